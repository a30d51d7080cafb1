"""A report on a checkpoint file alone, without its model's code: a line for each tensor of its `state_dict`."""

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_compress.measure.file_size import FileSize, file_size
from lightning_compress.measure.sparse_encoding import as_float32
from lightning_compress.measure.stored_tensors import count_nonzero, identity
from lightning_compress.reporting.values import Layer, Report

# What normalisation layers count, not learn: PyTorch's names, for a file does not tell buffers from parameters.
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
NOTE = (
    "A checkpoint does not tell parameters from buffers: all floating-point tensors count as parameters, but for "
    f"{', '.join(BUFFERS)}. MACs and latency need the model: lightning_compress.report(model, example_input)."
)


def report_checkpoint(path: str | Path) -> Report:
    """Measure what a checkpoint holds; nothing in the file is run.

    Args:
        path: a Lightning checkpoint, or a `state_dict` as `torch.save` writes it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read as tensors and plain values, or holds no `state_dict`.
    """
    tensors = state_dict_of(load(path), path)
    try:
        dense, sparse = file_size(as_float32(tensors), sparse=False), file_size(tensors, sparse=True)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path} cannot be measured: {error}") from error
    return Report(
        name=Path(path).name,
        layers=tuple(_lines(tensors, dense, sparse)),
        size_bytes=dense.size_bytes,
        size_bytes_sparse=sparse.size_bytes,
        size_bytes_gzip=dense.gzip_bytes,
        size_bytes_sparse_gzip=sparse.gzip_bytes,
        notes=(NOTE,),
        environment={"torch": str(torch.__version__)},
    )


def load(path: str | Path) -> Any:
    """Read a file of `torch.save` that holds tensors and plain values, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is something else, is damaged, or holds objects whose loading could run code.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if not path.is_file():
        raise ValueError(f"{path} is a folder. Give the checkpoint file.")
    try:
        _refuse_damaged(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols: what cannot be read raises
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises on a foreign file depends on the file's first bytes
        raise ValueError(f"{path} is not a checkpoint that can be read: {_reason(error)}") from error


def state_dict_of(checkpoint: Any, path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, or of a bare `state_dict`.

    Raises:
        ValueError: if there are none, or one is not plain and dense.
    """
    found = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, Mapping) else {}
    tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(
            f"{path} holds no state_dict: no tensors by name, neither under 'state_dict' nor at the top. Give a "
            f"Lightning checkpoint, or what torch.save(model.state_dict(), ...) wrote."
        )
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise ValueError(f"{path}: '{name}' is not a plain dense tensor but {tensor.layout}, {tensor.dtype}.")
    return tensors


def _refuse_damaged(path: Path) -> None:
    """Torch does not compare checksums, and would give wrong weights."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"the checksum of its part '{damaged}' is wrong, so it is damaged.")


def _reason(error: Exception) -> str:
    words = str(error)
    if isinstance(error, ValueError):
        return words
    if named := re.search(r"GLOBAL ([\w.]+)", words):
        return f"it holds objects of '{named[1]}', and loading such objects could run code."
    return "it is damaged, or not written by torch.save."


def _lines(tensors: dict[str, Tensor], dense: FileSize, sparse: FileSize) -> list[Layer]:
    lines, seen = [], set[object]()
    for name, tensor in tensors.items():
        key = identity(tensor)
        counts = tensor.is_floating_point() and name.rpartition(".")[2] not in BUFFERS and key not in seen
        seen.add(key)
        elements, nonzero = (tensor.numel(), count_nonzero(tensor)) if counts else (0, 0)
        is_weight = tensor.ndim >= 2
        lines.append(
            Layer(
                name=name,
                type=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                parameters=elements,
                nonzero=nonzero,
                weights=elements if is_weight else 0,
                weights_nonzero=nonzero if is_weight else 0,
                size_bytes=dense.record_bytes[name],
                size_bytes_sparse=sparse.record_bytes[name],
            )
        )
    return lines
