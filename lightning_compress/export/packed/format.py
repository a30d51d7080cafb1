"""What a file of packed weights says of itself: written as JSON, and read with the distrust that files deserve."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_compress.core.bit_packing import LARGEST_CODE, MOST_BITS, Packing
from lightning_compress.export.packed.safetensors import (
    DTYPES,
    NAMES,
    damaged_file_error,
    is_shape,
    is_whole,
    shorten,
    strict_json,
)
from lightning_compress.quantization.description import WeightSpec

FORMAT, DIGEST = "lightning_compress", "lightning_compress.sha256"
VERSION = 2
PARTS = ("codes", "scale", "zero_point", "levels")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ZERO_POINTS = (torch.int8, torch.int16)
WEIGHT_KEYS = {"bits", "offset", "step", "shape", "dtype", "axis", "group"}


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """One weight as it lies in the file.

    Attributes:
        codes: the packed bytes.
        packing: how they are packed.
        dtype: of the weight that is read.
        scale, levels, axis, group, zero_point: as in `WeightSpec`.
    """

    codes: Tensor
    packing: Packing
    dtype: torch.dtype
    scale: Tensor | None
    levels: Tensor | None
    axis: int
    group: int
    zero_point: Tensor | None = None

    def values(self) -> Tensor:
        """The weight in its own dtype."""
        codes = self.packing.unpack(self.codes)
        grid = WeightSpec(codes, self.scale, self.packing.bits, self.axis, self.group, self.levels, self.zero_point)
        return grid.values().to(self.dtype).contiguous()

    def parts(self) -> dict[str, Tensor]:
        """The tensors of the file, by what follows the weight's name."""
        fields = {"codes": self.codes, "scale": self.scale, "zero_point": self.zero_point, "levels": self.levels}
        return {name: tensor for name, tensor in fields.items() if tensor is not None}


@dataclass(frozen=True, eq=False)
class PackedContent:
    """All that a file holds.

    Attributes:
        weights: the packed ones.
        others: tensors that lie there as they are, or in a shorter dtype.
        same: names of tensors that lie there under another name.
        casts: what others are read as, where they lie there in a shorter dtype.
    """

    weights: Mapping[str, PackedWeight]
    others: Mapping[str, Tensor]
    same: Mapping[str, str]
    casts: Mapping[str, torch.dtype]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the file, by name."""
        parts = {f"{name}.{part}": one for name, weight in self.weights.items() for part, one in weight.parts().items()}
        return {**self.others, **parts}

    def metadata(self) -> dict[str, str]:
        """What tells how the tensors are to be read."""
        fields = {
            "version": VERSION,
            "weights": {name: _described(weight) for name, weight in self.weights.items()},
            "same": dict(self.same),
            "casts": {name: NAMES[dtype] for name, dtype in self.casts.items()},
        }
        return {FORMAT: json.dumps(fields, separators=(",", ":"))}

    def state(self) -> dict[str, Tensor]:
        """The state dict."""
        state = {name: weight.values() for name, weight in self.weights.items()}
        state |= {name: tensor.to(self.casts.get(name, tensor.dtype)) for name, tensor in self.others.items()}
        return state | {twin: state[name] for twin, name in self.same.items()}


def parse_packed(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> PackedContent:
    """What the metadata and the tensors of a file mean.

    Raises:
        ValueError: if the metadata say what does not fit the tensors.
    """
    fields = strict_json(metadata[FORMAT])
    weights = {name: _parsed(name, one, tensors) for name, one in _mapping(fields, "weights").items()}
    parts = {f"{name}.{part}" for name in weights for part in PARTS}
    others = {name: tensor for name, tensor in tensors.items() if name not in parts}
    casts = {name: _cast(name, one, others) for name, one in _mapping(fields, "casts").items()}
    return PackedContent(weights, others, _twins(_mapping(fields, "same"), {*others, *weights}), casts)


def check_kind(metadata: Mapping[str, str], path: str | Path) -> None:
    """Refuse files of others, and of later versions.

    Raises:
        ValueError: if it is such a one, or damaged where it would tell.
    """
    if FORMAT not in metadata or DIGEST not in metadata:
        raise ValueError(
            f"{path} was not written by write_packed: its metadata have no '{FORMAT}' and '{DIGEST}'. "
            f"An ordinary safetensors file is read by safetensors.torch.load_file."
        )
    try:
        fields = strict_json(metadata[FORMAT])
    except ValueError as error:
        raise damaged_file_error(path, str(error)) from error
    version = fields.get("version") if isinstance(fields, dict) else None
    if type(version) is not int or version != VERSION:
        raise ValueError(
            f"{path} has version {shorten(version)} of the format, but this program reads {VERSION}. Update "
            f"lightning-compress if it is a later one."
        )


def _described(weight: PackedWeight) -> dict[str, Any]:
    packing = weight.packing
    return {
        "bits": packing.bits,
        "offset": packing.offset,
        "step": packing.step,
        "shape": list(packing.shape),
        "dtype": NAMES[weight.dtype],
        "axis": weight.axis,
        "group": weight.group,
    }


def _mapping(fields: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = fields.get(key)
    if not isinstance(found, dict):
        raise ValueError(f"its '{key}' is {shorten(found)}")
    return found


def _parsed(name: str, fields: object, tensors: Mapping[str, Tensor]) -> PackedWeight:
    if not isinstance(fields, dict) or fields.keys() != WEIGHT_KEYS or name in tensors or not _is_consistent(fields):
        raise ValueError(f"'{name}' is described as {shorten(fields)}")
    shape, bits = tuple(fields["shape"]), fields["bits"]
    codes, scale, zero_point, levels = (tensors.get(f"{name}.{part}") for part in PARTS)
    if codes is None or codes.dtype != torch.uint8 or codes.shape != (-(-prod(shape) * bits // 8),):
        raise ValueError(f"'{name}.codes' is not the bytes of shape {shape} in {bits} bits")
    table = scale if levels is None else levels
    if (scale is None) == (levels is None) or table is None or table.dtype not in FLOATS:
        raise ValueError(f"'{name}' has not just a scale, or just levels, of floating point")
    if levels is not None and levels.ndim != 1:
        raise ValueError(f"'{name}.levels' has shape {tuple(levels.shape)}")
    if zero_point is not None and zero_point.dtype not in ZERO_POINTS:
        raise ValueError(f"'{name}.zero_point' is {zero_point.dtype}")
    packing, dtype = Packing(shape, bits, fields["offset"], fields["step"]), DTYPES[fields["dtype"]]
    return PackedWeight(codes, packing, dtype, scale, levels, fields["axis"], fields["group"], zero_point)


def _is_consistent(fields: Mapping[str, Any]) -> bool:
    """Whether the numbers that describe a weight are possible ones."""
    bits, offset, step, shape = fields["bits"], fields["offset"], fields["step"], fields["shape"]
    return (
        is_whole(bits, 1, MOST_BITS)
        and is_whole(offset, -LARGEST_CODE, LARGEST_CODE)
        and is_whole(step, 1, 2 * LARGEST_CODE)
        and offset + (2**bits - 1) * step <= LARGEST_CODE + 2**MOST_BITS  # so that codes are int32
        and is_shape(shape)
        and is_whole(fields["axis"], 0, max(len(shape) - 1, 0))
        and _is_floating(fields["dtype"])
        and _divides(fields["group"], shape, fields["axis"])
    )


def _divides(group: Any, shape: list[int], axis: int) -> bool:
    """Whether the inputs of a channel are so many groups; 0 stands for no groups."""
    if not is_whole(group) or group == 0:
        return is_whole(group)
    return 0 not in shape and bool(shape) and prod(shape) // shape[axis] % group == 0


def _is_floating(dtype: object) -> bool:
    return isinstance(dtype, str) and DTYPES.get(dtype) in FLOATS


def _cast(name: str, dtype: object, tensors: Mapping[str, Tensor]) -> torch.dtype:
    stored = tensors.get(name)
    if stored is None or not stored.is_floating_point() or not _is_floating(dtype):
        raise ValueError(f"'{name}' is to be read as {shorten(dtype)}, but is not there, or no floating point")
    return DTYPES[str(dtype)]


def _twins(fields: Mapping[str, object], known: set[str]) -> dict[str, str]:
    twins = {}
    for twin, name in fields.items():
        if not isinstance(name, str) or name not in known or twin in known:
            raise ValueError(f"'{twin}' is said to be the same as {shorten(name)}")
        twins[twin] = name
    return twins
