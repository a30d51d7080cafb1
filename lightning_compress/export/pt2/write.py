"""Programs of torch.export, with the weights as whole numbers in the file."""

import io
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from lightning_compress.export.atomic_write import replace_on_success
from lightning_compress.export.pt2.fake_quantize import ArithmeticFakeQuantize, as_python_numbers
from lightning_compress.export.pt2.program import (
    Call,
    arguments_batch_size,
    as_arguments,
    export_program,
    in_deployed_mode,
    resize_rows,
    run_program,
    strip_origins,
)
from lightning_compress.export.pt2.weights import StoredWeights, store_weights
from lightning_compress.quantization.lowering.deployed_model import DeployedModel

TORCHS_OWN = {"aten", "prim", "prims", "higher_order", "quantized_decomposed", "_operator", "math"}


@dataclass(frozen=True)
class Pt2Report:
    """How many bytes of a file are what; together they are the file.

    Attributes:
        weights: whole numbers of quantized weights, their scales and levels, and those in short floating point.
        others: all other parameters, buffers and constants.
        program: what is computed with them, as text, and the frame of the file.
        libraries: whose operators the program calls, but for torch's own; who loads it must import them first.
    """

    weights: int
    others: int
    program: int
    libraries: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Of the whole file."""
        return self.weights + self.others + self.program

    def __str__(self) -> str:
        needs = f"; needs {', '.join(self.libraries)}" if self.libraries else ""
        parts = f"weights {self.weights}, others {self.others}, program {self.program}"
        return f"{self.size_bytes} bytes: {parts}{needs}"


def write_pt2(
    deployable: DeployedModel, path: str | Path, example_input: Any, *, dynamic_batch: bool = True
) -> Pt2Report:
    """Write a program that `torch.export.load(path).module()` gives back, with no package but torch.

    Weights are stored as int8, or two or four to a byte where that makes the file smaller, or in a short floating point
    format; the program computes the floats from them at every call, bit for bit those of the module, in about a
    millisecond for a million weights. Activations are quantized by multiplying, rounding and clipping. All of it
    computes on the device of the module.

    The file is loaded again before it takes its place, and run on the example, on one row and on one more row than the
    example has: all outputs must be those of the module, bit for bit.

    Within it are raw numbers, and JSON for all else: no pickle (this is checked), no path of this machine, and not the
    example. But `torch.export.load` is no reader for files of strangers (seen in torch 2.13): it would run the pickles
    that a file may have for tensor subclasses, custom objects and examples, and what the JSON says of sizes goes to
    sympy, which runs code that is written there.

    Args:
        deployable: a plain module in eval mode, and the grids of its weights; it stays as it is.
        path: of the file, by custom ending in `.pt2`; what is there is replaced.
        example_input: what the module is called with: a tensor, a tuple of arguments, or a dict of keywords.
        dynamic_batch: whether the file takes batches of any size; the batch is the first size of the first tensor, and
            of all others that share it.

    Raises:
        FileNotFoundError: if the folder is not there.
        ValueError: if the module cannot be called or exported, and the message names the layer; or if the file would
            compute something else. Nothing is written then.
    """
    module, call = deployable.module, as_arguments(example_input)
    _check_callable(module, call)
    program, stored = _program(deployable, resize_rows(call, _rows_to_trace(call, dynamic_batch)), dynamic_batch)
    with replace_on_success(path) as part:
        _save(program, part, module)
        sizes = (
            {arguments_batch_size(call), 1, arguments_batch_size(call) + 1}
            if dynamic_batch and arguments_batch_size(call)
            else {None}
        )
        _check_same(part, module, [resize_rows(call, rows) for rows in sizes])
        return _report(program, stored, part.stat().st_size)


def _check_callable(module: nn.Module, call: Call) -> None:
    if training := [name for name, one in module.named_modules() if one.training]:
        raise ValueError(
            f"{type(module).__name__} is in training mode, in '{training[0]}' at least: call eval() first."
        )
    try:
        run_program(module, call)
    except Exception as error:
        raise ValueError(f"{type(module).__name__} cannot be called with this example_input: {error}") from error


def _rows_to_trace(call: Call, dynamic_batch: bool) -> int | None:
    """torch.export takes a batch of one row for a constant, so that it is given two."""
    return 2 if dynamic_batch and arguments_batch_size(call) == 1 else None


def _program(deployable: DeployedModel, call: Call, dynamic_batch: bool) -> tuple[ExportedProgram, list[StoredWeights]]:
    with in_deployed_mode(), as_python_numbers(deployable.quantizers.values()), ArithmeticFakeQuantize():
        graph_module = export_program(deployable.module, call, dynamic_batch).module()
        stored = store_weights(graph_module, deployable.module, deployable.weights, deployable.casts)
        return strip_origins(export_program(graph_module, call, dynamic_batch)), stored


def _save(program: ExportedProgram, path: Path, module: nn.Module) -> None:
    saved = io.BytesIO()
    try:
        torch.export.save(program, saved)
    except Exception as error:
        raise ValueError(
            f"The program of {type(module).__name__} cannot be saved: {error} Use operators that torch.export knows."
        ) from error
    with zipfile.ZipFile(saved) as archive, zipfile.ZipFile(path, "w") as smaller:
        for name in archive.namelist():
            content = archive.read(name)
            _refuse_pickle(name, content)
            # The text is many times as long as it need be; torch reads it packed as well.
            method = zipfile.ZIP_DEFLATED if name.endswith(".json") else zipfile.ZIP_STORED
            smaller.writestr(zipfile.ZipInfo(name), content, method)


def _refuse_pickle(name: str, content: bytes) -> None:
    if (name.endswith("_config.json") and b'"use_pickle": true' in content) or (name.endswith(".pt") and content):
        raise ValueError(
            f"'{name}' of the program would be a pickle: it holds an object that is no plain tensor. Let the module "
            f"compute with tensors only."
        )


def _check_same(path: Path, module: nn.Module, calls: Iterable[Call]) -> None:
    with open(path, "rb") as file:
        loaded = torch.export.load(file).module()
    for call in calls:
        try:
            found, expected = run_program(loaded, call), run_program(module, call)
        except Exception as error:
            raise ValueError(
                f"{type(module).__name__} as a program does not take {arguments_batch_size(call)} rows: {error}. Let "
                f"it do the same for any number of rows, or give dynamic_batch=False."
            ) from error
        if len(found) != len(expected) or not all(map(_same, found, expected)):
            raise ValueError(
                f"The program computes something else than {type(module).__name__} for {arguments_batch_size(call)} "
                f"rows: the outputs differ by up to {_largest(found, expected)}. Does it do different things for "
                f"different numbers of rows, or after other calls? For the example's rows alone, give "
                "dynamic_batch=False."
            )


def _same(found: Any, expected: Any) -> bool:
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor):
        return bool(found == expected)
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    return bool(((found == expected) | (found.isnan() & expected.isnan())).all())


def _largest(found: list[Any], expected: list[Any]) -> str:
    differences = [
        float((one.double() - other.double()).abs().max())
        for one, other in zip(found, expected, strict=False)
        if isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape and one.numel()
    ]
    return str(max(differences, default="a shape"))


def _report(program: ExportedProgram, stored: list[StoredWeights], size_bytes: int) -> Pt2Report:
    weights = sum(weight.size_bytes for weight in stored)
    storages = {tensor.data_ptr(): tensor for tensor in (*program.state_dict.values(), *program.constants.values())}
    tensors = sum(one.untyped_storage().nbytes() for one in storages.values())
    libraries = {
        node.target.namespace
        for graph_module in program.graph_module.modules()
        if isinstance(graph_module, torch.fx.GraphModule)
        for node in graph_module.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
    }
    return Pt2Report(weights, tensors - weights, size_bytes - tensors, tuple(sorted(libraries - TORCHS_OWN)))
