"""The mean over all pixels of whole numbers is written as a pool, which integer kernels compute; others are not."""

import numpy
import pytest

pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper

from lightning_compress.export.onnx.qdq.graph import Graph
from lightning_compress.export.onnx.qdq.pooling import pool_integers
from lightning_compress.export.onnx.qdq.runtime import make_session


def mean_of(axes, keepdims, shape=(2, 3, 4, 5), on_grid=True):
    """A graph of the mean of an image, on a grid or not."""
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    rank = len(shape) - (0 if keepdims else len(axes))
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)
    grid = ["scale", "zero"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", *grid], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", *grid], ["values"]),
        helper.make_node("ReduceMean", ["values" if on_grid else "x", "axes"], ["y"], keepdims=keepdims),
    ]
    constants = {"scale": numpy.float32(0.1), "zero": numpy.uint8(9), "axes": numpy.array(axes)}
    initializers = [numpy_helper.from_array(numpy.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "mean", [given], [made], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize(
    ("arguments", "operators"),
    [
        ({"axes": [2, 3], "keepdims": 1}, ["GlobalAveragePool"]),
        ({"axes": [-1, -2], "keepdims": 0}, ["GlobalAveragePool", "Squeeze"]),
        ({"axes": [1, 2], "keepdims": 0}, ["ReduceMean"]),
        ({"axes": [-1, -2], "keepdims": 1, "shape": (3, 4, 5)}, ["ReduceMean"]),
        ({"axes": [2, 3], "keepdims": 1, "on_grid": False}, ["ReduceMean"]),
    ],
    ids=["kept", "squeezed", "other axes", "no batch", "in floating point"],
)
def test_means_over_pixels_on_a_grid_become_pools(arguments, operators):
    before = mean_of(**arguments)
    graph = Graph(before)
    pool_integers(graph)
    after = graph.model()
    grids = ("QuantizeLinear", "DequantizeLinear")
    assert [node.op_type for node in after.graph.node if node.op_type not in grids] == operators
    values = numpy.random.default_rng(0).normal(size=arguments.get("shape", (2, 3, 4, 5))).astype(numpy.float32)
    wanted, found = (make_session(model).run(None, {"x": values})[0] for model in (before, after))
    assert found.shape == wanted.shape
    numpy.testing.assert_allclose(found, wanted, atol=1e-6)
