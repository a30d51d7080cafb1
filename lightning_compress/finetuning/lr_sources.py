"""Where the learning rates of a phase come from: the user's schedule now, as it was, or begun anew.

A source is called at each step with the rates that the user's schedule gives, one of each parameter group, and with
the step of the phase, negative before it begins; it returns the rates to take.
"""

import warnings
from collections import deque
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

Rates = list[float]


class LearningRateSource:
    """What the user's schedule gives, times a factor."""

    remembers = False  # whether it must be called before the phase too

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def __call__(self, rates: Rates, step: int, length: float) -> Rates:
        return [rate * self.factor for rate in rates]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same kind of source."""

    def forget(self) -> None:
        """The phase is over."""

    def begins_earlier(self, by: int) -> None:
        """The phase will begin that many steps before it was to."""

    def lacks(self, step: int) -> bool:
        """Whether it has not seen what it must have seen by this step."""
        return False


class FixedRate(LearningRateSource):
    """One rate for all."""

    def __call__(self, rates: Rates, step: int, length: float) -> Rates:
        return [self.factor] * len(rates)


class RelativeRate(LearningRateSource):
    """The initial rates, times what the user's schedule changes from the beginning of the phase on."""

    def __init__(self, initial: Rates) -> None:
        super().__init__()
        self.initial, self.first = initial, list[float]()

    def __call__(self, rates: Rates, step: int, length: float) -> Rates:
        self.first = self.first or list(rates)
        initial = [*self.initial, *self.first[len(self.initial) :]]
        pairs = zip(initial, rates, self.first, strict=True)
        return [start * (rate / first) if first else start for start, rate, first in pairs]

    def state_dict(self) -> dict[str, Any]:
        return {"first": list(self.first)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first = list(state["first"])


class DelayedSchedule(LearningRateSource):
    """The rates that the user's schedule gave some steps ago, step by step.

    Args:
        first: the step to which the first one of the phase goes back, counted from the phase's begin: 0 or below.
    """

    remembers = True

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first, self.past = first, deque[Rates]()

    def __call__(self, rates: Rates, step: int, length: float) -> Rates:
        if step >= self.first:
            self.past.append(rates)
        return self.past.popleft() if step >= 0 else rates

    def state_dict(self) -> dict[str, Any]:
        return {"past": torch.tensor(list(self.past), dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.past = deque(state["past"].tolist())

    def forget(self) -> None:
        self.past.clear()

    def begins_earlier(self, by: int) -> None:
        self.first = min(0, self.first + by)

    def lacks(self, step: int) -> bool:
        return min(step, 0) > self.first and not self.past


class DetachedSchedule:
    """A schedule that can be stepped apart from the run.

    Args:
        scheduler: that has not made a step; it is copied.
        optimizer: whose groups it moves; their settings are copied.
        keep: what the scheduler may refer to and must not be copied.

    Raises:
        ValueError: if the scheduler cannot be copied.
    """

    def __init__(self, scheduler: Any, optimizer: Optimizer, keep: Sequence[object] = ()) -> None:
        self.groups, self.count = _Groups(optimizer), 0
        memo = {**{id(one): one for one in keep}, id(optimizer): self.groups}
        try:
            self.scheduler = deepcopy(scheduler, memo)
        except Exception as error:  # whatever a scheduler of the user's own may hold
            raise ValueError(
                f"learning_rate='restart' replays a copy of the schedule, but {type(scheduler).__name__} cannot be "
                f"copied: {error}. Write a number, a factor such as 'x10', or 'rewind 0%'."
            ) from error

    def rates(self, count: int) -> Rates:
        """The rates after so many of its steps, which must not fall from call to call."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the copied optimizer makes no steps is no news
            while self.count < count:
                self.scheduler.step()
                self.count += 1
        return [float(group["lr"]) for group in self.groups.param_groups]


class RestartedSchedule(LearningRateSource):
    """The user's schedule from its first value on, with all of it squeezed into the phase.

    Args:
        copied: the schedule.
        ticks: steps of the run, or epochs, whichever the schedule counts.
        frequency: of these for one step of the schedule.
    """

    def __init__(self, copied: DetachedSchedule, ticks: int, frequency: int = 1) -> None:
        super().__init__()
        self.copied, self.ticks, self.frequency = copied, ticks, frequency

    def __call__(self, rates: Rates, step: int, length: float) -> Rates:
        replayed = self.copied.rates(step * self.ticks // int(length) // self.frequency)
        return [*replayed, *rates[len(replayed) :]]


class _Groups(Optimizer):
    """The settings of an optimizer's groups, without its parameters."""

    def __init__(self, optimizer: Optimizer) -> None:
        left_out = {"params", "param_names"}
        groups = [{k: deepcopy(v) for k, v in one.items() if k not in left_out} for one in optimizer.param_groups]
        super().__init__([{**one, "params": [nn.Parameter(torch.zeros(1))]} for one in groups], {})

    def step(self, closure: Any = None) -> None: ...  # type: ignore[override]
