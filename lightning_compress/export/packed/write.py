"""Weights as packed whole numbers in a safetensors file, and back to floats that are the same bit for bit.

A quantized weight `name` is two tensors: `name.codes`, bytes as `packing` lays them out, and either `name.scale`, one
float for the tensor, a channel or a group, or `name.levels`, a table that the codes are indices of. Where another code
than 0 stands for zero, it is in `name.zero_point`, in the shape of the scale. Everything else lies there under its own
name. How codes are packed stands in the metadata, as JSON under "lightning_compress": a code
is `packed * step + offset`. A SHA-256 of all content is beside it, so that damage does not go unseen.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_compress.core.bit_packing import tightest
from lightning_compress.export.atomic_write import replace_on_success
from lightning_compress.export.packed.format import (
    DIGEST,
    FLOATS,
    FORMAT,
    PARTS,
    ZERO_POINTS,
    PackedContent,
    PackedWeight,
    check_kind,
    parse_packed,
)
from lightning_compress.export.packed.safetensors import (
    damaged_file_error,
    read_tensors,
    state_fingerprint,
    write_tensors,
)
from lightning_compress.quantization.description import WeightSpec

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class PackedReport:
    """How many bytes of a file are what; together they are the file.

    Attributes:
        codes: packed whole numbers of quantized weights.
        scales: their steps and zero points.
        levels: their tables.
        others: all other tensors.
        header: names, shapes and metadata.
    """

    codes: int
    scales: int
    levels: int
    others: int
    header: int

    @property
    def size_bytes(self) -> int:
        """Of the whole file."""
        return sum(getattr(self, part.name) for part in fields(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{part.name} {getattr(self, part.name)}" for part in fields(self))
        return f"{self.size_bytes} bytes: {parts}"


def write_packed(
    path: str | Path,
    module_state: Mapping[str, Tensor],
    weights: Mapping[str, WeightSpec],
    metadata: Mapping[str, str] | None = None,
    *,
    casts: Mapping[str, torch.dtype] | None = None,
) -> PackedReport:
    """Write a state dict with its quantized weights packed; codes take the fewest bits that hold them all.

    The file is there once it is complete. Tensors that share all their memory are stored once.

    Args:
        path: of the file; what is there is replaced.
        module_state: the state dict; quantized weights hold their values on the grid.
        weights: the grid of each quantized weight, by its name in `module_state`.
        metadata: texts by name that the file tells of itself; `read_metadata` of `packed_file` gives them back.
        casts: tensors that a shorter dtype holds without loss, as those quantized to float16 or float8, by name.

    Raises:
        FileNotFoundError: if the folder is not there.
        ValueError: if a name is unknown or taken twice, a tensor is not exactly what it would be read as, or is of a
            kind that the format does not know.
    """
    content = _content(module_state, weights, casts or {})
    stored, metadata_texts = content.tensors(), {**_texts(metadata or {}), **content.metadata()}
    metadata_texts[DIGEST] = state_fingerprint(stored, metadata_texts)
    with replace_on_success(path) as part:
        header = write_tensors(part, stored, metadata_texts)
    return _report(content, header)


def read_packed(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a file that `write_packed` wrote: floats, on the CPU, bit for bit what it was given.

    Zeros are positive. Needs no package but torch. Nothing in the file is run, and what it says is checked before
    memory is taken: what is read is at most 64 times as large as the file, where weights of one bit are float64.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, of a later version, or of another kind.
    """
    tensors, metadata = read_tensors(path)
    check_kind(metadata, path)
    try:
        if (
            state_fingerprint(tensors, {key: text for key, text in metadata.items() if key != DIGEST})
            != metadata[DIGEST]
        ):
            raise ValueError("its content is not what was written")
        return parse_packed(metadata, tensors).state()
    except ValueError as error:
        raise damaged_file_error(path, str(error)) from error


def load_packed(module: Model, path: str | Path) -> Model:
    """Load a `.safetensors` file written by `export` into a module of the same structure, and return the module.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if names or shapes are not the module's, its dtypes would not hold the values, or it has no memory.

    >>> from tempfile import TemporaryDirectory
    >>> from lightning_compress import quantize
    >>> from lightning_compress.export import export
    >>> model = quantize(nn.Linear(64, 32), [torch.randn(16, 64)], weights=4, activations=None, progress=False)
    >>> with TemporaryDirectory() as folder:
    ...     report = export(model, f"{folder}/model.safetensors")
    ...     loaded = load_packed(nn.Linear(64, 32), f"{folder}/model.safetensors")
    >>> inputs = torch.randn(8, 64)
    >>> torch.allclose(loaded(inputs), model(inputs), atol=1e-6)
    True
    """
    state, own = read_packed(path), module.state_dict()
    _check_names(state, own, module, path)
    if empty := [name for name, tensor in own.items() if tensor.is_meta]:
        raise ValueError(
            f"'{empty[0]}' of {type(module).__name__} is on the meta device, where nothing can be loaded. Build the "
            f"module on the CPU or a GPU."
        )
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"'{name}' has shape {tuple(own[name].shape)} in {type(module).__name__}, but {tuple(tensor.shape)} in "
                f"{path}. Build the module as it was when the file was written."
            )
        if torch.promote_types(tensor.dtype, own[name].dtype) != own[name].dtype:
            raise ValueError(
                f"'{name}' is {own[name].dtype} in {type(module).__name__}, which does not hold the {tensor.dtype} of "
                f"{path}. Load into the module first, then change its dtype."
            )
    module.load_state_dict(state)
    return module


def _content(
    module_state: Mapping[str, Tensor], weights: Mapping[str, WeightSpec], casts: Mapping[str, torch.dtype]
) -> PackedContent:
    _check_state(module_state, weights, casts)
    same = _twins(module_state, {*weights, *casts})
    packed = {name: _packed(name, grid, module_state[name]) for name, grid in weights.items()}
    others = {
        name: _cast(name, tensor, casts.get(name, tensor.dtype))
        for name, tensor in module_state.items()
        if name not in weights and name not in same
    }
    return PackedContent(packed, others, same, {name: module_state[name].dtype for name in casts})


def _check_state(
    module_state: Mapping[str, Tensor], weights: Mapping[str, WeightSpec], casts: Mapping[str, torch.dtype]
) -> None:
    for name, tensor in module_state.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"'{name}' is a {type(tensor).__name__}, but a file of packed weights holds tensors only.")
    for name in (*weights, *casts):
        if name not in module_state:
            raise ValueError(f"'{name}' is not in module_state. It has {', '.join(list(module_state)[:8])}.")
    for name in weights:
        if taken := [part for part in PARTS if f"{name}.{part}" in module_state]:
            raise ValueError(f"'{name}.{taken[0]}' is a tensor of the module, but also a part of '{name}': rename one.")
        if name in casts:
            raise ValueError(f"'{name}' has a grid, and cannot be cast besides: leave it out of one of the two.")


def _twins(module_state: Mapping[str, Tensor], stored: set[str]) -> dict[str, str]:
    """For each tensor that is another one under a second name, the name under which it is stored."""
    standing: dict[object, str] = {}
    for name in sorted(module_state, key=lambda name: name not in stored):
        standing.setdefault(_memory(module_state[name], name), name)
    found = {name: standing[_memory(tensor, name)] for name, tensor in module_state.items()}
    return {name: other for name, other in found.items() if name != other and name not in stored}


def _memory(tensor: Tensor, name: str) -> object:
    """What tensors have in common that are one and the same."""
    if not tensor.numel() or tensor.layout != torch.strided or tensor.is_meta:
        return name
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device


def _packed(name: str, grid: WeightSpec, weight: Tensor) -> PackedWeight:
    values = grid.values()
    if weight.dtype not in FLOATS or values.dtype not in FLOATS:
        raise ValueError(f"'{name}' is {weight.dtype} and its grid {values.dtype}, but both are one of {FLOATS}.")
    if weight.shape != values.shape or not torch.equal(values.to(weight), weight):
        raise ValueError(f"'{name}' does not lie on its grid: what would be read is not what it is. Quantize it first.")
    try:
        packing = tightest(grid.codes)
    except ValueError as error:
        raise ValueError(f"'{name}': {error}") from error
    codes, zero_point = packing.pack(grid.codes), _short(name, grid.zero_point)
    return PackedWeight(codes, packing, weight.dtype, grid.scale, grid.levels, grid.axis, grid.group, zero_point)


def _short(name: str, zero_point: Tensor | None) -> Tensor | None:
    """Zero points in few bytes; None where all are 0."""
    if zero_point is None or not zero_point.any():
        return None
    for dtype in ZERO_POINTS:
        if torch.equal(zero_point.to(dtype).to(zero_point.dtype), zero_point):
            return zero_point.to(dtype)
    raise ValueError(f"'{name}' has zero points up to {int(zero_point.abs().max())}, but they are packed in 16 bits.")


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == tensor.dtype:
        return tensor
    shorter = tensor.to(dtype)
    if tensor.dtype not in FLOATS or not dtype.is_floating_point or not torch.equal(shorter.to(tensor.dtype), tensor):
        raise ValueError(f"'{name}' has values that {dtype} does not hold. Round it first, or leave it out of casts.")
    return shorter


def _texts(metadata: Mapping[str, str]) -> dict[str, str]:
    for name, text in metadata.items():
        if not isinstance(name, str) or not isinstance(text, str) or name in (FORMAT, DIGEST):
            raise ValueError(
                f"metadata are texts by name, but has {name!r}: {text!r}. Write json.dumps(...) of what is no text; "
                f"'{FORMAT}' and '{DIGEST}' are taken."
            )
    return dict(metadata)


def _report(content: PackedContent, header: int) -> PackedReport:
    by_part = {
        part: sum(_size_bytes(weight.parts()[part]) for weight in content.weights.values() if part in weight.parts())
        for part in PARTS
    }
    others = sum(map(_size_bytes, content.others.values()))
    scales = by_part["scale"] + by_part["zero_point"]
    return PackedReport(by_part["codes"], scales, by_part["levels"], others, header)


def _size_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize


def _check_names(state: Mapping[str, Tensor], own: Mapping[str, object], module: nn.Module, path: str | Path) -> None:
    missing, left = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or left:
        raise ValueError(
            f"{path} does not fit {type(module).__name__}: it lacks {missing[:8]}, and has {left[:8]} which the module "
            f"has not. Load it into the module whose state was written."
        )
