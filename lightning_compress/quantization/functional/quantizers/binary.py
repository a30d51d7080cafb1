"""Quantizers to two levels, of which none is zero: a weight that was pruned comes back as the upper one."""

import torch
from torch import Tensor
from torch.nn import functional

from lightning_compress.core.precision import to_float32
from lightning_compress.quantization.functional.rounding import (
    Quantized,
    bounds,
    code_range,
    for_sides,
    one_where_zero,
    scale_of_rows,
    sign,
    straight_through,
    symmetric_zero_point,
    uniform_noise,
)


@bounds(lambda _high: 1.0)
@for_sides("binary")
def binary_connect(values: Tensor) -> Quantized:
    """The sign of each weight. The gradient passes where `|values| <= 1`.

    The weights themselves are clipped to [-1, 1] after each update (`bounds`). No zeros.

    Args:
        values: weights `(rows, elements)`.

    Returns:
        Values -1 and +1, scale 1.

    Reference: Courbariaux et al., 2015, section 2.2, https://arxiv.org/abs/1511.00363

    >>> binary_connect(torch.tensor([[0.3, -2.0]])).values
    tensor([[ 1., -1.]])
    """
    scale = scale_of_rows(values, 1.0)
    return Quantized(straight_through(values, sign(values), values.abs() <= 1), scale, symmetric_zero_point(scale))


@bounds(lambda _high: 1.0)
@for_sides("binary")
def stochastic_binary(values: Tensor, generator: torch.Generator | None) -> Quantized:
    """As `binary_connect`, but +1 with the probability `clip((values + 1) / 2, 0, 1)`. No zeros.

    Without a generator it is `binary_connect`.

    Reference: Courbariaux et al., 2015, section 2.2, https://arxiv.org/abs/1511.00363

    >>> stochastic_binary(torch.tensor([[2.0, -2.0]]), torch.Generator().manual_seed(0)).values
    tensor([[ 1., -1.]])
    """
    if generator is None:
        return binary_connect(values)
    scale = scale_of_rows(values, 1.0)
    result = sign((to_float32(values) + 1) / 2 - uniform_noise(values, generator))
    return Quantized(straight_through(values, result, values.abs() <= 1), scale, symmetric_zero_point(scale))


@for_sides("binary")
def xnor(values: Tensor) -> Quantized:
    """The sign of each weight times the mean size of its row. No zeros, but in a row of nothing else.

    The gradient goes through the mean, and where `|values| <= 1` through the sign too. The paper prints `1 / elements`
    for the first of these, which leaves out the other weights of the row.

    Args:
        values: weights `(rows, elements)`; in the paper a row is a filter.

    Returns:
        Values, scale: the mean size of the row.

    Reference: Rastegari et al., 2016, section 3.1, https://arxiv.org/abs/1603.05279

    >>> xnor(torch.tensor([[0.5, -1.5]])).values
    tensor([[ 1., -1.]])
    """
    wide_values = to_float32(values)
    mean = wide_values.abs().mean(1, keepdim=True)
    signs = straight_through(wide_values, sign(wide_values), wide_values.abs() <= 1)
    scale = one_where_zero(mean.detach()).float()
    return Quantized((signs * mean).to(values.dtype), scale, symmetric_zero_point(scale))


@code_range(lambda quant_min, _quant_max: (quant_min, 1), two_level=True)
@for_sides("binary")
def bnn(values: Tensor, quant_min: int = -1) -> Quantized:
    """The sign of each activation. The gradient passes where `|values| <= 1`. No zeros where both signs can come.

    Args:
        values: activations of any shape; in the paper of either sign, with a BatchNorm before and no ReLU.
        quant_min: 0 where none is below zero, as behind a ReLU, whose two levels are 0 and 1: what it takes is above
            or not.

    Returns:
        Values `quant_min` and 1, scale 1.

    Reference: Hubara et al., 2016, section 1, https://arxiv.org/abs/1602.02830

    >>> bnn(torch.tensor([0.5, -1.5])).values
    tensor([ 1., -1.])
    >>> bnn(torch.tensor([0.5, 0.0]), quant_min=0).values
    tensor([1., 0.])
    """
    scale = torch.ones((), device=values.device)
    return Quantized(
        straight_through(values, _signs(values, quant_min), values.abs() <= 1), scale, symmetric_zero_point(scale)
    )


@for_sides("binary")
def xnor_activations(values: Tensor, quant_min: int = -1, window: int = 1) -> Quantized:
    """The sign of each activation times the mean size of the channels at its place. No zeros where both signs can come.

    The gradient passes where `|values| <= 1`, times that mean. The paper multiplies what a binary convolution returns
    by the means, averaged over the kernel's window; on its input, as here, that is the same for 1 x 1 kernels.

    Args:
        values: activations `(batch, features)`, `(batch, tokens, features)` or `(batch, channels, *space)` of two or
            more dimensions of space.
        quant_min: as in `bnn`.
        window: width in height and width of the box that means are averaged over, an odd number; 1 for none.

    Returns:
        Values, and no scale: it differs from place to place.

    Raises:
        ValueError: if the window is no odd number above 0.

    Reference: Rastegari et al., 2016, section 3.2, https://arxiv.org/abs/1603.05279

    >>> xnor_activations(torch.tensor([[1.0, -3.0], [0.5, 0.5]])).values
    tensor([[ 2.0000, -2.0000],
            [ 0.5000,  0.5000]])
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window is an odd number of places from 1 on, but is {window}. For 3 x 3 kernels write 3.")
    mean = to_float32(values.detach()).abs().mean(1 if values.ndim > 3 else -1, keepdim=True)
    if window > 1 and values.ndim == 4:
        mean = functional.avg_pool2d(mean, window, stride=1, padding=window // 2)
    return Quantized(straight_through(values, _signs(values, quant_min) * mean, mean * (values.abs() <= 1)), None, None)


def _signs(values: Tensor, quant_min: int) -> Tensor:
    """The two levels of activations; what is no number stays none."""
    return sign(values) if quant_min < 0 else torch.where(values > 0, 1.0, 0.0 * values)
