"""Means over all pixels in the form that runtimes have integer kernels for."""

import numpy
import onnx
from onnx import NodeProto, helper

from lightning_compress.export.onnx.qdq.graph import Graph

IMAGE_DIMENSIONS = 4
PIXELS = {2, 3}


def pool_integers(graph: Graph) -> None:
    """Write the mean over the pixels of what lies on a grid as `GlobalAveragePool`, which integer kernels can compute.

    Torch's exporter writes it as `ReduceMean`, which none computes.
    """
    makers = graph.producers()
    means = [
        node
        for node in graph.nodes
        if node.op_type == "ReduceMean" and makers.get(node.input[0], node).op_type == "DequantizeLinear"
    ]
    if not means:
        return
    ranks = _ranks(graph)
    for node in means:
        if ranks.get(node.input[0]) == IMAGE_DIMENSIONS and _axes(graph, node) == PIXELS:
            graph.replace(node, _pooled(graph, node))
    graph.drop_unused()


def _pooled(graph: Graph, mean: NodeProto) -> list[NodeProto]:
    keeps = next((helper.get_attribute_value(one) for one in mean.attribute if one.name == "keepdims"), 1)
    if keeps:
        return [helper.make_node("GlobalAveragePool", [mean.input[0]], list(mean.output))]
    pool = graph.make("GlobalAveragePool", [mean.input[0]], f"{mean.output[0]}.pooled")
    axes = graph.add_constant(f"{mean.output[0]}.axes", numpy.array(sorted(PIXELS)))
    return [pool, helper.make_node("Squeeze", [pool.output[0], axes], list(mean.output))]


def _axes(graph: Graph, mean: NodeProto) -> set[int]:
    axes = graph.constant(mean.input[1]) if len(mean.input) > 1 else None
    return set() if axes is None else {int(one) % IMAGE_DIMENSIONS for one in axes.reshape(-1)}


def _ranks(graph: Graph) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(graph.model()).graph
    return {one.name: len(one.type.tensor_type.shape.dim) for one in inferred.value_info}
