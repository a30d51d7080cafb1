import numpy
import pytest
import torch

from lightning_compress.export.onnx.qdq.activations import ActivationGrid, quantize_activations
from lightning_compress.export.onnx.qdq.graph import Graph
from tests.export.qdq.graphs import computed, marker, model, node

# None of them in the middle between two steps: there, torch and ONNX may round to either.
VALUES = numpy.concatenate([numpy.arange(-150, 150) * 0.02 + 0.0037, [-1e9, 1e9, 0.0]]).astype(numpy.float32)[None]


def on_grid(values, scale, zero_point):
    return torch.fake_quantize_per_tensor_affine(torch.from_numpy(values), scale, zero_point, 0, 255).numpy()


def operators(graph):
    return [one.op_type for one in graph.nodes]


def test_a_quantizer_becomes_two_nodes_that_compute_what_torch_computes():
    graph = Graph(model([marker("x", "y", 0.02, 100, "first")], {}))
    assert quantize_activations(graph) == [ActivationGrid("first", 0, "first.codes", float(numpy.float32(0.02)), 100)]
    assert operators(graph) == ["QuantizeLinear", "DequantizeLinear"]
    assert {"first.scale", "first.zero_point"} == set(graph.constants)
    (found,) = computed(graph.model(), x=VALUES)
    numpy.testing.assert_allclose(found, on_grid(VALUES, 0.02, 100), atol=1e-6)


@pytest.mark.parametrize("limits", [(0.0, 6.0), (-0.31, 1.013), (0.0, 0.3), (-2.0, 10.0), (0.5, None), (None, -0.1)])
@pytest.mark.parametrize("zero_point", [0, 37, 255])
def test_clips_before_a_quantizer_are_computed_on_whole_numbers_with_the_same_result(limits, zero_point):
    quant_min, quant_max = limits
    constants = {
        name: numpy.float32(one)
        for name, one in (("quant_min", quant_min), ("quant_max", quant_max))
        if one is not None
    }
    names = ["quant_min" if quant_min is not None else "", "quant_max" if quant_max is not None else ""]
    nodes = [node("Relu", ["x"], "a"), node("Clip", ["a", *names], "b"), marker("b", "y", 0.02, zero_point)]
    if quant_min is not None and quant_min < 0:
        nodes = [node("Clip", ["x", *names], "b"), marker("b", "y", 0.02, zero_point)]
    graph = Graph(model(nodes, constants))
    (place,) = quantize_activations(graph)
    assert operators(graph)[0] == "QuantizeLinear"
    clipped = numpy.clip(VALUES if quant_min is not None and quant_min < 0 else VALUES.clip(0), quant_min, quant_max)
    (found,) = computed(graph.model(), x=VALUES)
    numpy.testing.assert_allclose(found, on_grid(clipped, 0.02, zero_point), atol=1e-6)
    reached = numpy.rint(found / numpy.float32(0.02)) + zero_point
    assert (place.lowest, place.highest) == (reached.min(), reached.max())


def test_a_relu_before_a_grid_from_zero_on_costs_no_node():
    graph = Graph(model([node("Relu", ["x"], "a"), marker("a", "y", 0.02, 0)], {}))
    quantize_activations(graph)
    assert operators(graph) == ["QuantizeLinear", "DequantizeLinear"]


def test_a_clip_that_others_see_or_whose_limits_are_computed_stays_before_the_quantizer():
    nodes = [node("Relu", ["x"], "a"), marker("a", "b", 0.02, 0), node("Add", ["a", "b"], "y")]
    graph = Graph(model(nodes, {}))
    quantize_activations(graph)
    assert operators(graph) == ["Relu", "QuantizeLinear", "DequantizeLinear", "Add"]
    assert graph.nodes[1].input[0] == "a"
    nodes = [
        node("ReduceMin", ["x"], "quant_min", keepdims=0),
        node("Clip", ["x", "quant_min"], "a"),
        marker("a", "y", 0.02, 0),
    ]
    graph = Graph(model(nodes, {}))
    quantize_activations(graph)
    assert operators(graph) == ["ReduceMin", "Clip", "QuantizeLinear", "DequantizeLinear"]


def test_equal_grids_of_one_value_share_their_nodes_and_each_call_is_told():
    nodes = [
        node("Relu", ["x"], "a"),
        marker("a", "b", 0.02, 0, "left"),
        marker("a", "c", 0.02, 0, "right", number=1),
        marker("a", "d", 0.04, 0, "coarse"),
        node("Sum", ["b", "c", "d"], "y"),
    ]
    graph = Graph(model(nodes, {}))
    places = quantize_activations(graph)
    assert [(place.quantizer, place.number, place.codes) for place in places] == [
        ("left", 0, "left.codes"),
        ("right", 1, "left.codes"),
        ("coarse", 0, "coarse.codes"),
    ]
    assert operators(graph).count("QuantizeLinear") == 2
    (found,) = computed(graph.model(), x=VALUES)
    expected = 2 * on_grid(VALUES.clip(0), 0.02, 0) + on_grid(VALUES.clip(0), 0.04, 0)
    numpy.testing.assert_allclose(found, expected, atol=1e-5)


def test_one_that_is_called_twice_keeps_one_scale():
    nodes = [marker("x", "a", 0.02, 9), node("Neg", ["a"], "b"), marker("b", "y", 0.02, 9, number=1)]
    graph = Graph(model(nodes, {}))
    assert [place.codes for place in quantize_activations(graph)] == ["step.codes", "step.codes_2"]
    assert sorted(graph.constants) == ["step.scale", "step.zero_point"]


def test_a_quantizer_in_the_body_of_a_branch_is_refused():
    from onnx import helper

    def body(name):
        value = helper.make_tensor_value_info(name, 1, None)
        return helper.make_graph([marker("x", name, 0.02, 0)], name, [], [value])

    condition = helper.make_tensor("true", 9, [], [True])
    nodes = [node("If", ["true"], "y", then_branch=body("then"), else_branch=body("else"))]
    made = model(nodes, {})
    made.graph.initializer.append(condition)
    with pytest.raises(ValueError, match="in the body of a loop or branch"):
        quantize_activations(Graph(made))
