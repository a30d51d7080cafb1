"""Read and write safetensors files with the `safetensors` library, and check what the library lets pass.

The library checks that sizes and offsets fit the file before it takes memory. It does not refuse repeated names,
unknown fields or shapes that torch cannot compute with, nor say which tensor it cannot write, so this is done here.

Reference: https://github.com/huggingface/safetensors#format
"""

import ctypes
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
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
LENGTH_BYTES = 8
MOST_DIMENSIONS = 32


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Write a file, and return the number of bytes in front of the tensors.

    Tensors may share memory; each is stored in full.

    Raises:
        ValueError: if a tensor has a dtype or layout that the format cannot store, or the header is too large.
    """
    try:
        save_file(_storable(tensors), path, dict(metadata) or None)
    except SafetensorError as error:
        raise ValueError(
            f"{path} cannot be written: {error}. If its header is too large, store shorter metadata."
        ) from error
    return _order_metadata(path, metadata)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of a file by name, on the CPU, and its metadata.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or has another format.
    """
    with _opened(path) as file:
        names = file.keys()
        # Copies: the library maps the file into memory, so that a change of the file would change the tensors. A copy
        # also turns boolean bytes other than 0 and 1, which torch does not define, into 1.
        return {name: file.get_tensor(name).clone() for name in names}, file.metadata() or {}


def read_metadata(path: str | Path) -> dict[str, str]:
    """Read the metadata of a file without its tensors.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the header is damaged or the file has another format.
    """
    with _opened(path) as file:
        return file.metadata() or {}


def state_fingerprint(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the SHA-256 of names, dtypes, shapes, bytes and metadata, independent of their order.

    Raises:
        ValueError: if a tensor has a dtype or layout that the format cannot store.
    """
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        _check_storable(name, tensor)
        digest.update(json.dumps([name, NAMES[tensor.dtype], list(tensor.shape)]).encode())
        flat = _plain(tensor)
        if flat.numel():  # hash the memory of the tensor itself: no copy, no numpy
            digest.update((ctypes.c_char * flat.nbytes).from_address(flat.data_ptr()))
    return digest.hexdigest()


def strict_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: if the text is not JSON, is nested too deeply, holds NaN or repeats a key: readers differ in which
            of two values they take.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_repetition, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error


def is_whole(number: object, low: int = 0, high: int = 2**62) -> bool:
    """Return whether this is an integer from `low` to `high`; booleans are not."""
    return type(number) is int and low <= number <= high


def shorten(value: object) -> str:
    """Return the repr of a value for an error message, cut at 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def is_shape(shape: object) -> bool:
    """Return whether this is a list of sizes that torch can use as a shape."""
    if not isinstance(shape, list) or len(shape) > MOST_DIMENSIONS or not all(map(is_whole, shape)):
        return False
    return bool(prod(max(size, 1) for size in shape) <= 2**62)  # torch multiplies the other sizes even if one is 0


def damaged_file_error(path: str | Path, what: str) -> ValueError:
    """Return the error for a file whose content is not what was written."""
    return ValueError(f"{path} is damaged, or no safetensors file: {what}. Write it again, or fetch it again.")


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU; copies where two share memory, which the library refuses."""
    found, storages = {}, set()
    for name, tensor in tensors.items():
        _check_storable(name, tensor)
        plain = _plain(tensor)
        storage = plain.untyped_storage().data_ptr()
        found[name] = plain.clone() if storage in storages else plain
        storages.add(storage)
    return found


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().resolve_conj().resolve_neg()


def _check_storable(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in NAMES or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise ValueError(
            f"'{name}' is a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}, which a safetensors file "
            f"cannot hold. It takes dense tensors of {', '.join(str(dtype) for dtype in NAMES)}."
        )


def _order_metadata(path: str | Path, metadata: Mapping[str, str]) -> int:
    """Rewrite the header with the metadata in the given order; return the number of bytes in front of the tensors.

    The library writes them in random order, so that the same model would give another file each time.
    """
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
        ordered = {**header, METADATA: dict(metadata)} if metadata else header
        file.seek(LENGTH_BYTES)
        file.write(json.dumps(ordered, ensure_ascii=False, separators=(",", ":")).encode().ljust(length))
    return LENGTH_BYTES + length


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    """A file whose header is checked; errors of the library become ours."""
    try:
        with safe_open(path, "pt") as file:
            _check_header(path)
            yield file
    except (SafetensorError, ValueError) as error:
        raise damaged_file_error(path, str(error)) from error


def _check_header(path: str | Path) -> None:
    """Refuse what the library lets pass: repeated names, unknown fields, dtypes and shapes that we do not support."""
    with open(path, "rb") as file:
        header = strict_json(file.read(int.from_bytes(file.read(LENGTH_BYTES), "little")))
    for name, fields in header.items():
        if name == METADATA:
            continue
        if fields.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"'{name}' has the fields {shorten(list(fields))}, not dtype, shape and data_offsets")
        if fields["dtype"] not in DTYPES or not is_shape(fields["shape"]):
            raise ValueError(f"'{name}' has shape {shorten(fields['shape'])} of unknown dtype {fields['dtype']}")


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its JSON names something twice")
    return found


def _no_constant(name: str) -> Callable[..., Any]:
    raise ValueError(f"its JSON has {name}, which is no number")
