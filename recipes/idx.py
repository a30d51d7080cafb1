"""Read the IDX files in which MNIST is published, gzipped or not, without trusting what their headers claim."""

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

GZIP_MAGIC = b"\x1f\x8b"
UNSIGNED_BYTE = 0x08
LARGEST_COUNT = 1_000_000
CHUNK_BYTES = 1 << 20


def read_idx(path: Path, item_shape: tuple[int, ...]) -> Tensor:
    """Read an IDX file of unsigned bytes.

    Args:
        path: the file; gzip is known by its first bytes, not by its name.
        item_shape: shape of one item, `(28, 28)` for MNIST's images and `()` for its labels.

    Returns:
        uint8, shape `(count, *item_shape)`.

    Raises:
        ValueError: if the header is not that of such a file, or the data is shorter or longer than it says.
    """
    try:
        with _opened(path) as file:
            shape = _read_shape(file, path, item_shape)
            return _read_exactly(file, path, math.prod(shape)).view(shape)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is a damaged gzip file ({error}). Fetch it anew.") from error


def _opened(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        zipped = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
    return gzip.open(path, "rb") if zipped else path.open("rb")  # type: ignore[return-value]


def _read_shape(file: BinaryIO, path: Path, item_shape: tuple[int, ...]) -> tuple[int, ...]:
    dimensions = 1 + len(item_shape)
    magic = bytes([0, 0, UNSIGNED_BYTE, dimensions])
    header = file.read(4 + 4 * dimensions)
    if header[:4] != magic:
        raise ValueError(
            f"{path} starts with 0x{header[:4].hex()}; an IDX file of this kind starts with 0x{magic.hex()}."
        )
    if len(header) < 4 + 4 * dimensions:
        raise ValueError(f"{path} ends within its header, after {len(header)} bytes. Fetch it anew.")
    shape = tuple(int.from_bytes(header[start : start + 4], "big") for start in range(4, len(header), 4))
    if shape[1:] != item_shape or not 0 < shape[0] <= LARGEST_COUNT:
        raise ValueError(
            f"{path} claims to hold {shape[0]} items of shape {shape[1:]}, "
            f"but 1 to {LARGEST_COUNT:,} of shape {item_shape} are expected."
        )
    return shape


def _read_exactly(file: BinaryIO, path: Path, size_bytes: int) -> Tensor:
    # Chunk by chunk: memory grows with what is there, not with what the header claims.
    data = bytearray()
    while chunk := file.read(min(CHUNK_BYTES, size_bytes + 1 - len(data))):
        data += chunk
    if len(data) != size_bytes:
        found = f"only {len(data):,}" if len(data) < size_bytes else "more"
        raise ValueError(f"{path} should hold {size_bytes:,} bytes after its header, but holds {found}. Fetch it anew.")
    return torch.frombuffer(data, dtype=torch.uint8)
