"""Write tensors as one file, each in the shortest of three lossless codes, and read it back.

The file is `MAGIC`, the number of records (4 bytes, little-endian), and one record after another. A record is the
name (length, UTF-8), a code byte, and for code

- SAME: the place of an earlier record that holds the same tensor (tied weights);
- any other: the type byte, the number of dimensions, each dimension, and
    - DENSE: all elements;
    - BITMAP: one bit for each element, then the nonzero elements;
    - GAPS: symbol width, number of nonzeros, length of the gaps, gaps in symbols of that width, then the nonzeros.

Counts and lengths are LEB128, 7 bits a byte. Elements are little-endian in their own type, bit for bit, except that
-0.0 comes back as 0.0. The file holds shapes and names, but not the Python code of the model.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_compress.measure.element_bits import DTYPES, Words, from_words, to_words, word_size_bytes
from lightning_compress.measure.index_encoding import (
    best_width_bits,
    gaps_between,
    gaps_size_bytes,
    pack_bitmap,
    pack_gaps,
    unpack_bitmap,
    unpack_gaps,
)
from lightning_compress.measure.stored_tensors import identity

MAGIC = b"LCS1"
HEADER_SIZE_BYTES = len(MAGIC) + 4
DENSE, BITMAP, GAPS, SAME = range(4)


@dataclass(frozen=True)
class _Plan:
    """The chosen code of one tensor, and the bytes that it takes after the record's head."""

    code: int
    size_bytes: int
    width_bits: int = 0


def encode(tensors: Mapping[str, Tensor], *, sparse: bool = True) -> bytes:
    """The whole file; with `sparse=False` all elements are written, as a plain dense file would.

    Raises:
        ValueError: if an element type has no code.

    >>> len(encode({"weight": torch.zeros(100)})) < len(encode({"weight": torch.zeros(100)}, sparse=False))
    True
    """
    return b"".join([MAGIC, len(tensors).to_bytes(4, "little"), *records(tensors, sparse=sparse)])


def records(tensors: Mapping[str, Tensor], *, sparse: bool = True) -> Iterator[bytes]:
    """One record for each tensor, in order.

    >>> weight = torch.ones(2)
    >>> [len(record) for record in records({"a": weight, "tied": weight})]  # 2 + 4 + 8 bytes; 5 + 1 + 1 bytes
    [14, 7]
    """
    for name, tensor, same_as in _with_ties(tensors):
        if same_as is None:
            words = to_words(tensor)
            yield _head(name, tensor, plan := _plan(words, sparse)) + _body(words, plan)
        else:
            yield _text(name) + bytes([SAME]) + _number(same_as)


def encoded_size_bytes(tensors: Mapping[str, Tensor], *, sparse: bool = True) -> int:
    """`len(encode(tensors))` without writing it.

    >>> tensors = {"weight": torch.tensor([0.0, 0.0, 2.0])}
    >>> encoded_size_bytes(tensors) == len(encode(tensors))
    True
    """
    size_bytes = HEADER_SIZE_BYTES
    for name, tensor, same_as in _with_ties(tensors):
        if same_as is None:
            plan = _plan(to_words(tensor), sparse)
            size_bytes += len(_head(name, tensor, plan)) + plan.size_bytes
        else:
            size_bytes += len(_text(name)) + 1 + len(_number(same_as))
    return size_bytes


def as_float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with real floating-point ones as float32, and tied ones still tied.

    >>> tensors = as_float32({"a": torch.ones(1).half(), "b": torch.ones(1).int()})
    >>> {name: tensor.dtype for name, tensor in tensors.items()}
    {'a': torch.float32, 'b': torch.int32}
    """
    made: dict[object, Tensor] = {}
    return {
        name: made.setdefault(identity(tensor), tensor.float()) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def decode(data: bytes) -> dict[str, Tensor]:
    """The tensors that `encode` was given, on the CPU; tied ones are one tensor again.

    Raises:
        ValueError: if `data` is not such a file, or is cut or damaged.

    >>> decode(encode({"weight": torch.tensor([0.0, 0.0, 2.0])}))
    {'weight': tensor([0., 0., 2.])}
    """
    if data[: len(MAGIC)] != MAGIC:
        raise ValueError(f"Not a file of this code: it begins with {data[:4]!r} instead of {MAGIC!r}.")
    reader = _Reader(data, len(MAGIC))
    found: list[tuple[str, Tensor]] = []
    try:
        for _ in range(int.from_bytes(reader.take(4), "little")):
            name, code = reader.take(reader.number()).decode(), reader.take(1)[0]
            found.append((name, found[reader.number()][1] if code == SAME else _read(reader, code)))
    except (IndexError, ValueError, RuntimeError, MemoryError, OverflowError) as error:
        raise ValueError(f"The file is damaged in record {len(found)}, at byte {reader.at}: {error}") from error
    if reader.at != len(data):
        raise ValueError(f"The file is {len(data)} bytes long, but its records end at byte {reader.at}.")
    return dict(found)


def _with_ties(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, int | None]]:
    seen: dict[object, int] = {}
    for place, (name, tensor) in enumerate(tensors.items()):
        key = identity(tensor)
        yield name, tensor, seen.get(key)
        seen.setdefault(key, place)


def _plan(words: Words, sparse: bool) -> _Plan:
    dense = _Plan(DENSE, words.nbytes)
    if not sparse:
        return dense
    nonzeros = int(np.count_nonzero(words))
    bitmap = _Plan(BITMAP, (len(words) + 7) // 8 + nonzeros * words.itemsize)
    if 2 * nonzeros >= len(words):  # a gap takes two bits or more, so that the bitmap is the shorter one
        return min(dense, bitmap, key=lambda plan: plan.size_bytes)
    width_bits, symbols = best_width_bits(gaps_between(np.flatnonzero(words)))
    packed = gaps_size_bytes(symbols, width_bits)
    head = 1 + len(_number(nonzeros)) + len(_number(packed))
    gaps = _Plan(GAPS, head + packed + nonzeros * words.itemsize, width_bits)
    return min(dense, bitmap, gaps, key=lambda plan: plan.size_bytes)


def _head(name: str, tensor: Tensor, plan: _Plan) -> bytes:
    shape = b"".join(map(_number, tensor.shape))
    return _text(name) + bytes([plan.code, DTYPES.index(tensor.dtype)]) + _number(tensor.ndim) + shape


def _body(words: Words, plan: _Plan) -> bytes:
    if plan.code == DENSE:
        return words.tobytes()
    positions = np.flatnonzero(words)
    values = words[positions].tobytes()
    if plan.code == BITMAP:
        return pack_bitmap(words != 0) + values
    packed = pack_gaps(gaps_between(positions), plan.width_bits)
    return bytes([plan.width_bits]) + _number(len(positions)) + _number(len(packed)) + packed + values


def _read(reader: "_Reader", code: int) -> Tensor:
    dtype = DTYPES[reader.take(1)[0]]
    shape = tuple(reader.number() for _ in range(reader.number()))
    elements = int(np.prod(shape, dtype=object)) * (2 if dtype.is_complex else 1)
    if code == DENSE:
        return from_words(_values(reader, elements, dtype), dtype, shape)
    if code == BITMAP:
        positions = unpack_bitmap(reader.take((elements + 7) // 8), elements)
    elif code == GAPS:
        width_bits, nonzeros = reader.take(1)[0], reader.number()
        positions = unpack_gaps(reader.take(reader.number()), width_bits, nonzeros)
        if len(positions) != nonzeros:
            raise ValueError(f"{nonzeros} nonzeros are to follow, but there are gaps for {len(positions)}")
    else:
        raise ValueError(f"there is no code {code}")
    words = np.zeros(elements, f"<u{word_size_bytes(dtype)}")
    words[positions] = _values(reader, len(positions), dtype)
    return from_words(words, dtype, shape)


def _values(reader: "_Reader", count: int, dtype: torch.dtype) -> Words:
    size_bytes = word_size_bytes(dtype)
    return np.frombuffer(reader.take(count * size_bytes), f"<u{size_bytes}")


@dataclass
class _Reader:
    data: bytes
    at: int

    def take(self, count: int) -> bytes:
        if self.at + count > len(self.data):
            raise ValueError(f"{count} bytes are to follow, but {len(self.data) - self.at} are left")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self) -> int:
        value, shift = 0, 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value


def _text(text: str) -> bytes:
    data = text.encode()
    return _number(len(data)) + data


def _number(value: int) -> bytes:
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes([*data, value])
