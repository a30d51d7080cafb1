"""Measure the training time of quantization-aware training and the latency of its ONNX files, on a wide ResNet-20.

    python benchmarks/quantization.py
    python benchmarks/quantization.py --running     keep the step times of the file, measure the rest again

Prints a table of training steps and of latencies, and writes `benchmarks/results/quantization.json`.

Time of a step: plain Lightning, `QuantizationAwareTraining` (8 bits with updated or frozen ranges, 4 bits with learned
step sizes), and torchao's PT2E QAT if torchao is installed. All train in one process and take turns of a few steps in
random order. The ratio is the median over the rounds of the ratio to plain Lightning in the same round.

Latency: the network after `quantize` (post-training quantization, 512 random images of 32 x 32) and `export`, its
float32 file, and eager torch, in turns, one thread each. On a CPU without VNNI, `export` writes 8-bit weights as uint8
where int8 kernels would saturate; 7-bit weights (the default) never saturate and use the faster kernels. On a
CPU with VNNI everything is timed a second time with the AVX2 kernels of ONNX Runtime and torch
(`common/avx2_emulation.py`).
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from common.avx2_emulation import environment_without_avx512, is_wider, saturates
from common.interleaved_timing import Batches, Variant, paired, take_turns
from common.models import WIDTH, Network, WideResNet20
from common.onnx_sessions import session, write_float
from common.results_file import arguments, be_quiet, environment, write
from lightning_compress import QuantizationAwareTraining, export, quantize

MakeModule = Callable[[], pl.LightningModule]
MakeCallback = Callable[[pl.LightningModule], pl.Callback]
PLAIN, FAR = "plain Lightning", 10**9
SHAPE, BATCHES = (3, 32, 32), (1, 64)
TARGETS = {"QuantizationAwareTraining, 8 bits": 1.30}
SEVEN, EIGHT, FLOAT = "ONNX Runtime, 7-bit weights", "ONNX Runtime, 8-bit weights", "ONNX Runtime, float32"
LATENCY_TARGET, CALIBRATION_TARGET_SECONDS = 1.7, 10.0


@dataclass
class Size:
    """How large the network and its batch are; a quick look has smaller ones."""

    depth: int = 3
    batch: int = 64


SIZE = Size()


def wide_resnet() -> WideResNet20:
    return WideResNet20(SIZE.depth)


class Exported(WideResNet20):
    """The same network as torchao trains it: an exported graph with fake-quantizers in it."""

    def __init__(self) -> None:
        from torchao.quantization.pt2e import move_exported_model_to_train
        from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
        from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
            X86InductorQuantizer,
            get_default_x86_inductor_quantization_config,
        )

        super().__init__(SIZE.depth)
        inner = Network(self)
        graph = torch.export.export(inner.train(), (torch.zeros(SIZE.batch, *SHAPE),)).module()
        quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(is_qat=True))
        prepared = prepare_qat_pt2e(graph, quantizer)
        move_exported_model_to_train(prepared)
        for name in ("conv", "norm", "stages", "head"):
            delattr(self, name)
        self.network = prepared

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


def quantizing(**arguments: Any) -> MakeCallback:
    return lambda _model: QuantizationAwareTraining(begin=0, end=FAR, every=FAR, freeze_bn=None, **arguments)


def variants() -> dict[str, tuple[MakeModule, MakeCallback | None]]:
    """By name: what makes the module, and the callback that is added."""
    ours = {
        PLAIN: (wide_resnet, None),
        "QuantizationAwareTraining, 8 bits": (wide_resnet, quantizing(freeze_ranges=None)),
        "QuantizationAwareTraining, 8 bits, ranges frozen": (wide_resnet, quantizing(freeze_ranges=4)),
        "QuantizationAwareTraining, 4 bits, learned steps": (
            wide_resnet,
            quantizing(weights=4, activations=4, freeze_ranges=None),
        ),
    }
    try:
        import torchao  # noqa: F401
    except ModuleNotFoundError:
        return ours
    return {**ours, "torchao's PT2E QAT": (Exported, None)}


def step_times(rounds: int, clock: str = "wall") -> dict[str, dict[str, float]]:
    """Of each variant: its median step, and the median and quartiles of its ratio to plain Lightning."""
    running = {
        name: Variant(name, make, added, Batches(SHAPE, SIZE.batch), warm=2, accelerator="cpu")
        for name, (make, added) in variants().items()
    }
    return paired(take_turns(running, rounds, random.Random(0))[clock], PLAIN)


# What comes out ----------------------------------------------------------------------------------------------------


def deployed(runs: int, quick: bool = False) -> dict[str, Any]:
    """Latencies at batch 1 and 64, files' bytes, seconds of calibration."""
    model, images = network(quick)
    begin = time.perf_counter()
    quantized = quantize(model, images.split(64), reduce_range=False, progress=False)
    calibration = time.perf_counter() - begin
    narrow = quantize(model, images.split(64), progress=False)
    with tempfile.TemporaryDirectory() as folder:
        paths = files_in(Path(folder))
        told = export(narrow, paths[SEVEN], images[:4])
        export(quantized, paths[EIGHT], images[:4])
        write_float(Network(model), images[:4], paths[FLOAT])
        found = {batch: latencies(model, paths, images[:batch], runs) for batch in BATCHES}
        sizes = {name: path.stat().st_size for name, path in paths.items()}
        narrow_found = without_avx512(Path(folder), runs, quick) if is_wider() else None
    return {
        "calibration_images": len(images),
        "calibration_seconds": calibration,
        "latency": found,
        "latency_without_avx512": narrow_found,
        "bytes": sizes,
        "integer_kernels": told.integer_kernels,
    }


def network(quick: bool) -> tuple[WideResNet20, Tensor]:
    """The network, and images to calibrate it with; the same in each process."""
    if quick:
        SIZE.depth, SIZE.batch = 1, 8
    torch.manual_seed(0)
    return wide_resnet().eval(), torch.rand(64 if quick else 512, *SHAPE)


def files_in(folder: Path) -> dict[str, Path]:
    return {name: folder / f"{place}.onnx" for place, name in enumerate((SEVEN, EIGHT, FLOAT))}


def without_avx512(folder: Path, runs: int, quick: bool) -> dict[int, dict[str, dict[str, float]]]:
    """The latencies of the same files by a process that computes as on a CPU with AVX2 alone."""
    environment = environment_without_avx512(folder)
    command = [sys.executable, __file__, "--files", str(folder), str(runs), *(["--quick"] if quick else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The process without AVX-512 ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return {int(batch): one for batch, one in json.loads(done.stdout.splitlines()[-1]).items()}


def tell_latencies(folder: Path, runs: int, quick: bool) -> None:
    """Print them as JSON.

    Raises:
        RuntimeError: if ONNX Runtime computes with VNNI all the same.
    """
    if not saturates():
        raise RuntimeError("ONNX Runtime still computes with VNNI.")
    model, images = network(quick)
    print(json.dumps({batch: latencies(model, files_in(folder), images[:batch], runs) for batch in BATCHES}))


def latencies(model: nn.Module, paths: dict[str, Path], images: Tensor, runs: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each, and its ratio to the file of 7 bits in the same round."""
    called: dict[str, Callable[[], object]] = {name: session(path, images) for name, path in paths.items()}
    called["eager torch"] = lambda: model(images)
    seconds: dict[str, list[float]] = {name: [] for name in called}
    with torch.inference_mode():
        for name in called:
            called[name]()
        for _ in range(runs):
            for name, call in called.items():
                begin = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - begin)
    first = seconds[SEVEN]
    return {
        name: {
            "ms": 1000 * statistics.median(values),
            "over_seven": statistics.median(one / other for one, other in zip(values, first, strict=True)),
        }
        for name, values in seconds.items()
    }


# What is said ------------------------------------------------------------------------------------------------------


def step_table(steps: dict[str, dict[str, float]]) -> Table:
    table = Table(
        "", title=f"Training step, ResNet-20 of width {WIDTH}, batch {SIZE.batch}", caption="median (quartiles)"
    )
    for column in ("ms", "over plain Lightning", "target"):
        table.add_column(column, justify="right")
    for name, one in steps.items():
        quartiles = f"({one['ratio_quartile_1']:.3f}-{one['ratio_quartile_3']:.3f})"
        target = f"<= {TARGETS[name]}" if name in TARGETS else ""
        table.add_row(name, f"{one['step_ms']:.1f}", f"{one['ratio']:.3f} {quartiles}", target)
    return table


def latency_table(found: dict[str, Any], key: str, where: str) -> Table:
    table = Table("", title=f"Running the network, one thread{where}", caption=f"bytes: {found['bytes']}")
    for batch in found[key]:
        table.add_column(f"batch {batch}, ms", justify="right")
        table.add_column("over 7 bits", justify="right")
    for name in found[key][1]:
        cells = [(f"{one[name]['ms']:.2f}", f"{one[name]['over_seven']:.2f}") for one in found[key].values()]
        table.add_row(name, *(cell for pair in cells for cell in pair))
    return table


def main() -> None:
    read = arguments(
        "quantization",
        __doc__,
        threads={"type": int, "default": 1, "help": "of torch"},
        rounds={"type": int, "default": 25, "help": "in which each variant takes a turn of a few steps"},
        running={"action": "store_true", "help": "time only what comes out, and keep the steps that the file has"},
        files={"nargs": 2, "help": argparse.SUPPRESS},
    )
    be_quiet()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(read.threads)
    if read.files:
        tell_latencies(Path(read.files[0]), int(read.files[1]), read.quick)
        return
    console = Console()
    network(read.quick)
    known = json.loads(read.output.read_text(encoding="utf-8")) if read.running else {"environment": environment()}
    if not read.running:
        known["steps"] = step_times(2 if read.quick else read.rounds)
    console.print(step_table(known["steps"]))
    found = deployed(3 if read.quick else 60, read.quick)
    console.print(latency_table(found, "latency", ""))
    if found["latency_without_avx512"] is not None:
        console.print(latency_table(found, "latency_without_avx512", ", with the kernels for AVX2 alone"))
    console.print(
        f"Calibration on {found['calibration_images']} images: {found['calibration_seconds']:.1f} s (target: "
        f"{CALIBRATION_TARGET_SECONDS:.0f}). Aim for int8 at batch 64: {LATENCY_TARGET} times as fast as float32.",
        highlight=False,
    )
    write(read.output, {**known, "environment_of_running": environment(), **found})
    console.print(f"Written to {read.output}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
