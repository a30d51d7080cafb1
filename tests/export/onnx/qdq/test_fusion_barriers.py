import numpy
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from lightning_compress import export, quantize
from lightning_compress.export.onnx.qdq.fusion_barriers import add_barriers
from lightning_compress.export.onnx.qdq.graph import Graph
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


def outcomes(made):
    """What a graph comes to as it is written, as the runtime takes its nodes together, and so with barriers in it."""
    graph = Graph(made)
    add_barriers(graph)
    x = 2 * numpy.random.default_rng(1).normal(size=(64, 16)).astype(numpy.float32)
    sessions = session(made, OFF), session(made), session(graph.model())
    return [one.run(None, {"x": x})[0] for one in sessions]


@pytest.mark.parametrize("after", [(), ("Relu",)])
def test_the_runtime_rounds_float_weights_between_quantizers_unless_a_barrier_stands_there(after):
    made = between_quantizers(after)
    exact, rounded, kept = outcomes(made)
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


def two_grids(between=(), second=0.02):
    """One grid right behind another, or behind nodes that the runtime looks through."""
    constants = {
        "first": numpy.float32(0.03), "second": numpy.float32(second), "z": numpy.uint8(128),
        "quant_min": numpy.float32(-128 * second), "quant_max": numpy.float32(127 * second),
    }  # fmt: skip
    nodes = [
        node("QuantizeLinear", ["x", "first", "z"], "q0"),
        node("DequantizeLinear", ["q0", "first", "z"], "v0"),
        *(
            node(name, [f"v{place}", *(["quant_min", "quant_max"] if name == "Clip" else [])], f"v{place + 1}")
            for place, name in enumerate(between)
        ),
        node("QuantizeLinear", [f"v{len(between)}", "second", "z"], "q1"),
        node("DequantizeLinear", ["q1", "second", "z"], "y"),
    ]
    return model(nodes, constants, {"x": ["batch", 16]})


@pytest.mark.parametrize("between", [(), ("Identity",)])
def test_the_runtime_makes_one_grid_of_two_unless_a_barrier_stands_between_them(between):
    made = two_grids(between)
    exact, one, kept = outcomes(made)
    # If this fails, ONNX Runtime no longer does it, and the barrier can go.
    assert numpy.abs(one - exact).max() > 0.019
    assert numpy.array_equal(kept, exact)


@pytest.mark.parametrize("between", [(), ("Clip",), ("Transpose", "Relu")])
@pytest.mark.parametrize("second", [0.02, 0.03])
def test_a_barrier_stands_between_two_grids_only_if_they_differ(between, second):
    graph = Graph(two_grids(between, second))
    add_barriers(graph)
    assert [one.op_type for one in graph.nodes].count("Max") == int(second == 0.02)


def behind_a_relu(*operators):
    """A layer on integers, its ReLU, and what takes the outcome."""
    rng = numpy.random.default_rng(0)
    constants = {
        "in": numpy.float32(0.03), "z": numpy.uint8(128), "w": rng.integers(-127, 128, (8, 16)).astype(numpy.int8),
        "s": numpy.float32(0.01), "zw": numpy.int8(0), "b": rng.integers(-99, 99, 8).astype(numpy.int32),
        "sb": numpy.float32(0.0003), "zb": numpy.int32(0), "ones": numpy.ones(8, numpy.float32),
    }  # fmt: skip
    others = {"QuantizeLinear": ["a", "in", "z"], "LayerNormalization": ["a", "ones"], "Sigmoid": ["a"]}
    nodes = [
        node("QuantizeLinear", ["x", "in", "z"], "q"),
        node("DequantizeLinear", ["q", "in", "z"], "v"),
        node("DequantizeLinear", ["w", "s", "zw"], "wf"),
        node("DequantizeLinear", ["b", "sb", "zb"], "bf"),
        node("Gemm", ["v", "wf", "bf"], "g", transB=1),
        node("Relu", ["g"], "a"),
        *(node(name, others[name], f"y{place}") for place, name in enumerate(operators)),
    ]
    return model(nodes, constants, {"x": ["batch", 16]}, [f"y{place}" for place in range(len(operators))])


@pytest.mark.parametrize("operators", [("LayerNormalization",), ("Sigmoid",)])
def test_a_relu_that_no_quantizer_takes_does_not_cost_its_layer_the_integer_kernel(operators, tmp_path):
    made = behind_a_relu(*operators)
    graph = Graph(made)
    add_barriers(graph)
    # If this fails, ONNX Runtime no longer does it, and the barrier can go.
    assert "QGemm" not in kernels_of(made, tmp_path / "as it is.onnx")
    assert "QGemm" in kernels_of(graph.model(), tmp_path / "kept.onnx")
    exact, _, kept = outcomes(made)
    assert numpy.abs(exact - kept).max() < 1e-5


def test_a_relu_that_a_quantizer_takes_along_stays():
    graph = Graph(behind_a_relu("QuantizeLinear"))
    add_barriers(graph)
    assert "Relu" in [one.op_type for one in graph.nodes]


def kernels_of(made, path):
    """The operators that ONNX Runtime runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [one.op_type for one in onnx.load(path).graph.node]


def test_a_silu_that_leaves_its_grid_is_one_kernel(tmp_path):
    torch.manual_seed(0)
    norms = [nn.GroupNorm(2, 16) for _ in range(2)]
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.SiLU(), norms[0], nn.Conv2d(16, 16, 3), nn.SiLU(), norms[1], nn.Conv2d(16, 8, 1)
    )
    images = torch.randn(4, 3, 8, 8)
    export(quantize(net, [images], progress=False), tmp_path / "model.onnx", images)
    operators = kernels_of(onnx.load(tmp_path / "model.onnx"), tmp_path / "optimized.onnx")
    assert operators.count("QuickGelu") == 2
    assert "Sigmoid" not in operators
    assert operators.count("DequantizeLinear") == 2 + 1  # before each SiLU, and of the last layer, which stays in float
