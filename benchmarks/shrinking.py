"""Measure the training time that `ChannelPruning` saves, the time of one cut, and the latency of the pruned network.

    python benchmarks/shrinking.py
    python benchmarks/shrinking.py --only cut       keep the rest of the file, measure the cut again

Prints a table for each of them and writes `benchmarks/results/shrinking.json`.

Training time: ResNet-20 of width 32 on random images of 32 x 32, cut to 0.4 of its MACs between 20 % and 60 % of the
run, with any number of channels or with multiples of 16 (`round_to`), beside the same run without the callback. The
runs take turns; the figure is the median ratio to the dense run of the same round. The median time of a step between
two cuts is printed beside the MACs at that time.

One cut: ResNet-50 on images of 224 x 224, from tracing the module to the end of the surgery, with the state of the
optimizer; beside it torch-pruning, if it is installed, which traces, scores and cuts without an optimizer. The median
of three cuts is printed.

Latency: the dense network and the pruned ones, in eager torch and ONNX Runtime, in turns, one thread each.
"""

import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from common.interleaved_timing import Batches, quiet_trainer
from common.models import Network, ResNet8, ResNet50, WideResNet20
from common.onnx_sessions import session, write_float
from common.results_file import arguments, be_quiet, environment, write
from lightning_compress import ChannelPruning
from lightning_compress.measure.macs import count_macs

SHAPE, MACS = (3, 32, 32), 0.4
DENSE = "dense"
VARIANTS: dict[str, dict[str, Any]] = {DENSE: {}, "any width": {"round_to": 1}}
FULL: dict[str, dict[str, Any]] = {**VARIANTS, "multiples of 16": {"round_to": 16}}
RUN_TARGET, CUT_TARGET_SECONDS = 0.75, 2.0


class Paced(pl.Callback):
    """Seconds of each step, from batch to batch within an epoch."""

    def __init__(self) -> None:
        self.seconds: list[float | None] = []
        self.begun: float | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        now = time.perf_counter()
        if self.begun is not None:
            self.seconds.append(now - self.begun)
        self.begun = now

    def on_train_epoch_end(self, *_: Any) -> None:
        self.seconds.append(None)  # the last step of an epoch has no end here
        self.begun = None


class TimedCuts(ChannelPruning):
    """Tells what it took to find the groups and to make each cut, and after which step."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.finding, self.made = 0.0, []

    def _prepare(self, *given: Any) -> None:
        begin = time.perf_counter()
        super()._prepare(*given)
        self.finding = time.perf_counter() - begin

    def _cut(self, trainer: pl.Trainer, *given: Any) -> None:
        super()._cut(trainer, *given)
        self.made.append((int(trainer.global_step), self._pruner.metrics()["macs"]))

    def change_structure(self, *given: Any) -> None:
        begin = time.perf_counter()
        super().change_structure(*given)
        self.acting = time.perf_counter() - begin


# The run -----------------------------------------------------------------------------------------------------------


def one_run(make: Callable[[], pl.LightningModule], batch: int, epochs: int, **settings: Any) -> dict[str, Any]:
    """Seconds of `fit`, the module, and the median step for each number of MACs; dense without settings."""
    torch.manual_seed(0)
    model, paced = make(), Paced()
    cuts = [TimedCuts(macs=MACS, **settings)] if settings else []
    trainer = quiet_trainer([paced, *cuts], max_epochs=epochs, accelerator="cpu")
    begin = time.perf_counter()
    trainer.fit(model, Batches(SHAPE, batch))
    seconds = time.perf_counter() - begin
    made = [cut for one in cuts for cut in one.made]
    return {"seconds": seconds, "model": model, "steps": by_macs(paced.seconds, made)}


def by_macs(seconds: list[float | None], cuts: list[tuple[int, float]]) -> list[dict[str, float]]:
    """Median step between two cuts, without those right after a cut and the first ones."""
    edges = [(0, 1.0), *cuts, (len(seconds), 0.0)]
    found = []
    for (begin, macs), (end, _) in pairwise(edges):
        steps = [one for one in seconds[begin + 2 : end - 1] if one is not None]
        if steps:
            found.append({"macs": macs, "step_ms": 1000 * statistics.median(steps), "steps": len(steps)})
    return found


def runs(
    make: Callable[[], pl.LightningModule],
    batch: int,
    epochs: int,
    rounds: int = 1,
    variants: dict[str, dict[str, Any]] = VARIANTS,
) -> dict[str, Any]:
    """All variants in turns: of each the seconds and the ratio to the dense run, the steps, and the last network."""
    one_run(make, batch, 1)  # what only the first run of a process pays
    shuffled, done = random.Random(0), {name: [] for name in variants}
    for _ in range(rounds):
        for name in shuffled.sample(list(variants), len(variants)):
            done[name].append(one_run(make, batch, epochs, **variants[name]))
    return {
        name: {
            "seconds": statistics.median(one["seconds"] for one in several),
            "ratios": [one["seconds"] / its["seconds"] for one, its in zip(several, done[DENSE], strict=True)],
            "steps": followed([one["steps"] for one in several]),
            "model": several[-1]["model"],
        }
        for name, several in done.items()
    }


def followed(runs_steps: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """For each number of MACs the median step of the runs, and its ratio to the first of the same run."""
    return [
        {
            "macs": several[0]["macs"],
            "step_ms": statistics.median(one["step_ms"] for one in several),
            "ratio": statistics.median(
                one["step_ms"] / run[0]["step_ms"] for one, run in zip(several, runs_steps, strict=True)
            ),
        }
        for several in zip(*runs_steps, strict=False)
    ]


# One cut -----------------------------------------------------------------------------------------------------------


def one_cut(pixels: int, make: Callable[[], pl.LightningModule]) -> dict[str, float]:
    """Seconds of finding the groups, and of scores, choice and surgery, in a run with a momentum optimizer."""
    torch.manual_seed(0)
    cuts = TimedCuts(macs=0.5, begin=1, end=2, every=1)
    quiet_trainer([cuts], max_steps=2, accelerator="cpu").fit(make(), Batches((3, pixels, pixels), 2))
    return {"finding": cuts.finding, "cutting": cuts.acting, "macs": cuts.made[-1][1]}


def their_cut(pixels: int, make: Callable[[], nn.Module]) -> dict[str, float] | None:
    """torch-pruning's seconds for a graph and one step that removes about as much."""
    try:
        import torch_pruning
    except ModuleNotFoundError:
        return None
    model, example = make(), torch.randn(2, 3, pixels, pixels)
    before = _macs(model, example)
    begin = time.perf_counter()
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.3,
        ignored_layers=[model.head],
    )
    found = time.perf_counter()
    pruner.step()
    end = time.perf_counter()
    return {"finding": found - begin, "cutting": end - found, "macs": _macs(model, example) / before}


def _macs(model: nn.Module, example: torch.Tensor) -> int:
    return sum(one.dense for one in count_macs(model, example).values())


# Latency -----------------------------------------------------------------------------------------------------------


def latencies(models: dict[str, Any], batch: int, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds of each network, and the median of its ratio to the dense one within a round."""
    images = torch.randn(batch, *SHAPE)
    calls: dict[str, dict[str, Callable[[], object]]] = {"eager": {}, "ONNX Runtime": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            network, path = Network(model).eval(), Path(folder) / f"{name}.onnx"
            calls["eager"][name] = lambda network=network: network(images)
            write_float(network, torch.randn(2, *SHAPE), path)
            calls["ONNX Runtime"][name] = session(path, images)
    with torch.inference_mode():
        return {runtime: _in_turns(several, rounds) for runtime, several in calls.items()}


def _in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if number > 1:
                seconds[name].append(time.perf_counter() - begin)
    return {
        name: {
            "ms": 1000 * statistics.median(several),
            "ratio": statistics.median(one / dense for one, dense in zip(several, seconds[DENSE], strict=True)),
        }
        for name, several in seconds.items()
    }


# What is said ------------------------------------------------------------------------------------------------------


def run_table(found: dict[str, Any], epochs: int) -> Table:
    table = Table("", title=f"A run of {epochs} epochs that shrinks to {MACS} of its MACs (aim: {RUN_TARGET})")
    for column in ("s", "over the dense run", "of each round"):
        table.add_column(column, justify="right")
    for name, one in found.items():
        each = ", ".join(f"{ratio:.3f}" for ratio in one["ratios"])
        table.add_row(name, f"{one['seconds']:.1f}", f"{statistics.median(one['ratios']):.3f}", each)
    return table


def step_table(name: str, steps: list[dict[str, float]]) -> Table:
    table = Table(title=f"A step of training, as the network shrinks: {name}")
    for column in ("MACs left", "step, ms", "over the first"):
        table.add_column(column, justify="right")
    for one in steps:
        table.add_row(f"{one['macs']:.2f}", f"{one['step_ms']:.1f}", f"{one['ratio']:.2f}")
    return table


def cut_table(cuts: dict[str, dict[str, float]], pixels: int) -> Table:
    table = Table("", title=f"One cut of ResNet-50, images of {pixels} x {pixels}, one thread")
    for column in ("graph, s", "scores and surgery, s", "together, s", "MACs left"):
        table.add_column(column, justify="right")
    for name, one in cuts.items():
        both = one["finding"] + one["cutting"]
        table.add_row(name, f"{one['finding']:.2f}", f"{one['cutting']:.2f}", f"{both:.2f}", f"{one['macs']:.2f}")
    return table


def latency_table(found: dict[int, dict[str, dict[str, dict[str, float]]]], macs: dict[str, float]) -> Table:
    table = Table("", "MACs", title="Running the network, one thread: ms, and over the dense one")
    for batch, runtimes in found.items():
        for runtime in runtimes:
            table.add_column(f"{runtime}, batch {batch}", justify="right")
    for name, share in macs.items():
        cells = [runtimes[runtime][name] for runtimes in found.values() for runtime in runtimes]
        table.add_row(name, f"{share:.2f}", *(f"{one['ms']:.2f} ({one['ratio']:.2f})" for one in cells))
    return table


def cut(pixels: int, make: Callable[[], pl.LightningModule], console: Console) -> dict[str, dict[str, float]]:
    """The middle one of three cuts each, in turns, and their table."""
    several = [(one_cut(pixels, make), their_cut(pixels, make)) for _ in range(3)]
    names = ("ChannelPruning", "torch-pruning")
    cuts = {
        name: sorted(several_of, key=lambda one: one["finding"] + one["cutting"])[1]
        for name, several_of in zip(names, zip(*several, strict=True), strict=True)
        if None not in several_of
    }
    console.print(cut_table(cuts, pixels), f"The aim is {CUT_TARGET_SECONDS:.0f} s.", highlight=False)
    return cuts


def main() -> None:
    read = arguments(
        "shrinking",
        __doc__,
        threads={"type": int, "default": 1, "help": "of torch"},
        rounds={"type": int, "default": 3, "help": "in which each variant trains once"},
        only={"choices": ["cut"], "help": "measure this again, and leave the rest of the file as it is"},
    )
    be_quiet()
    torch.set_num_threads(read.threads)
    console, quick = Console(), read.quick
    pixels, make = (32, ResNet8) if quick else (224, ResNet50)
    if read.only == "cut":
        known = json.loads(read.output.read_text(encoding="utf-8"))
        write(read.output, {**known, "cut": cut(pixels, make, console), "cut_environment": environment()})
        return
    epochs = 2 if quick else 6
    found = runs(ResNet8, 4, epochs) if quick else runs(WideResNet20, 32, epochs, read.rounds, FULL)
    models = {name: one.pop("model") for name, one in found.items()}
    console.print(run_table(found, epochs))
    for name, one in found.items():
        if name != DENSE:
            console.print(step_table(name, one["steps"]))
    whole, example = _macs(models[DENSE], torch.zeros(1, *SHAPE)), torch.zeros(1, *SHAPE)
    macs = {name: _macs(model, example) / whole for name, model in models.items()}
    latency = {batch: latencies(models, batch, 3 if quick else 60) for batch in (1, 64)}
    console.print(latency_table(latency, macs))
    cuts = cut(pixels, make, console)
    write(read.output, {"environment": environment(), "runs": found, "macs": macs, "latency": latency, "cut": cuts})
    console.print(f"Written to {read.output}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
