"""Which interval of real numbers a grid covers, and the scale and zero point that follow from it.

An estimator takes `values`, and `dim=None` for one interval, 0-d, or `dim=1` for one of each row of a matrix, shape
`(rows, 1)`. It returns `(minimum, maximum)` in float32. It may ask for `quant_min` and `quant_max`, the limits of the
grid's whole numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from math import ceil, gcd
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_compress.quantization.functional.rounding import SMALLEST_STEP

Interval: TypeAlias = tuple[Tensor, Tensor]
# More numbers say little more about a distribution, and would cost more than the layer whose numbers they are.
SAMPLE = 2**18
GOLDEN = 0.6180339887498949


def min_max(values: Tensor, dim: int | None = None) -> Interval:
    """From the smallest to the largest value.

    Raises:
        ValueError: if there are no values.

    >>> min_max(torch.tensor([[1.0, -2.0], [3.0, 4.0]]), dim=1)
    (tensor([[-2.],
            [ 3.]]), tensor([[1.],
            [4.]]))
    """
    rows = _rows(values, dim)
    # `torch.aminmax` along a dimension takes twenty times as long as these two, and without one half as long.
    quant_min, quant_max = (
        torch.aminmax(rows) if dim is None else (rows.amin(1, keepdim=True), rows.amax(1, keepdim=True))
    )
    return quant_min, quant_max


def percentile(values: Tensor, dim: int | None = None, share: float = 0.9999) -> Interval:
    """The smallest interval that leaves out no more than `1 - share` of the values at each end.

    Of more than 2 ** 18 values so many are looked at, always the same, spread evenly. If one of those is no number,
    neither is the interval.

    Raises:
        ValueError: if the share is not in (0.5, 1], or there are no values.

    >>> percentile(torch.arange(101.0), share=0.9)
    (tensor(10.), tensor(90.))
    """
    if not 0.5 < share <= 1:
        raise ValueError(
            f"share is a fraction in (0.5, 1], but is {share}. To leave out 0.1 % at each end write 0.999."
        )
    sample = _sample(_rows(values, dim), SAMPLE)
    count = sample.shape[1]
    # The rounding of `share * count` must not take one value more.
    kept = min(max(ceil(share * count - 1e-6), 1), count)
    quant_max = sample.kthvalue(kept, dim=1, keepdim=True).values
    quant_min = sample.kthvalue(count - kept + 1, dim=1, keepdim=True).values
    unknown = sample.isnan().any(1, keepdim=True)
    return tuple(_shaped(one.masked_fill(unknown, torch.nan), dim) for one in (quant_min, quant_max))  # type: ignore[return-value]


def mse(values: Tensor, dim: int | None, quant_min: int, quant_max: int) -> Interval:
    """The part of the whole interval, shrunken towards zero, whose rounding has the least squared error.

    Looked for first in twentieths of the whole, then in hundredths around the best of them. The grid is symmetric if
    `quant_min` is below 0. Of many values, 2 ** 18 are looked at, but no fewer than 1024 of a row.

    Raises:
        ValueError: if there are no values, or one is not finite.

    >>> lowest, highest = mse(torch.tensor([0.1, -0.2, 0.3, 100.0]), None, -7, 7)
    >>> bool(highest <= 100)
    True
    """
    interval = min_max(values, dim)
    rows = _rows(values, dim)
    sample = _sample(rows, max(SAMPLE // len(rows), 1024))
    best = _best_share(sample, interval, [step / 20 for step in range(1, 21)], quant_min, quant_max)
    around = [best + step / 100 for step in range(-4, 5)]
    best = _best_share(sample, interval, around, quant_min, quant_max)
    return _shaped(best, dim) * interval[0], _shaped(best, dim) * interval[1]


def affine_range(minimum: Tensor, maximum: Tensor, quant_min: int, quant_max: int, symmetric: bool) -> Interval:
    """The scale and zero point of a grid that covers an interval, widened to hold 0.

    Args:
        minimum, maximum: of the interval, any one shape.
        quant_min, quant_max: limits of the grid's whole numbers.
        symmetric: whether the grid's middle is 0; then its reach is that of the larger end.

    Returns:
        Scale in float32 and zero point in int32, in the shape of the interval. 0 lies on the grid. Where the interval
        is nothing but 0, the scale is 1.

    Raises:
        ValueError: if an end is not finite, the ends are the wrong way round, or the grid cannot be symmetric.

    >>> affine_range(torch.tensor(-1.0), torch.tensor(3.0), -127, 127, symmetric=True)
    (tensor(0.0236), tensor(0, dtype=torch.int32))
    """
    _check_grid(quant_min, quant_max, symmetric)
    _check_ends(minimum, maximum)
    return affine_qparams(minimum, maximum, quant_min, quant_max, symmetric)


def affine_qparams(minimum: Tensor, maximum: Tensor, quant_min: int, quant_max: int, symmetric: bool) -> Interval:
    """What `affine_range` returns, without its checks: to look at a number on an accelerator is to wait for it.

    >>> affine_qparams(torch.tensor(-1.0), torch.tensor(4.1), 0, 255, symmetric=False)
    (tensor(0.0200), tensor(50, dtype=torch.int32))
    """
    below, above = minimum.float().clamp(max=0), maximum.float().clamp(min=0)
    if symmetric:
        scale = _positive(torch.maximum(-below, above) / quant_max)
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    # Each end alone: the width of the whole could overflow.
    scale = _positive(above / (quant_max - quant_min) - below / (quant_max - quant_min))
    return scale, (quant_min - (below / scale).round()).to(torch.int32)


def union(old: Interval, new: Interval) -> Interval:
    """The interval that holds both.

    >>> union((torch.tensor(0.0), torch.tensor(2.0)), (torch.tensor(-1.0), torch.tensor(1.0)))
    (tensor(-1.), tensor(2.))
    """
    return torch.minimum(old[0], new[0]), torch.maximum(old[1], new[1])


def exponential_average(old: Interval, new: Interval, momentum: float = 0.01) -> Interval:
    """The old interval, moved to the new one by a share of their distance.

    >>> old, new = (torch.tensor(0.0), torch.tensor(2.0)), (torch.tensor(-1.0), torch.tensor(1.0))
    >>> exponential_average(old, new, momentum=0.5)
    (tensor(-0.5000), tensor(1.5000))
    """
    return torch.lerp(old[0], new[0], momentum), torch.lerp(old[1], new[1], momentum)


@dataclass(frozen=True)
class RangeEstimator:
    """How the interval of one batch is found, and how it joins that of the batches before.

    Attributes:
        estimator: `min_max`, `percentile`, `mse` or one like them.
        momentum: the share of a new interval in a running average; None: the interval only widens.

    Reference: Jacob et al., 2018, section 3.1, https://arxiv.org/abs/1712.05877

    >>> estimator = RangeEstimator(min_max, momentum=0.5)
    >>> old = estimator.estimate(torch.tensor([0.0, 4.0]), dim=None, quant_min=0, quant_max=255)
    >>> new = estimator.estimate(torch.tensor([-1.0, 2.0]), dim=None, quant_min=0, quant_max=255)
    >>> estimator.join(old, new)
    (tensor(-0.5000), tensor(3.))
    """

    estimator: Callable[..., Interval] = min_max
    momentum: float | None = 0.01
    # To look these names up at each call would take as long as a small operator.
    _asked: tuple[str, ...] = field(default=(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        named = signature(self.estimator).parameters
        object.__setattr__(
            self, "_asked", tuple(one for one in ("values", "dim", "quant_min", "quant_max") if one in named)
        )
        if self.momentum is not None and not 0 < self.momentum <= 1:
            raise ValueError(f"momentum is a share in (0, 1], or None to widen only, but is {self.momentum}.")

    @property
    def widens(self) -> bool:
        """Whether it never becomes narrower."""
        return self.momentum is None

    def estimate(self, values: Tensor, *, dim: int | None, quant_min: int, quant_max: int) -> Interval:
        """The interval of these values."""
        offered = {"values": values, "dim": dim, "quant_min": quant_min, "quant_max": quant_max}
        found: Interval = self.estimator(**{name: offered[name] for name in self._asked})
        return found

    def join(self, old: Interval, new: Interval) -> Interval:
        """The interval of all values up to the new ones."""
        return union(old, new) if self.momentum is None else exponential_average(old, new, self.momentum)


def _rows(values: Tensor, dim: int | None) -> Tensor:
    """As a matrix, each of whose rows has an interval."""
    if dim not in (None, 1) or (dim == 1 and values.ndim != 2):
        raise ValueError(f"dim is None, or 1 for the rows of a matrix, but is {dim} for shape {tuple(values.shape)}.")
    if not values.numel():
        raise ValueError(f"values of shape {tuple(values.shape)} hold no numbers, so that they have no range.")
    matrix = values.detach().reshape(1, -1) if dim is None else values.detach()
    return matrix.float()


def _shaped(column: Tensor, dim: int | None) -> Tensor:
    return column.reshape(()) if dim is None else column


def _sample(rows: Tensor, wanted: int) -> Tensor:
    """So many numbers of each row, always the same; all, if there are no more."""
    count = rows.shape[1]
    if count <= wanted:
        return rows
    # Equal strides could meet the same channel or pixel again and again.
    stride = int(count * GOLDEN)
    while gcd(stride, count) != 1:
        stride += 1
    places = torch.arange(wanted, device=rows.device) * stride % count
    return rows[:, places]


def _best_share(
    sample: Tensor, interval: Interval, shares: list[Tensor] | list[float], quant_min: int, quant_max: int
) -> Tensor:
    """Of each row the share of its whole interval that has the least error, shape `(rows, 1)`."""
    ends = [end.reshape(-1, 1) for end in interval]
    tried = [torch.as_tensor(share, device=sample.device).expand(len(sample), 1).clamp(0.01, 1) for share in shares]
    errors = torch.cat(
        [_error(sample, share * ends[0], share * ends[1], quant_min, quant_max) for share in tried], dim=1
    )
    return torch.cat(tried, dim=1).gather(1, errors.argmin(1, keepdim=True))


def _error(sample: Tensor, minimum: Tensor, maximum: Tensor, quant_min: int, quant_max: int) -> Tensor:
    scale, zero_point = affine_range(minimum, maximum, quant_min, quant_max, symmetric=quant_min < 0)
    rounded = (sample / scale).round_().clamp_(quant_min - zero_point, quant_max - zero_point).mul_(scale)
    return rounded.sub_(sample).square_().sum(1, keepdim=True)


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale.clamp(min=SMALLEST_STEP))


def _check_grid(quant_min: int, quant_max: int, symmetric: bool) -> None:
    if quant_min >= quant_max or quant_max < 1:
        raise ValueError(
            f"A grid needs quant_min < quant_max and quant_max >= 1, but has quant_min={quant_min} and "
            f"quant_max={quant_max}."
        )
    if symmetric and quant_min >= 0:
        raise ValueError(
            f"A symmetric grid needs numbers below 0, but quant_min={quant_min}. Give quant_min={-quant_max}, or "
            "symmetric=False."
        )


def _check_ends(minimum: Tensor, maximum: Tensor) -> None:
    if not (minimum.isfinite().all() and maximum.isfinite().all()):
        raise ValueError(
            f"A range from {float(minimum.min())} to {float(maximum.max())} is not finite, so no grid can cover it. "
            f"Look for overflow or division by zero before it: a lower learning rate or float32 may help."
        )
    if not (minimum <= maximum).all():
        raise ValueError(
            f"A range goes from its minimum up, but {float(minimum.max())} is above {float(maximum.min())}."
        )
