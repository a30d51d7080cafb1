import itertools

import numpy
import pytest

from lightning_compress.export.onnx.qdq.activations import ActivationGrid
from lightning_compress.export.onnx.qdq.graph import Graph
from lightning_compress.export.onnx.qdq.kernels import IntegerKernel, find_kernel, integer_kernels, still_dequantized
from tests.export.qdq.graphs import model, node

PLACE = ActivationGrid("input", 0, "codes", 0.1, 0)


def graph_of(operator, shape=(4, 6), before=(), **attributes):
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], "codes"),
        node("DequantizeLinear", ["codes", "s", "z"], "v0"),
        *(node(name, [f"v{place}"], f"v{place + 1}") for place, name in enumerate(before)),
        node(operator, [f"v{len(before)}", "w"], "y", **attributes),
    ]
    constants = {"s": numpy.float32(0.1), "z": numpy.uint8(0), "w": numpy.zeros(shape, numpy.float32)}
    return Graph(model(nodes, constants))


@pytest.mark.parametrize(
    ("operator", "shape", "attributes", "axis"),
    [
        ("Conv", (4, 6, 3, 3), {}, 0),
        ("Gemm", (4, 6), {"transB": 1}, 0),
        ("Gemm", (6, 4), {}, 1),
        ("MatMul", (6, 4), {}, 1),
        ("MatMul", (2, 6, 4), {}, None),
        ("Gemm", (6, 4), {"alpha": 0.5}, None),
        ("Gemm", (6, 4), {"transA": 1}, None),
        ("ConvTranspose", (6, 4, 3, 3), {}, None),
        ("Mul", (6, 4), {}, None),
    ],
)
def test_kernels_are_offered_for_what_they_compute_with_the_axis_of_their_channels(operator, shape, attributes, axis):
    graph = graph_of(operator, shape, **attributes)
    found = find_kernel(graph, graph.nodes[-1], "w", [PLACE])
    assert (None if found is None else found.axis) == axis


def test_the_grid_is_that_of_the_value_before_it_was_moved_about():
    for before, known in ((("MaxPool", "Transpose"), True), (("Relu",), False), (("MaxPool", "Relu"), False)):
        graph = graph_of("Conv", (4, 6, 3, 3), before)
        found = find_kernel(graph, graph.nodes[-1], "w", [PLACE])
        assert (found is not None and found.place == PLACE) is known
    assert find_kernel(graph_of("MatMul"), graph_of("MatMul").nodes[-1], "w", []) is None


def test_only_a_constant_that_is_the_weight_and_nothing_else_has_a_kernel():
    graph = graph_of("MatMul")
    swapped = node("MatMul", ["w", "v0"], "y")
    twice = node("Gemm", ["v0", "w", "w"], "y")
    assert find_kernel(graph, swapped, "w", [PLACE]) is find_kernel(graph, twice, "w", [PLACE]) is None


@pytest.mark.parametrize("highest", [255, 127, 15])
def test_saturation_is_possible_if_two_products_do_not_fit_in_sixteen_bits(highest):
    rng = numpy.random.default_rng(0)
    kernel = IntegerKernel(node("Gemm", ["x", "w"], "y"), ActivationGrid("input", 0, "codes", 0.1, 0, 0, highest), 0)
    answers = set()
    for limit in (20, 60, 64, 65, 80, 100, 127):
        codes = rng.integers(-limit, limit + 1, (2, 5))
        worst = max(
            abs(a * one + b * two)
            for row in codes.tolist()
            for one, two in itertools.permutations(row, 2)
            for a, b in itertools.product((0, highest), repeat=2)
        )
        assert kernel.may_saturate(codes) == (worst > 32767), (limit, worst)
        answers.add(worst > 32767)
    assert answers == ({True, False} if highest == 255 else {False})


def test_a_single_product_and_depthwise_convolutions_never_saturate():
    codes = numpy.full((4, 9), 127)
    assert IntegerKernel(node("Conv", ["x", "w"], "y"), PLACE, 0).may_saturate(codes)
    assert IntegerKernel(node("Conv", ["x", "w"], "y", group=2), PLACE, 0).may_saturate(codes)
    assert not IntegerKernel(node("Conv", ["x", "w"], "y", group=4), PLACE, 0).may_saturate(codes)
    assert not IntegerKernel(node("Gemm", ["x", "w"], "y"), PLACE, 0).may_saturate(codes[:, :1])


def test_an_optimized_graph_is_counted_by_its_kernels_and_what_it_still_dequantizes():
    names = ["QLinearConv", "QLinearConv", "QGemm", "QLinearAdd", "MatMulIntegerToFloat", "Conv", "MaxPool"]
    nodes = [node(name, ["x"], f"v{place}") for place, name in enumerate(names)]
    made = model([*nodes, node("DequantizeLinear", ["w.codes", "s"], "y")], {})
    expected = {"QLinearConv": 2, "QGemm": 1, "QLinearAdd": 1, "MatMulIntegerToFloat": 1}
    assert integer_kernels(made) == expected
    assert still_dequantized(made, ["w.codes", "other.codes"]) == {"w.codes"}
