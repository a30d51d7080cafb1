"""Measure 12 popular networks in ONNX Runtime: float32, ours, ONNX Runtime's own quantizer; and ours in OpenVINO.

    pip install -r benchmarks/requirements.txt
    python benchmarks/popular_networks.py
    python benchmarks/popular_networks.py --only resnet18,vit_tiny     keep what the file has of the others

Prints a table of latencies for batch 1 and 64 and writes `benchmarks/results/popular_networks.json`.

Networks have random weights, and BatchNorm statistics of random images. Each is written as a float32 file; as the
file that `export` makes of `quantize` with its defaults; and as that which `onnxruntime.quantization.quantize_static`
makes of the float file (uint8 activations, int8 weights with a scale for each channel, every operator that it knows).
Both are calibrated on the same inputs. All run on one thread in turns; figures are medians of processor time, and of
ratios in the same round. `error` is the distance of the outputs from torch's in float32, as a share of their size.

On a CPU with VNNI all files are timed a second time with the AVX2 kernels (`common/avx2_emulation.py`), where codes
that are too large saturate.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from common.avx2_emulation import environment_without_avx512, is_wider, saturates
from common.inference_timing import LONG, SHORT, Effort, in_turns
from common.networks import NETWORKS, QUICK, network
from common.onnx_sessions import openvino_session, quantize_static, session, write_float
from common.results_file import arguments, be_quiet, environment, write
from lightning_compress import export, quantize

FLOAT, OURS, THEIRS, OPENVINO = "float32", "ours", "quantize_static", "ours in OpenVINO"
BATCHES, CALIBRATION = (1, 64), 32


def measured(name: str, folder: Path, size: int, emulated: dict[str, str] | None, effort: Effort) -> dict[str, Any]:
    """Sizes, errors and latencies of one network, with what `export` said of it."""
    model, inputs = network(name, size, max(BATCHES))
    calibration, found = inputs[:CALIBRATION], {}
    write_float(model, inputs[:2], folder / f"{FLOAT}.onnx")
    quantize_static(folder / f"{FLOAT}.onnx", folder / f"{THEIRS}.onnx", calibration.split(8))
    try:
        told = export(quantize(model, calibration.split(8), progress=False), folder / f"{OURS}.onnx", inputs[:2])
        found = {"integer_kernels": told.integer_kernels, "float_layers": told.float_layers}
    except (ValueError, RuntimeError) as error:
        found = {"refused": str(error)[:300]}
    torch.save((inputs, model(inputs[:CALIBRATION])), folder / "inputs.pt")
    found |= {"bytes": {path.stem: path.stat().st_size for path in sorted(folder.glob("*.onnx"))}}
    found |= latencies(folder, effort, openvino=True)
    if emulated is not None:
        command = [sys.executable, __file__, "--files", str(folder)]
        done = subprocess.run(command, env=emulated, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"The process without AVX-512 ended with {done.returncode}:\n{done.stderr[-3000:]}")
        found["without_avx512"] = json.loads(done.stdout.splitlines()[-1])
    return found


def latencies(folder: Path, effort: Effort, openvino: bool) -> dict[str, Any]:
    """Of the files in a folder: distance from torch, and milliseconds by batch, with ratios to float32."""
    inputs, wanted = torch.load(folder / "inputs.pt")
    names = [name for name in (FLOAT, OURS, THEIRS) if (folder / f"{name}.onnx").exists()]
    made: dict[str, Callable[[Tensor], Callable[[], Any]]] = {
        name: (lambda given, name=name: session(folder / f"{name}.onnx", given)) for name in names
    }
    if openvino and OURS in names and (running := openvino_session(folder / f"{OURS}.onnx")) is not None:
        made[OPENVINO] = running
    errors = {}
    for name, make in made.items():
        output = torch.from_numpy(next(iter(make(inputs[: len(wanted)])())))
        errors[name] = float((output - wanted).norm() / wanted.norm())
    by_batch = {
        batch: in_turns({name: make(inputs[:batch]) for name, make in made.items()}, FLOAT, effort) for batch in BATCHES
    }
    return {"error": errors, "latency": by_batch}


def table_of(found: dict[str, Any], title: str) -> Table:
    table = Table("", title=title, caption="ms of float32; the others: times as fast")
    for batch in BATCHES:
        for name in (FLOAT, OURS, THEIRS, OPENVINO):
            table.add_column(f"{name}, {batch}", justify="right")
    for network_name, one in found.items():
        cells = [network_name]
        for by_name in one["latency"].values():
            cells.append(f"{by_name[FLOAT]['ms']:.2f}")
            others = [by_name.get(name) for name in (OURS, THEIRS, OPENVINO)]
            cells += ["" if other is None else f"{other['speedup']:.2f}" for other in others]
        table.add_row(*cells)
    return table


def tell(console: Console, found: dict[str, Any], where: str) -> None:
    """Print the table, and on how many networks ours is at least as fast as the others."""
    console.print(table_of(found, f"ONNX Runtime on one thread{where}"))
    for batch in BATCHES:
        pairs = [{name: at["ms"] for name, at in one["latency"][batch].items()} for one in found.values()]
        ours = [one for one in pairs if OURS in one]
        counts = {other: sum(one[OURS] <= one[other] for one in ours) for other in (THEIRS, FLOAT)}
        words = ", ".join(f"{count} as {other}" for other, count in counts.items())
        console.print(f"batch {batch}: {len(ours)} of {len(found)} have a file; at least as fast: {words}")


def known(path: Path) -> dict[str, Any]:
    """What a file has of all networks; batches are numbers again."""
    found = json.loads(path.read_text(encoding="utf-8"))["networks"] if path.exists() else {}
    for one in found.values():
        for each in (one, one.get("without_avx512", {})):
            each["latency"] = {int(batch): by_name for batch, by_name in each.get("latency", {}).items()}
    return found


def main() -> None:
    read = arguments(
        "popular_networks",
        __doc__,
        size={"type": int, "default": 224, "help": "pixels of an image's side"},
        only={"type": lambda names: names.split(","), "help": "names with commas; the file keeps the other networks"},
        files={"type": Path, "help": argparse.SUPPRESS},
    )
    be_quiet()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1), torch.set_grad_enabled(False)
    if read.files:
        if not saturates():
            raise RuntimeError("ONNX Runtime still computes with VNNI.")
        print(json.dumps(latencies(read.files, LONG, openvino=False)))
        return
    console, found = Console(), known(read.output) if read.only else {}
    with tempfile.TemporaryDirectory() as folder:
        emulated = environment_without_avx512(Path(folder)) if is_wider() and not read.quick else None
        for name in read.only or (QUICK if read.quick else NETWORKS):
            (Path(folder) / name).mkdir()
            found[name] = measured(name, Path(folder) / name, read.size, emulated, SHORT if read.quick else LONG)
            console.print(f"{name}: {found[name].get('refused', found[name]['error'])}", highlight=False)
            write(read.output, {"environment": environment(), "size": read.size, "networks": found})
    tell(console, found, "")
    if emulated is not None:
        tell(console, {name: one["without_avx512"] for name, one in known(read.output).items()}, ", AVX2 kernels")
    console.print(f"Written to {read.output}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
