"""The file that a run ends with: what would hinder it is found before training, and it is written by `export`."""

from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import nn

from lightning_compress.core.optional_dependencies import need
from lightning_compress.export.api import export
from lightning_compress.nn.example_inputs import copy_example
from lightning_compress.nn.input_recorder import RecordedInput
from lightning_compress.quantization.lowering.lower import is_float


def check_export(path: Path, model: nn.Module, quantizes: bool) -> None:
    """Refuse what could not be written when the run is over.

    Args:
        path: of the file; folders that are missing are made.
        model: that is trained.
        quantizes: whether it will be quantized.

    Raises:
        ModuleNotFoundError: if a package is missing.
        ValueError: if the place cannot be written, or the kind of file is for quantized models only.
    """
    if path.suffix == ".onnx":
        need("onnx", "onnxruntime", "onnxscript")
    elif not quantizes and is_float(model):
        raise ValueError(
            f"export='{path.name}' is a file of a quantized model, but nothing quantizes this one. Add "
            f"QuantizationAwareTraining, or write 'model.onnx', which takes floats."
        )
    absolute = path.absolute()
    there = next(one for one in (absolute, *absolute.parents) if one.exists())
    if there.is_dir() == (there == absolute):
        kind = "a folder" if there.is_dir() else "no folder"
        raise ValueError(f"export='{path}' cannot be written: {there} is {kind}. Name a file in a folder.")
    try:
        with TemporaryFile(dir=there if there.is_dir() else there.parent):
            pass
    except OSError as error:
        raise ValueError(f"export='{path}' cannot be written: {error}. Name another place.") from error


def write_export(path: Path, model: nn.Module, call: RecordedInput | None) -> int:
    """Write the file, and return its bytes.

    Args:
        path: of the file.
        model: on the CPU, as it was trained.
        call: what it, or the part of it that holds all its parameters, is called with.

    Raises:
        Exception: what `export` refuses, and whatever else the exporters of torch raise.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    called = model
    if call is not None and call.part:
        if not is_float(model):
            raise ValueError(
                f"the grids are those of the whole {type(model).__name__}, but training calls its '{call.part}' only. "
                f"Give it a forward: def forward(self, batch): return self.{call.part}(batch)."
            )
        called = model.get_submodule(call.part)
    example: Any = None if call is None else copy_example(call.example, torch.device("cpu"))
    return export(called, path, example).size_bytes
