"""Checkpoints and exported files that earlier code wrote, kept in `tests/golden/`, and the numbers it got from them.

    python -m tests.tools.golden --write       write the files anew, where a key of a checkpoint has a new name
    python -m tests.tools.golden --expected    write the numbers, once: it refuses to replace them

The numbers in `expected.safetensors`, `expected_lowered.safetensors` and `timelines.json` were written by the code of
commit 877c80a. Files that are written anew must still lead to them, so a change of names cannot hide a change of
results. This script uses the public names of the package only.
"""

import argparse
import json
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.resources import files
from io import StringIO
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import (
    AveragedTeacher,
    ChannelPruning,
    CompressionReport,
    Distillation,
    FineTuning,
    PeerTeacher,
    Pruning,
    QuantizationAwareTraining,
    Recipe,
    export,
    load_compressed,
    load_packed,
    quantize,
    remove_quantizers,
)

FOLDER = Path(__file__).parents[1] / "golden"
EXPECTED = FOLDER / "expected.safetensors"
EXPECTED_LOWERED = FOLDER / "expected_lowered.safetensors"
TIMELINES = FOLDER / "timelines.json"
EPOCHS, SAVED_AT_STEP = 3, 8  # of 24 steps: in the middle of each schedule, between two of its events
EXPORTED = ("exported_int8", "exported_int4")  # scenarios whose models are exported, in float32; not resumed
SUFFIXES = (".onnx", ".pt2", ".safetensors")


class Classifier(pl.LightningModule):
    """Six channels of 8x8, 3 classes: convolution, BatchNorm and two linear layers, equal each time."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net = network(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def network(width: int) -> nn.Sequential:
    convolution = [nn.Conv2d(2, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(4)]
    return nn.Sequential(*convolution, nn.Flatten(), nn.Linear(4 * width, 16), nn.ReLU(), nn.Linear(16, 3))


def teacher() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return network(12)


class Peer(nn.Module):
    """A second student with a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = teacher()

    def log(self, *_: Any, **__: Any) -> None: ...

    log_dict = log

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    images, classes = torch.randn(64, 2, 8, 8, generator=generator), torch.randint(0, 3, (64,), generator=generator)
    return DataLoader(TensorDataset(images, classes), batch_size=8)


def example() -> Tensor:
    return torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(3))


def start_from(folder: Path) -> list[Any]:
    """What a recipe's `start_from:` makes, with the weights of another network of the same shapes."""
    other = Classifier()
    with torch.no_grad():
        for value in other.parameters():
            value.mul_(0.5)
    torch.save({"state_dict": other.state_dict()}, folder / "start.ckpt")
    (folder / "recipe.yaml").write_text(f"start_from: {folder / 'start.ckpt'}\ncallbacks: []\n", encoding="utf-8")
    callbacks: list[Any] = Recipe.load(folder / "recipe.yaml").callbacks("pytorch_lightning")
    assert len(callbacks) == 1
    return callbacks


def report(folder: Path) -> list[Any]:
    return [CompressionReport(example(), latency=False, print_table=False, dirpath=str(folder))]


def int8() -> list[Any]:
    return [QuantizationAwareTraining(begin=2, freeze_ranges=15, freeze_bn=15, reduce_range=False)]


def int4() -> list[Any]:
    return [
        QuantizationAwareTraining(
            weights=4, activations=4, first="same", last="same", begin=2, damping=1e-3, freeze_bn="90%"
        )
    ]


TIMES = {"begin": 2, "end": 15, "every": 3}
# Each with new callbacks for one run, given a folder for what they read and write.
SCENARIOS: dict[str, Callable[[Path], list[Any]]] = {
    "pruning_taylor": lambda _: [Pruning(0.8, criterion="taylor", distribution="global", **TIMES)],
    "pruning_wanda": lambda _: [Pruning(0.5, criterion="wanda", granularity="row", **TIMES)],
    "channels_macs": lambda _: [ChannelPruning(macs=0.5, example_input=example(), **TIMES)],
    "channels_soft": lambda _: [
        ChannelPruning(sparsity=0.5, soft=True, criterion="taylor", schedule="constant", **TIMES)
    ],
    "qat_int8": lambda _: int8(),
    "qat_int4": lambda _: int4(),
    "exported_int8": lambda _: int8(),
    "exported_int4": lambda _: int4(),
    "distillation_logits": lambda _: [Distillation(teacher(), final_alpha=0.1, **TIMES)],
    "distillation_learned": lambda _: [Distillation(teacher(), losses={("net.1", "1"): ["vid", "projected_hint"]})],
    "distillation_averaged": lambda _: [Distillation(AveragedTeacher(0.9), alpha=0.5)],
    "distillation_peer": lambda _: [Distillation(PeerTeacher(Peer()), alpha=0.5)],
    "finetuning_gradual": lambda _: [FineTuning(freeze=["net.0", "net.1"], gradual=True, begin=2, end=20)],
    "finetuning_rates": lambda _: [
        FineTuning(layer_decay=0.5, weight_decay="x0.5", learning_rate="restart", warmup="10%", begin=4, end=20)
    ],
    "start_from": start_from,
    "report": report,
    "together": lambda folder: [
        ChannelPruning(sparsity=0.25, begin=1, end=7, every=3),
        Pruning(0.5, begin=9, end=14, every=2),
        QuantizationAwareTraining(begin=16, freeze_bn="90%", reduce_range=False),
        Distillation(teacher(), alpha=0.5),
        *report(folder),
    ],
}


EVERYWHERE = {"first": "same", "last": "same"}
# Of `quantize`: quantizers, bits and granularities, each of which is lowered in its own way; with all codes of 8 bits,
# unless said.
LOWERED: dict[str, dict[str, Any]] = {
    "int8": {},
    "int8_tensor": {"granularity": "tensor"},
    "int8_asymmetric": {"symmetric": False},
    "int8_reduced_range": {"reduce_range": True},
    "int8_equalized": {"granularity": "tensor", "equalize": True},
    "int4_mse": {"weights": 4, "activations": 4, **EVERYWHERE},
    "int4_groups": {"weights": 4, "granularity": "group 2", **EVERYWHERE},
    "int4_adaround": {"weights": 4, "adaround": 20, **EVERYWHERE},
    "int4_weights_alone": {"weights": 4, "activations": None, **EVERYWHERE},
    "int4_lsq": {"weights": 4, "activations": 4, "method": "lsq", **EVERYWHERE},
    "int4_pact": {"weights": 4, "activations": 4, "method": "pact", **EVERYWHERE},
    "int4_dorefa": {"weights": 4, "activations": 4, "method": "dorefa", **EVERYWHERE},
    "int2_asymmetric": {"weights": 2, "symmetric": False, **EVERYWHERE},
    "int2_wage": {"weights": 2, "method": "wage", **EVERYWHERE},
    "ternary_ttq": {"weights": "ternary", "method": "ttq", **EVERYWHERE},
    "binary_connect": {"weights": "binary", "method": "binary_connect", **EVERYWHERE},
    "binary_activations": {"weights": "binary", "activations": "binary", "method": "bnn", **EVERYWHERE},
    "fp8": {"weights": "fp8", "activations": "fp8"},
}
RESUMED = [name for name in SCENARIOS if name not in EXPORTED]


@contextmanager
def reproducible(name: str) -> Iterator[None]:
    """One thread, and float64 but for what is exported.

    Another CPU, or another number of threads, adds in another order. In float32 one weight of a network of 4 bits then
    rounds the other way, and a few steps later all weights differ in the second digit.
    """
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32 if name in EXPORTED else torch.float64)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)


class Save(pl.Callback):
    """Save a checkpoint at the end of the epoch that ends after a step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == SAVED_AT_STEP:
            trainer.save_checkpoint(self.path)


def fit(name: str, folder: Path, *, save: Path | None = None, resume: Path | None = None) -> tuple[Classifier, Any]:
    """Train with the callbacks of a scenario; returns the module and its Trainer."""
    with reproducible(name):
        return _fit(name, folder, save, resume)


def _fit(name: str, folder: Path, save: Path | None, resume: Path | None) -> tuple[Classifier, Any]:
    torch.manual_seed(0)
    module = Classifier()
    trainer = pl.Trainer(
        callbacks=[*SCENARIOS[name](folder), *([Save(save)] if save else [])],
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, loader(), ckpt_path=resume, weights_only=True if resume else None)
    return module, trainer


def checkpoint(name: str) -> Path:
    return FOLDER / f"{name}.ckpt"


def exported(name: str, suffix: str) -> Path:
    return FOLDER / f"{name}{suffix}"


def numbers_after_resume(name: str, folder: Path) -> dict[str, Tensor]:
    """Weights, momentum, output and figures of the report, of a run that is resumed from a checkpoint of the folder."""
    with reproducible(name):
        return _numbers_of_run(*fit(name, folder, resume=checkpoint(name)))


def _numbers_of_run(module: Classifier, trainer: Any) -> dict[str, Tensor]:
    # The code behind the expected numbers left float weights, and no quantizers, in a module that was trained.
    for callback in trainer.callbacks:
        if isinstance(callback, QuantizationAwareTraining) and callback.quantized is not None:
            callback.quantized.restore_latents()
    remove_quantizers(module)
    found = {f"weights.{key}": value for key, value in module.state_dict().items()}
    for index, state in trainer.optimizers[0].state_dict()["state"].items():
        if (momentum := state.get("momentum_buffer")) is not None:
            found[f"momentum.{index}"] = momentum
    found["output"] = output(module)
    for callback in trainer.callbacks:
        if isinstance(callback, CompressionReport):
            made = callback.report
            assert made is not None
            counts = [made.parameters, made.nonzero, made.macs, made.macs_nonzero, made.before.parameters]
            found["report"] = torch.tensor(counts)
    return found


def numbers_loaded(name: str) -> dict[str, Tensor]:
    """What the module computes that `load_compressed` and `load_from_checkpoint` make of a checkpoint of the folder."""
    with reproducible(name):
        found = {"load_compressed": output(load_compressed(Classifier, checkpoint(name)))}
        if name not in ("channels_macs", "together"):  # their tensors have other shapes than those of a new module
            plain = Classifier.load_from_checkpoint(checkpoint(name), weights_only=True)
            found["load_from_checkpoint"] = output(plain)
        return found


def numbers_exported(name: str, suffix: str, path: Path) -> dict[str, Tensor]:
    """What an exported file computes on the example."""
    if suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: example().numpy()})
        return {"output": torch.from_numpy(found)}
    if suffix == ".pt2":
        with torch.no_grad():
            return {"output": torch.export.load(path).module()(example())}
    module = load_packed(Classifier(), path)
    return {"output": output(module)} | {f"weights.{key}": value for key, value in module.state_dict().items()}


def write_exported(name: str, suffix: str, path: Path) -> Path:
    """Export the model of a checkpoint of the folder."""
    export(load_compressed(Classifier, checkpoint(name)).eval(), path, example())
    return path


def numbers_lowered(name: str, folder: Path) -> dict[str, Tensor]:
    """What a model that `quantize` made computes, what it computes when lowered, and what is stored of it."""
    with reproducible(EXPORTED[0]):
        model = Classifier().eval().net
        quantized = quantize(
            model, [images for images, _ in loader()][:2], progress=False, **{"reduce_range": False} | LOWERED[name]
        )
        export(quantized, folder / "model.pt2", example())
        export(quantized, folder / "model.safetensors")
        found = {"quantized": output(quantized)} | numbers_exported(name, ".pt2", folder / "model.pt2")
        return found | {f"stored.{key}": value for key, value in load_file(folder / "model.safetensors").items()}


@torch.no_grad()
def output(module: nn.Module) -> Tensor:
    found: Tensor = module.eval()(example())
    return found


def numbers() -> Iterator[tuple[str, Tensor]]:
    """All numbers that the files of the folder lead to, each with its key in `expected.safetensors`."""
    for name in SCENARIOS:
        with tempfile.TemporaryDirectory() as folder:
            resumed = numbers_after_resume(name, Path(folder)) if name in RESUMED else {}
            for key, value in (resumed | numbers_loaded(name)).items():
                yield f"{name}/{key}", value
    for name in EXPORTED:
        for suffix in SUFFIXES:
            for key, value in numbers_exported(name, suffix, exported(name, suffix)).items():
                yield f"{name}{suffix}/{key}", value


def all_numbers_lowered() -> Iterator[tuple[str, Tensor]]:
    for name in LOWERED:
        with tempfile.TemporaryDirectory() as folder:
            for key, value in numbers_lowered(name, Path(folder)).items():
                yield f"lowered_{name}/{key}", value


def expected(prefix: str) -> dict[str, Tensor]:
    """The recorded numbers of one scenario or file, without their prefix."""
    recorded = load_file(EXPECTED) | load_file(EXPECTED_LOWERED)
    found = {key: value for key, value in recorded.items() if key.startswith(f"{prefix}/")}
    return {key.removeprefix(f"{prefix}/"): value for key, value in found.items()}


def timelines() -> dict[str, list[str]]:
    """Of each ready recipe in a run of 1,000 steps: in which steps something happens, and the numbers that it names."""
    found = {}
    for path in sorted(Path(str(files("lightning_compress.recipes"))).glob("*.yaml")):
        with redirect_stdout(StringIO()):
            text = Recipe.load(path).timeline(1000)
        rows = re.findall(r"^ +step ([\d,]+) +(\S*)  +(.*)$", text, re.MULTILINE)
        found[path.stem] = [" ".join([step, *re.findall(r"\d[\d.,]*", what)]) for step, _, what in rows]
    return found


def write() -> None:
    """Write checkpoints and exported files with the code that stands."""
    FOLDER.mkdir(exist_ok=True)
    for name in SCENARIOS:
        with tempfile.TemporaryDirectory() as folder:
            fit(name, Path(folder), save=checkpoint(name))
    for name in EXPORTED:
        for suffix in SUFFIXES:
            write_exported(name, suffix, exported(name, suffix))


def write_expected(paths: list[Path]) -> None:
    """Write those of the files of numbers that are wanted."""
    for path, found in ((EXPECTED, numbers), (EXPECTED_LOWERED, all_numbers_lowered)):
        if path in paths:
            save_file({key: value.detach().clone().contiguous() for key, value in found()}, path)
    if TIMELINES in paths:
        TIMELINES.write_text(json.dumps(timelines(), indent=0) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write checkpoints and exported files anew")
    parser.add_argument("--expected", action="store_true", help="write the numbers that they lead to, once")
    chosen = parser.parse_args(arguments)
    if not (chosen.write or chosen.expected):
        parser.error("nothing to do: give --write, --expected or both")
    missing = [path for path in (EXPECTED, EXPECTED_LOWERED, TIMELINES) if not path.exists()]
    if chosen.expected and not missing:
        parser.error(f"{EXPECTED} and the like are there; the numbers of earlier code are not replaced")
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    if chosen.write:
        write()
    if chosen.expected:
        write_expected(missing)
    size = sum(path.stat().st_size for path in FOLDER.iterdir())
    print(f"{FOLDER}: {len(list(FOLDER.iterdir()))} files, {size} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
