"""Checks of arguments that several callbacks take, made at their construction."""

from collections.abc import Callable, Mapping
from functools import wraps
from inspect import isclass
from typing import Any, cast

from lightning_compress.core import schedules
from lightning_compress.core.registry import find
from lightning_compress.core.schedules import Schedule


def refuse_old_names(init: Callable[..., None], renamed: Mapping[str, str]) -> Callable[..., None]:
    """Let a constructor that is called with an argument's old name say the new one.

    Args:
        init: the `__init__` of a class; its signature stays.
        renamed: new names by old ones.

    >>> class Pruner:
    ...     def __init__(self, min_density: float = 0.0) -> None: ...
    >>> Pruner.__init__ = refuse_old_names(Pruner.__init__, {"floor": "min_density"})
    >>> Pruner(floor=0.1)
    Traceback (most recent call last):
    TypeError: Pruner has no argument 'floor': it is called 'min_density' now.
    """

    @wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name in renamed:
                kind = type(self).__name__
                raise TypeError(f"{kind} has no argument '{name}': it is called '{renamed[name]}' now.")
        init(self, *args, **kwargs)

    return checked


def check_fraction(name: str, value: object) -> float:
    """Return `value`, a fraction in [0, 1).

    Raises:
        ValueError: if it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is a fraction in [0, 1), but is {value!r}.")
    if 1 <= value <= 100:
        mend = f" For {value:g} % write {value / 100:g}." if value < 100 else " Something has to stay."
        raise ValueError(f"{name} is a fraction in [0, 1), but is {value}.{mend}")
    if not 0 <= value < 1:
        raise ValueError(f"{name} is a fraction in [0, 1), but is {value}. For 90 % write 0.9.")
    return float(value)


def check_schedule(schedule: Schedule) -> None:
    """Refuse a schedule that does not return shares of the way.

    Raises:
        ValueError: if a value at one of eleven places lies outside [0, 1], or the last one is not 1.
    """
    shares = [schedule(tenth / 10) for tenth in range(11)]
    for tenth, share in enumerate(shares):
        if not (isinstance(share, int | float) and 0.0 <= share <= 1.0 + 1e-9):
            raise ValueError(
                f"A schedule returns the share of the way from the initial to the final value, in [0, 1], but "
                f"{schedule} returns {share!r} at progress {tenth / 10}."
            )
    if abs(shares[-1] - 1.0) > 1e-6:
        raise ValueError(
            f"A schedule ends at 1, the final value, but {schedule} returns {shares[-1]} at progress 1.0. Divide its "
            f"values by the last one, and set the final value itself to what it should reach."
        )


def as_schedule(schedule: str | Callable[[float], float]) -> Schedule:
    """The schedule of that name in `core.schedules` or of that dotted path, or the function itself.

    Raises:
        ValueError: if it is unknown, or does not lead from the initial to the final value.
    """
    found = find(schedule, schedules)
    made: Schedule = cast(Any, found)() if isclass(found) else found
    check_schedule(made)
    return made
