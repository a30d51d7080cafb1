"""Quantizers whose grid is learned together with the weights."""

from typing import Any

import torch
from torch import Tensor

from lightning_compress.core.precision import to_float32
from lightning_compress.quantization.functional.rounding import (
    SMALLEST_STEP,
    Quantized,
    code_range,
    for_sides,
    gradient_between_,
    learns,
    one_where_zero,
    straight_through,
    symmetric_zero_point,
)

FIRST_CLIP = 10.0


def _first_step(values: Tensor, quant_min: int, quant_max: int) -> Tensor:
    return one_where_zero(2 * values.abs().mean(1, keepdim=True) / quant_max**0.5)


def _first_clip(values: Tensor, quant_min: int, quant_max: int) -> Tensor:
    reach = values.abs() if quant_min < 0 else values.clamp(min=0)
    return one_where_zero(reach.amax(1, keepdim=True).clamp(max=FIRST_CLIP))


@learns(step=_first_step)
@for_sides("integer", "ternary")
def lsq(values: Tensor, quant_min: int, quant_max: int, step: Tensor) -> Quantized:
    """Round to multiples of a learned step, `clip(values / step, quant_min, quant_max).round() * step`.

    Within the limits the step's gradient is `round(v / step) - v / step`, outside the limit itself; it is divided by
    `sqrt(N * quant_max)`, where N is the number of weights of a row, or of features of a sample. `values` have a
    gradient within the limits. A step that an update has thrown below zero counts by its size.

    Args:
        values: weights `(rows, elements)`, or activations `(batch, ...)`.
        quant_min, quant_max: limits; the paper's are `-2 ** (bits - 1)` and `2 ** (bits - 1) - 1` for signed numbers,
            and 0 and `2 ** bits - 1` for non-negative ones. Where quant_min is 0, negative values become 0.
        step: learned, shape `(rows, 1)`, or 0-d for activations; at first `2 * mean|v| / sqrt(quant_max)`.

    Reference: Esser et al., 2020, section 2, https://arxiv.org/abs/1902.08153

    >>> lsq(torch.tensor([[0.26, -9.0]]), -7, 7, step=torch.tensor([[0.5]])).values
    tensor([[ 0.5000, -3.5000]])
    """
    positive = step.abs().clamp(min=SMALLEST_STEP)
    features = values.shape[1:].numel() if values.ndim > 1 else values.numel()
    damping = (max(features, 1) * quant_max) ** -0.5
    found = _LearnedStep.apply(values, positive, quant_min, quant_max, damping)  # type: ignore[no-untyped-call]
    return Quantized(found, positive.detach(), symmetric_zero_point(positive))


@learns(clip=_first_clip)
@code_range(lambda quant_min, quant_max: (-quant_max if quant_min < 0 else 0, quant_max))
@for_sides("integer", "ternary")
def pact(values: Tensor, quant_max: int, clip: Tensor, quant_min: int = 0) -> Quantized:
    """Clip activations at a learned value and round to `quant_max` steps below it.

    The clip's gradient is 1 for each value that reaches it, else 0. The paper pulls it down by the weight decay of the
    weights: that is left to the optimizer. A clip that was thrown below zero counts by its size.

    Args:
        values: activations `(batch, ...)`.
        quant_max: the largest whole number.
        clip: learned, 0-d; at first 10, or the largest value of the first batch if that is smaller.
        quant_min: where it is 0, negative values become 0, as in the paper; below 0 they are clipped at `-clip`.

    Reference: Choi et al., 2018, section 3, https://arxiv.org/abs/1805.06085

    >>> pact(torch.tensor([-1.0, 1.2, 9.0]), quant_max=3, clip=torch.tensor(6.0)).values
    tensor([0., 2., 6.])
    """
    wide_values, bound = to_float32(values), clip.abs().clamp(min=SMALLEST_STEP)
    below = torch.where(wide_values < bound, wide_values, bound)
    bounded = torch.where(below > -bound, below, -bound) if quant_min < 0 else below.clamp(min=0)
    scale = bound.detach() / quant_max
    places = (bounded.detach() / scale).round_().clamp_(-quant_max, quant_max)
    return Quantized(straight_through(bounded, places * scale).to(values.dtype), scale, symmetric_zero_point(scale))


class _LearnedStep(torch.autograd.Function):
    """The core's learnable operators decide by the rounded number what lies outside; the paper by the number itself."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, step: Tensor, quant_min: int, quant_max: int, damping: float) -> Tensor:
        ctx.save_for_backward(values, step)
        ctx.quant_min, ctx.quant_max, ctx.damping = quant_min, quant_max, damping
        return (to_float32(values) / step).clamp_(quant_min, quant_max).round_().mul_(step).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # Left to autograd, with a rounding that passes gradients, the slope has none: its two parts cancel out.
        values, step = (one.detach() for one in ctx.saved_tensors)
        ratio = to_float32(values) / step
        slope = (
            ratio.clamp(ctx.quant_min, ctx.quant_max)
            .round_()
            .sub_(gradient_between_(ratio, ratio.clone(), ctx.quant_min, ctx.quant_max))
        )
        moved = slope * gradient if gradient.requires_grad else slope.mul_(gradient)
        total = moved.sum() if step.ndim == 0 else moved.sum(1, keepdim=True)
        passed = gradient_between_(gradient, ratio, ctx.quant_min, ctx.quant_max)
        return passed, (total * ctx.damping).to(step.dtype), None, None, None
