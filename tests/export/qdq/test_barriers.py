import numpy
import onnxruntime
import pytest

from lightning_compress.export.qdq.barriers import add_barriers
from lightning_compress.export.qdq.graph import Graph
from tests.export.qdq.graphs import model, node, session

OFF = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL


def between_quantizers(after=()):
    """A layer whose rows differ a hundredfold in size, so that one scale for all of them shows."""
    rng = numpy.random.default_rng(0)
    weight = rng.normal(size=(8, 16)).astype(numpy.float32)
    weight[4:] *= 0.01
    constants = {
        "in": numpy.float32(0.03), "z": numpy.uint8(128), "out": numpy.float32(0.001), "w": weight,
        "b": rng.normal(size=8).astype(numpy.float32) * 0.01,
    }  # fmt: skip
    nodes = [
        node("QuantizeLinear", ["x", "in", "z"], "q0"),
        node("DequantizeLinear", ["q0", "in", "z"], "v"),
        node("Gemm", ["v", "w", "b"], "a0", transB=1),
        *(node(name, [f"a{place}"], f"a{place + 1}") for place, name in enumerate(after)),
        node("QuantizeLinear", [f"a{len(after)}", "out", "z"], "q1"),
        node("DequantizeLinear", ["q1", "out", "z"], "y"),
    ]
    return model(nodes, constants, {"x": ["batch", 16]})


@pytest.mark.parametrize("after", [(), ("Relu",)])
def test_the_runtime_rounds_float_weights_between_quantizers_unless_a_barrier_stands_there(after):
    made = between_quantizers(after)
    graph = Graph(made)
    add_barriers(graph)
    x = numpy.random.default_rng(1).normal(size=(32, 16)).astype(numpy.float32)
    (exact,) = session(made, OFF).run(None, {"x": x})
    (rounded,) = session(made).run(None, {"x": x})
    (kept,) = session(graph.model()).run(None, {"x": x})
    # If this fails, ONNX Runtime no longer does it, and barriers can go.
    assert numpy.abs(rounded - exact).max() > 0.003
    assert numpy.abs(kept - exact).max() <= 0.0011


def test_no_barrier_stands_where_none_is_needed():
    for change in ("float input", "float output", "integer weight"):
        graph = Graph(between_quantizers())
        gemm = graph.nodes[2]
        if change == "float input":
            gemm.input[0] = "x"
        if change == "float output":
            graph.nodes.insert(3, node("Sigmoid", ["a0"], "a"))
            graph.nodes[4].input[0] = "a"
        if change == "integer weight":
            graph.nodes.insert(0, node("DequantizeLinear", ["codes", "in"], "wd"))
            gemm.input[1] = "wd"
        add_barriers(graph)
        assert "Max" not in [one.op_type for one in graph.nodes], change
