"""Quantizers that learn nothing and bend nothing: grids of a given scale, and short floating point."""

from typing import Any

import torch
from torch import Tensor

from lightning_compress.core.precision import to_float32
from lightning_compress.quantization.functional.rounding import (
    Quantized,
    for_sides,
    gradient_between_,
    limits_around_zero,
    straight_through,
    uniform_noise,
)


@for_sides("integer", "ternary")
def uniform(values: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Quantized:
    """Round to a multiple of `scale`, halves to even, and clamp the codes to `[quant_min, quant_max]`.

    The gradient passes where the rounded number lies within the limits. Values are those of
    `torch.fake_quantize_per_channel_affine` and `torch.fake_quantize_per_tensor_affine`, bit for bit, but for what is
    no number, which those turn into one.

    Args:
        values: weights `(rows, elements)`, or activations of any shape.
        scale: shape `(rows, 1)`, or 0-d for activations.
        zero_point: int32 in `[quant_min, quant_max]`, shape as `scale`.
        quant_min, quant_max: limits of the whole numbers.

    Reference: Jacob et al., 2018, section 3, https://arxiv.org/abs/1712.05877

    >>> scale, zero_point = torch.tensor(0.5), torch.tensor(0, dtype=torch.int32)
    >>> uniform(torch.tensor([0.6, -9.0, 9.0]), scale, zero_point, -8, 7).values
    tensor([ 0.5000, -4.0000,  3.5000])
    """
    return Quantized(_on_grid(values, scale, zero_point, quant_min, quant_max), scale, zero_point)


@for_sides("integer", "ternary")
def stochastic(
    values: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, generator: torch.Generator | None
) -> Quantized:
    """As `uniform`, but round up with the probability of the fraction that rounding down would lose.

    On average nothing is lost; what lies on the grid stays where it is. Without a generator it is `uniform`.

    Reference: Gupta et al., 2015, section 3.1, https://arxiv.org/abs/1502.02551

    >>> scale, zero_point = torch.tensor(0.5), torch.tensor(0, dtype=torch.int32)
    >>> stochastic(torch.tensor([0.6, -9.0]), scale, zero_point, -8, 7, generator=None).values
    tensor([ 0.5000, -4.0000])
    """
    chances = None if generator is None else uniform_noise(values, generator)
    return Quantized(_on_grid(values, scale, zero_point, quant_min, quant_max, chances), scale, zero_point)


@for_sides("float")
def floating(values: Tensor, dtype: torch.dtype) -> Quantized:
    """Round to the nearest number of a short floating point format; what is too large becomes its largest.

    There is no scale: weights far below 1 lose digits in 8 bits, whose smallest normal numbers are 2 ** -6 (e4m3) and
    2 ** -14 (e5m2). The gradient passes within the range of the format.

    Args:
        values: of any shape.
        dtype: of torch, narrower than float32.

    Returns:
        Values in the precision that was given, scale None.

    Reference: Micikevicius et al., 2018, https://arxiv.org/abs/1710.03740, and 2022, https://arxiv.org/abs/2209.05433

    >>> floating(torch.tensor([1.06, 1e9]), torch.float8_e4m3fn).values
    tensor([  1., 448.])
    """
    largest = torch.finfo(dtype).max
    bounded = to_float32(values).clamp(-largest, largest)
    return Quantized(straight_through(values, bounded.to(dtype), to_float32(values).abs() <= largest), None, None)


def _on_grid(
    values: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, chances: Tensor | None = None
) -> Tensor:
    found: Tensor = _Uniform.apply(values, scale, zero_point, quant_min, quant_max, chances)  # type: ignore[no-untyped-call]
    return found


class _Uniform(torch.autograd.Function):
    """The core's fused operators take ten times as long as these few, and hide what is no number."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        quant_min: int,
        quant_max: int,
        chances: Tensor | None,
    ) -> Tensor:
        ctx.limits = limits_around_zero(zero_point, quant_min, quant_max)
        # What the values were is kept by others too, and takes less time to round again than a mask to apply. The scale
        # may have followed other values, in place, before the gradient comes.
        scale = scale.clone()
        ctx.save_for_backward(values, scale, chances)
        return _steps(values, scale, chances).clamp_(*ctx.limits).mul_(scale).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, scale, chances = ctx.saved_tensors
        steps, (lowest, highest) = _steps(values.detach(), scale, chances), ctx.limits
        return gradient_between_(gradient, steps, lowest - 0.5, highest + 0.5), None, None, None, None, None


def _steps(values: Tensor, scale: Tensor, chances: Tensor | None) -> Tensor:
    """How many steps each value is away from zero, as a whole number that may lie outside the limits."""
    # To multiply, not to divide, is what torch's own operators do: it may decide to which side a half falls.
    ratio = to_float32(values) * (1 / scale)
    if chances is None:
        return ratio.round_()
    floored = ratio.floor()
    return floored.add_(chances < ratio - floored)
