"""Quantizers that bring everything into [-1, 1], where their grid is fixed: DoReFa and WAGE."""

import torch
from torch import Tensor

from lightning_compress.core.precision import to_float32
from lightning_compress.quantization.functional.rounding import (
    Quantized,
    bounds,
    code_range,
    for_sides,
    one_where_zero,
    scale_of_rows,
    straight_through,
    symmetric_zero_point,
)


@for_sides("integer", "ternary")
def dorefa_weights(values: Tensor, quant_max: int) -> Quantized:
    """Squash weights by tanh, divide by the largest of the row, round to `quant_max` steps on each side of zero.

    The gradient goes through the division and the tanh. The size of the weights is lost, so that a normalization has
    to follow. The paper's grid has one level more, `2 ** bits`, and none of them is zero; this one keeps zeros, and is
    a grid of whole numbers. The paper has one row for the whole layer.

    Args:
        values: weights `(rows, elements)`.
        quant_max: the largest whole number.

    Returns:
        Values in [-1, 1], scale `1 / quant_max`.

    Reference: Zhou et al., 2016, section 2.3, https://arxiv.org/abs/1606.06160

    >>> dorefa_weights(torch.tensor([[9.0, 0.0, -0.5]]), quant_max=7).values
    tensor([[ 1.0000,  0.0000, -0.4286]])
    """
    squashed = to_float32(values).tanh()
    shares = squashed / one_where_zero(squashed.abs().amax(1, keepdim=True))
    scale = scale_of_rows(values, 1 / quant_max)
    rounded = (shares.detach() * quant_max).round_() * scale
    return Quantized(straight_through(shares, rounded).to(values.dtype), scale, symmetric_zero_point(scale))


@code_range(lambda quant_min, quant_max: (-quant_max if quant_min < 0 else 0, quant_max))
@for_sides("integer", "ternary", "binary")
def dorefa_activations(values: Tensor, quant_max: int, quant_min: int = 0) -> Quantized:
    """Clip activations to [0, 1] and round to `quant_max` steps. The gradient passes within the bounds.

    Args:
        values: activations of any shape.
        quant_max: the largest whole number.
        quant_min: where it is below 0, the bounds are [-1, 1].

    Returns:
        Values in [0, 1], or [-1, 1], scale `1 / quant_max`.

    Reference: Zhou et al., 2016, section 2.4, https://arxiv.org/abs/1606.06160

    >>> dorefa_activations(torch.tensor([-1.0, 0.2, 0.9, 2.0]), quant_max=3).values
    tensor([0.0000, 0.3333, 1.0000, 1.0000])
    """
    bounded = to_float32(values).clamp(-1.0 if quant_min < 0 else 0.0, 1.0)
    scale = torch.tensor(1 / quant_max, device=values.device)
    rounded = (bounded.detach() * quant_max).round_() * scale
    return Quantized(straight_through(bounded, rounded).to(values.dtype), scale, symmetric_zero_point(scale))


@bounds(lambda quant_max: quant_max / (quant_max + 1))
@for_sides("integer", "ternary")
def wage_weights(values: Tensor, quant_max: int) -> Quantized:
    """Round weights to multiples of `2 ** (1 - bits)` in (-1, 1). The gradient passes where `|values| <= 1`.

    The weights themselves are clipped to (-1, 1) after each update (`bounds`). The paper also draws them from
    +-max(1.5 * scale, sqrt(6 / inputs)) and divides the layer's output by a power of two: that is left to others.

    Args:
        values: weights `(rows, elements)`.
        quant_max: the largest whole number, `2 ** (bits - 1) - 1`.

    Returns:
        Values, scale `1 / (quant_max + 1)`.

    Reference: Wu et al., 2018, section 3.3, https://arxiv.org/abs/1802.04680

    >>> wage_weights(torch.tensor([[0.3, -2.0]]), quant_max=7).values
    tensor([[ 0.2500, -0.8750]])
    """
    scale = scale_of_rows(values, 1 / (quant_max + 1))
    places = (to_float32(values) * (quant_max + 1)).round_().clamp_(-quant_max, quant_max)
    return Quantized(straight_through(values, places * scale, values.abs() <= 1), scale, symmetric_zero_point(scale))


@code_range(lambda _quant_min, quant_max: (1, 2 * ((quant_max + 1) // 2) - 1))
@for_sides("integer")
def wage_activations(values: Tensor, quant_max: int) -> Quantized:
    """Round activations to multiples of `2 ** (1 - bits)` in (-1, 1). The gradient passes within the outermost ones.

    Args:
        values: activations of any shape, of either sign.
        quant_max: the largest whole number, `2 ** bits - 1`; zero lies in the middle.

    Returns:
        Values, scale `2 / (quant_max + 1)`, zero point `(quant_max + 1) / 2`.

    Reference: Wu et al., 2018, section 3.3.2, https://arxiv.org/abs/1802.04680

    >>> wage_activations(torch.tensor([0.3, -2.0]), quant_max=15).values
    tensor([ 0.2500, -0.8750])
    """
    middle = (quant_max + 1) // 2
    scale = torch.tensor(1 / middle, device=values.device)
    bounded = to_float32(values).clamp(-(middle - 1) / middle, (middle - 1) / middle)
    rounded = (bounded.detach() * middle).round_() * scale
    return Quantized(straight_through(bounded, rounded).to(values.dtype), scale, symmetric_zero_point(scale) + middle)
