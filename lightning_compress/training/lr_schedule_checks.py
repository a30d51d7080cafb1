"""Learning-rate schedules that end before the run does, told before the first step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from inspect import isfunction
from typing import Any

from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    LambdaLR,
    OneCycleLR,
    PolynomialLR,
    SequentialLR,
)

from lightning_compress.core.phases import Run


@dataclass(frozen=True)
class ShortSchedule:
    """A schedule that is over before the run, in words.

    Attributes:
        stops: whether torch would stop the run there; otherwise training goes on at rates that nobody asked for.
    """

    words: str
    stops: bool


def find_short_schedules(configs: Sequence[Any], run: Run, step: int, epoch: int) -> list[ShortSchedule]:
    """Every schedule that is over before the run.

    Args:
        configs: the Trainer's `lr_scheduler_configs`.
        run: how long it is.
        step, epoch: how much of it is done.
    """
    found = []
    for config in configs:
        left = ticks_left(config, run, step, epoch)
        if left is not None:
            found += [short for one, ticks in _parts(config.scheduler, left) if (short := _short(one, ticks))]
    return found


def ticks_left(config: Any, run: Run, step: int, epoch: int) -> int | None:
    """How often a schedule is still stepped in the run; None where that is not known."""
    if config.reduce_on_plateau or not run.automatic:
        return None
    if config.interval == "step":
        return None if run.steps is None or config.frequency != 1 else max(run.steps - step, 0)
    if run.steps is not None and run.steps_per_epoch:
        done, total = step // run.steps_per_epoch, run.steps // run.steps_per_epoch  # no tick for part of an epoch
    elif run.epochs is not None and run.max_steps is None:
        done, total = epoch, run.epochs
    else:
        return None
    frequency = int(config.frequency)
    return max(total // frequency - done // frequency, 0)


def _parts(scheduler: Any, left: int) -> Iterator[tuple[Any, int]]:
    """The schedules that a schedule is made of, each with its own count of ticks at the end of the run."""
    if isinstance(scheduler, ChainedScheduler):
        for one in scheduler._schedulers:
            yield from _parts(one, left)
        return
    ticks = scheduler.last_epoch + left if hasattr(scheduler, "last_epoch") else left
    if isinstance(scheduler, SequentialLR):
        yield scheduler._schedulers[-1], ticks - scheduler._milestones[-1]
    else:
        yield scheduler, ticks


def _short(scheduler: Any, ticks: int) -> ShortSchedule | None:
    name, last = type(scheduler).__name__, ticks - 1  # the tick whose rates the last update takes
    if isinstance(scheduler, OneCycleLR) and ticks > scheduler.total_steps:
        return ShortSchedule(
            f"{name} has total_steps={scheduler.total_steps}, but is stepped {ticks} times in this run: torch stops "
            f"the run with an error there. Write total_steps={ticks}, or int(self.trainer.estimated_stepping_batches).",
            stops=True,
        )
    if isinstance(scheduler, CosineAnnealingLR) and last > scheduler.T_max:
        return ShortSchedule(
            f"{name} has T_max={scheduler.T_max}, but is stepped {ticks} times in this run: after T_max the learning "
            f"rate rises again. Write T_max={ticks}.",
            stops=False,
        )
    zero = _zero_from(scheduler, last)
    if zero is None:
        return None
    words = f"{name} is 0 from its step {zero} on, but is stepped {ticks} times in this run: nothing trains any more"
    return ShortSchedule(f"{words} after that. Let the schedule last as long as the run.", stops=False)


def _zero_from(scheduler: Any, last: int) -> int | None:
    """The first tick from which on every rate is zero up to the `last` one; None if that one has a rate."""
    if isinstance(scheduler, PolynomialLR):
        return int(scheduler.total_iters) if last >= scheduler.total_iters else None
    if not isinstance(scheduler, LambdaLR) or last < 0:
        return None
    factors = scheduler.lr_lambdas
    # Objects may remember how often they were called, so only functions are asked.
    if not all(isfunction(getattr(one, "func", one)) for one in factors) or any(one(last) != 0 for one in factors):
        return None
    while last > 0 and all(one(last - 1) == 0 for one in factors):
        last -= 1
    return last
