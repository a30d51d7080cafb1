"""Keep ONNX Runtime from taking nodes together whose result would be another.

Where an input is dequantized and the output quantized, it takes float weights for an oversight, and rounds them to int8
with one scale for the whole tensor. Of two grids one behind the other it makes one, which is neither. And a `Relu` that
it takes along with a `Gemm` keeps that from its integer kernel. It looks no farther than clips, so another operator in
the way keeps it off: a `Max`, which changes nothing or does what the `Relu` did. Of a SiLU it makes one kernel only if
such a node is before it.
"""

from collections.abc import Sequence

import numpy
from onnx import NodeProto, helper

from lightning_compress.export.onnx.qdq.graph import Graph
from lightning_compress.export.onnx.qdq.kernels import MOVES

QUANTIZED_UNASKED = ("Conv", "ConvTranspose", "Gemm")
LOOKED_THROUGH = ("Relu", "Clip", *MOVES)


def add_barriers(graph: Graph) -> None:
    """Put a `Max` wherever nodes are not to be taken together."""
    _beside_float_weights(graph)
    _between_grids(graph)
    _instead_of_relus(graph)
    _before_sigmoid_gates(graph)


def _beside_float_weights(graph: Graph) -> None:
    """Behind layers with float weights between two quantizers."""
    makers, takers = graph.producers(), graph.consumers()
    for node in [node for node in graph.nodes if node.op_type in QUANTIZED_UNASKED]:
        weight = makers.get(node.input[1])
        if weight is not None and weight.op_type == "DequantizeLinear":
            continue
        if _comes_from(node.input[0], makers) and _leads_to(node.output[0], takers):
            _stop(graph, node)


def _between_grids(graph: Graph) -> None:
    """Before a quantizer whose numbers lie on another grid already."""
    makers = graph.producers()
    for node in [node for node in graph.nodes if node.op_type == "QuantizeLinear"]:
        before = _dequantized(node.input[0], makers, LOOKED_THROUGH)
        if before is not None and _grid_of(graph, before) != _grid_of(graph, node):
            barrier = graph.make("Max", [node.input[0], _lowest(graph)], f"{node.input[0]}.apart")
            node.input[0] = barrier.output[0]
            graph.replace(node, [barrier, node])


def _instead_of_relus(graph: Graph) -> None:
    """In the place of a `Relu` behind a `Gemm`, unless a quantizer takes it along."""
    makers, takers = graph.producers(), graph.consumers()
    for node in [node for node in graph.nodes if node.op_type == "Relu"]:
        maker, following = makers.get(node.input[0]), takers.get(node.output[0], [])
        quantized = bool(following) and all(one.op_type == "QuantizeLinear" for one in following)
        if maker is not None and maker.op_type == "Gemm" and not quantized:
            zero = graph.constant("zero_float")
            name = graph.add_constant("zero_float", numpy.float32(0)) if zero is None else "zero_float"
            graph.replace(node, [helper.make_node("Max", [node.input[0], name], list(node.output))])


def _before_sigmoid_gates(graph: Graph) -> None:
    """Between a `DequantizeLinear` and the SiLU that takes it.

    ONNX Runtime dequantizes a value anew for each node that takes it, before it looks for `x * sigmoid(x)`, which it
    then does not find any more and computes in three passes over the floats where one would do.
    """
    makers, takers = graph.producers(), graph.consumers()
    for sigmoid in [node for node in graph.nodes if node.op_type == "Sigmoid"]:
        value, users = sigmoid.input[0], takers.get(sigmoid.input[0], [])
        maker, following = makers.get(value), takers.get(sigmoid.output[0], [])
        gate = following[0] if len(following) == 1 and following[0].op_type == "Mul" else None
        if maker is None or maker.op_type != "DequantizeLinear" or gate is None or value not in gate.input:
            continue
        if len(users) > 2 or value in graph.outputs:
            continue
        maker.output[0] = graph.new_name(f"{value}.once")
        graph.replace(maker, [maker, helper.make_node("Max", [maker.output[0], _lowest(graph)], [value])])


def _grid_of(graph: Graph, node: NodeProto) -> list[bytes]:
    """Scale and zero point; the names of what is no constant."""
    constants = [(name, graph.constant(name)) for name in node.input[1:]]
    return [name.encode() if value is None else value.tobytes() for name, value in constants]


def _comes_from(name: str, makers: dict[str, NodeProto]) -> bool:
    """Whether a value was dequantized, and only moved since."""
    return _dequantized(name, makers, MOVES) is not None


def _dequantized(name: str, makers: dict[str, NodeProto], through: Sequence[str]) -> NodeProto | None:
    """The node that dequantized a value, if only such nodes lie between."""
    while (maker := makers.get(name)) is not None and maker.op_type in through:
        name = maker.input[0]
    return maker if maker is not None and maker.op_type == "DequantizeLinear" else None


def _leads_to(name: str, takers: dict[str, list[NodeProto]]) -> bool:
    """Whether a value is quantized, and only clipped or moved before."""
    while len(found := takers.get(name, [])) == 1 and found[0].op_type in LOOKED_THROUGH:
        name = found[0].output[0]
    return len(found) == 1 and found[0].op_type == "QuantizeLinear"


def _stop(graph: Graph, node: NodeProto) -> None:
    name = node.output[0]
    node.output[0] = graph.new_name(f"{name}.free")
    graph.replace(node, [node, helper.make_node("Max", [node.output[0], _lowest(graph)], [name])])


def _lowest(graph: Graph) -> str:
    """The name of a number that no other is below."""
    known = graph.constant("lowest_float") is not None
    return "lowest_float" if known else graph.add_constant("lowest_float", numpy.finfo(numpy.float32).min)
