"""Arguments of structured pruning, checked where they are given."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_compress.channel_pruning.budget import KINDS, RUNTIMES, Budget
from lightning_compress.channel_pruning.functional import criteria, distributions
from lightning_compress.core.optional_dependencies import need
from lightning_compress.core.registry import check_signature, find

OFFERED_TO_DISTRIBUTIONS = ("groups", "scores", "originals", "fraction", "min_density")
PENALTIES = ("slimming", "group_lasso")


def budget_of(latency_in: str = "torch", **given: float | None) -> Budget:
    """The one budget that is given.

    Raises:
        ValueError: if none is or several are, its number is out of range, or the runtime is not known.
        ModuleNotFoundError: if what the runtime needs is missing.
    """
    if latency_in not in RUNTIMES:
        raise ValueError(f"latency_in is one of {', '.join(RUNTIMES)}, but is {latency_in!r}.")
    if latency_in == "onnxruntime":
        need("onnx", "onnxruntime", "onnxscript")
    asked = {kind: value for kind, value in given.items() if value is not None}
    if len(asked) != 1:
        found = ", ".join(f"{kind}={value}" for kind, value in asked.items()) or "none"
        raise ValueError(f"Give one budget of {', '.join(KINDS)}; given: {found}. For half of the MACs write macs=0.5.")
    [(kind, value)] = asked.items()
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{kind} is a number above 0, but is {value!r}.")
    if kind != "latency_ms" and not value < 1:
        what = "goes" if kind == "sparsity" else "is kept"
        mend = f" For {value:g} % write {value / 100:g}." if 1 < value < 100 else ""
        raise ValueError(f"{kind} is the fraction in (0, 1) that {what}, but is {value}.{mend}")
    return Budget(kind, float(value), latency_in)


def criterion_of(criterion: str | Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The criterion of that name, if all that it asks for is offered."""
    return check_signature(find(criterion, criteria), criteria.OFFERED)


def distribution_of(distribution: str | Callable[..., Any]) -> Callable[..., Any]:
    """The distribution of that name, if all that it asks for is offered."""
    return check_signature(find(distribution, distributions), OFFERED_TO_DISTRIBUTIONS)


def check_options(round_to: object, recalibrate: object, penalty: object, strength: object) -> None:
    """Refuse numbers and names that mean nothing.

    Raises:
        ValueError: with the value and what it may be.
    """
    for name, value, least in (("round_to", round_to, 1), ("recalibrate", recalibrate, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is a whole number from {least} up, but is {value!r}.")
    if penalty is not None and penalty not in PENALTIES:
        raise ValueError(f"penalty is None or one of {', '.join(PENALTIES)}, but is {penalty!r}.")
    if isinstance(strength, bool) or not isinstance(strength, int | float) or strength < 0:
        raise ValueError(f"penalty_strength is a number from 0 up, but is {strength!r}. Papers take 1e-5 to 1e-4.")
