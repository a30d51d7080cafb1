"""Quantizing what flows back: errors, which go from layer to layer, and gradients, which go to the optimizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_compress.core.precision import to_float32
from lightning_compress.quantization.functional.rounding import sign, straight_through, uniform_noise


def quantize_gradient(values: Tensor, quantizer: Callable[[Tensor], Tensor]) -> Tensor:
    """`values` as they are; what flows back through here is quantized.

    Args:
        values: of any shape.
        quantizer: of the gradient, same shape in and out.

    >>> values = torch.zeros(3, requires_grad=True)
    >>> loss = (quantize_gradient(values, torch.round) * torch.tensor([0.2, 1.7, -3.1])).sum()
    >>> loss.backward()
    >>> values.grad
    tensor([ 0.,  2., -3.])
    """
    same: Tensor = _QuantizedGradient.apply(values, quantizer)  # type: ignore[no-untyped-call]
    return same


def dorefa(gradient: Tensor, bits: int, generator: torch.Generator) -> Tensor:
    """Round to `2 ** bits` levels between minus and plus the largest size of each sample, after adding noise.

    The noise of up to half a step makes the rounding right on average. No level is zero, but a sample of zeros stays.

    Args:
        gradient: of what a layer returns, shape `(batch, ...)`.
        bits: of one number, from 1 on.
        generator: of the noise.

    Raises:
        ValueError: if the bits are no whole number from 1 to 16.

    Reference: Zhou et al., 2016, section 2.5, https://arxiv.org/abs/1606.06160

    >>> gradient = torch.tensor([[1.0, 0.5, 0.0, -1.0]])
    >>> dorefa(gradient, bits=8, generator=torch.Generator().manual_seed(0)).shape
    torch.Size([1, 4])
    """
    steps = _levels(bits, smallest=1) - 1
    largest = _largest_of_samples(gradient)
    shares = to_float32(gradient) / (2 * torch.where(largest == 0, 1.0, largest)) + 0.5
    noisy = shares + (uniform_noise(gradient, generator) - 0.5) / steps
    rounded = (noisy.clamp(0, 1) * steps).round() / steps
    return (2 * largest * (rounded - 0.5)).to(gradient.dtype)


def wage_errors(error: Tensor, bits: int) -> Tensor:
    """Divide by the power of two nearest to the largest size, and round to multiples of `2 ** (1 - bits)` in (-1, 1).

    The errors' size is lost, only their direction goes on: the paper's updates do not depend on it.

    Args:
        error: gradient of what a layer returns, of any shape.
        bits: of one number, from 2 on.

    Raises:
        ValueError: if the bits are no whole number from 2 to 16.

    Reference: Wu et al., 2018, section 3.3.3, https://arxiv.org/abs/1802.04680

    >>> wage_errors(torch.tensor([1.0, 0.3, -0.001]), bits=4)
    tensor([0.8750, 0.2500, -0.0000])
    """
    half = _levels(bits, smallest=2) // 2
    return ((_shifted(error) * half).round().clamp(1 - half, half - 1) / half).to(error.dtype)


def wage_gradients(gradient: Tensor, bits: int, generator: torch.Generator, learning_rate: float = 1.0) -> Tensor:
    """Divide by the power of two nearest to the largest size, and round by chance to multiples of `2 ** (1 - bits)`.

    Args:
        gradient: of a weight, of any shape.
        bits: of one number, from 2 on.
        generator: of the rounding.
        learning_rate: in steps of the grid; above 0, in the paper a power of two. The result is the whole update, for
            plain SGD of learning rate 1.

    Raises:
        ValueError: if the bits are no whole number from 2 to 16, or the learning rate is not above 0.

    Reference: Wu et al., 2018, section 3.3.4, https://arxiv.org/abs/1802.04680

    >>> wage_gradients(torch.tensor([1.0, -0.5]), bits=8, generator=torch.Generator().manual_seed(0))
    tensor([0.0078, -0.0000])
    """
    half = _levels(bits, smallest=2) // 2
    if not learning_rate > 0:
        raise ValueError(
            f"learning_rate is above 0, but is {learning_rate}. It counts steps of the grid: begin with 8."
        )
    sizes = learning_rate * _shifted(gradient)
    floored = sizes.abs().floor()
    chosen = floored + (uniform_noise(gradient, generator) < sizes.abs() - floored)
    return (sign(sizes) * chosen / half).to(gradient.dtype)


class _QuantizedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, quantizer: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.quantizer = quantizer
        return values.clone()  # a view of what a function was given may not be changed in place, as ReLU may do

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        found = ctx.quantizer(gradient.detach())
        return (straight_through(gradient, found) if gradient.requires_grad else found), None


def _shifted(values: Tensor) -> Tensor:
    """Divided by the power of two that is nearest to the largest size, in the exponent."""
    largest = to_float32(values).abs().max()
    # Beyond these powers float32 has no normal numbers, and the quotient would be infinite.
    power = torch.where(largest == 0, 1.0, largest).log2().round().clamp(-126, 126)
    return torch.ldexp(to_float32(values), -power)


def _largest_of_samples(values: Tensor) -> Tensor:
    sizes = to_float32(values).abs()
    return sizes.amax(tuple(range(1, values.ndim)), keepdim=True) if values.ndim > 1 else sizes


def _levels(bits: int, smallest: int) -> int:
    if isinstance(bits, bool) or not isinstance(bits, int) or not smallest <= bits <= 16:
        raise ValueError(f"bits is a whole number from {smallest} to 16, but is {bits!r}. The papers take 6 or 8.")
    return 1 << bits
