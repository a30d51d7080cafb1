"""Compare `QuantizationAwareTraining` as it stands with the same run in float, at the last epoch.

    python benchmarks/quantization_defaults.py
    python benchmarks/quantization_defaults.py --only CNN,MLP      keep what the file has of the others

Prints a table and writes `benchmarks/results/quantization_defaults.json`.

Four small networks (convolutions with BatchNorm, a transformer, an MLP, depth-wise convolutions) learn 3,500 real
digits for 8 epochs, 432 steps, and are tested on 1,000 others after the last one. Each is trained by three optimizers:
SGD with a constant learning rate of 0.1 and momentum 0.9; AdamW with 0.001; one-cycle SGD up to 0.1. For the
transformer the rates of SGD are a tenth of these. Nothing but the bits is given to the callback. A figure is the
accuracy in points below the float run of the same seed, as the mean over three seeds; beside it that of the worst.
"""

import json
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from common.results_file import arguments, be_quiet, environment, write
from lightning_compress import QuantizationAwareTraining
from lightning_compress.recipes.digits import read_sample

BATCH, EPOCHS, SEEDS = 64, 8, (0, 1, 2)
BITS: dict[str, dict[str, Any]] = {
    "W8A8": {},
    "W4A4": {"weights": 4, "activations": 4},
    "W2A2": {"weights": 2, "activations": 2},
    "ternary": {"weights": "ternary"},
    "binary": {"weights": "binary"},
}
ALLOWED = {"W8A8": 1.0, "W4A4": 2.0, "W2A2": 5.0, "ternary": 5.0, "binary": 5.0}  # points
OPTIMIZERS = ("SGD 0.1", "AdamW", "one-cycle")


def _block(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


def _pointwise(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def _head(width: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


class Transformer(nn.Module):
    """16 patches of 7 x 7 pixels, two encoder layers of width 48."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(49, 48)
        self.place = nn.Parameter(0.02 * torch.randn(16, 48))
        layer = nn.TransformerEncoderLayer(48, 4, 96, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(48, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = functional.unfold(images, 7, stride=7).transpose(1, 2)
        found: Tensor = self.head(self.encoder(self.patches(tokens) + self.place).mean(1))
        return found


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "CNN": lambda: nn.Sequential(_block(1, 16, 2), _block(16, 32, 2), _block(32, 32), _head(32)),
    "transformer": Transformer,
    "MLP": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    ),
    "depth-wise": lambda: nn.Sequential(
        _block(1, 16, 2),
        _block(16, 16, 1, 16),
        _pointwise(16, 32),
        _block(32, 32, 2, 32),
        _pointwise(32, 48),
        _head(48),
    ),
}


class Classifier(pl.LightningModule):
    def __init__(self, net: nn.Module, optimizer: str, rate: float, steps: int) -> None:
        super().__init__()
        self.net, self.optimizer, self.rate, self.steps = net, optimizer, rate, steps

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        if self.optimizer == "AdamW":
            return torch.optim.AdamW(self.parameters(), 1e-3)
        sgd = torch.optim.SGD(self.parameters(), self.rate, momentum=0.9)
        if self.optimizer == "SGD 0.1":
            return sgd
        schedule = torch.optim.lr_scheduler.OneCycleLR(sgd, self.rate, total_steps=self.steps)
        return {"optimizer": sgd, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def data() -> tuple[TensorDataset, tuple[Tensor, Tensor]]:
    digits = read_sample(seed=0)

    def images(split: Any) -> Tensor:
        scaled: Tensor = (split.images.float().unsqueeze(1) / 255 - 0.1307) / 0.3081
        return scaled

    return TensorDataset(images(digits.train), digits.train.labels), (images(digits.test), digits.test.labels)


def accuracy(name: str, optimizer: str, bits: str | None, seed: int, epochs: int) -> float:
    """Share of the test images, in percent, that the model in hand knows after the last epoch."""
    train, (images, labels) = data()
    torch.manual_seed(seed)
    loader = DataLoader(train, BATCH, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(seed))
    rate = 0.01 if name == "transformer" else 0.1
    module = Classifier(NETWORKS[name](), optimizer, rate, epochs * len(loader))
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[] if bits is None else [QuantizationAwareTraining(**BITS[bits])],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    with torch.no_grad():
        return 100 * float((module.eval().net(images).argmax(1) == labels).float().mean())


def compared(name: str, optimizer: str, seeds: tuple[int, ...], epochs: int) -> dict[str, list[float]]:
    """By bits, the accuracy of each seed; of the float runs under "float"."""
    return {
        bits or "float": [accuracy(name, optimizer, bits, seed, epochs) for seed in seeds] for bits in (None, *BITS)
    }


def losses(found: dict[str, list[float]], bits: str) -> list[float]:
    """Points lost to the float run of the same seed."""
    return [before - after for before, after in zip(found["float"], found[bits], strict=True)]


def show(runs: dict[str, dict[str, dict[str, list[float]]]]) -> None:
    table = Table(title="Points of accuracy lost to float at the last epoch: mean (worst seed)")
    for column in ("network", "optimizer", "float, %", *(f"{bits}, ≤ {ALLOWED[bits]:.0f}" for bits in BITS)):
        table.add_column(column, justify="right" if "," in column else "left")
    missed = []
    for name, by_optimizer in runs.items():
        for optimizer, found in by_optimizer.items():
            lost = {bits: losses(found, bits) for bits in BITS}
            means = {bits: sum(points) / len(points) for bits, points in lost.items()}
            missed += [f"{name}, {optimizer}, {bits}" for bits in BITS if means[bits] > ALLOWED[bits]]
            figures = [f"{means[bits]:.1f} ({max(lost[bits]):.1f})" for bits in BITS]
            table.add_row(name, optimizer, f"{sum(found['float']) / len(found['float']):.1f}", *figures)
    Console(width=140).print(table)
    print("Beyond what is allowed: " + ("; ".join(missed) or "none") + ".")


def main() -> None:
    read = arguments("quantization_defaults", __doc__, only={"default": "", "help": "names of networks, by commas"})
    be_quiet()
    torch.set_num_threads(1)
    names = [name for name in NETWORKS if not read.only or name in read.only.split(",")]
    seeds, epochs, optimizers = (SEEDS[:1], 2, OPTIMIZERS[1:2]) if read.quick else (SEEDS, EPOCHS, OPTIMIZERS)
    kept = read.only and not read.quick and read.output.exists()
    runs: dict[str, Any] = json.loads(read.output.read_text(encoding="utf-8"))["runs"] if kept else {}
    for name in names[:1] if read.quick else names:
        runs[name] = {optimizer: compared(name, optimizer, seeds, epochs) for optimizer in optimizers}
        write(read.output, {"environment": environment(), "seeds": list(seeds), "epochs": epochs, "runs": runs})
    show(runs)


if __name__ == "__main__":
    main()
