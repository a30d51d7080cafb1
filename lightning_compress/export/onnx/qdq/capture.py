"""A deployable as an ONNX graph in floating point, in which each quantizer is one node that carries its name."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import torch
from onnx import ModelProto
from torch import Tensor
from torch.fx import Node

from lightning_compress.export.onnx.qdq.fake_quantize_calls import FakeQuantizeCall, replaced_fake_quantize
from lightning_compress.nn.example_inputs import batch_size, check_example, describe_shapes, resize_batch
from lightning_compress.quantization.lowering.deployed_model import DeployedModel

MARKER = "FakeQuantize"
DOMAIN = "lightning_compress"
LOOK_UPS = {torch.ops.aten.embedding.default}


@dataclass(frozen=True)
class CapturedModel:
    """What the exporter of torch makes of a deployable.

    Attributes:
        model: with nodes `lightning_compress.FakeQuantize` for the quantizers.
        unused: names of parameters that the forward does not use.
        looked_up: names of parameters of which the forward takes rows by their numbers, and nothing else.
    """

    model: ModelProto
    unused: frozenset[str]
    looked_up: frozenset[str] = frozenset()


def capture_model(deployable: DeployedModel, example_input: Any, *, dynamic_batch: bool, opset: int) -> CapturedModel:
    """Export the module in floating point.

    Raises:
        ValueError: if it is not in float32 on the CPU, or an operator or a control flow cannot be exported.
    """
    check_example(example_input)
    _check_dtypes(deployable)
    # The exporter may take a batch of one sample for a constant.
    example = resize_batch(example_input, max(2, batch_size(example_input) or 2)) if dynamic_batch else example_input
    arguments, keywords = _as_arguments(example)
    shapes = _shapes(example) if dynamic_batch else None
    with _quiet(), replaced_fake_quantize(deployable, _marked), torch.no_grad():
        try:
            program = torch.onnx.export(
                deployable.module,
                # A dict at the end would be taken for keywords, unless an empty one stands behind it.
                arguments if keywords else (*arguments, {}),
                kwargs=keywords,
                dynamo=True,
                dynamic_shapes=shapes,
                opset_version=opset,
                external_data=False,
                verbose=False,
            )
        except Exception as error:
            raise ValueError(_error_text(deployable, error, example_input, dynamic_batch)) from error
    if program is None or program.exported_program is None:
        raise ValueError("torch.onnx.export gave no program.")
    users = _users(program.exported_program)
    unused = frozenset(name for name, nodes in users.items() if not nodes)
    looked_up = frozenset(name for name, nodes in users.items() if {node.target for node in nodes} == LOOK_UPS)
    return CapturedModel(program.model_proto, unused, looked_up)


def _marked(call: FakeQuantizeCall, values: Tensor) -> Tensor:
    attributes: dict[str, Any] = {
        "scale": call.scale,
        "zero_point": call.zero_point,
        "lowest": call.lowest,
        "highest": call.highest,
        "quantizer": call.quantizer,
        "number": call.number,
    }
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{MARKER}", (values,), attributes, dtype=values.dtype, shape=values.shape, version=1
    )


def _check_dtypes(deployable: DeployedModel) -> None:
    for name, value in deployable.module.state_dict().items():
        if isinstance(value, Tensor) and value.device.type != "cpu":
            raise ValueError(f"'{name}' is on {value.device}: move the module to the CPU first, by .cpu().")
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float32:
            raise ValueError(f"'{name}' is {value.dtype}: make the module float32 first, by .float().")


def _as_arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, dict):
        return (), example
    if isinstance(example, tuple) and not hasattr(example, "_fields"):
        return example, {}
    return (example,), {}


def _shapes(example: Any) -> Any:
    """What of `example` may change its length, in the same nest; a bare example is the only argument."""
    size = batch_size(example)
    batch = torch.export.Dim.DYNAMIC

    def of(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: of(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(of(one) for one in value) if not hasattr(value, "_fields") else list(map(of, value))
        return {0: batch} if isinstance(value, Tensor) and value.ndim and value.shape[0] == size else None

    arguments, keywords = _as_arguments(example)
    return of(keywords) if keywords else of(arguments)


def _users(program: torch.export.ExportedProgram) -> dict[str, list[Node]]:
    """The nodes that take each parameter, by its name in the module."""
    names = program.graph_signature.inputs_to_parameters
    inputs = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    return {names[node.name]: list(node.users) for node in inputs}


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's remarks on other packages and on its own insides are not about the user's model."""
    logger = logging.getLogger("torch.onnx")
    fast_path, level = torch.backends.mha.get_fastpath_enabled(), logger.level
    with ExitStack() as undo:
        undo.callback(logger.setLevel, level)
        undo.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        undo.enter_context(warnings.catch_warnings())
        logger.setLevel(logging.ERROR)
        torch.backends.mha.set_fastpath_enabled(False)
        warnings.simplefilter("ignore")
        yield


def _error_text(deployable: DeployedModel, error: Exception, example: Any, dynamic_batch: bool) -> str:
    """What went wrong, in few words: the exporter's own message is a page, with the cause at its end."""
    kind = type(deployable.module).__name__
    causes = [text for one in _chain(error) if (text := str(one).strip())] or [type(error).__name__]
    operators = [name for text in causes for name in re.findall(r"torch\.ops\.([\w.]+)|aten[.:]+(\w+)", text)]
    cause = shorten(causes[-1], 300)
    if any("No ONNX function found" in text or "No decompositions registered" in text for text in causes) and operators:
        operator = operators[0][0] or f"aten.{operators[0][1]}"
        return (
            f"{kind} computes with {operator}, which ONNX has no operator for: {cause} Write it with "
            f"other operators, or export to .pt2, which holds all that torch has."
        )
    hint = " If the batch cannot change its size: dynamic_batch=False." if dynamic_batch else ""
    return (
        f"{kind} cannot be exported for the input {describe_shapes(example)}: {cause} A forward must not choose its "
        f"way by the values of tensors.{hint}"
    )


def _chain(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (following := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(following)
    return chain
