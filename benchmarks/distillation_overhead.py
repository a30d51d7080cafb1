"""What `Distillation` costs: steps beside the same loss written by hand, and from a cache beside no teacher at all.

    python benchmarks/distillation_overhead.py

Steps: as in `pruning_overhead`, all variants train at the same time in one process, and take turns of a few steps in
random order; this in several processes, one after the other. By hand means a training_step that asks the teacher under
`no_grad` and adds `kl_div`; that it and `Distillation` train alike is checked first. The cache is computed before the
timing. A step at which metrics are logged, one in 50 unless the Trainer is told otherwise, is left out by the median,
so it has a row of its own.

Memory: each variant in a fresh process, the high-water mark of the resident set during a fit, above what the process
held before it had a model; the median of a few processes, minus that of plain training. Where there is a GPU, also a
fit there, with `torch.cuda.max_memory_allocated`.

Processes that are timed keep what they free, and all threads share one heap: glibc's own way gives each thread a heap,
which it cuts back and faults in again, and makes one and the same step differ by 5 % from thread to thread. Processes
whose memory is measured give back at once what they free, or the mark would tell what malloc keeps in store.
"""

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from _models import Block, ResNet20
from _results import arguments, be_quiet, environment, write
from pruning_overhead import TURN_STEPS, Turns, reset_peak, resident_bytes
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import Distillation
from lightning_compress.recipes.mnist import LeNet5

PLAIN, BY_HAND = "plain, no teacher", "teacher by hand"
LIVE, LOGGED, CACHED = (
    "Distillation(teacher)",
    "Distillation(teacher), a logged step",
    "Distillation(teacher, cache=...)",
)
TEMPERATURE, ALPHA = 4.0, 0.9
TARGETS = {LIVE: 1.02, CACHED: 1.05}
BATCH, EPOCH_TURNS, WARM_TURNS = 64, 16, 3
STEPS = {"LeNet-5": 720, "ResNet-8": 216}
TIMED_PROCESSES, MEMORY_PROCESSES, MEMORY_STEPS = 3, 2, 12
KEEP = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(1 << 25)}
GIVE_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}


# What is trained ----------------------------------------------------------------------------------------------------


class ResNet8(ResNet20):
    """0.08 M parameters: one block where ResNet-20 has three."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(16, 16), Block(16, 32), Block(32, 64))


@dataclass(frozen=True)
class Task:
    """A student, its teacher, and the shape of an image."""

    student: type[pl.LightningModule]
    teacher: type[pl.LightningModule]
    shape: tuple[int, int, int]

    def make_student(self) -> pl.LightningModule:
        torch.manual_seed(0)
        return self.student()

    def make_teacher(self) -> pl.LightningModule:
        torch.manual_seed(1)
        return self.teacher()


TASKS = {
    "LeNet-5": Task(LeNet5, LeNet5, (1, 28, 28)),
    "ResNet-8": Task(ResNet8, ResNet20, (3, 32, 32)),
}


@dataclass
class Setup:
    """What is handed to a Trainer."""

    module: pl.LightningModule
    callbacks: list[pl.Callback] = field(default_factory=list)
    log_every_n_steps: int = 50


def plain(task: Task, _folder: Path) -> Setup:
    return Setup(task.make_student())


def by_hand(task: Task, _folder: Path) -> Setup:
    """The student's own training_step, with a teacher in it."""
    teacher = task.make_teacher().eval()

    class Taught(task.student):  # type: ignore[name-defined, misc]
        def on_fit_start(self) -> None:
            teacher.to(self.device)

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            images, labels = batch
            logits = self(images)
            with torch.no_grad():
                answers = teacher(images)
            loss = functional.cross_entropy(logits, labels)
            self.log("train_loss", loss)
            ours, theirs = (functional.log_softmax(one / TEMPERATURE, dim=1) for one in (logits, answers))
            divergence = functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
            return (1 - ALPHA) * loss + ALPHA * TEMPERATURE**2 * divergence

    torch.manual_seed(0)
    return Setup(Taught())


def live(task: Task, _folder: Path) -> Setup:
    return Setup(task.make_student(), [Distillation(task.make_teacher(), temperature=TEMPERATURE, alpha=ALPHA)])


def logged(task: Task, folder: Path) -> Setup:
    setup = live(task, folder)
    setup.log_every_n_steps = 1
    return setup


def cached(task: Task, folder: Path) -> Setup:
    taught = Distillation(task.make_teacher(), temperature=TEMPERATURE, alpha=ALPHA, cache=folder)
    return Setup(task.make_student(), [taught])


VARIANTS: dict[str, Callable[[Task, Path], Setup]] = {
    PLAIN: plain,
    BY_HAND: by_hand,
    LIVE: live,
    LOGGED: logged,
    CACHED: cached,
}
BASES = {BY_HAND: PLAIN, LIVE: BY_HAND, LOGGED: BY_HAND, CACHED: PLAIN}


class Batches(TensorDataset):
    """Fetches a whole batch at once, as recipes/mnist.py does."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        rows = torch.tensor(indices)
        return tuple(tensor[rows] for tensor in self.tensors)


def make_data(task: Task, batch: int) -> Batches:
    """Random images for an epoch of a whole number of turns."""
    generator, count = torch.Generator().manual_seed(0), EPOCH_TURNS * TURN_STEPS * batch
    images = torch.randn(count, *task.shape, generator=generator)
    return Batches(images, torch.randint(0, 10, (count,), generator=generator))


def loader(data: Batches, batch: int) -> "DataLoader[Any]":
    """In order, so that all variants see the same batches."""
    return DataLoader(data, batch, collate_fn=lambda fetched: fetched)


def trainer(setup: Setup, accelerator: str, *callbacks: pl.Callback, max_steps: int = -1) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=-1,
        max_steps=max_steps,
        accelerator=accelerator,
        devices=1,
        logger=False,
        log_every_n_steps=setup.log_every_n_steps,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, *setup.callbacks],
    )


# Steps -------------------------------------------------------------------------------------------------------------


class WaitingTurns(Turns):
    """Turns on a GPU: it is waited for at the second and the last start of a turn; between them it is left alone."""

    def take(self) -> float:
        super().take()
        return (self.starts[-1] - self.starts[1]) / (len(self.starts) - 2)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if len(self.starts) in (1, TURN_STEPS - 1):
            torch.cuda.synchronize()
        super().on_train_batch_start(trainer)


class Contestant:
    """One variant, training in a thread of its own whenever it is its turn."""

    def __init__(self, variant: str, setup: Setup, batches: Any, accelerator: str) -> None:
        self.setup = setup
        self.error: BaseException | None = None
        self.turns = Turns() if accelerator == "cpu" else WaitingTurns()
        self.trainer = trainer(setup, accelerator, self.turns)
        self.thread = threading.Thread(target=self._fit, args=(batches,), name=variant, daemon=True)
        self.thread.start()
        self.turns.came.acquire()

    def take(self) -> float:
        """Seconds of a step, in one turn."""
        self._raise_error()
        seconds = self.turns.take()
        self._raise_error()
        return seconds

    def end(self) -> None:
        self.turns.stop = True
        while self.thread.is_alive():
            self.turns.go.release()
            self.thread.join(0.2)

    def _raise_error(self) -> None:
        if self.error is not None:
            raise RuntimeError(f"{self.thread.name} failed") from self.error

    def _fit(self, batches: Any) -> None:
        try:
            self.trainer.fit(self.setup.module, batches)
        except BaseException as error:
            self.error = error
        finally:
            self.turns.came.release()


def step_times(
    task: Task, rounds: int, batch: int, folder: Path, accelerator: str, seed: int
) -> dict[str, list[float]]:
    """Seconds per step of each variant, round by round."""
    data, shuffled, order = make_data(task, batch), random.Random(seed), list(VARIANTS)
    shuffled.shuffle(order)  # who comes first has the first place in memory
    contestants = {
        variant: Contestant(variant, VARIANTS[variant](task, folder), loader(data, batch), accelerator)
        for variant in order
    }
    for turn in range(WARM_TURNS):  # in the first, the cache is computed
        for contestant in contestants.values():
            contestant.take()
        if turn == 0:
            refuse_different(contestants)
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        shuffled.shuffle(order)
        for variant in order:
            seconds[variant].append(contestants[variant].take())
    for contestant in contestants.values():
        contestant.end()
    return seconds


def all_step_times(name: str, processes: int, rounds: int, options: dict[str, Any]) -> list[dict[str, list[float]]]:
    """`step_times` in each of several processes."""
    return [
        in_process(f"{name}: steps", KEEP, **options, rounds=max(2, rounds // processes), seed=process)
        for process in track(range(processes), f"{name}: steps")
    ]


def refuse_different(contestants: dict[str, Contestant]) -> None:
    """Whoever has the teacher must have the weights of the one by hand, or something else is compared."""
    expected = weights(contestants[BY_HAND])
    far = (weights(contestants[PLAIN]) - expected).norm()
    for variant in (LIVE, LOGGED, CACHED):
        away = (weights(contestants[variant]) - expected).norm()
        if away > 0.01 * far:
            raise RuntimeError(
                f"After a turn, '{variant}' is {away:.2e} from '{BY_HAND}'; plain training is {far:.2e}."
            )


def weights(contestant: Contestant) -> Tensor:
    return nn.utils.parameters_to_vector(contestant.setup.module.parameters()).detach().cpu()


def paired(processes: list[dict[str, list[float]]]) -> dict[str, dict[str, Any]]:
    """Of each variant: its median step, and the median of its ratio to its base in the same round."""
    found: dict[str, dict[str, Any]] = {}
    for variant in VARIANTS:
        values = [second for seconds in processes for second in seconds[variant]]
        found[variant] = {"step_ms": 1000 * statistics.median(values)}
        if variant in BASES:
            found[variant] |= {"over": BASES[variant], **ratio_of(processes, variant, BASES[variant])}
    return found


def ratio_of(processes: list[dict[str, list[float]]], variant: str, base: str) -> dict[str, Any]:
    """The median ratio over all rounds, and that of each process; the error is that of the rounds or the processes."""
    ratios = [
        [value / other for value, other in zip(seconds[variant], seconds[base], strict=True)] for seconds in processes
    ]
    together, medians = [one for several in ratios for one in several], [statistics.median(one) for one in ratios]
    low, middle, high = statistics.quantiles(together, n=4)
    # A median of n values has about 1.25 / sqrt(n) times their spread.
    of_rounds = 1.25 * (high - low) / 1.35 / len(together) ** 0.5
    of_processes = statistics.stdev(medians) / len(medians) ** 0.5 if len(medians) > 1 else 0.0
    return {
        "ratio": middle,
        "ratio_quartile_1": low,
        "ratio_quartile_3": high,
        "ratio_standard_error": max(of_rounds, of_processes),
        "ratio_by_process": medians,
    }


# Memory ------------------------------------------------------------------------------------------------------------


def memory_cost(task: Task, variant: str, batch: int, folder: Path, accelerator: str) -> dict[str, int]:
    """Bytes that a fit takes at its peak; run it in a fresh process."""
    batches = loader(make_data(task, batch), batch)
    gc.collect()
    before = resident_bytes("VmRSS")
    setup = VARIANTS[variant](task, folder)
    reset_peak()
    trainer(setup, accelerator, max_steps=MEMORY_STEPS).fit(setup.module, batches)
    found = {"resident": resident_bytes("VmHWM") - before}
    return found if accelerator == "cpu" else {**found, "cuda": torch.cuda.max_memory_allocated()}


def memory_costs(name: str, processes: int, options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each variant: its peak bytes, each time in a process of its own, and their median above that of plain."""
    kinds = {"resident": "cpu", **({"cuda": "gpu"} if torch.cuda.is_available() else {})}
    peaks: dict[str, dict[str, Any]] = {one: {kind: [] for kind in kinds} for one in VARIANTS if one != LOGGED}
    turns = [(kind, variant) for kind in kinds for _ in range(processes) for variant in peaks]
    for kind, variant in track(turns, f"{name}: memory"):
        found = in_process(f"{name}: {variant}", GIVE_BACK, **options | {"accelerator": kinds[kind]})
        peaks[variant][kind].append(found[kind])
    for found in peaks.values():
        for kind in kinds:
            above = statistics.median(found[kind]) - statistics.median(peaks[PLAIN][kind])
            found[f"{kind}_above_plain"] = round(above)
    return peaks


# Processes ---------------------------------------------------------------------------------------------------------


def in_process(part: str, malloc: dict[str, str], **options: Any) -> Any:
    """What this script prints when it is told to do one part of the work."""
    command = [sys.executable, __file__, "--part", part]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **malloc})
    if done.returncode:
        raise RuntimeError(f"'{part}' failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def part_of(read: Any) -> Any:
    """The other side of `in_process`."""
    name, _, what = read.part.partition(": ")
    if what == "steps":
        return step_times(TASKS[name], read.rounds, read.batch, read.folder, read.accelerator, read.seed)
    return memory_cost(TASKS[name], what, read.batch, read.folder, read.accelerator)


# What is said ------------------------------------------------------------------------------------------------------


def table(name: str, batch: int, where: str, steps: dict[str, Any], memory: dict[str, Any]) -> Table:
    title = f"{name}, taught by {TASKS[name].teacher.__name__}, batch {batch}, steps on {where}"
    table = Table("", "over", title=title, caption="ratio: the median, and its standard error")
    for column in ("ms", "ratio", "aim", "peak memory above plain, MB"):
        table.add_column(column, justify="right")
    for variant, one in steps.items():
        ratio = f"{one['ratio']:.4f} ± {one['ratio_standard_error']:.4f}" if variant in BASES else ""
        peaks = [f"{kind} {peak / 1e6:.2f}" for kind, peak in memory.get(variant, {}).items() if kind.endswith("plain")]
        above = ", ".join(peaks).replace("_above_plain", "")
        aim = f"<= {TARGETS[variant]}" if variant in TARGETS else ""
        table.add_row(variant, BASES.get(variant, ""), f"{one['step_ms']:.2f}", ratio, aim, above)
    return table


def main() -> None:
    read = arguments(
        "distillation_overhead",
        __doc__,
        threads={"type": int, "default": 1, "help": "of torch (default: 1)"},
        steps={"type": int, "help": f"of each variant, to be timed (default: {STEPS})"},
        batch={"type": int, "default": BATCH, "help": f"images (default: {BATCH})"},
        accelerator={"choices": ["cpu", "gpu"], "default": "cpu", "help": "where steps are timed (default: cpu)"},
        part={"help": argparse.SUPPRESS},
        rounds={"type": int, "help": argparse.SUPPRESS},
        seed={"type": int, "help": argparse.SUPPRESS},
        folder={"type": Path, "help": argparse.SUPPRESS},
    )
    torch.set_num_threads(read.threads)
    be_quiet()
    if read.part:
        print(json.dumps(part_of(read)))
        return
    batch = 4 if read.quick else read.batch
    options = {"threads": read.threads, "batch": batch, "accelerator": read.accelerator}
    timed, measured = (1, 1) if read.quick else (TIMED_PROCESSES, MEMORY_PROCESSES)
    console, busy = Console(), {"before": environment()["load_average_1_minute"]}
    steps, memory = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in TASKS:
            options["folder"] = Path(folder) / name
            rounds = 3 if read.quick else (read.steps or STEPS[name]) // TURN_STEPS
            steps[name] = paired(all_step_times(name, timed, rounds, options))
            memory[name] = memory_costs(name, measured, options)
            busy[name] = environment()["load_average_1_minute"]
            console.print(table(name, batch, read.accelerator, steps[name], memory[name]))
    values = {
        "environment": {**environment(), "accelerator": read.accelerator, "load_averages": busy},
        "batch": batch,
        "steps_timed": {name: 3 * TURN_STEPS if read.quick else read.steps or STEPS[name] for name in TASKS},
        "processes": {"timed": timed, "memory": measured},
        "targets": TARGETS,
        "steps": steps,
        "memory_bytes": memory,
    }
    write(read.output, values)
    console.print(f"Written to {read.output}", soft_wrap=True)


if __name__ == "__main__":
    main()
