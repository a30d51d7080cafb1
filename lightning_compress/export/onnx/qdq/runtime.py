"""Run an ONNX graph in ONNX Runtime, on the inputs of a torch module."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
import onnx
import onnxruntime
import torch
from onnx import ModelProto
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_compress.export.onnx.qdq.graph import Array
from lightning_compress.nn.example_inputs import describe_shapes, map_tensors

ONLY_ERRORS = 3


def make_session(model: ModelProto | str | Path, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    """A session on the CPU with all optimizations, of a graph in memory or in a file.

    Args:
        model: the graph.
        optimized: where to write the optimized graph.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ONLY_ERRORS
    options.intra_op_num_threads = 1
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    source = model.SerializeToString() if isinstance(model, ModelProto) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def optimized_graph(model: ModelProto) -> ModelProto:
    """The graph as ONNX Runtime computes it on this machine."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        make_session(model, path)
        return onnx.load(path)


def run_session(running: onnxruntime.InferenceSession, example: Any) -> dict[str, Array]:
    """All outputs by name, for the input that the module is called with.

    Raises:
        ValueError: if the graph takes other inputs.
    """
    names = [one.name for one in running.get_inputs()]
    values = {name: value.detach().cpu().numpy() for name, value in _inputs(names, example).items()}
    outputs = [one.name for one in running.get_outputs()]
    return dict(zip(outputs, running.run(outputs, values), strict=True))


def _inputs(names: list[str], example: Any) -> dict[str, Tensor]:
    """Tensors by the name of the input: by keyword, else in their order."""
    if isinstance(example, dict) and set(names) <= example.keys():
        return {name: example[name] for name in names}
    tensors: list[Tensor] = []
    map_tensors(example, tensors.append)
    if len(tensors) != len(names):
        raise ValueError(f"The graph takes {', '.join(names)}, but the input is {describe_shapes(example)}.")
    return dict(zip(names, tensors, strict=True))


def as_arrays(output: Any) -> list[Array]:
    """The tensors that a module returns, in the order of a graph's outputs."""
    return [one.detach().cpu().numpy() for one in tree_leaves(output) if isinstance(one, Tensor)]


def relative_difference(found: Array, expected: Array) -> float:
    """The largest difference as a share of the largest expected size; for whole numbers, the share of unequal ones.

    Infinite if the shapes differ, or one is no number where the other is.
    """
    if found.shape != expected.shape:
        return numpy.inf
    if not numpy.issubdtype(expected.dtype, numpy.floating):
        return float((found != expected).mean()) if found.size else 0.0
    same = (found == expected) | (numpy.isnan(found) & numpy.isnan(expected))
    if same.all():
        return 0.0
    size = numpy.abs(expected[numpy.isfinite(expected)]).max(initial=numpy.finfo(numpy.float32).tiny)
    with numpy.errstate(invalid="ignore"):
        differences = numpy.where(same, 0.0, numpy.abs(found.astype(numpy.float64) - expected))
    return float(numpy.nan_to_num(differences, nan=numpy.inf, posinf=numpy.inf).max() / size)


def call_for_outputs(function: Any, *arguments: Any) -> Any:
    """Call a module for its numbers alone."""
    with torch.no_grad():
        return function(*arguments)
