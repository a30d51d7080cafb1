"""Gates of Hardswish in the form that integer kernels compute."""

import numpy
from onnx import NodeProto, helper

from lightning_compress.export.onnx.qdq.graph import Graph

ALPHA, BETA = 0.2, 0.5  # of a HardSigmoid that does not say others


def gate_integers(graph: Graph) -> None:
    """Write a `HardSigmoid` between two grids as a sum that is cut off where the grid ends.

    It is `alpha * x + beta` between 0 and 1. On a grid that ends there, an integer sum of x, whose steps are counted as
    `alpha` times their size, and of a constant does the same, and ONNX Runtime has a kernel for that.
    """
    makers, takers = graph.producers(), graph.consumers()
    for node in [node for node in graph.nodes if node.op_type == "HardSigmoid"]:
        maker, following = makers.get(node.input[0]), takers.get(node.output[0], [])
        if maker is None or maker.op_type != "DequantizeLinear" or not following:
            continue
        scale = graph.constant(maker.input[1])
        if scale is not None and scale.size == 1 and all(_ends_at_one(graph, one) for one in following):
            graph.replace(node, _sum(graph, node, maker, float(scale)))
    graph.drop_unused()


def _ends_at_one(graph: Graph, quantize: NodeProto) -> bool:
    """Whether a node puts its input on a grid of 256 steps from 0 to 1."""
    if quantize.op_type != "QuantizeLinear" or len(quantize.input) < 3:
        return False
    scale, zero_point = (graph.constant(name) for name in quantize.input[1:3])
    if scale is None or zero_point is None or zero_point.dtype != numpy.uint8 or zero_point.any():
        return False
    return bool(numpy.isclose(scale, 1 / 255, rtol=1e-6).all())


def _sum(graph: Graph, node: NodeProto, maker: NodeProto, scale: float) -> list[NodeProto]:
    values = {one.name: float(helper.get_attribute_value(one)) for one in node.attribute}
    alpha, beta = values.get("alpha", ALPHA), values.get("beta", BETA)
    name = node.output[0]
    step = graph.add_constant(f"{name}.step", numpy.float32(scale * alpha))
    slope = graph.make("DequantizeLinear", [maker.input[0], step, *maker.input[2:]], f"{name}.slope")
    parts = {"offset": numpy.uint8(255), "offset_step": numpy.float32(beta / 255), "offset_zero": numpy.uint8(0)}
    constants = [graph.add_constant(f"{name}.{part}", value) for part, value in parts.items()]
    offset = graph.make("DequantizeLinear", constants, f"{name}.offset_value")
    return [slope, offset, helper.make_node("Add", [slope.output[0], offset.output[0]], [name])]
