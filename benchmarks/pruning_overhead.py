"""What `Pruning` costs: each training step beside plain Lightning and its `ModelPruning`, and each update of the masks.

    python benchmarks/pruning_overhead.py

Steps: all variants train at the same time in one process, and take turns of a few steps in random order, so that
whatever else slows the machine slows all of them. A step is timed inside the training loop, from one
`on_train_batch_start` to the next, epochs' ends left out. Printed is the median over the rounds of the ratio to plain
Lightning in the same round.

Updates: `Pruner.update`, global magnitude, 24 linear layers, each size in a fresh process. Memory is the high-water
mark of the resident set during a second update, above what the process held when it had nothing but the weights.
"""

import gc
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from _models import ResNet20
from _results import arguments, be_quiet, environment, write
from pytorch_lightning.callbacks import ModelPruning
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from lightning_compress import Pruning
from lightning_compress.core.selection import select
from lightning_compress.pruning import criteria, distributions
from lightning_compress.pruning.granularity import parse
from lightning_compress.pruning.plan import Layers
from lightning_compress.pruning.pruner import Pruner
from lightning_compress.recipes.mnist import LeNet5

PLAIN = "plain Lightning"
BATCH, TURN_STEPS, EPOCH_TURNS = 64, 6, 4
ROUNDS = {"LeNet-5": 300, "ResNet-20": 40}
TARGETS = {"Pruning, masks on": 1.02, "Pruning, off": 1.005, "memory": 1.3}
FAR = 10**9
LAYERS = 24


# Steps -------------------------------------------------------------------------------------------------------------


def our_masks_on(_model: pl.LightningModule) -> Pruning:
    """Prunes at the first step, and its window is over: from there on masks are applied at each step."""
    return Pruning(0.9, schedule="constant", begin=0, end=1, every=1)


def our_window_open(_model: pl.LightningModule) -> Pruning:
    """Prunes at the first step; the next update is far away."""
    return Pruning(0.9, schedule="constant", begin=0, end=FAR, every=FAR)


def ours_off(_model: pl.LightningModule) -> Pruning:
    """Its window begins after the run."""
    return Pruning(0.9, begin=FAR, end=FAR + 1, every=1)


def lightnings(model: pl.LightningModule) -> ModelPruning:
    """Prunes the same weights to the same sparsity once, at the end of the first epoch; nothing is rewound."""
    named = dict(model.named_modules())
    return ModelPruning(
        "l1_unstructured",
        [(named[one.name.rpartition(".")[0]], "weight") for one in select(model).chosen],
        amount=0.9,
        apply_pruning=lambda epoch: epoch == 0,
        use_lottery_ticket_hypothesis=False,
    )


VARIANTS: dict[str, Callable[[pl.LightningModule], pl.Callback] | None] = {
    PLAIN: None,
    "Pruning, masks on": our_masks_on,
    "Pruning, masks on, window open": our_window_open,
    "Pruning, off": ours_off,
    "Lightning's ModelPruning": lightnings,
}
MODELS: dict[str, tuple[Callable[[], pl.LightningModule], tuple[int, int, int]]] = {
    "LeNet-5": (LeNet5, (1, 28, 28)),
    "ResNet-20": (ResNet20, (3, 32, 32)),
}


class Turns(pl.Callback):
    """Lets the training loop go on for `TURN_STEPS` steps at a time, and times them."""

    def __init__(self) -> None:
        self.go, self.came = threading.Semaphore(0), threading.Semaphore(0)
        self.starts: list[float] = []
        self.stop = False

    def take(self) -> float:
        """Let the loop go on; returns the median seconds of a step, without the first, which finds the caches cold."""
        self.starts = []
        self.go.release()
        self.came.acquire()
        steps = [after - before for before, after in zip(self.starts, self.starts[1:], strict=False)]
        return statistics.median(steps[1:]) if len(steps) > 1 else float("nan")

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if len(self.starts) == TURN_STEPS or trainer.global_step == 0:
            self.came.release()
            self.go.acquire()
            trainer.should_stop = self.stop
        self.starts.append(time.perf_counter())


class Batches:
    """The same random batches again and again; an epoch is a whole number of turns."""

    def __init__(self, shape: tuple[int, int, int], batch: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batches = [
            (torch.randn(batch, *shape, generator=generator), torch.randint(0, 10, (batch,), generator=generator))
            for _ in range(16)
        ]

    def __len__(self) -> int:
        return EPOCH_TURNS * TURN_STEPS

    def __iter__(self) -> Iterator[Any]:
        return (self.batches[place % len(self.batches)] for place in range(len(self)))


class Contestant:
    """One variant, training in a thread of its own whenever it is its turn."""

    def __init__(self, model: str, variant: str, batch: int) -> None:
        self.turns, self.error = Turns(), None
        make, shape = MODELS[model]
        torch.manual_seed(0)
        self.module, self.batches = make(), Batches(shape, batch)
        added = VARIANTS[variant]
        self.trainer = pl.Trainer(
            max_epochs=-1,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[self.turns, *([added(self.module)] if added else [])],
        )
        self.thread = threading.Thread(target=self._fit, name=variant, daemon=True)
        self.thread.start()
        self.turns.came.acquire()
        for _ in range(EPOCH_TURNS + 1):  # ModelPruning acts at the end of the first epoch
            self.take()

    def take(self) -> float:
        seconds = self.turns.take()
        if self.error is not None:
            raise RuntimeError(f"{self.thread.name} failed") from self.error
        return seconds

    def end(self) -> None:
        self.turns.stop = True
        while self.thread.is_alive():
            self.turns.go.release()
            self.thread.join(0.2)

    def _fit(self) -> None:
        try:
            self.trainer.fit(self.module, self.batches)
        except BaseException as error:
            self.error = error
        finally:
            self.turns.came.release()


def step_times(model: str, rounds: int, batch: int) -> dict[str, list[float]]:
    """Seconds per step of each variant, round by round."""
    contestants = {variant: Contestant(model, variant, batch) for variant in VARIANTS}
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    shuffled, order = random.Random(0), list(VARIANTS)
    for _ in track(range(rounds), f"{model}: steps"):
        shuffled.shuffle(order)
        for variant in order:
            seconds[variant].append(contestants[variant].take())
    for contestant in contestants.values():
        contestant.end()
    return seconds


def paired(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Of each variant: its median step, and the median and quartiles of its ratio to plain Lightning."""
    found = {}
    for variant, values in seconds.items():
        ratios = [value / plain for value, plain in zip(values, seconds[PLAIN], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        # A median of n values has about 1.25 / sqrt(n) times their spread.
        error = 1.25 * (high - low) / 1.35 / len(ratios) ** 0.5
        found[variant] = {
            "step_ms": 1000 * statistics.median(values),
            "ratio": middle,
            "ratio_quartile_1": low,
            "ratio_quartile_3": high,
            "ratio_standard_error": error,
        }
    return found


# Updates -----------------------------------------------------------------------------------------------------------


def update_cost(weights: int, updates: int) -> dict[str, float]:
    """Seconds and memory of a mask update; run it in a fresh process."""
    _updates(LAYERS * 64 * 64, 2)  # so that what is loaded once is not counted
    gc.collect()
    empty = resident_bytes("VmRSS")
    pruner = _pruner(weights)
    size_bytes = sum(one.parameter.nbytes for one in pruner.layers.by_name.values())
    before = resident_bytes("VmRSS")
    pruner.update(0.5)
    reset_peak()
    seconds = [_timed(lambda: pruner.update(0.8))]
    peak = resident_bytes("VmHWM")
    seconds += [_timed(lambda step=step: pruner.update(0.8 + step / 100)) for step in range(1, updates)]
    count = size_bytes // 4
    return {
        "weights": count,
        "weights_bytes": size_bytes,
        "weights_resident_bytes": before - empty,
        "seconds": statistics.median(seconds),
        "seconds_per_million": statistics.median(seconds) / count * 1e6,
        "peak_bytes_above_weights": peak - before,
        "peak_over_weights": (peak - before) / size_bytes,
    }


def _pruner(weights: int) -> Pruner:
    side = round((weights / LAYERS) ** 0.5)
    model = nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(LAYERS)))
    layers = Layers({one.name: one for one in select(model).chosen}, parse("weight"))
    return Pruner(layers, criteria.magnitude, distributions.global_)


def _updates(weights: int, count: int) -> None:
    pruner = _pruner(weights)
    for step in range(count):
        pruner.update(0.5 + step / 10)


def _timed(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def resident_bytes(field: str) -> int:
    """`VmRSS`, the resident set, or `VmHWM`, its high-water mark."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory is measured on Linux only.")


def reset_peak() -> None:
    """Let the high-water mark begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def update_costs(sizes: list[float], updates: int) -> list[dict[str, float]]:
    """`update_cost` of each size, in millions, each in a process of its own."""
    costs = []
    for millions in track(sizes, "mask updates"):
        command = [
            sys.executable,
            __file__,
            "--update",
            str(round(millions * 1e6)),
            "--threads",
            str(torch.get_num_threads()),
        ]
        done = subprocess.run([*command, "--updates", str(updates)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"The update of {millions} M weights failed:\n{done.stderr[-3000:]}")
        costs.append(json.loads(done.stdout.splitlines()[-1]))
    return costs


# What is said ------------------------------------------------------------------------------------------------------


def step_table(steps: dict[str, dict[str, dict[str, float]]]) -> Table:
    table = Table("", title=f"Step of training, batch {BATCH}, over plain Lightning", caption="median (quartiles)")
    for model in steps:
        table.add_column(f"{model}, ms", justify="right")
        table.add_column("ratio", justify="right")
    table.add_column("target", justify="right")
    for variant in VARIANTS:
        cells = []
        for found in steps.values():
            one = found[variant]
            cells.append(f"{one['step_ms']:.2f}")
            cells.append(f"{one['ratio']:.4f} ({one['ratio_quartile_1']:.3f}-{one['ratio_quartile_3']:.3f})")
        table.add_row(variant, *cells, f"<= {TARGETS[variant]}" if variant in TARGETS else "")
    return table


def update_table(costs: list[dict[str, float]]) -> Table:
    table = Table(title="One update of the masks, global magnitude")
    for title in ("weights", "seconds", "seconds per million", "peak memory above the weights, MB", "over the weights"):
        table.add_column(title, justify="right")
    for cost in costs:
        table.add_row(
            f"{cost['weights'] / 1e6:.2f} M",
            f"{cost['seconds']:.3f}",
            f"{cost['seconds_per_million']:.4f}",
            f"{cost['peak_bytes_above_weights'] / 1e6:.1f}",
            f"{cost['peak_over_weights']:.2f} (target <= {TARGETS['memory']})",
        )
    return table


def main() -> None:
    read = arguments(
        "pruning_overhead",
        __doc__,
        threads={"type": int, "default": 1, "help": "of torch (default: 1)"},
        update={"type": int, "help": "only measure updates of so many weights, in this process, and print JSON"},
        updates={"type": int, "default": 5, "help": "updates to time for each size (default: 5)"},
    )
    torch.set_num_threads(read.threads)
    if read.update:
        print(json.dumps(update_cost(read.update, read.updates)))
        return
    be_quiet()
    console, rounds = Console(), dict.fromkeys(ROUNDS, 3) if read.quick else ROUNDS
    batch = 4 if read.quick else BATCH
    steps = {model: paired(step_times(model, rounds[model], batch)) for model in MODELS}
    console.print(step_table(steps))
    costs = update_costs([0.1, 0.2] if read.quick else [1, 10, 100], read.updates)
    console.print(update_table(costs))
    values = {"environment": environment(), "rounds": rounds, "targets": TARGETS, "steps": steps, "updates": costs}
    write(read.output, values)
    console.print(f"Written to {read.output}", soft_wrap=True)


if __name__ == "__main__":
    main()
