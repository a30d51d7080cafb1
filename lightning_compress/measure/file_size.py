"""Lengths of the files that hold a model, record by record, and of their gzip."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_compress.measure.sparse_encoding import HEADER_SIZE_BYTES, MAGIC, records

# Some 20 MB go through gzip in a second; a larger model would wait for a trivial baseline.
GZIP_LIMIT_BYTES = 200_000_000


@dataclass(frozen=True)
class FileSize:
    """Bytes of a file as `sparse_encoding.encode` writes it, of each of its records, and of its gzip at level 6.

    `gzip_bytes` is None where it was not asked for, or the tensors are larger than `GZIP_LIMIT_BYTES`.

    >>> from torch import ones
    >>> file_size({"a": ones(2)}, sparse=True, gzip=False)
    FileSize(size_bytes=22, record_bytes={'a': 14}, gzip_bytes=None)
    """

    size_bytes: int
    record_bytes: dict[str, int]
    gzip_bytes: int | None


def file_size(tensors: Mapping[str, Tensor], *, sparse: bool, gzip: bool = True) -> FileSize:
    """Write the file, one record at a time, and measure it; no more than one record is held in memory.

    >>> from torch import zeros
    >>> sparse, dense = (file_size({"weight": zeros(1000)}, sparse=sparse) for sparse in (True, False))
    >>> sparse.size_bytes < dense.size_bytes, dense.gzip_bytes < dense.size_bytes
    (True, True)
    """
    zips = gzip and sum(tensor.nbytes for tensor in tensors.values()) <= GZIP_LIMIT_BYTES
    zipped, gzip_bytes = zlib.compressobj(level=6, wbits=31), 0
    record_bytes = {}
    header = MAGIC + len(tensors).to_bytes(4, "little")
    gzip_bytes += len(zipped.compress(header))
    for name, record in zip(tensors, records(tensors, sparse=sparse), strict=True):
        record_bytes[name] = len(record)
        gzip_bytes += len(zipped.compress(record)) if zips else 0
    gzip_bytes += len(zipped.flush())
    return FileSize(HEADER_SIZE_BYTES + sum(record_bytes.values()), record_bytes, gzip_bytes if zips else None)
