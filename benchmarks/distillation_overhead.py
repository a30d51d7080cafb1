"""Measure the time and memory that `Distillation` adds to training, with a live teacher and with cached outputs.

    python benchmarks/distillation_overhead.py

Prints a table for each network and writes `benchmarks/results/distillation_overhead.json`.

Time of a step: all variants train in one process and take turns of a few steps in random order
(`common/interleaved_timing.py`). This is repeated in several processes, with the malloc settings of
`common/processes.py`. "teacher by hand" is a `training_step` that calls the teacher under `no_grad` and adds `kl_div`;
the script first checks that it and `Distillation` train alike. The cache is filled before the timing starts. Metrics
are logged at one step in 50 by default, which a median does not see, so a logged step has a row of its own.

Memory: each variant trains in a fresh process. The figure is the high-water mark of the resident set during `fit`
minus what the process used before it built the model; the median of several processes, minus that of plain training.
On a machine with a GPU, `torch.cuda.max_memory_allocated` of a run on the GPU is printed too.
"""

import argparse
import gc
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from common.distillation_variants import (
    BASES,
    BY_HAND,
    CACHED,
    LIVE,
    LOGGED,
    PLAIN,
    TASKS,
    VARIANTS,
    VariantSpec,
    loader,
    make_data,
)
from common.interleaved_timing import TURN_STEPS, Seconds, Turns, Variant, paired, quiet_trainer, take_turns
from common.memory import reset_peak, resident_bytes
from common.processes import GIVE_BACK, KEEP, Parts
from common.results_file import arguments, be_quiet, environment, write

TARGETS = {LIVE: 1.02, CACHED: 1.05}
BATCH, EPOCH_TURNS, WARM_TURNS = 64, 16, 3
STEPS = {"LeNet-5": 720, "ResNet-8": 216}
TIMED_PROCESSES, MEMORY_PROCESSES, MEMORY_STEPS = 3, 2, 12
QUICK_TASK, QUICK_BATCH, QUICK_ROUNDS, QUICK_EPOCH_TURNS = "LeNet-5", 2, 2, 4


# Steps -------------------------------------------------------------------------------------------------------------


class WaitingTurns(Turns):
    """Turns on a GPU: it is waited for at the second and the last start of a turn; between them it is left alone."""

    def seconds(self) -> tuple[float, float]:
        (first, *_), (last, *_) = self.starts[1], self.starts[-1]
        return ((last - first) / (len(self.starts) - 2),) * 2

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if len(self.starts) in (1, TURN_STEPS - 1):
            torch.cuda.synchronize()
        super().on_train_batch_start(trainer)


def step_times(
    name: str, rounds: int, batch: int, epoch_turns: int, folder: str, accelerator: str, seed: int
) -> dict[str, Seconds]:
    """Seconds per step of each variant, round by round, by each clock."""
    task, shuffled, order = TASKS[name], random.Random(seed), list(VARIANTS)
    data = make_data(task, batch, epoch_turns)
    shuffled.shuffle(order)  # who comes first has the first place in memory
    running = {
        variant: start_variant(variant, VARIANTS[variant](task, folder), loader(data, batch), accelerator)
        for variant in order
    }
    for turn in range(WARM_TURNS):  # in the first, the cache is computed
        for one in running.values():
            one.take()
        if turn == 0:
            refuse_different(running)
    return take_turns(running, rounds, shuffled)


def start_variant(name: str, variant: VariantSpec, batches: Any, accelerator: str) -> Variant:
    turns = Turns() if accelerator == "cpu" else WaitingTurns()
    options = {"accelerator": accelerator, "log_every_n_steps": variant.log_every_n_steps}
    return Variant(name, variant.make, variant.added, batches, turns=turns, warm=0, **options)


def refuse_different(running: dict[str, Variant]) -> None:
    """Whoever has the teacher must have the weights of the one by hand, or something else is compared."""
    expected = running[BY_HAND].weights()
    far = (running[PLAIN].weights() - expected).norm()
    for variant in (LIVE, LOGGED, CACHED):
        away = (running[variant].weights() - expected).norm()
        if away > 0.01 * far:
            raise RuntimeError(
                f"After a turn, '{variant}' is {away:.2e} from '{BY_HAND}'; plain training is {far:.2e}."
            )


def step_costs(name: str, processes: int, rounds: int, quick: bool, **options: Any) -> dict[str, dict[str, Any]]:
    """The figures of each variant, from several processes; ratios by both clocks."""
    each = {"what": "steps", "name": name, "rounds": max(2, rounds // processes), **options}
    times = [PARTS.run(KEEP, quick, **each, seed=process) for process in track(range(processes), f"{name}: steps")]
    wall, processor = (paired([one[clock] for one in times], BASES) for clock in ("wall", "processor"))
    return {variant: {**wall[variant], "by_processor_time": processor[variant]} for variant in VARIANTS}


# Memory ------------------------------------------------------------------------------------------------------------


def memory_cost(name: str, variant: str, batch: int, epoch_turns: int, folder: str, accelerator: str) -> dict[str, int]:
    """Bytes that a fit takes at its peak; run it in a fresh process."""
    task = TASKS[name]
    batches = loader(make_data(task, batch, epoch_turns), batch)
    gc.collect()
    before = resident_bytes("VmRSS")
    made = VARIANTS[variant](task, folder)
    torch.manual_seed(0)
    module = made.make()
    callbacks = [made.added(module)] if made.added else []
    reset_peak()
    quiet_trainer(callbacks, accelerator=accelerator, max_epochs=-1, max_steps=MEMORY_STEPS).fit(module, batches)
    found = {"resident": resident_bytes("VmHWM") - before}
    return found if accelerator == "cpu" else {**found, "cuda": torch.cuda.max_memory_allocated()}


def memory_costs(name: str, processes: int, quick: bool, **options: Any) -> dict[str, dict[str, Any]]:
    """Of each variant: its peak bytes, each time in a process of its own, and their median above that of plain."""
    kinds = {"resident": "cpu", **({"cuda": "gpu"} if torch.cuda.is_available() else {})}
    peaks: dict[str, dict[str, Any]] = {one: {kind: [] for kind in kinds} for one in VARIANTS if one != LOGGED}
    turns = [(kind, variant) for kind in kinds for _ in range(processes) for variant in peaks]
    for kind, variant in track(turns, f"{name}: memory"):
        each = {**options, "what": "memory", "name": name, "variant": variant, "accelerator": kinds[kind]}
        peaks[variant][kind].append(PARTS.run(GIVE_BACK, quick, **each)[kind])
    for found in peaks.values():
        for kind in kinds:
            above = statistics.median(found[kind]) - statistics.median(peaks[PLAIN][kind])
            found[f"{kind}_above_plain"] = round(above)
    return peaks


PARTS = Parts(__file__, {"steps": step_times, "memory": memory_cost})


# What is said ------------------------------------------------------------------------------------------------------


def table(name: str, batch: int, where: str, steps: dict[str, Any], memory: dict[str, Any]) -> Table:
    title = f"{name}, taught by {TASKS[name].teacher.__name__}, batch {batch}, steps on {where}"
    table = Table("", "over", title=title, caption="ratio: the median, and its standard error")
    for column in ("ms", "ratio", "by processor time", "aim", "peak memory above plain, MB"):
        table.add_column(column, justify="right")
    for variant, one in steps.items():
        ratios = [_ratio(found) if variant in BASES else "" for found in (one, one["by_processor_time"])]
        peaks = [f"{kind} {peak / 1e6:.2f}" for kind, peak in memory.get(variant, {}).items() if kind.endswith("plain")]
        above = ", ".join(peaks).replace("_above_plain", "")
        aim = f"<= {TARGETS[variant]}" if variant in TARGETS else ""
        table.add_row(variant, BASES.get(variant, ""), f"{one['step_ms']:.2f}", *ratios, aim, above)
    return table


def _ratio(one: dict[str, Any]) -> str:
    return f"{one['ratio']:.4f} ± {one['ratio_standard_error']:.4f}"


def main() -> None:
    read = arguments(
        "distillation_overhead",
        __doc__,
        threads={"type": int, "default": 1, "help": "of torch (default: 1)"},
        steps={"type": int, "help": f"of each variant, to be timed (default: {STEPS})"},
        batch={"type": int, "default": BATCH, "help": f"images (default: {BATCH})"},
        accelerator={"choices": ["cpu", "gpu"], "default": "cpu", "help": "where steps are timed (default: cpu)"},
        part={"type": json.loads, "help": argparse.SUPPRESS},
    )
    be_quiet()
    if read.part:
        print(json.dumps(PARTS.here(**read.part)))
        return
    quick, batch = read.quick, QUICK_BATCH if read.quick else read.batch
    epoch_turns = QUICK_EPOCH_TURNS if quick else EPOCH_TURNS
    options = {"quick": quick, "threads": read.threads, "batch": batch, "epoch_turns": epoch_turns}
    timed, measured = (1, 1) if quick else (TIMED_PROCESSES, MEMORY_PROCESSES)
    console, busy = Console(), {"before": environment()["load_average_1_minute"]}
    steps, memory = {}, {}
    tasks = [QUICK_TASK] if quick else list(TASKS)
    with tempfile.TemporaryDirectory() as folder:
        for name in tasks:
            options["folder"] = str(Path(folder) / name)
            rounds = QUICK_ROUNDS if quick else (read.steps or STEPS[name]) // TURN_STEPS
            steps[name] = step_costs(name, timed, rounds, accelerator=read.accelerator, **options)
            memory[name] = memory_costs(name, measured, **options)
            busy[name] = environment()["load_average_1_minute"]
            console.print(table(name, batch, read.accelerator, steps[name], memory[name]))
    values = {
        "environment": {**environment(), "accelerator": read.accelerator, "load_averages": busy},
        "batch": batch,
        "steps_timed": {name: QUICK_ROUNDS * TURN_STEPS if quick else read.steps or STEPS[name] for name in tasks},
        "processes": {"timed": timed, "memory": measured},
        "targets": TARGETS,
        "steps": steps,
        "memory_bytes": memory,
    }
    write(read.output, values)
    console.print(f"Written to {read.output}", soft_wrap=True)


if __name__ == "__main__":
    main()
