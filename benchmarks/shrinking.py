"""What `ChannelPruning` saves and costs: time of a run that shrinks, of one cut, and of the network that comes out.

    python benchmarks/shrinking.py

The run: ResNet-20 on random images of 32 x 32, to 0.4 of its MACs with the callback's own pace (from 20 % to 60 % of
the run), beside the same run without the callback; they take turns, whole run by whole run, and the median ratio of the
pairs is printed. Of the same runs: the median step between two cuts beside the MACs that were left then.
One cut: ResNet-50 on images of 224 x 224, from the first look at the module to the end of the surgery, as the training
run pays for it; beside it torch-pruning, if it is installed, which finds the graph, scores and cuts, without optimizer.
Latency: the dense ResNet-20 and the one that came out, eager and in ONNX Runtime, in turns, one thread each.
"""

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
from _models import ResNet8, ResNet20, ResNet50
from _results import arguments, be_quiet, environment, write
from _sessions import session, write_float
from _turns import Batches, quiet_trainer
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_compress import ChannelPruning
from lightning_compress.measure.macs import count_macs

SHAPE, MACS = (3, 32, 32), 0.4
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
        self.finding, self.cuts = 0.0, []

    def _prepare(self, *given: Any) -> None:
        begin = time.perf_counter()
        super()._prepare(*given)
        self.finding = time.perf_counter() - begin

    def _cut(self, trainer: pl.Trainer, *given: Any) -> None:
        super()._cut(trainer, *given)
        self.cuts.append((int(trainer.global_step), self._shrinker.measured()["macs"]))

    def _act(self, *given: Any) -> None:
        begin = time.perf_counter()
        super()._act(*given)
        self.acting = time.perf_counter() - begin


# The run -----------------------------------------------------------------------------------------------------------


def one_run(make: Callable[[], pl.LightningModule], batch: int, epochs: int, shrinking: bool) -> dict[str, Any]:
    """Seconds of `fit`, the module, and the median step for each number of MACs."""
    torch.manual_seed(0)
    model, paced = make(), Paced()
    cuts = TimedCuts(macs=MACS)
    trainer = quiet_trainer([paced, *([cuts] if shrinking else [])], max_epochs=epochs, accelerator="cpu")
    begin = time.perf_counter()
    trainer.fit(model, Batches(SHAPE, batch))
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "model": model, "steps": by_macs(paced.seconds, cuts.cuts)}


def by_macs(seconds: list[float | None], cuts: list[tuple[int, float]]) -> list[dict[str, float]]:
    """Median step between two cuts, without those right after a cut and the first ones."""
    edges = [(0, 1.0), *cuts, (len(seconds), 0.0)]
    found = []
    for (begin, macs), (end, _) in pairwise(edges):
        steps = [one for one in seconds[begin + 2 : end - 1] if one is not None]
        if steps:
            found.append({"macs": macs, "step_ms": 1000 * statistics.median(steps), "steps": len(steps)})
    return found


def runs(make: Callable[[], pl.LightningModule], batch: int, epochs: int, pairs: int) -> dict[str, Any]:
    """Dense and shrinking runs in turns, and the networks of the last pair."""
    one_run(make, batch, 1, False)  # what only the first run of a process pays
    shuffled, ratios, last, seconds = random.Random(0), [], {}, {True: [], False: []}
    steps: list[list[dict[str, float]]] = []
    for _ in range(pairs):
        for shrinking in shuffled.sample([True, False], 2):
            last[shrinking] = one_run(make, batch, epochs, shrinking)
            seconds[shrinking].append(last[shrinking]["seconds"])
        ratios.append(last[True]["seconds"] / last[False]["seconds"])
        steps.append(last[True]["steps"])
    followed = [
        {
            "macs": several[0]["macs"],
            "step_ms": statistics.median(one["step_ms"] for one in several),
            "ratio": statistics.median(
                one["step_ms"] / run[0]["step_ms"] for one, run in zip(several, steps, strict=True)
            ),
        }
        for several in zip(*steps, strict=False)
    ]
    models = {shrinking: one["model"] for shrinking, one in last.items()}
    dense, shrunk = (statistics.median(seconds[one]) for one in (False, True))
    found = {"ratio": statistics.median(ratios), "ratios": ratios, "dense_seconds": dense, "shrinking_seconds": shrunk}
    return {**found, "epochs": epochs, "steps": followed, "models": models}


# One cut -----------------------------------------------------------------------------------------------------------


def one_cut(pixels: int, make: Callable[[], pl.LightningModule]) -> dict[str, float]:
    """Seconds of finding the groups, and of scores, choice and surgery, in a run with a momentum optimizer."""
    torch.manual_seed(0)
    cuts = TimedCuts(macs=0.5, begin=1, end=2, every=1)
    quiet_trainer([cuts], max_steps=2, accelerator="cpu").fit(make(), Batches((3, pixels, pixels), 2))
    return {"finding": cuts.finding, "cutting": cuts.acting, "macs": cuts.cuts[-1][1]}


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


class Network(nn.Module):
    """The layers of a LightningModule, without what an export of it trips over."""

    def __init__(self, model: ResNet20) -> None:
        super().__init__()
        self.conv, self.norm, self.blocks, self.head = model.conv, model.norm, model.blocks, model.head

    forward = ResNet20.forward


def latencies(dense: nn.Module, thin: nn.Module, batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of both, and the median of the ratios within a round."""
    images = torch.randn(batch, *SHAPE)
    networks = {"dense": Network(dense).eval(), "thin": Network(thin).eval()}
    calls: dict[str, dict[str, Callable[[], object]]] = {"eager": {}, "ONNX Runtime": {}}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for name, network in networks.items():
            calls["eager"][name] = lambda network=network: network(images)
            with torch.inference_mode(False):
                write_float(network, images[:2] if batch > 1 else images.repeat(2, 1, 1, 1), Path(folder) / name)
            calls["ONNX Runtime"][name] = session(Path(folder) / name, images)
        return {runtime: _in_turns(pair, rounds) for runtime, pair in calls.items()}


def _in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if number > 1:
                seconds[name].append(time.perf_counter() - begin)
    ratios = [thin / dense for dense, thin in zip(seconds["dense"], seconds["thin"], strict=True)]
    medians = {f"{name}_ms": 1000 * statistics.median(several) for name, several in seconds.items()}
    return {**medians, "ratio": statistics.median(ratios)}


# What is said ------------------------------------------------------------------------------------------------------


def step_table(found: dict[str, Any]) -> Table:
    table = Table(title="A step of training, as the network shrinks")
    for column in ("MACs left", "step, ms", "over the first"):
        table.add_column(column, justify="right")
    for one in found["steps"]:
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


def latency_table(found: dict[int, dict[str, dict[str, float]]], macs: float) -> Table:
    table = Table("", title=f"Running ResNet-20, dense and with {macs:.2f} of its MACs, one thread")
    for batch in found:
        for column in ("dense, ms", "thin, ms", "ratio"):
            table.add_column(f"batch {batch}: {column}", justify="right")
    for runtime in next(iter(found.values())):
        rows = [one[runtime] for one in found.values()]
        cells = [(f"{one['dense_ms']:.2f}", f"{one['thin_ms']:.2f}", f"{one['ratio']:.2f}") for one in rows]
        table.add_row(runtime, *(cell for triple in cells for cell in triple))
    return table


def main() -> None:
    read = arguments(
        "shrinking",
        __doc__,
        threads={"type": int, "default": 1, "help": "of torch"},
        pairs={"type": int, "default": 5, "help": "of runs, dense and shrinking"},
    )
    be_quiet()
    torch.set_num_threads(read.threads)
    console = Console()
    quick = read.quick
    found = runs(ResNet8, 4, 2, 1) if quick else runs(ResNet20, 64, 8, read.pairs)
    models = found.pop("models")
    console.print(
        f"A run that shrinks to {MACS} of its MACs takes {found['ratio']:.3f} of the time of the dense one "
        f"({', '.join(f'{one:.3f}' for one in found['ratios'])}); the aim is {RUN_TARGET}.",
        highlight=False,
    )
    console.print(step_table(found))
    example = torch.randn(1, *SHAPE)
    macs = _macs(models[True], example) / _macs(models[False], example)
    latency = {batch: latencies(models[False], models[True], batch, 3 if quick else 60) for batch in (1, 64)}
    console.print(latency_table(latency, macs))
    pixels, make = (32, ResNet8) if quick else (224, ResNet50)
    cuts = {"ChannelPruning": one_cut(pixels, make), "torch-pruning": their_cut(pixels, make)}
    cuts = {name: one for name, one in cuts.items() if one is not None}
    console.print(cut_table(cuts, pixels), f"The aim is {CUT_TARGET_SECONDS:.0f} s.", highlight=False)
    write(read.output, {"environment": environment(), "run": found, "latency": latency, "cut": cuts})
    console.print(f"Written to {read.output}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
