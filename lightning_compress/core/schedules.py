"""Schedules: how far a phase has gone in, the share of the way from the initial to the final value out.

Each is a frozen dataclass of numbers that is called with the progress of a phase, in [0, 1], and returns a share, in
[0, 1]. A function of one argument does as well.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[float], float]


@dataclass(frozen=True)
class Constant:
    """Hold the final value from the first moment on: one shot.

    >>> Constant()(0.0)
    1.0
    """

    def __call__(self, progress: float) -> float:
        return 1.0


@dataclass(frozen=True)
class Linear:
    """Go evenly: `progress`.

    >>> Linear()(0.25)
    0.25
    """

    def __call__(self, progress: float) -> float:
        return progress


@dataclass(frozen=True)
class Cubic:
    """Rise fast, then settle: `1 - (1 - progress) ** 3`, called AGP in other libraries.

    Reference: Zhu & Gupta, 2017, section 3, https://arxiv.org/abs/1710.01878

    >>> [Cubic()(progress) for progress in (0.0, 0.5, 1.0)]
    [0.0, 0.875, 1.0]
    """

    def __call__(self, progress: float) -> float:
        return 1.0 - (1.0 - progress) ** 3


@dataclass(frozen=True)
class Cosine:
    """Start and end gently: `(1 - cos(pi * progress)) / 2`.

    >>> [round(Cosine()(progress), 3) for progress in (0.0, 0.25, 0.5, 1.0)]
    [0.0, 0.146, 0.5, 1.0]
    """

    def __call__(self, progress: float) -> float:
        return (1.0 - math.cos(math.pi * progress)) / 2.0


@dataclass(frozen=True)
class Exponential:
    """Approach the end at a constant rate: `(1 - exp(-rate * progress)) / (1 - exp(-rate))`.

    With `rate = -log(1 - final_sparsity)` and no initial sparsity, each update prunes the same share of what is left.

    Args:
        rate: above 0, no unit; the higher, the earlier.

    Raises:
        ValueError: if `rate` is not above 0.

    >>> round(0.9 * Exponential(rate=-math.log(1 - 0.9))(0.5), 6) == round(1 - (1 - 0.9) ** 0.5, 6)
    True
    """

    rate: float = 3.0

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise ValueError(f"rate must be above 0, but is {self.rate}.")

    def __call__(self, progress: float) -> float:
        return math.expm1(-self.rate * progress) / math.expm1(-self.rate)


@dataclass(frozen=True)
class Steps:
    """Rise in equal jumps, the first one at once.

    Args:
        count: number of jumps, at least 1.

    Raises:
        ValueError: if `count` is below 1.

    >>> [Steps(count=2)(progress) for progress in (0.0, 0.4, 0.5, 0.9, 1.0)]
    [0.5, 0.5, 1.0, 1.0, 1.0]
    """

    count: int = 4

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count must be at least 1, but is {self.count}.")

    def __call__(self, progress: float) -> float:
        return min(1.0, (math.floor(progress * self.count + 1e-9) + 1) / self.count)


@dataclass(frozen=True)
class OneCycle:
    """Wait, go fastest in the middle, settle: `(1 + exp(beta - alpha)) / (1 + exp(beta - alpha * progress))`.

    Args:
        alpha, beta: slope and offset, no unit.

    Reference: Hubens et al., 2021, section 3, https://arxiv.org/abs/2107.02086

    >>> [round(OneCycle()(progress), 3) for progress in (0.0, 0.5, 1.0)]
    [0.002, 0.731, 1.0]
    """

    alpha: float = 14.0
    beta: float = 6.0

    def __call__(self, progress: float) -> float:
        return (1.0 + math.exp(self.beta - self.alpha)) / (1.0 + math.exp(self.beta - self.alpha * progress))
