import numpy
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from lightning_compress.export.onnx.qdq.graph import Graph
from lightning_compress.export.onnx.qdq.storage import InitializerStore
from tests.export.qdq.graphs import model, node, session


def unpacked(codes, unsigned=False):
    """What two implementations unpack, the operators that do it, and the bytes of all constants."""
    graph = Graph(model([node("Identity", ["x"], "y")], {}))
    store = InitializerStore(graph)
    name = store.integer(codes, "weight", unsigned)
    graph.nodes[:0] = store.nodes
    graph.nodes[-1].input[0] = name
    made = graph.model()
    made.graph.output[0].CopyFrom(onnx.ValueInfoProto(name="y"))
    size = sum(len(one.raw_data) for one in made.graph.initializer)
    x = numpy.zeros((1, 1), dtype=numpy.float32)
    runs = [session(made).run(None, {"x": x})[0], ReferenceEvaluator(made).run(None, {"x": x})[0]]
    return runs, [one.op_type for one in store.nodes], size


CASES = {
    "binary": ([-1, 1], 1), "ternary": ([-1, 0, 1], 2), "wide ternary": ([-64, 0, 64], 2),
    "two bits": ([-2, -1, 0, 1], 2),
    "three bits": (range(-3, 4), 4), "four bits": (range(-8, 8), 4), "doubled": (range(-56, 57, 8), 4),
    "five bits": (range(-15, 16), 8), "eight bits": (range(-127, 128), 8), "ten bits": (range(-511, 512), 16),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", [(64, 5, 3), (7, 31)])
def test_codes_come_back_from_as_few_bits_as_they_need(name, shape):
    choices, bits = CASES[name]
    codes = numpy.random.default_rng(0).choice(numpy.array(choices), shape)
    runs, _, size = unpacked(codes)
    for found in runs:
        assert found.dtype == (numpy.int16 if bits == 16 else numpy.int8)
        assert numpy.array_equal(found, codes)
    tables = 100  # shifts, mask, shape, table
    assert size <= codes.size * bits / 8 + 1 + (tables if bits < 4 or name == "doubled" else 0)


@pytest.mark.parametrize("highest", [1, 3, 15, 255])
def test_unsigned_codes_do_too(highest):
    codes = numpy.random.default_rng(0).integers(0, highest + 1, (16, 16))
    runs, _, _ = unpacked(codes, unsigned=True)
    for found in runs:
        assert found.dtype == numpy.uint8
        assert numpy.array_equal(found, codes)


def test_equal_codes_are_stored_once_and_few_are_not_packed():
    store = InitializerStore(Graph(model([node("Identity", ["x"], "y")], {})))
    codes = numpy.arange(-100, 100)
    assert store.integer(codes, "one") == store.integer(codes.copy(), "two") == "one.codes"
    assert store.integer(codes.reshape(2, 100), "three") == "three.codes"
    _, operators, _ = unpacked(numpy.array([[1, -1]]))
    assert "BitShift" not in operators
