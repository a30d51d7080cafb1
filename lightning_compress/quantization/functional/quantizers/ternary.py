"""Quantizers of weights to three levels: below, at and above zero."""

import torch
from torch import Tensor

from lightning_compress.core.precision import to_float32
from lightning_compress.quantization.functional.rounding import (
    SMALLEST_STEP,
    Quantized,
    for_sides,
    learns,
    one_where_zero,
    straight_through,
    symmetric_zero_point,
)


@for_sides("ternary")
def twn(values: Tensor) -> Quantized:
    """Weights beyond 0.7 of their row's mean size become +-the mean size of those, the others 0.

    The gradient passes everywhere.

    Args:
        values: weights `(rows, elements)`.

    Returns:
        Values, scale: the mean size of the row's large weights.

    Reference: Li and Liu, 2016, section 2, https://arxiv.org/abs/1605.04711

    >>> twn(torch.tensor([[0.1, 1.0, -3.0]])).values
    tensor([[ 0.,  2., -2.]])
    """
    sizes = to_float32(values.detach()).abs()
    large = sizes > 0.7 * sizes.mean(1, keepdim=True)
    scale = one_where_zero(_mean_where(large, sizes)).float()
    return Quantized(
        straight_through(values, values.detach().sign() * large * scale), scale, symmetric_zero_point(scale)
    )


def _threshold(values: Tensor) -> Tensor:
    return 0.05 * values.abs().amax(1, keepdim=True)


def _mean_where(chosen: Tensor, sizes: Tensor) -> Tensor:
    return (sizes * chosen).sum(1, keepdim=True) / chosen.sum(1, keepdim=True).clamp(min=1)


def _first_positive(values: Tensor, quant_min: int, quant_max: int) -> Tensor:
    return one_where_zero(_mean_where(values > _threshold(values), values.abs()))


def _first_negative(values: Tensor, quant_min: int, quant_max: int) -> Tensor:
    return one_where_zero(_mean_where(values < -_threshold(values), values.abs()))


@learns(positive=_first_positive, negative=_first_negative)
@for_sides("ternary")
def ttq(values: Tensor, positive: Tensor, negative: Tensor) -> Quantized:
    """Weights beyond 0.05 of their row's largest become `positive` or `-negative`, both learned, the others 0.

    Each of the two has the gradients of the weights in its place, summed; a weight has its own, times the level that it
    has become, or times 1 at zero. A level that was thrown below zero counts by its size.

    Args:
        values: weights `(rows, elements)`.
        positive, negative: learned, shape `(rows, 1)`; at first the mean size of the weights of that sign beyond the
            threshold, as it suits a trained network (the paper divides a layer by its largest weight before).

    Returns:
        Values, and no scale: the two levels differ in size.

    Reference: Zhu et al., 2017, section 3, https://arxiv.org/abs/1612.01064

    >>> values, levels = torch.tensor([[0.01, 1.0, -3.0]]), torch.tensor([[2.0]])
    >>> ttq(values, positive=levels, negative=levels / 4).values
    tensor([[ 0.0000,  2.0000, -0.5000]])
    """
    threshold = _threshold(to_float32(values.detach()))
    above, below = values > threshold, values < -threshold
    upper, lower = (level.abs().clamp(min=SMALLEST_STEP) for level in (positive, negative))
    # The product is 0, unless a weight of the row is no number: that must not vanish.
    levels = torch.where(above, upper, torch.where(below, -lower, 0 * threshold))
    slopes = torch.where(above, upper.detach(), torch.where(below, lower.detach(), torch.ones_like(upper)))
    # Of this sum, the levels alone are left in the values, and both terms in the gradient.
    return Quantized(levels.to(values.dtype) + straight_through(values, torch.zeros_like(values), slopes), None, None)
