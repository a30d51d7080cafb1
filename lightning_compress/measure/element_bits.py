"""A tensor's elements as unsigned integers of the same bits, and back."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[np.unsignedinteger[Any]]

# The place in this list is what a file stores: append only.
DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128,
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint16, torch.uint32, torch.uint64,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
)  # fmt: skip


def word_size_bytes(dtype: torch.dtype) -> int:
    """Bytes of one word: of an element, or of the real or imaginary part of a complex one.

    >>> word_size_bytes(torch.float32), word_size_bytes(torch.complex64)
    (4, 4)
    """
    return dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize


def to_words(tensor: Tensor) -> Words:
    """Flat little-endian words, two for a complex element; -0.0 becomes 0.0.

    Masking by multiplication leaves both zeros, and the sign of one would cost as much as a whole weight.

    Raises:
        ValueError: if the element type is none of `DTYPES`.

    >>> to_words(torch.tensor([1.0, -0.0])).tolist() == [0x3F800000, 0]
    True
    """
    if tensor.dtype not in DTYPES:
        raise ValueError(f"No code for tensors of type {tensor.dtype}. Convert it to one of {DTYPES}.")
    if tensor.numel() == 0:  # torch cannot view empty memory as another type
        return np.zeros(0, f"<u{word_size_bytes(tensor.dtype)}")
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    real = torch.view_as_real(plain).reshape(-1) if plain.is_complex() else plain
    size = word_size_bytes(tensor.dtype)
    words: Words = real.view(torch.uint8).numpy().view(f"<u{size}")
    return _without_negative_zero(words) if _is_wide_float(tensor.dtype) else words


def from_words(words: Words, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor whose words these are.

    >>> from_words(to_words(torch.tensor([[1.5, 0.0]])), torch.float32, (1, 2))
    tensor([[1.5000, 0.0000]])
    """
    if not len(words):
        return torch.zeros(shape, dtype=dtype)
    flat = torch.from_numpy(np.ascontiguousarray(words).view(np.uint8).copy())
    if dtype.is_complex:
        return torch.view_as_complex(flat.view(dtype.to_real()).reshape(-1, 2)).reshape(shape)
    return flat.view(dtype).reshape(shape)


def _is_wide_float(dtype: torch.dtype) -> bool:
    # In some 8-bit floats the bits of a lone sign mean NaN.
    return (dtype.is_floating_point or dtype.is_complex) and word_size_bytes(dtype) > 1


def _without_negative_zero(words: Words) -> Words:
    negative_zero = words == words.dtype.type(1 << (8 * words.itemsize - 1))
    return np.where(negative_zero, words.dtype.type(0), words) if negative_zero.any() else words
