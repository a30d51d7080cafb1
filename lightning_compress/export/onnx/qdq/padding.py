"""Pad whole numbers instead of floats, so that an integer kernel can follow."""

from collections.abc import Collection

import numpy
from onnx import NodeProto, helper

from lightning_compress.export.onnx.qdq.graph import Graph

PAD_VALUE, PAD_AXES = 2, 3


def pad_integers(graph: Graph, codes: Collection[str]) -> None:
    """Move each `Pad` that takes a dequantized value before its `DequantizeLinear`.

    Args:
        graph: is changed.
        codes: names of the whole numbers that quantizers make.
    """
    known = set(codes)
    for pad in [node for node in graph.nodes if node.op_type == "Pad"]:
        dequantize = graph.producers().get(pad.input[0])
        if dequantize is None or dequantize.op_type != "DequantizeLinear" or dequantize.input[0] not in known:
            continue
        if not _pads_with_zero(graph, pad):
            continue
        codes_of, *parameters = dequantize.input
        value = parameters[1] if _mode(pad) == "constant" else ""
        inputs = [codes_of, pad.input[1], value, *pad.input[PAD_AXES:]]
        moved = graph.make("Pad", inputs if any(inputs[2:]) else inputs[:2], f"{codes_of}.padded")
        moved.attribute.extend(pad.attribute)
        known.add(moved.output[0])
        after = helper.make_node("DequantizeLinear", [moved.output[0], *parameters], list(pad.output))
        graph.replace(pad, [moved, after])
    graph.drop_unused()


def _pads_with_zero(graph: Graph, pad: NodeProto) -> bool:
    if _mode(pad) != "constant" or len(pad.input) <= PAD_VALUE or not pad.input[PAD_VALUE]:
        return True
    value = graph.constant(pad.input[PAD_VALUE])
    return value is not None and bool(numpy.all(value == 0))


def _mode(pad: NodeProto) -> str:
    return next((helper.get_attribute_value(one).decode() for one in pad.attribute if one.name == "mode"), "constant")
