import numpy
import pytest

from lightning_compress.export.onnx.qdq.graph import Graph
from lightning_compress.export.onnx.qdq.padding import pad_integers
from tests.export.qdq.graphs import computed, model, node


def padded(*rest, second=(), **attributes):
    """A quantized value that is padded by one before and two behind, perhaps twice."""
    constants = {
        "s": numpy.float32(0.1), "z": numpy.uint8(100), "pads": numpy.array([0, 1, 0, 2]),
        "zero": numpy.float32(0), "one": numpy.float32(1), "both": numpy.array([0, 1]),
    }  # fmt: skip
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], "codes"),
        node("DequantizeLinear", ["codes", "s", "z"], "v"),
        node("Pad", ["v", "pads", *rest], "w" if second else "y", **attributes),
        *([node("Pad", ["w", "pads"], "y")] if second else []),
    ]
    return model(nodes, constants)


CASES = {
    "constant": ((), {}), "explicit zero": (("zero",), {}), "axes": (("", "both"), {}),
    "reflect": ((), {"mode": "reflect"}), "edge": (("", "both"), {"mode": "edge"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("second", [False, True])
def test_whole_numbers_are_padded_before_they_are_dequantized_with_the_same_result(name, second):
    rest, attributes = CASES[name]
    made = padded(*rest, second=second, **attributes)
    graph = Graph(made)
    pad_integers(graph, ["codes"])
    operators = [one.op_type for one in graph.nodes]
    assert operators == ["QuantizeLinear", *["Pad"] * (1 + second), "DequantizeLinear"]
    x = numpy.random.default_rng(0).normal(size=(2, 5)).astype(numpy.float32)
    (expected,) = computed(made, x=x)
    (found,) = computed(graph.model(), x=x)
    assert expected.shape == (2, 8 + 3 * second)
    assert numpy.array_equal(found, expected)


def test_other_values_and_other_numbers_stay_as_they_are():
    for made, codes in ((padded("one"), ["codes"]), (padded(), [])):
        graph = Graph(made)
        pad_integers(graph, codes)
        assert [one.op_type for one in graph.nodes] == ["QuantizeLinear", "DequantizeLinear", "Pad"]
