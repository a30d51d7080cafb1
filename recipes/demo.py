"""The demonstration: LeNet-5 on MNIST, trained dense, then the same run with two callbacks added (`make demo`)."""

import argparse
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lightning_compress import CompressionReport, Pruning, report
from lightning_compress._lightning import Trainer

from .mnist import MNIST, LeNet5

LEAST_ACCURACY = 0.92
PROJECT = "lightning-compress-demo"
SEED = 0


@dataclass(frozen=True)
class Outcome:
    """What one run gave: the trained module, all it logged at last, and the folder of its offline W&B run."""

    module: LeNet5
    metrics: dict[str, float]
    tracked_in: Path


def main(argv: Sequence[str] | None = None) -> int:
    """Train twice and compare; return 0 if the pruned network reads at least 92 % of the test digits."""
    arguments = _parser().parse_args(argv)
    output_dir, console = arguments.output_dir, Console()
    # The digits lie in memory: workers could only slow their loading down. The other is between Lightning and torch.
    for words in (".*does not have many workers", ".*treespec"):
        warnings.filterwarnings("ignore", words)
    data = MNIST(arguments.data_dir, download=arguments.download)
    pruning = Pruning(final_sparsity=arguments.sparsity)

    console.rule("1 of 2: dense")
    dense = train("dense", data, arguments.epochs, output_dir, callbacks=[])

    console.rule("2 of 2: the same run, with Pruning and CompressionReport added")
    before = report(dense.module, torch.zeros(1, 1, 28, 28), metrics=dense.metrics, runs=50, seconds=1.0)
    compression = CompressionReport(baseline=before, dirpath=str(output_dir), print_table=False)
    pruned = train("pruned", data, arguments.epochs, output_dir, callbacks=[pruning, compression])

    console.rule("Dense, and pruned")
    if compression.report is not None:
        compression.report.print(console)
    _say_where(console, [*compression.files], [dense, pruned])
    return _verdict(console, pruned.metrics["test_accuracy"])


def train(name: str, data: Any, epochs: int, output_dir: Path, callbacks: list[Any]) -> Outcome:
    """Run what a user's own script would: a module, data, a Trainer; and `callbacks`, the only difference."""
    torch.manual_seed(SEED)
    module, logger = LeNet5(), _wandb_logger(name, output_dir)
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        logger=logger,
        devices=1,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=output_dir,
    )
    trainer.fit(module, datamodule=data)
    metrics = dict(trainer.callback_metrics)
    trainer.test(module, datamodule=data, verbose=False)
    metrics |= trainer.callback_metrics
    tracked_in = Path(logger.experiment.dir).parent
    import_module("wandb").finish()
    return Outcome(module.cpu(), {key: float(value) for key, value in metrics.items()}, tracked_in)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lightning_compress.recipes.demo", description=__doc__)
    parser.add_argument(
        "--data-dir", type=Path, help="folder of MNIST's IDX files; without it a shipped sample is used"
    )
    parser.add_argument("--download", action="store_true", help="fetch what is missing of MNIST, about 11 MB")
    parser.add_argument("--epochs", type=_positive, default=10, help="of each of the two runs (default: 10)")
    parser.add_argument("--sparsity", type=float, default=0.9, help="fraction of the weights to prune (default: 0.9)")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/demo"), help="default: outputs/demo")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number above 0")
    return int(text)


def _wandb_logger(name: str, output_dir: Path) -> Any:
    # Offline, whatever the environment says: a demonstration asks for no login and sends nothing.
    os.environ.setdefault("WANDB_SILENT", "true")
    output_dir.mkdir(parents=True, exist_ok=True)
    loggers = import_module(Trainer.__module__.partition(".trainer")[0] + ".loggers")
    return loggers.WandbLogger(project=PROJECT, name=name, save_dir=output_dir, offline=True)


def _say_where(console: Console, files: Sequence[Path], outcomes: Sequence[Outcome]) -> None:
    lines = [
        *(f"Report: {file}" for file in files),
        *(f"W&B run, offline: {outcome.tracked_in}" for outcome in outcomes),
        "The page opens in any browser; `wandb sync FOLDER` would send a run to your W&B account.",
    ]
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)


def _verdict(console: Console, accuracy: float) -> int:
    reached = accuracy >= LEAST_ACCURACY
    words = f"The pruned network reads {accuracy:.1%} of the test digits; at least {LEAST_ACCURACY:.0%} are promised."
    console.print(words, style="green" if reached else "red", highlight=False)
    return 0 if reached else 1


if __name__ == "__main__":
    raise SystemExit(main())
