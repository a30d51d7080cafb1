"""How a cache of a teacher's outputs lies on disk: forms of an output, and one array of rows per part of it."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

NAMES = ("float16", "bfloat16", "float32", "float64", "bool", "uint8", "int8", "int16", "int32", "int64")
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in NAMES}
KEYS = ("", "keys")

Output = tuple[torch.dtype, tuple[int, ...]]  # type and shape for one sample
Part = tuple[str, str]  # name of an output, and what is stored of it


@dataclass(frozen=True)
class CacheFormat:
    """How outputs are stored: as they are, with other `floats`, or as the `top` most probable classes.

    The latter are log-probabilities in float16, their places in the last dimension, and the log of the probability mass
    of the rest, spread evenly over it on reading. So log-probabilities are read: logits whose softmax at temperature 1
    is that of the teacher for these classes, up to float16.
    """

    floats: torch.dtype | None = None
    top: int | None = None

    def encode(self, name: str, output: Tensor) -> dict[str, Tensor]:
        """What is stored of an output `(batch, ...)`."""
        if self.top is not None:
            return _top(name, output, self.top)
        return {"values": output.to(self.floats) if self.floats and output.is_floating_point() else output}

    def decode(self, parts: Mapping[str, Tensor], output: Output) -> Tensor:
        """The output again, in its own type."""
        dtype, shape = output
        if self.top is None:
            return parts["values"].to(dtype)
        logs = (parts["rest"] - math.log(shape[-1] - self.top)).repeat(*[1] * len(shape), shape[-1])
        return logs.scatter_(-1, parts["places"].long(), parts["values"].to(logs.dtype)).to(dtype)


def parse_cache_format(form: str) -> CacheFormat:
    """Read "full", "float16" or "top-k".

    Raises:
        ValueError: if it is none of them.

    >>> parse_cache_format("top-20")
    CacheFormat(floats=None, top=20)
    """
    if form in ("full", "float16"):
        return CacheFormat(floats=torch.float16 if form == "float16" else None)
    top = re.fullmatch("top-([1-9][0-9]{0,8})", form) if isinstance(form, str) else None
    if top is None:
        raise ValueError(f'form is {form!r}. Write "full", "float16", or "top-20" for the 20 most probable classes.')
    return CacheFormat(top=int(top[1]))


@dataclass(frozen=True)
class StoredArray:
    """A file that has a row for each sample."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return np.dtype(dtype_name(storage_dtype(self.dtype)))

    def create(self, folder: Path) -> np.memmap[Any, Any]:
        return np.lib.format.open_memmap(folder / self.file, "w+", self.numpy_dtype, self.shape)

    def open(self, folder: Path) -> np.ndarray[Any, Any]:
        """Map the file for reading, once its length is known to be right."""
        try:
            with (folder / self.file).open("rb") as file:
                np.lib.format.read_magic(file)
                shape, by_column, dtype = np.lib.format.read_array_header_1_0(file)
                begin, end = file.tell(), file.seek(0, os.SEEK_END)
        except Exception as error:  # numpy has several parsers for its own header, and each has its errors
            raise damaged_cache_error(folder, f"{self.file} cannot be read ({error}).") from error
        if (shape, by_column, dtype, end) != (self.shape, False, self.numpy_dtype, begin + self.size_bytes):
            raise damaged_cache_error(
                folder,
                f"{self.file} has {end} bytes, {dtype} and shape {shape}, instead of {begin + self.size_bytes} bytes, "
                f"{self.numpy_dtype} and shape {self.shape}.",
            )
        return np.asarray(np.memmap(folder / self.file, dtype, "r", begin, shape))


def cache_arrays(count: int, form: CacheFormat, outputs: Mapping[str, Output]) -> dict[Part, StoredArray]:
    """All files; they are numbered, because the name of an output could be anything."""
    found = {KEYS: StoredArray("keys.npy", torch.int64, (count,))}
    for name, (dtype, shape) in outputs.items():
        for part, rows in form.encode(name, torch.empty(0, *shape, dtype=dtype)).items():
            found[name, part] = StoredArray(f"{len(found) - 1}.npy", rows.dtype, (count, *rows.shape[1:]))
    return found


def damaged_cache_error(folder: Path, why: str) -> ValueError:
    """The error of a cache that cannot be read."""
    return ValueError(f"The cache {folder} is damaged: {why} Remove the folder to have it computed again.")


def _top(name: str, output: Tensor, top: int) -> dict[str, Tensor]:
    classes = output.shape[-1] if output.ndim > 1 else 1
    if not output.is_floating_point() or top >= classes:
        raise ValueError(
            f'"top-{top}" is for logits of more than {top} classes, but {name!r} is {output.dtype} with {classes} in '
            f'its last dimension. Take a smaller number, or "float16".'
        )
    logs = output.to(torch.promote_types(output.dtype, torch.float32)).log_softmax(-1)
    values, places = logs.topk(top, dim=-1)
    rest = logs.scatter(-1, places, -torch.inf).logsumexp(-1, keepdim=True)
    small = torch.int16 if classes <= 1 << 15 else torch.int32
    return {"values": values.to(torch.float16), "places": places.to(small), "rest": rest.to(torch.float32)}


def dtype_name(dtype: torch.dtype) -> str:
    """A type as numpy and the header call it."""
    return str(dtype).removeprefix("torch.")


def storage_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which numpy can hold one; the bits stay."""
    return torch.int16 if dtype is torch.bfloat16 else dtype  # numpy has no bfloat16
