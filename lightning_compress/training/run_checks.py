"""Whether a run suits the phases of its callbacks: how long it is, its learning-rate schedules, its strategy."""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from lightning_compress._lightning import Trainer, rank_zero_warn
from lightning_compress.core.conflicts import UNITS, PhaseOwner, refuse_outside, total_length
from lightning_compress.core.phases import PhaseWindow, Run
from lightning_compress.training.clock import has_timer
from lightning_compress.training.lr_schedule_checks import find_short_schedules

SHARDED = {"FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy"}


class RatesOwner(PhaseOwner, Protocol):
    """What is asked of a callback here."""

    def sets_learning_rates(self) -> bool: ...


def check_phase(callback: PhaseOwner, trainer: Trainer, run: Run) -> None:
    """Refuse a phase that the run never comes to, and warn of one that it leaves unfinished.

    Raises:
        ValueError: if it begins when the run is over.
    """
    window = callback.window
    if window is None or trainer.fast_dev_run:
        return
    refuse_outside(callback.name, callback.begin, window, run)
    if math.isinf(window.end):
        return
    total = total_length(run, window.unit)
    if total is not None and window.end > total:
        rank_zero_warn(
            f"'{callback.name}' ends at {callback.end!r}, which is {UNITS[window.unit]} {window.end}, but this run has "
            f"only {total} {window.unit}: it will not reach its end. Lower `end`, or train longer."
        )
    if has_timer(trainer):
        rank_zero_warn(f"'{callback.name}' may not reach its end: max_time may end this run before.")


def check_lr_schedules(
    callbacks: Sequence[RatesOwner], trainer: Trainer, run: Run, windows: Mapping[str, PhaseWindow]
) -> None:
    """Refuse learning-rate schedules at whose end torch stops the run, and warn of others that end before it.

    Raises:
        ValueError: with the schedule, its length and that of the run.
    """
    kinds = {type(one).__name__ for one in trainer.callbacks}
    if trainer.fast_dev_run or "StochasticWeightAveraging" in kinds:  # it takes a schedule of its own in the end
        return
    last = [windows[one.name] for one in callbacks if one.sets_learning_rates()]
    covered = any(window.end >= (total_length(run, window.unit) or math.inf) for window in last)
    for short in find_short_schedules(trainer.lr_scheduler_configs, run, trainer.global_step, trainer.current_epoch):
        if short.stops and not kinds & {"EarlyStopping", "Timer"}:
            raise ValueError(short.words)
        if short.stops or not covered:
            rank_zero_warn(short.words)


def refuse_equal_names(callback: PhaseOwner, callbacks: Sequence[PhaseOwner]) -> None:
    """Refuse two callbacks that would save under one key.

    Raises:
        ValueError: with their classes.
    """
    kind = type(callback).__name__
    for other in callbacks:
        if other is not callback and other.name == callback.name:
            raise ValueError(
                f"Two callbacks have the name '{callback.name}': {kind} and {type(other).__name__}. Give one another "
                f"name: {kind}(..., name='{callback.name}_2')."
            )


def refuse_sharded_weights(callback: PhaseOwner, trainer: Trainer) -> None:
    """Refuse strategies under which no rank has all weights.

    Raises:
        ValueError: with the strategy.
    """
    strategy = type(trainer.strategy)
    if SHARDED & {cls.__name__ for cls in strategy.__mro__}:
        raise ValueError(
            f"{type(callback).__name__} needs whole weights on every rank, but {strategy.__name__} shards them. Use "
            f"strategy='ddp', or one device."
        )
