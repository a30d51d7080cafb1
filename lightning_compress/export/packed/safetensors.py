"""Files of tensors in the safetensors format, read and written by nothing but torch and the standard library.

A file is the length of its header in 8 bytes (little-endian), the header as JSON, and the bytes of the tensors one
after the other. Nothing in it can run. A reader must not trust it: every size is checked before memory is taken for it.

Reference: https://github.com/huggingface/safetensors#format
"""

import ctypes
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = "__metadata__"
HEADER_LIMIT_BYTES = 1 << 24
MOST_DIMENSIONS = 32


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies among the bytes behind the header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Write a file; how many bytes of it are header.

    Raises:
        ValueError: if a tensor is of a dtype or layout that the format does not know, or the header grows too large.
    """
    for name, tensor in tensors.items():
        _refuse_unknown(name, tensor)
    # As the library does: large elements first, so that each tensor begins at a multiple of its element's size.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header = _header_of({name: tensors[name] for name in order}, metadata)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            _give_bytes(tensors[name], file.write)
    return 8 + len(header)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file by name, on the CPU, and its metadata.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or no file of this format.
    """
    with open(path, "rb") as file:
        metadata, places = _read_header(file, path)
        return {place.name: _read(file, place, path) for place in places}, metadata


def read_metadata(path: str | Path) -> dict[str, str]:
    """What a file says of itself; its tensors are not read.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if its header is damaged, or it is no file of this format.
    """
    with open(path, "rb") as file:
        return _read_header(file, path)[0]


def state_fingerprint(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of names, dtypes, shapes, bytes and metadata, in whatever order they lie.

    Raises:
        ValueError: if a tensor is of a dtype or layout that the format does not know.
    """
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        _refuse_unknown(name, tensor)
        digest.update(json.dumps([name, NAMES[tensor.dtype], list(tensor.shape)]).encode())
        _give_bytes(tensor, digest.update)
    return digest.hexdigest()


def strict_json(text: str | bytes) -> Any:
    """What JSON says.

    Raises:
        ValueError: if it is no JSON, too deep, or names something twice, of which readers would take this or that.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_repetition, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error


def is_whole(number: object, low: int = 0, high: int = 2**62) -> bool:
    """Whether this is a whole number from `low` to `high`; `True` is none."""
    return type(number) is int and low <= number <= high


def shorten(value: object) -> str:
    """A value as it is shown in an error, be it ever so long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def is_shape(shape: object) -> bool:
    """Whether this is a list of sizes that torch can take."""
    if not isinstance(shape, list) or len(shape) > MOST_DIMENSIONS or not all(map(is_whole, shape)):
        return False
    return bool(prod(max(size, 1) for size in shape) <= 2**62)  # also with a size of 0, torch multiplies the others


def _refuse_unknown(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in NAMES or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise ValueError(
            f"'{name}' is a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}, which no safetensors file "
            f"holds. It takes dense tensors of {', '.join(str(dtype) for dtype in NAMES)}."
        )


def _give_bytes(tensor: Tensor, take: Callable[[Any], object]) -> None:
    """Give the bytes of a tensor to what takes bytes, without a copy where it lies in one piece, and without numpy."""
    flat = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg()
    if flat.numel():
        take((ctypes.c_char * flat.nbytes).from_address(flat.data_ptr()))


def _header_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    fields: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        fields[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(fields, separators=(",", ":")).encode()
    if len(header) > HEADER_LIMIT_BYTES - 8:
        raise ValueError(f"The header takes {len(header)} bytes, but {HEADER_LIMIT_BYTES} are the limit: say less.")
    return header + b" " * (-len(header) % 8)


def _read_header(file: BinaryIO, path: str | Path) -> tuple[dict[str, str], list[TensorEntry]]:
    """What the header says: metadata, and places in the order in which they lie."""
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 10 or length > min(size - 8, HEADER_LIMIT_BYTES):
        raise damaged_file_error(path, f"of {size} bytes, {length} were its header")
    try:
        header = strict_json(file.read(length).decode())
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        metadata = _metadata(header.pop(METADATA, {}))
        places = sorted((_place(*entry) for entry in header.items()), key=lambda place: (place.begin, place.end))
        _check_cover(places, size - 8 - length)
    except ValueError as error:
        raise damaged_file_error(path, str(error)) from error
    return metadata, places


def damaged_file_error(path: str | Path, what: str) -> ValueError:
    """The error of a file that is not as it was written."""
    return ValueError(f"{path} is damaged, or no safetensors file: {what}. Write it again, or fetch it again.")


def _metadata(fields: object) -> dict[str, str]:
    if not isinstance(fields, dict) or not all(isinstance(text, str) for text in fields.values()):
        raise ValueError("its metadata are not texts by name")
    return fields


def _place(name: str, fields: object) -> TensorEntry:
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"'{name}' has not just a dtype, a shape and offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"'{name}' has the unknown dtype {shorten(dtype)}")
    if not is_shape(shape) or not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_whole, offsets)):
        raise ValueError(f"'{name}' has the shape {shorten(shape)} at {shorten(offsets)}")
    if offsets[1] - offsets[0] != prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"'{name}' has the shape {shape} of {dtype}, but lies at {offsets}")
    return TensorEntry(name, DTYPES[dtype], tuple(shape), *offsets)


def _check_cover(places: Iterable[TensorEntry], size: int) -> None:
    """Refuse holes, overlaps, and what reaches beyond the end."""
    end = 0
    for place in places:
        if place.begin != end:
            raise ValueError(f"'{place.name}' begins at byte {place.begin}, but what is before it ends at {end}")
        end = place.end
    if end != size:
        raise ValueError(f"its tensors take {end} bytes, but {size} are there")


def _read(file: BinaryIO, place: TensorEntry, path: str | Path) -> Tensor:
    content = bytearray(place.end - place.begin)
    if file.readinto(content) != len(content):  # type: ignore[attr-defined]
        raise damaged_file_error(path, f"it ends within '{place.name}'")
    if not content:
        return torch.empty(place.shape, dtype=place.dtype)
    if place.dtype == torch.bool:  # a byte other than 0 and 1 is no boolean to those who compute with it
        return torch.frombuffer(content, dtype=torch.uint8).reshape(place.shape) != 0
    return torch.frombuffer(content, dtype=place.dtype).reshape(place.shape)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its JSON names something twice")
    return found


def _no_constant(name: str) -> Callable[..., Any]:
    raise ValueError(f"its JSON has {name}, which is no number")
