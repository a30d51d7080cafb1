"""Measure the time that `Pruning` adds to a training step, and the time and memory of one mask update.

    python benchmarks/pruning_overhead.py

Prints a table for each network and one for the mask updates, and writes `benchmarks/results/pruning_overhead.json`.

Time of a step: plain Lightning, masks by hand, `Pruning` and Lightning's `ModelPruning` train in one process and take
turns of a few steps in random order (`common/interleaved_timing.py`), in several processes one after the other. "masks
by hand" is a module with two hooks that multiply gradients and weights by the masks; the script first checks that it
and `Pruning` train alike, bit for bit. LeNet-5 is also timed with one malloc heap per thread, glibc's default
(`common/processes.py`), and with the fused Adam: the default Adam takes square roots of second moments, which are zero
where gradients are masked, and MKL needs 5 times as long for the root of zero as for that of another number.

Mask update: `Pruner.update` with global magnitude over 24 linear layers, each size in fresh processes. Memory includes
the masks and is measured in two ways: the most that tensors used during the first two updates, from torch's allocator;
and the high-water mark of the resident set during the second update minus what the process used with the weights
alone, with and without the memory that malloc keeps for reuse.
"""

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelPruning
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from common.interleaved_timing import Batches, Seconds, Variant, paired, take_turns
from common.mask_update_cost import update_cost
from common.models import ResNet20
from common.processes import AS_IT_IS, GIVE_BACK, KEEP, Parts
from common.results_file import arguments, be_quiet, environment, write
from lightning_compress import Pruning
from lightning_compress.nn.selection import select
from lightning_compress.recipes.mnist import LeNet5

PLAIN, BY_HAND, MASKS_ON, OFF = "plain Lightning", "masks by hand", "Pruning, masks on", "Pruning, off"
BATCH, PROCESSES, SPARSITY = 64, 3, 0.9
TARGETS = {MASKS_ON: 1.02, OFF: 1.005, "memory": 1.3}
FAR = 10**9
QUICK_MODEL = "LeNet-5"
HEAPS = {"one heap": KEEP, "a heap for each thread": AS_IT_IS}

Module, Added = type[pl.LightningModule], Callable[[pl.LightningModule], pl.Callback] | None

# What is trained ----------------------------------------------------------------------------------------------------


class FusedLeNet5(LeNet5):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate, fused=True)


@dataclass(frozen=True)
class Steps:
    """A model that is timed, with which heaps, and how often."""

    module: Module
    shape: tuple[int, int, int]
    heap: str
    rounds: int


STEPS = {
    "LeNet-5": Steps(LeNet5, (1, 28, 28), "one heap", 150),
    "LeNet-5, a heap for each thread": Steps(LeNet5, (1, 28, 28), "a heap for each thread", 150),
    "LeNet-5, fused Adam": Steps(FusedLeNet5, (1, 28, 28), "one heap", 150),
    "ResNet-20": Steps(ResNet20, (3, 32, 32), "one heap", 45),
}


def by_hand(module: Module) -> Module:
    """The module with masks that its own hooks apply; they are made at the first step, as those of `Pruning` are."""

    class Masked(module):  # type: ignore[valid-type, misc]
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            if not hasattr(self, "pairs"):
                self.pairs = [(one.parameter, largest(one.parameter)) for one in select(self).chosen]
            for parameter, mask in self.pairs:
                parameter.grad.mul_(mask)

        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            with torch.no_grad():
                for parameter, mask in self.pairs:
                    parameter.mul_(mask)

    return Masked


def largest(weight: nn.Parameter) -> torch.Tensor:
    sizes = weight.detach().abs().flatten()
    kept = sizes.topk(len(sizes) - round(SPARSITY * len(sizes))).indices
    return torch.zeros_like(sizes).index_fill_(0, kept, 1.0).view(weight.shape)


def our_masks_on(_model: pl.LightningModule) -> Pruning:
    """Prunes at the first step, and its window is over: from there on masks are applied at each step."""
    return Pruning(SPARSITY, schedule="constant", begin=0, end=1, every=1)


def our_window_open(_model: pl.LightningModule) -> Pruning:
    """Prunes at the first step; the next update is far away."""
    return Pruning(SPARSITY, schedule="constant", begin=0, end=FAR, every=FAR)


def ours_off(_model: pl.LightningModule) -> Pruning:
    """Its window begins after the run."""
    return Pruning(SPARSITY, begin=FAR, end=FAR + 1, every=1)


def lightnings(model: pl.LightningModule) -> ModelPruning:
    """Prunes the same weights to the same sparsity once, at the end of the first epoch; nothing is rewound."""
    named = dict(model.named_modules())
    return ModelPruning(
        "l1_unstructured",
        [(named[one.name.rpartition(".")[0]], "weight") for one in select(model).chosen],
        amount=SPARSITY,
        apply_pruning=lambda epoch: epoch == 0,
        use_lottery_ticket_hypothesis=False,
    )


VARIANTS: dict[str, Callable[[Module], tuple[Module, Added]]] = {
    PLAIN: lambda module: (module, None),
    BY_HAND: lambda module: (by_hand(module), None),
    MASKS_ON: lambda module: (module, our_masks_on),
    "Pruning, masks on, window open": lambda module: (module, our_window_open),
    OFF: lambda module: (module, ours_off),
    "Lightning's ModelPruning": lambda module: (module, lightnings),
}


# Steps -------------------------------------------------------------------------------------------------------------


def step_times(model: str, rounds: int, batch: int, seed: int) -> dict[str, Seconds]:
    """Seconds per step of each variant, round by round, by each clock."""
    steps, shuffled, order = STEPS[model], random.Random(seed), list(VARIANTS)
    shuffled.shuffle(order)  # who comes first has the first place in memory
    running = {
        variant: Variant(variant, *VARIANTS[variant](steps.module), Batches(steps.shape, batch)) for variant in order
    }
    refuse_different(running)
    return take_turns(running, rounds, shuffled)


def refuse_different(running: dict[str, Variant]) -> None:
    """With equal masks comes the same training, or something else is compared."""
    if not torch.equal(running[BY_HAND].weights(), running[MASKS_ON].weights()):
        raise RuntimeError(f"'{MASKS_ON}' and '{BY_HAND}' have come to different weights.")


def step_costs(model: str, batch: int, quick: bool, threads: int) -> dict[str, dict[str, Any]]:
    """The figures of each variant, from several processes; ratios by both clocks."""
    steps, processes = STEPS[model], 1 if quick else PROCESSES
    malloc, rounds = HEAPS[steps.heap], 3 if quick else steps.rounds // processes
    times = [
        PARTS.run(malloc, quick, what="steps", threads=threads, model=model, rounds=rounds, batch=batch, seed=process)
        for process in track(range(processes), f"{model}: steps")
    ]
    wall, processor = (paired([one[clock] for one in times], PLAIN) for clock in ("wall", "processor"))
    return {variant: {**wall[variant], "by_processor_time": processor[variant]} for variant in VARIANTS}


# Updates -----------------------------------------------------------------------------------------------------------


def update_costs(weights: int, quick: bool, **options: Any) -> dict[str, float]:
    """`update_cost`, and the resident set where what is freed is given back at once, which takes its time."""
    cost, given_back = (
        PARTS.run(malloc, quick, what="update", weights=weights, **options) for malloc in (AS_IT_IS, GIVE_BACK)
    )
    resident = {f"{name}_without_store": given_back[name] for name in given_back if "resident" in name}
    return {**cost, **resident}


PARTS = Parts(__file__, {"steps": step_times, "update": update_cost})


# What is said ------------------------------------------------------------------------------------------------------


def step_table(model: str, steps: dict[str, dict[str, Any]]) -> Table:
    table = Table("", title=f"{model}, a step of training")
    for column in ("ms", "over plain Lightning (quartiles)", "by processor time", "target"):
        table.add_column(column, justify="right")
    for variant, one in steps.items():
        ratio = f"{one['ratio']:.4f} ({one['ratio_quartile_1']:.3f}-{one['ratio_quartile_3']:.3f})"
        target = f"<= {TARGETS[variant]}" if variant in TARGETS else ""
        table.add_row(variant, f"{one['step_ms']:.2f}", ratio, f"{one['by_processor_time']['ratio']:.4f}", target)
    return table


def update_table(costs: list[dict[str, float]]) -> Table:
    table = Table(title="One update of the masks, global magnitude; memory, masks included, over the weights' bytes")
    for title in ("weights", "seconds", "seconds per million", "tensors", "resident set", "without store"):
        table.add_column(title, justify="right")
    for cost in costs:
        table.add_row(
            f"{cost['weights'] / 1e6:.2f} M",
            f"{cost['seconds']:.3f}",
            f"{cost['seconds_per_million']:.4f}",
            f"{cost['peak_tensor_bytes_over_weights']:.2f} (target <= {TARGETS['memory']})",
            f"{cost['peak_resident_bytes_over_weights']:.2f}",
            f"{cost['peak_resident_bytes_over_weights_without_store']:.2f}",
        )
    return table


def main() -> None:
    read = arguments(
        "pruning_overhead",
        __doc__,
        threads={"type": int, "default": 1, "help": "of torch (default: 1)"},
        updates={"type": int, "default": 5, "help": "updates to time for each size (default: 5)"},
        part={"type": json.loads, "help": argparse.SUPPRESS},
    )
    be_quiet()
    if read.part:
        print(json.dumps(PARTS.here(**read.part)))
        return
    console, batch = Console(), 4 if read.quick else BATCH
    busy = {"before": environment()["load_average_1_minute"]}
    steps = {}
    models = {QUICK_MODEL: STEPS[QUICK_MODEL]} if read.quick else STEPS
    for model in models:
        steps[model] = step_costs(model, batch, read.quick, read.threads)
        busy[model] = environment()["load_average_1_minute"]
        console.print(step_table(model, steps[model]))
    sizes = [100_000] if read.quick else [10**6, 10**7, 10**8]
    updating = {"quick": read.quick, "threads": read.threads, "updates": read.updates}
    costs = [update_costs(size, **updating) for size in track(sizes, "mask updates")]
    console.print(update_table(costs))
    values = {
        "environment": {**environment(), "load_averages": busy},
        "rounds": {model: 3 if read.quick else one.rounds for model, one in models.items()},
        "heaps": {model: one.heap for model, one in models.items()},
        "targets": TARGETS,
        "steps": steps,
        "updates": costs,
    }
    write(read.output, values)
    console.print(f"Written to {read.output}", soft_wrap=True)


if __name__ == "__main__":
    main()
