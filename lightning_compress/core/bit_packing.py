"""Whole numbers of a few bits each, side by side without gaps.

Number `i` takes the bits `i * bits` to `(i + 1) * bits - 1` of a stream, its lowest bit first. Bit `k` of the stream is
bit `k % 8` of byte `k // 8`, counted from the lowest; after the last number the byte is filled up with zeros.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

MOST_BITS = 16
LARGEST_CODE = 2**30


def pack(codes: Tensor, bits: int) -> Tensor:
    """The numbers of a tensor in its order, `bits` bits each.

    Args:
        codes: whole numbers from 0 to `2**bits - 1`, any shape.
        bits: 1 to 16.

    Returns:
        Bytes, uint8 of shape `(ceil(codes.numel() * bits / 8),)`.

    Raises:
        ValueError: if a number needs more bits, is below 0, or is no whole number.

    >>> pack(torch.tensor([1, 2, 3, 0]), bits=2).tolist()
    [57]
    """
    _check_bits(bits)
    _check_codes(codes, bits)
    count = codes.numel()
    eights = torch.zeros(-(-count // 8), 8, dtype=_working_dtype(bits), device=codes.device)
    eights.view(-1)[:count] = codes.reshape(-1)
    packed = torch.zeros(len(eights), bits, dtype=torch.uint8, device=codes.device)
    for place, byte, shift in _meetings(bits):
        packed[:, byte] |= (_shifted_left(eights[:, place], shift) & 255).to(torch.uint8)
    return packed.reshape(-1)[: _bytes(count, bits)].clone()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The numbers that `pack` took.

    Args:
        packed: what `pack` returned.
        bits: as then, 1 to 16.
        count: how many there were.

    Returns:
        int32 of shape `(count,)`.

    Raises:
        ValueError: if `packed` is not that many bytes.

    >>> unpack(torch.tensor([57], dtype=torch.uint8), bits=2, count=4).tolist()
    [1, 2, 3, 0]
    """
    _check_bits(bits)
    _check_packed(packed, bits, count)
    filled = torch.cat([packed, packed.new_zeros(-len(packed) % bits)]).reshape(-1, bits).to(_working_dtype(bits))
    columns = [torch.zeros_like(filled[:, 0])] * 8
    for place, byte, shift in _meetings(bits):
        columns[place] = columns[place] | _shifted_left(filled[:, byte], -shift)
    codes: Tensor = torch.stack(columns, dim=1).reshape(-1)[:count] & (2**bits - 1)
    return codes.to(torch.int32)


@dataclass(frozen=True)
class Packing:
    """How the codes of a tensor are packed: as `(code - offset) / step`.

    Attributes:
        shape: of the tensor.
        bits: of each packed number, 1 to 16.
        offset: the code that is packed as 0.
        step: between the codes of neighbouring packed numbers.
    """

    shape: tuple[int, ...]
    bits: int
    offset: int = 0
    step: int = 1

    def pack(self, codes: Tensor) -> Tensor:
        """The codes as bytes."""
        return pack((codes.long() - self.offset).div(self.step, rounding_mode="floor"), self.bits)

    def unpack(self, packed: Tensor) -> Tensor:
        """The codes again, int32 of their shape."""
        stored = unpack(packed, self.bits, prod(self.shape))
        return (stored * self.step + self.offset).reshape(self.shape)


def tightest(codes: Tensor) -> Packing:
    """The packing with the fewest bits that holds these codes; where there are but two, one bit.

    Raises:
        ValueError: if they need more than 16 bits, or are larger than 2**30.

    >>> tightest(torch.tensor([-1, 1, 1]))
    Packing(shape=(3,), bits=1, offset=-1, step=2)
    """
    shape = tuple(codes.shape)
    if not codes.numel():
        return Packing(shape, 1)
    low, high = (int(one) for one in codes.aminmax())
    ends_only = bool(((codes == low) | (codes == high)).all())
    step = max(high - low, 1) if ends_only else 1
    bits = max((high - low) // step, 1).bit_length()
    if bits > MOST_BITS or max(high, -low) > LARGEST_CODE:
        raise ValueError(
            f"codes reach from {low} to {high}, which takes {bits} bits, but at most {MOST_BITS} are packed, of codes "
            f"up to {LARGEST_CODE}. Keep this tensor in floating point."
        )
    return Packing(shape, bits, low, step)


def _meetings(bits: int) -> list[tuple[int, int, int]]:
    """Where each of eight numbers meets each of their `bits` bytes: place, byte, how far left the number is moved."""
    return [
        (place, byte, place * bits - 8 * byte)
        for place in range(8)
        for byte in range(place * bits // 8, (place * bits + bits - 1) // 8 + 1)
    ]


def _shifted_left(numbers: Tensor, shift: int) -> Tensor:
    return numbers << shift if shift >= 0 else numbers >> -shift


def _working_dtype(bits: int) -> torch.dtype:
    """Where single numbers are shifted: what is one bit stays within its byte, so that masks take little memory."""
    return torch.uint8 if bits == 1 else torch.int32


def _bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def _check_bits(bits: int) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= MOST_BITS:
        raise ValueError(f"bits is a whole number from 1 to {MOST_BITS}, but is {bits!r}.")


def _check_codes(codes: Tensor, bits: int) -> None:
    if codes.is_floating_point() or codes.is_complex():
        raise ValueError(f"codes are whole numbers, but have dtype {codes.dtype}. Round and cast them.")
    if codes.numel() and (codes.amin() < 0 or codes.amax() >= 2**bits):
        raise ValueError(
            f"codes of {bits} bits are 0 to {2**bits - 1}, but these reach from {int(codes.amin())} to "
            f"{int(codes.amax())}. Subtract an offset, or take more bits."
        )


def _check_packed(packed: Tensor, bits: int, count: int) -> None:
    if packed.dtype != torch.uint8 or packed.ndim != 1:
        raise ValueError(f"packed is a row of uint8, but is {packed.dtype} of shape {tuple(packed.shape)}.")
    if count < 0 or len(packed) != _bytes(count, bits):
        raise ValueError(
            f"{count} numbers of {bits} bits are {_bytes(count, bits)} bytes, but packed has {len(packed)}."
        )
