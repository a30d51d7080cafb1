"""Read checkpoints safely, and find in them what callbacks of this package have saved."""

import re
import warnings
import zipfile
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STATE_PREFIX = "lightning_compress/"


def saved_entries(checkpoint: Any, kind: str | None = None) -> list[dict[str, Any]]:
    """The entries of this package's callbacks in a checkpoint, in the order in which they were written.

    Args:
        checkpoint: its content.
        kind: only those entries that say so; see `CompressionCallback.state_kind`.

    >>> saved_entries({"callbacks": {"lightning_compress/pruning": {"format": 1}, "EarlyStopping": {"wait_count": 0}}})
    [{'format': 1}]
    """
    callbacks = checkpoint.get("callbacks", {}) if isinstance(checkpoint, Mapping) else {}
    ours = [entry for key, entry in callbacks.items() if str(key).startswith(STATE_PREFIX) and isinstance(entry, dict)]
    return [entry for entry in ours if kind is None or entry.get("kind") == kind]


def refuse_damaged_entry(key: str, saved: Any, state_format: int, required: Set[str]) -> None:
    """Refuse what cannot be a callback's entry of a checkpoint.

    Args:
        key: of the entry.
        saved: the entry.
        state_format: of the code that reads it.
        required: keys that every such entry has.

    Raises:
        ValueError: with what to do instead.
    """
    found = saved.get("format") if isinstance(saved, dict) else type(saved).__name__
    if not isinstance(saved, dict) or not required <= saved.keys() or found != state_format:
        raise ValueError(
            f"The checkpoint's entry '{key}' is damaged, or was written by another version: its format is {found}, and "
            f"{state_format} is read here. Start from its weights instead, by load_from_checkpoint."
        )


def load_checkpoint(path: str | Path) -> Any:
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
