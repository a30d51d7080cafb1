"""When a phase is over before its time: a metric has reached its target, or gets no better."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from lightning_compress.core.registry import near_miss

MODES = {"min": 1.0, "max": -1.0}


@dataclass
class StopCriterion:
    """Is told a metric again and again, and says when it has been enough.

    Args:
        metric: its name.
        mode: "min" if less is better, or "max".
        target: enough as soon as the metric is there; None: no target.
        patience: enough when the metric has so often not become better; None: never.
        min_delta: by how much it must become better to count.
        best, waited: what has been seen so far; `best` times -1 with "max".

    >>> until = StopCriterion("val_loss", patience=2)
    >>> [until(value) for value in (1.0, 0.5, 0.6, 0.5)]
    [False, False, False, True]
    """

    metric: str
    mode: str = "min"
    target: float | None = None
    patience: int | None = None
    min_delta: float = 0.0
    best: float = math.inf
    waited: int = 0

    def __call__(self, value: float) -> bool:
        less = MODES[self.mode] * value
        if less < self.best - self.min_delta:
            self.best, self.waited = less, 0
        else:
            self.waited += 1
        reached = self.target is not None and less <= MODES[self.mode] * self.target
        return reached or (self.patience is not None and self.waited >= self.patience)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.waited = state["best"], state["waited"]


def as_stop_criterion(written: Mapping[str, Any] | None) -> StopCriterion | None:
    """Read `until`.

    Raises:
        ValueError: if it is no mapping with a metric and a patience or a target, or one of these is none.
    """
    if written is None:
        return None
    known = ("metric", "mode", "target", "patience", "min_delta")
    if not isinstance(written, Mapping):
        raise ValueError(f"until is a mapping such as {{'metric': 'val_loss', 'patience': 3}}, but is {written!r}.")
    for key in written:
        if key not in known:
            raise ValueError(f"until has no {key!r}.{near_miss(key, known)} It takes {', '.join(known)}.")
    if not isinstance(written.get("metric"), str) or {"patience", "target"}.isdisjoint(written):
        raise ValueError(f"until needs a metric, and a patience (in epochs) or a target, but is {dict(written)!r}.")
    if written.get("mode", "min") not in MODES:
        raise ValueError(f"until's mode is 'min' or 'max', but is {written['mode']!r}.")
    patience = written.get("patience", 1)
    if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
        raise ValueError(f"until's patience is a number of epochs, at least 1, but is {patience!r}.")
    for key in ("target", "min_delta"):
        if isinstance(written.get(key, 0.0), bool) or not isinstance(written.get(key, 0.0), int | float):
            raise ValueError(f"until's {key} is a number, but is {written[key]!r}.")
    return StopCriterion(**cast(Any, dict(written)))


def monitored_value(metric: str, metrics: Mapping[str, Any]) -> float:
    """The metric among those that have been logged.

    Raises:
        ValueError: if it is not there.
    """
    if metric not in metrics:
        raise ValueError(
            f"until waits for '{metric}', which has not been logged by the end of this epoch."
            f"{near_miss(metric, metrics)} There are {', '.join(map(str, metrics)) or 'no metrics'}."
        )
    return float(metrics[metric])
