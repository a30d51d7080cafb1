"""Compare post-training quantization: ours, ONNX Runtime's `quantize_static`, NNCF and torchao, on trained networks.

    pip install -r benchmarks/requirements.txt
    python benchmarks/post_training.py

Prints a table of accuracy, agreement, bytes and latency, and writes `benchmarks/results/post_training.json`.

Three small networks (a ResNet, one with depthwise convolutions and squeeze-and-excitation, a vision transformer) learn
3,500 real digits, enlarged to 32 x 32. Each tool calibrates on the same 256 of them, with its defaults for 8 bits, and
is tested on 1,000 others. Agreement is the share of them for which the top class is that of float32. Files of the first
three run in ONNX Runtime; what torchao makes (PT2E for x86) runs compiled by torch's Inductor. One thread, in turns,
medians.
"""

import copy
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from common.inference_timing import LONG, SHORT, in_turns
from common.networks import Attention, DepthwiseNet
from common.onnx_sessions import quantize_static, session, write_float
from common.results_file import arguments, be_quiet, environment, write
from lightning_compress import export, quantize
from lightning_compress.recipes.digits import read_sample

FLOAT, OURS, STATIC, NNCF, TORCHAO = "float32", "ours", "quantize_static", "NNCF", "torchao PT2E"
SIZE, CALIBRATION, BATCH, BATCHES = 32, 256, 64, (1, 64)
Run = Callable[[Tensor], Callable[[], Any]]


def networks() -> dict[str, Callable[[], nn.Module]]:
    from common.models import Network, ResNet8

    return {"ResNet-8": lambda: Network(ResNet8()), "depthwise": DepthwiseNet, "transformer": Attention}


def data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images of three equal channels, and labels: to learn from, and to be tested with."""
    digits = read_sample(seed=0)

    def prepared(split: Any) -> tuple[Tensor, Tensor]:
        images = (split.images.float().unsqueeze(1) / 255 - 0.1307) / 0.3081
        return functional.interpolate(images, SIZE).expand(-1, 3, -1, -1).contiguous(), split.labels

    return prepared(digits.train), prepared(digits.test)


def trained(make: Callable[[], nn.Module], images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(epochs):
        order = torch.randperm(len(images))
        for chosen in order[: len(order) // BATCH * BATCH].split(BATCH):
            loss = functional.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad(), loss.backward(), optimizer.step(), schedule.step()
    return model.eval()


def made(model: nn.Module, given: Tensor, folder: Path, quick: bool) -> dict[str, tuple[Path, Run]]:
    """By tool: its file, and what runs it."""
    paths = {name: folder / f"{name}.onnx" for name in (FLOAT, OURS, STATIC, NNCF)}
    write_float(model, given[:2], paths[FLOAT])
    export(quantize(model, given.split(BATCH), progress=False), paths[OURS], given[:2])
    quantize_static(paths[FLOAT], paths[STATIC], given.split(BATCH))
    _nncf(paths[FLOAT], paths[NNCF], given)
    found: dict[str, tuple[Path, Run]] = {
        name: (path, lambda images, path=path: session(path, images)) for name, path in paths.items() if path.exists()
    }
    try:
        return found if quick else {**found, TORCHAO: _torchao(model, given, folder / "torchao.pt2")}
    except ModuleNotFoundError:
        return found


def _nncf(source: Path, path: Path, given: Tensor) -> None:
    try:
        import nncf
    except ModuleNotFoundError:
        return
    import onnx

    model = onnx.load(source)
    name = model.graph.input[0].name
    batches = nncf.Dataset([{name: batch.numpy()} for batch in given.split(BATCH)])
    onnx.save(nncf.quantize(model, batches, subset_size=len(given) // BATCH), path)


def _torchao(model: nn.Module, given: Tensor, path: Path) -> tuple[Path, Run]:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    example, dynamic = given[:4].clone(), ({0: torch.export.Dim("batch")},)  # of a view all of the memory is saved
    graph = torch.export.export(copy.deepcopy(model), (example,), dynamic_shapes=dynamic).module()
    prepared = prepare_pt2e(graph, X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config()))
    for batch in given.split(BATCH):
        prepared(batch)
    converted = convert_pt2e(prepared)
    torch.export.save(torch.export.export(converted, (example,), dynamic_shapes=dynamic), path)
    torch._inductor.config.freezing = True
    compiled = torch.compile(converted)
    return path, lambda images: lambda: [compiled(images).numpy()]


def measured(model: nn.Module, given: Tensor, test: tuple[Tensor, Tensor], quick: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        tools = made(model, given, Path(folder), quick)
        chosen = {name: _choices(run, test[0]) for name, (_, run) in tools.items()}
        found: dict[str, Any] = {
            name: {
                "accuracy": float((chosen[name] == test[1]).float().mean()),
                "agreement": float((chosen[name] == chosen[FLOAT]).float().mean()),
                "bytes": path.stat().st_size,
                "latency": {},
            }
            for name, (path, _) in tools.items()
        }
        for batch in BATCHES:
            calls = {name: run(test[0][:batch]) for name, (_, run) in tools.items()}
            timed = in_turns(calls, FLOAT, SHORT if quick else LONG)
            for name, one in timed.items():
                found[name]["latency"][batch] = one
    return found


def _choices(run: Run, images: Tensor) -> Tensor:
    return torch.cat([torch.as_tensor(run(batch)()[0]).argmax(1) for batch in images.split(BATCH)])


def table_of(found: dict[str, Any]) -> Table:
    table = Table("", "", title="Post-training quantization to 8 bits, one thread")
    for column in ("accuracy", "agreement", "bytes", *(f"batch {batch}, ms" for batch in BATCHES)):
        table.add_column(column, justify="right")
    for network, tools in found.items():
        for name, one in tools.items():
            times = (f"{one['latency'][batch]['ms']:.2f}" for batch in BATCHES)
            table.add_row(
                network, name, f"{one['accuracy']:.3f}", f"{one['agreement']:.3f}", f"{one['bytes']:,}", *times
            )
    return table


def main() -> None:
    read = arguments("post_training", __doc__)
    be_quiet()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    (images, labels), test = data()
    if read.quick:
        images, labels, test = images[:256], labels[:256], (test[0][:128], test[1][:128])
    found = {}
    for name, make in networks().items():
        model = trained(make, images, labels, 1 if read.quick else 15)
        with torch.no_grad():
            found[name] = measured(model, images[:CALIBRATION], test, read.quick)
        write(read.output, {"environment": environment(), "networks": found})
    Console().print(table_of(found))
    print(f"Written to {read.output}")


if __name__ == "__main__":
    sys.exit(main())
