"""Where the nonzeros of a tensor lie, in few bytes: as a bitmap, or as the gaps between them in fixed-width symbols."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.integer[Any]]
WIDTHS_BITS = range(2, 17)
_CHUNK_SYMBOLS = 1 << 20  # a multiple of 8, so that each chunk ends on a whole byte


def pack_bitmap(nonzero: NDArray[np.bool_]) -> bytes:
    """One bit for each element, in order, highest bit first; the last byte is filled with zeros.

    >>> pack_bitmap(np.array([True, False, False, False, False, False, True, True, True])).hex()  # 10000011 1.......
    '8380'
    """
    return np.packbits(nonzero).tobytes()


def unpack_bitmap(data: bytes, elements: int) -> Integers:
    """Flat positions of the nonzeros of `elements` elements.

    >>> unpack_bitmap(bytes([0b10000011, 0b10000000]), elements=9).tolist()
    [0, 6, 7, 8]
    """
    return np.flatnonzero(np.unpackbits(np.frombuffer(data, np.uint8), count=elements))


def gaps_between(positions: Integers) -> Integers:
    """How many zeros lie before each nonzero, back to the one before it.

    >>> gaps_between(np.array([0, 1, 5])).tolist()
    [0, 0, 3]
    """
    return np.diff(positions, prepend=-1) - 1


def best_width_bits(gaps: Integers) -> tuple[int, int]:
    """The symbol width that needs the fewest bits, and how many symbols it needs.

    In a width of `w` bits the symbol `2**w - 1` means "that many zeros and no nonzero yet"; any smaller one means
    "that many zeros, then a nonzero". So a gap takes `gap // (2**w - 1)` of the first kind and one of the second.

    >>> best_width_bits(np.array([0, 2, 1]))  # three gaps below 3: symbols of 2 bits
    (2, 3)
    >>> best_width_bits(np.array([6, 6, 6]))  # 3 symbols of 3 bits are shorter than 9 of 2
    (3, 3)
    """
    lengths, counts = np.unique(gaps, return_counts=True)
    symbols = {width: len(gaps) + int((lengths // _escape(width) * counts).sum()) for width in WIDTHS_BITS}
    width = min(symbols, key=lambda bits: bits * symbols[bits])
    return width, symbols[width]


def pack_gaps(gaps: Integers, width_bits: int) -> bytes:
    """Gaps as symbols of `width_bits`, see `best_width_bits`; the last byte is filled with zeros.

    >>> pack_gaps(np.array([0, 4]), width_bits=2).hex()  # 00, then 11 ("3 zeros") and 01
    '34'
    """
    escape = _escape(width_bits)
    skips = gaps // escape
    symbols = np.full(len(gaps) + int(skips.sum()), escape, dtype=np.uint16)
    symbols[np.cumsum(skips + 1) - 1] = gaps % escape
    starts = range(0, len(symbols), _CHUNK_SYMBOLS)
    return b"".join(_packed(symbols[start : start + _CHUNK_SYMBOLS], width_bits) for start in starts)


def unpack_gaps(data: bytes, width_bits: int, nonzeros: int) -> Integers:
    """Flat positions of the first `nonzeros` nonzeros.

    Raises:
        ValueError: if no symbol is that wide.

    >>> unpack_gaps(bytes([0b00110100]), width_bits=2, nonzeros=2).tolist()  # gaps of 0 and 4 zeros
    [0, 5]
    """
    if width_bits not in WIDTHS_BITS:
        raise ValueError(f"symbols are 2 to 16 bits wide, not {width_bits}")
    chunk_bytes = _CHUNK_SYMBOLS * width_bits // 8
    chunks = [data[start : start + chunk_bytes] for start in range(0, len(data), chunk_bytes)]
    symbols = np.concatenate([_unpacked(chunk, width_bits) for chunk in chunks] or [np.zeros(0, np.int64)])
    escape = _escape(width_bits)
    steps = np.where(symbols == escape, escape, symbols + 1)
    positions: Integers = (np.cumsum(steps) - 1)[symbols != escape]
    return positions[:nonzeros]


def gaps_size_bytes(symbols: int, width_bits: int) -> int:
    """Length of what `pack_gaps` returns for so many symbols.

    >>> gaps_size_bytes(symbols=3, width_bits=3)  # 9 bits
    2
    """
    return (symbols * width_bits + 7) // 8


def _escape(width_bits: int) -> int:
    return int((1 << width_bits) - 1)


def _packed(symbols: Integers, width_bits: int) -> bytes:
    shifts = np.arange(width_bits - 1, -1, -1, dtype=np.uint16)
    return np.packbits((symbols[:, None] >> shifts & 1).astype(np.uint8)).tobytes()


def _unpacked(data: bytes, width_bits: int) -> Integers:
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    entire = bits[: len(bits) // width_bits * width_bits].reshape(-1, width_bits)
    symbols: Integers = np.matmul(entire, 1 << np.arange(width_bits - 1, -1, -1, dtype=np.int64))
    return symbols
