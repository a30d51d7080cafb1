"""Keep ONNX Runtime from quantizing weights that are to stay in floating point.

Where an input is dequantized and the output quantized, it takes float weights for an oversight, and rounds them to int8
with one scale for the whole tensor. It looks no farther than clips, so another operator in the way keeps it off.
"""

import numpy
from onnx import NodeProto, helper

from lightning_compress.export.qdq.graph import Graph
from lightning_compress.export.qdq.kernels import MOVES

QUANTIZED_UNASKED = ("Conv", "ConvTranspose", "Gemm")
LOOKED_THROUGH = ("Relu", "Clip", *MOVES)


def add_barriers(graph: Graph) -> None:
    """Put a `Max` that changes nothing behind layers with float weights between two quantizers."""
    makers, takers = graph.makers(), graph.takers()
    for node in [node for node in graph.nodes if node.op_type in QUANTIZED_UNASKED]:
        weight = makers.get(node.input[1])
        if weight is not None and weight.op_type == "DequantizeLinear":
            continue
        if _comes_from(node.input[0], makers) and _leads_to(node.output[0], takers):
            _stop(graph, node)


def _comes_from(name: str, makers: dict[str, NodeProto]) -> bool:
    """Whether a value was dequantized, and only moved since."""
    while (maker := makers.get(name)) is not None and maker.op_type in MOVES:
        name = maker.input[0]
    return maker is not None and maker.op_type == "DequantizeLinear"


def _leads_to(name: str, takers: dict[str, list[NodeProto]]) -> bool:
    """Whether a value is quantized, and only clipped or moved before."""
    while len(found := takers.get(name, [])) == 1 and found[0].op_type in LOOKED_THROUGH:
        name = found[0].output[0]
    return len(found) == 1 and found[0].op_type == "QuantizeLinear"


def _stop(graph: Graph, node: NodeProto) -> None:
    name = node.output[0]
    node.output[0] = graph.new_name(f"{name}.free")
    lowest = graph.add_constant("lowest_float", numpy.finfo(numpy.float32).min)
    graph.replace(node, [node, helper.make_node("Max", [node.output[0], lowest], [name])])
