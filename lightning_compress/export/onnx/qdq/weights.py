"""Weights as stored whole numbers: dequantized beside an integer kernel, unpacked to floats for all other operators."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy
import onnx
from onnx import NodeProto, helper

from lightning_compress.export.onnx.qdq.activations import ActivationGrid
from lightning_compress.export.onnx.qdq.biases import add_integer_bias, scales_with_bias_room
from lightning_compress.export.onnx.qdq.fusion_barriers import add_barriers
from lightning_compress.export.onnx.qdq.graph import Array, Graph
from lightning_compress.export.onnx.qdq.initializers import LocatedWeight
from lightning_compress.export.onnx.qdq.kernels import IntegerKernel, find_kernel
from lightning_compress.export.onnx.qdq.storage import InitializerStore

WeightType = Literal["auto", "int8", "uint8"]
MIDDLE = 128


@dataclass
class WrittenWeights:
    """What has become of the weights of a graph.

    Attributes:
        integer: constant by the name of the whole numbers that an integer kernel may take.
        floating: constants that are unpacked to floats.
        looked_up: constants of which only some rows are unpacked at each call.
        saturating: constants that stand as int8 before kernels that may saturate.
        unsigned: constants that stand as uint8, because int8 may saturate.
        bias_errors: largest error of a rounded bias, by constant.
    """

    integer: dict[str, str] = field(default_factory=dict)
    floating: set[str] = field(default_factory=set)
    looked_up: set[str] = field(default_factory=set)
    saturating: set[str] = field(default_factory=set)
    unsigned: set[str] = field(default_factory=set)
    bias_errors: dict[str, float] = field(default_factory=dict)


def write_weights(
    graph: Graph,
    located: dict[str, LocatedWeight],
    places: Sequence[ActivationGrid],
    weight_type: WeightType,
    in_float: Collection[str] = (),
) -> WrittenWeights:
    """Put stored whole numbers in the place of each located constant.

    Args:
        graph: is changed.
        located: whole numbers by the constant's name.
        places: the quantizers of activations.
        weight_type: what integer kernels take; "auto" takes uint8 where int8 may saturate.
        in_float: constants that no integer kernel is to take.
    """
    store, written = InitializerStore(graph), WrittenWeights()
    for name, one in located.items():
        takers = graph.consumers().get(name, [])
        kernels = [] if name in in_float else _kernels(graph, name, one, takers, places)
        if kernels:
            shared = sum(numpy.array_equal(one.codes, other.codes) for other in located.values()) > 1
            _for_kernels(graph, store, name, one, kernels, weight_type, written, shared)
        taken = [kernel.node for kernel in kernels]
        others = [node for node in takers if not any(node is other for other in taken)]
        for node in [node for node in others if _looks_up(node, name, one)]:
            graph.replace(node, _lookup(graph, store, node, one))
            written.looked_up.add(name)
            others = [other for other in others if other is not node]
        if others or name in graph.outputs:
            _in_float(graph, store, name, one)
            written.floating.add(name)
    graph.nodes[:0] = store.nodes
    graph.drop_unused()
    add_barriers(graph)
    return written


def _kernels(
    graph: Graph, name: str, one: LocatedWeight, takers: Sequence[NodeProto], places: Sequence[ActivationGrid]
) -> list[IntegerKernel]:
    """The integer kernels that can take these codes."""
    if one.scale is None or one.scale.shape[1] != 1 or numpy.abs(one.codes).max(initial=0) >= MIDDLE:
        return []
    found = [kernel for node in takers if (kernel := find_kernel(graph, node, name, places)) is not None]
    scales, zeros = one.row_steps()
    if scales.ndim == 0:
        return found
    # Convolutions take a scale for each channel, but one zero for all.
    one_zero = bool((zeros == zeros[:1]).all())
    return [kernel for kernel in found if kernel.axis == one.axis and (one_zero or kernel.node.op_type != "Conv")]


def _for_kernels(
    graph: Graph,
    store: InitializerStore,
    name: str,
    one: LocatedWeight,
    kernels: Sequence[IntegerKernel],
    weight_type: WeightType,
    written: WrittenWeights,
    shared: bool,
) -> None:
    codes, scales, zeros = scales_with_bias_room(graph, kernels, one.codes, *one.row_steps())
    saturating = any(kernel.may_saturate(codes) for kernel in kernels)
    unsigned = weight_type == "uint8" or (saturating and weight_type == "auto")
    (written.unsigned if unsigned else written.saturating).update([name] if saturating else [])
    stored = _in_order(store, one, (codes + MIDDLE if unsigned else codes).reshape(one.shape), unsigned, shared)
    written.integer[stored] = name
    # ONNX Runtime fuses Gemm only if the zero point is written down, even where it is zero.
    zero_point = (zeros + MIDDLE).astype(numpy.uint8) if unsigned else zeros.astype(numpy.int8)
    inputs = [
        stored,
        graph.add_constant(f"{one.title}.scale", scales),
        graph.add_constant(f"{one.title}.zero_point", zero_point),
    ]
    value = store.add("DequantizeLinear", inputs, f"{one.title}.dequantized", axis=kernels[0].axis)
    for kernel in kernels:
        kernel.node.input[1] = value
        error = add_integer_bias(graph, store, kernel, scales, one.title)
        written.bias_errors[name] = max(error, written.bias_errors.get(name, 0.0))


def _in_order(store: InitializerStore, one: LocatedWeight, codes: Array, unsigned: bool, shared: bool) -> str:
    """The name of the whole numbers with their axes as the constant had them.

    They are stored so: OpenVINO finds no integer weight behind a `Transpose`. What others take too, such as an
    embedding, is stored once, as that takes it.
    """
    if one.order is None or not shared:
        return store.integer(codes if one.order is None else codes.transpose(one.order), one.title, unsigned)
    stored = store.integer(codes, one.title, unsigned)
    return store.add("Transpose", [stored], f"{one.title}.ordered", perm=one.order)


def _looks_up(node: NodeProto, name: str, one: LocatedWeight) -> bool:
    """Whether a node only takes some rows of a constant, each with a scale of its own or none."""
    axis = next((helper.get_attribute_value(each) for each in node.attribute if each.name == "axis"), 0)
    rows = one.order is None and len(one.codes) == one.shape[0] and (one.scale is None or one.scale.shape[1] == 1)
    return bool(rows and node.op_type == "Gather" and axis == 0 and node.input[0] == name != node.input[1])


def _lookup(graph: Graph, store: InitializerStore, node: NodeProto, one: LocatedWeight) -> list[NodeProto]:
    """Take the rows as whole numbers, and make floats of these alone."""
    stored = store.integer(one.codes.reshape(one.shape), one.title, unsigned=one.levels is not None)
    rows = graph.make("Gather", [stored, node.input[1]], f"{one.title}.rows", axis=0)
    if one.levels is not None:
        return [rows, *_from_levels(graph, one, rows.output[0], node.output[0])]
    nodes = [rows, graph.make("Cast", rows.output, f"{one.title}.numbers", to=onnx.TensorProto.FLOAT)]
    for operator, steps, wanted in _to_floats(*one.row_steps()):
        shaped = steps.reshape(-1, *[1] * (len(one.shape) - 1)) if steps.ndim else steps
        numbers, constant = nodes[-1].output[0], graph.add_constant(f"{one.title}.{wanted}", shaped)
        if steps.ndim:
            nodes.append(graph.make("Gather", [constant, node.input[1]], f"{one.title}.row_{wanted}", axis=0))
            constant = nodes[-1].output[0]
        nodes += _computed(graph, operator, numbers, constant, steps, one.title)
    nodes[-1].output[0] = node.output[0]
    return nodes


def _to_floats(scales: Array, zeros: Array) -> list[tuple[str, Array, str]]:
    """What is done to the numbers, one after the other: operator, other operand, and its name."""
    short = numpy.int8 if numpy.abs(zeros).max(initial=0) < MIDDLE else numpy.int16
    return [*([("Sub", zeros.astype(short), "zero")] if zeros.any() else []), ("Mul", scales, "scale")]


def _computed(graph: Graph, operator: str, numbers: str, constant: str, steps: Array, title: str) -> list[NodeProto]:
    """The operator, on a constant that may be whole numbers."""
    if steps.dtype == numpy.float32:
        return [graph.make(operator, [numbers, constant], f"{title}.scaled")]
    cast = graph.make("Cast", [constant], f"{title}.zeros", to=onnx.TensorProto.FLOAT)
    return [cast, graph.make(operator, [numbers, cast.output[0]], f"{title}.shifted")]


def _in_float(graph: Graph, store: InitializerStore, name: str, one: LocatedWeight) -> None:
    """Make floats of all the whole numbers, under the constant's old name: a runtime does this once, when it loads."""
    stored = store.integer(one.codes.reshape(one.shape), one.title, unsigned=one.levels is not None)
    graph.take_constant(name)
    if one.levels is not None:
        nodes = _from_levels(graph, one, stored, graph.new_name(f"{one.title}.values"))
    else:
        nodes = _scaled(graph, one, stored)
    if one.order is not None:
        nodes.append(graph.make("Transpose", nodes[-1].output, f"{one.title}.ordered", perm=one.order))
    nodes[-1].output[0] = name
    store.nodes += nodes


def _scaled(graph: Graph, one: LocatedWeight, stored: str) -> list[NodeProto]:
    """Number, less that of zero, times step, row by row, or group by group within a row."""
    nodes = [graph.make("Cast", [stored], f"{one.title}.numbers", to=onnx.TensorProto.FLOAT)]
    single = one.scale is not None and one.scale.shape[1] == 1
    scales, zeros = one.row_steps() if single else (numpy.asarray(one.scale)[:, :, None], one.zeros()[:, :, None])
    plain = single and (scales.ndim == 0 or one.axis is not None)
    if plain and scales.ndim:
        shape: tuple[int, ...] = (-1, *[1] * (len(one.shape) - 1))
    else:
        shape = scales.shape if scales.ndim != 1 else (-1, 1, 1)
    if not plain:
        nodes.append(_reshaped(graph, nodes[-1].output[0], (*scales.reshape(shape).shape[:2], -1), one.title))
    for operator, steps, wanted in _to_floats(scales, zeros):
        constant = graph.add_constant(f"{one.title}.{wanted}", numpy.ascontiguousarray(steps.reshape(shape)))
        nodes += _computed(graph, operator, nodes[-1].output[0], constant, steps, one.title)
    if not plain:
        nodes.append(_reshaped(graph, nodes[-1].output[0], one.shape, one.title))
    return nodes


def _reshaped(graph: Graph, value: str, shape: Sequence[int], title: str) -> NodeProto:
    name = graph.add_constant(f"{title}.shape", numpy.array(shape, dtype=numpy.int64))
    return graph.make("Reshape", [value, name], f"{title}.reshaped")


def _from_levels(graph: Graph, one: LocatedWeight, codes: str, name: str) -> list[NodeProto]:
    """Look the floats up in the table."""
    places = graph.make("Cast", [codes], f"{one.title}.places", to=onnx.TensorProto.INT32)
    table = graph.add_constant(f"{one.title}.levels", numpy.asarray(one.levels))
    return [places, helper.make_node("Gather", [table, places.output[0]], [name], axis=0)]
