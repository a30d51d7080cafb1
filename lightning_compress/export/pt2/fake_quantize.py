"""Quantizers of activations within an exported program, in operators that every compiler knows for any batch size."""

import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# torch.export, and compilers after it, know this operator for fixed sizes only.
FAKE_QUANTIZE = torch.fake_quantize_per_tensor_affine


def fake_quantize_ops(
    input: Tensor, scale: Tensor | float, zero_point: Tensor | int, quant_min: int, quant_max: int
) -> Tensor:
    """What `torch.fake_quantize_per_tensor_affine` gives, bit for bit, by multiplying, rounding and clipping.

    Args:
        input: any shape; what is divided by `scale` is below 2**63, where the operator of torch overflows.
        scale, zero_point: numbers, or tensors of one number.
        quant_min, quant_max: ends of the grid.
    """
    if not isinstance(scale, Tensor):
        scale = _in_float32(scale)
    inverse = 1 / scale if isinstance(scale, Tensor) else _in_float32(1 / scale)
    values = input if input.dtype == torch.float32 else input.float()
    low, high = quant_min - zero_point, quant_max - zero_point
    on_grid = (values * inverse).round().clamp(low, high) * scale  # type: ignore[arg-type]
    return on_grid if input.dtype == torch.float32 else on_grid.to(input.dtype)


def _in_float32(number: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", number))[0])


def _is_number(buffer: Tensor | None) -> bool:
    return buffer is not None and buffer.numel() == 1


class ArithmeticFakeQuantize(TorchFunctionMode):
    """Within it, `fake_quantize_ops` is called in place of torch's own operator."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (fake_quantize_ops if func is FAKE_QUANTIZE else func)(*args, **(kwargs or {}))


@contextmanager
def as_python_numbers(quantizers: Iterable[nn.Module]) -> Iterator[None]:
    """Let quantizers have numbers in place of their buffers `scale` and `zero_point`: a program is shorter by these."""
    changed = [one for one in quantizers if all(_is_number(one._buffers.get(name)) for name in ("scale", "zero_point"))]
    buffers = [{name: one._buffers.pop(name) for name in ("scale", "zero_point")} for one in changed]
    try:
        for one, taken in zip(changed, buffers, strict=True):
            vars(one).update({name: buffer.item() for name, buffer in taken.items() if buffer is not None})
        yield
    finally:
        for one, taken in zip(changed, buffers, strict=True):
            for name, buffer in taken.items():
                vars(one).pop(name, None)
                one._buffers[name] = buffer
