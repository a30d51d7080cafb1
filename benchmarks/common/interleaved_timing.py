"""Time several training runs in one process that take turns of a few steps.

Whatever slows the machine slows all of them, so variants are compared by their ratio in the same round. A step is
timed inside the training loop, from one `on_train_batch_start` to the next, without the first step of a turn and the
ends of epochs; by the wall clock, and by the processor time of the training thread, which leaves out other programs.
"""

import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

TURN_STEPS, EPOCH_TURNS = 6, 4
CLOCKS = ("wall", "processor")
Seconds = dict[str, list[float]]


class Turns(pl.Callback):
    """Lets the training loop go on for `TURN_STEPS` steps at a time, and times them."""

    def __init__(self) -> None:
        self.go, self.came = threading.Semaphore(0), threading.Semaphore(0)
        self.starts: list[tuple[float, float]] = []
        self.stop = False

    def take(self) -> tuple[float, float]:
        """Let the loop go on; returns the median seconds of a step by each of `CLOCKS`, without the first."""
        self.starts = []
        self.go.release()
        self.came.acquire()
        return self.seconds() if len(self.starts) > 2 else (float("nan"), float("nan"))

    def seconds(self) -> tuple[float, float]:
        wall, processor = (
            [after - before for before, after in pairwise(one)] for one in zip(*self.starts, strict=True)
        )
        return statistics.median(wall[1:]), statistics.median(processor[1:])

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if len(self.starts) == TURN_STEPS or trainer.global_step == 0:
            self.came.release()
            self.go.acquire()
            trainer.should_stop = self.stop
        self.starts.append((time.perf_counter(), time.thread_time()))


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


class Variant:
    """A run that trains in a thread of its own, and only when it is its turn.

    Args:
        name: of the variant.
        make: makes the module, under a seed that is the same for all.
        added: makes the callback that is added to the run; None adds none.
        batches: the training data.
        turns: the callback that times it.
        warm: warm-up turns, taken at once; by default an epoch and one more.
        arguments: of the Trainer.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], pl.LightningModule],
        added: Callable[[pl.LightningModule], pl.Callback] | None,
        batches: Any,
        *,
        turns: Turns | None = None,
        warm: int = EPOCH_TURNS + 1,
        **arguments: Any,
    ) -> None:
        self.error: BaseException | None = None
        self.turns = turns or Turns()
        torch.manual_seed(0)
        self.module = make()
        callbacks = [self.turns, *([added(self.module)] if added else [])]
        self.trainer = quiet_trainer(callbacks, **{"max_epochs": -1, "accelerator": "cpu", **arguments})
        self.thread = threading.Thread(target=self._fit, args=(batches,), name=name, daemon=True)
        self.thread.start()
        self.turns.came.acquire()
        for _ in range(warm):
            self.take()

    def take(self) -> float:
        """Take a turn; returns seconds of a step by the clock on the wall."""
        return self.take_all()[0]

    def take_all(self) -> tuple[float, float]:
        """Take a turn; returns seconds of a step by each of `CLOCKS`."""
        self._raise_error()
        seconds = self.turns.take()
        self._raise_error()
        return seconds

    def weights(self) -> Tensor:
        """All parameters, as one vector on the CPU."""
        return nn.utils.parameters_to_vector(self.module.parameters()).detach().cpu()

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
            self.trainer.fit(self.module, batches)
        except BaseException as error:
            self.error = error
        finally:
            self.turns.came.release()


def quiet_trainer(callbacks: Sequence[pl.Callback], **arguments: Any) -> pl.Trainer:
    """A Trainer of one device that writes nothing."""
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(devices=1, callbacks=list(callbacks), **silent, **arguments)


def take_turns(running: Mapping[str, Variant], rounds: int, shuffled: random.Random) -> dict[str, Seconds]:
    """Give each variant a turn per round, in random order, then end the runs.

    Returns:
        Seconds of a step by clock, variant and round.
    """
    found: dict[str, Seconds] = {clock: {variant: [] for variant in running} for clock in CLOCKS}
    order = list(running)
    for _ in range(rounds):
        shuffled.shuffle(order)
        for variant in order:
            for clock, seconds in zip(CLOCKS, running[variant].take_all(), strict=True):
                found[clock][variant].append(seconds)
    for variant in running.values():
        variant.end()
    return found


def paired(seconds: Seconds | Sequence[Seconds], base: str | Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Median step of each variant, and the median of its ratio to its base in the same round.

    Args:
        seconds: as from `take_turns`, by one clock; of one process, or of several.
        base: the variant that all are compared with, or the base of each; a variant without one has no ratio.
    """
    processes = [seconds] if isinstance(seconds, dict) else list(seconds)
    bases = dict.fromkeys(processes[0], base) if isinstance(base, str) else base
    found: dict[str, dict[str, Any]] = {}
    for variant in processes[0]:
        found[variant] = {"step_ms": 1000 * statistics.median(one for process in processes for one in process[variant])}
        if variant in bases:
            found[variant] |= {"over": bases[variant], **_ratio_of(processes, variant, bases[variant])}
    return found


def _ratio_of(processes: Sequence[Seconds], variant: str, base: str) -> dict[str, Any]:
    """The median ratio over all rounds, and that of each process; the error is that of the rounds or the processes."""
    ratios = [
        [value / other for value, other in zip(seconds[variant], seconds[base], strict=True)] for seconds in processes
    ]
    together, medians = [one for several in ratios for one in several], [statistics.median(one) for one in ratios]
    low, middle, high = statistics.quantiles(together, n=4) if len(together) > 1 else together * 3
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
