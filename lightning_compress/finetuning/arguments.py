"""What the arguments of `FineTuning` mean, checked at its construction."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_compress.core.phases import Duration, ParsedDuration, parse_duration

EFFECTS = ("freeze", "unfreeze", "learning_rate", "warmup", "lr_multipliers", "layer_decay", "rewind", "recalibrate_bn")


@dataclass(frozen=True)
class LearningRateSpec:
    """A learning rate or weight decay as it was asked for.

    Args:
        kind: "same", "fixed", "scaled", "restart" or "rewind".
        value: the number of "fixed", the factor of "scaled".
        time: of "rewind", as it was written.
    """

    kind: str
    value: float = 1.0
    time: Duration | None = None


def as_learning_rate(value: float | str | None, rewind: Duration | None) -> LearningRateSpec:
    """Read `learning_rate`.

    Args:
        value: a number, "x0.1" for a factor, "restart", "rewind", or "rewind 5%".
        rewind: the moment that "rewind" means where none is written behind it.

    Raises:
        ValueError: if it is none of these, or not above 0.
    """
    if isinstance(value, str) and value.split()[:1] == ["rewind"]:
        time: Duration | None = value.strip().removeprefix("rewind").strip() or rewind
        if time is None:
            raise ValueError(
                "learning_rate='rewind' needs a moment. Write learning_rate='rewind 5%', or give rewind='5%', which "
                "takes the weights back too."
            )
        parse_duration(time)
        return LearningRateSpec("rewind", time=time)
    if value == "restart":
        return LearningRateSpec("restart")
    return _as_rate("learning_rate", value, smallest=math.ulp(0.0), others=", 'restart', 'rewind' or 'rewind 5%'")


def as_weight_decay(value: float | str | None) -> LearningRateSpec:
    """Read `weight_decay`: a number, or "x0.1" for a factor.

    Raises:
        ValueError: if it is neither, or below 0.
    """
    return _as_rate("weight_decay", value, smallest=0.0, others="")


def check_positive(name: str, value: object) -> float:
    """Return `value`, a finite number above 0.

    Raises:
        ValueError: if it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} is a number above 0, but is {value!r}.")
    return float(value)


def check_lr_multipliers(lr_multipliers: Mapping[str, float] | None) -> dict[Any, float]:
    """Return the lr_multipliers by pattern.

    Raises:
        ValueError: if one is not above 0.
    """
    if lr_multipliers is not None and not isinstance(lr_multipliers, Mapping):
        raise ValueError(f"lr_multipliers is a mapping such as {{'backbone.*': 0.1}}, but are {lr_multipliers!r}.")
    for pattern, factor in (lr_multipliers or {}).items():
        if factor == 0:
            raise ValueError(f"lr_multipliers[{pattern!r}] is 0. To let these stand still, write freeze=[{pattern!r}].")
    return {
        pattern: check_positive(f"lr_multipliers[{pattern!r}]", factor)
        for pattern, factor in (lr_multipliers or {}).items()
    }


def check_before(name: str, time: Duration, begin: Duration) -> None:
    """Refuse a moment to go back to that is seen not to come before the phase.

    Raises:
        ValueError: if it is no duration, or not before `begin` in the same unit.
    """
    to, first = parse_duration(time), parse_duration(begin)
    if first.value == 0 or (to.unit == first.unit and to.value >= first.value):
        raise ValueError(
            f"{name}={time!r} is not before begin={begin!r}: what is rewound is put back at begin to what it was at "
            f"an earlier moment."
        )


def check_has_effect(asked: Mapping[str, Any]) -> None:
    """Refuse arguments that ask for nothing, or only for how to do what is not asked for.

    Raises:
        ValueError: with the argument that is missing.
    """
    if not isinstance(asked["gradual"], bool):
        raise ValueError(f"gradual is True or False, but is {asked['gradual']!r}.")
    if asked["gradual"] and not asked["freeze"]:
        raise ValueError("gradual=True unfreezes what is frozen. Name it: freeze=['backbone.*'].")
    if not any(asked[name] for name in EFFECTS) and asked["weight_decay"] is None:
        raise ValueError(f"FineTuning does nothing without one of {', '.join(EFFECTS)}, weight_decay.")
    if asked["layers"] is not None and not (asked["gradual"] or asked["layer_decay"]):
        raise ValueError("layers are for gradual=True and layer_decay. Give one of them, or leave layers out.")
    if asked["recalibrate_bn"] not in (None, "begin", "end"):
        raise ValueError(f"recalibrate_bn is 'begin' or 'end', but is {asked['recalibrate_bn']!r}.")
    end, begin = parse_duration(asked["end"]), parse_duration(asked["begin"])
    if asked["recalibrate_bn"] == "end" and end == ParsedDuration(1.0, "fraction"):
        raise ValueError(
            f"recalibrate_bn='end' needs batches after end={asked['end']!r}. End earlier, such as end='90%'."
        )
    if asked["warmup"] is not None:
        warmup = parse_duration(asked["warmup"])
        if warmup.unit == end.unit and (begin.unit == end.unit or not begin.value):
            _refuse_long_warmup(asked, warmup.value, end.value - begin.value)


def _refuse_long_warmup(asked: Mapping[str, Any], warmup: float, phase: float) -> None:
    if warmup > phase + 1e-9:
        raise ValueError(
            f"warmup={asked['warmup']!r} is longer than the phase from begin={asked['begin']!r} to "
            f"end={asked['end']!r}. Shorten the warmup, or lengthen the phase."
        )


def _as_rate(name: str, value: float | str | None, smallest: float, others: str) -> LearningRateSpec:
    if value is None:
        return LearningRateSpec("same")
    match = re.fullmatch(r"\s*x\s*(\S+)\s*", value) if isinstance(value, str) else None
    number = _number(match[1] if match else value)
    if number is None or not smallest <= number < math.inf:
        limit = "above 0" if smallest else "of at least 0"
        raise ValueError(f"{name} is a number {limit}, a factor such as 'x0.1'{others}, but is {value!r}.")
    return LearningRateSpec("scaled" if match else "fixed", number)


def _number(value: object) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
