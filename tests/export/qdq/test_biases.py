import numpy
import pytest

from lightning_compress.export.onnx.qdq.activations import ActivationGrid
from lightning_compress.export.onnx.qdq.biases import add_integer_bias, scales_with_bias_room
from lightning_compress.export.onnx.qdq.graph import Graph
from lightning_compress.export.onnx.qdq.kernels import IntegerKernel
from lightning_compress.export.onnx.qdq.storage import InitializerStore
from tests.export.qdq.graphs import model, node

NO_ZEROS = numpy.zeros(2, numpy.int64)


def kernel_with(bias, place_scale=0.1):
    graph = Graph(model([node("Gemm", ["x", "w", "b"], "y", transB=1)], {"b": numpy.array(bias, numpy.float32)}))
    return graph, IntegerKernel(graph.nodes[0], ActivationGrid("input", 0, "codes", place_scale, 0), 0)


@pytest.mark.parametrize(("highest", "factor"), [(1, 64), (3, 16), (7, 8), (15, 4), (31, 2), (63, 1), (127, 1)])
def test_numbers_of_few_bits_are_doubled_for_finer_biases_and_stand_for_the_same_weights(highest, factor):
    rng = numpy.random.default_rng(0)
    codes = rng.integers(-highest, highest + 1, (2, 40))
    codes[0, 0] = highest
    scales = numpy.array([0.3, 0.07], dtype=numpy.float32)
    graph, kernel = kernel_with([0.1, 0.2])
    more, finer, zeros = scales_with_bias_room(graph, [kernel], codes, scales, NO_ZEROS)
    assert zeros.tolist() == [0, 0]
    assert numpy.array_equal(more, codes * factor)
    assert numpy.array_equal(more.astype(numpy.float32) * finer[:, None], codes.astype(numpy.float32) * scales[:, None])


def test_without_a_bias_nothing_changes():
    graph = Graph(model([node("Gemm", ["x", "w"], "y", transB=1)], {}))
    kernel = IntegerKernel(graph.nodes[0], ActivationGrid("input", 0, "codes", 0.1, 0), 0)
    codes, scales = numpy.array([[1, -1]]), numpy.float32(0.5)
    zeros = numpy.int64(1)
    assert scales_with_bias_room(graph, [kernel], codes, scales, zeros) == (codes, scales, zeros)


def test_numbers_that_stand_for_zero_move_with_the_others_and_stay_within_8_bits():
    codes, scales, zeros = numpy.array([[-7, 0, 3], [-7, -5, 7]]), numpy.array([0.3, 1e-24]), numpy.array([-3, -7])
    graph, kernel = kernel_with([0.1, 0.7])
    more, finer, moved = scales_with_bias_room(graph, [kernel], codes, scales.astype(numpy.float32), zeros)
    assert moved.tolist() == [-24, -56]
    assert more.tolist() == [[-56, 0, 24], [-56, -56, -56]]  # what was next to nothing is nothing
    numpy.testing.assert_allclose((more[0] - moved[0]) * finer[0], (codes[0] - zeros[0]) * 0.3, rtol=1e-6)


def test_a_bias_is_rounded_by_half_a_step_of_the_product_at_most():
    rng = numpy.random.default_rng(0)
    bias, scales = rng.normal(size=50).astype(numpy.float32), rng.uniform(0.001, 0.01, 50).astype(numpy.float32)
    graph, kernel = kernel_with(bias)
    store = InitializerStore(graph)
    error = add_integer_bias(graph, store, kernel, scales, "layer")
    codes, steps = graph.constant("layer.bias"), graph.constant("layer.bias_scale")
    assert codes.dtype == numpy.int32
    numpy.testing.assert_allclose(steps, 0.1 * scales, rtol=1e-6)
    assert error == pytest.approx(numpy.abs(codes * steps.astype(float) - bias).max())
    assert 0 < error <= 0.5 * steps.max()
    assert kernel.node.input[2] == store.nodes[0].output[0]


def test_a_channel_of_next_to_no_weights_gets_steps_that_int32_can_count_its_bias_in():
    codes = numpy.array([[100, -127, 3], [100, -127, 3]])
    scales = numpy.array([1e-24, 0.01], dtype=numpy.float32)
    graph, kernel = kernel_with([0.7, 0.7])
    new, wider, _ = scales_with_bias_room(graph, [kernel], codes, scales, NO_ZEROS)
    assert new.tolist() == [[0, 0, 0], [100, -127, 3]]
    assert wider[1] == scales[1]
    add_integer_bias(graph, InitializerStore(graph), kernel, wider, "layer")
    numbers = graph.constant("layer.bias").astype(float)
    assert abs(numbers[0]) <= 2**30 * (1 + 1e-6)
    assert numbers[0] * 0.1 * wider[0] == pytest.approx(0.7, rel=1e-6)


def test_a_channel_without_weights_gets_the_steps_that_its_bias_asks_for():
    codes, scales = numpy.array([[0, 0, 0], [100, -127, 3]]), numpy.array([0.3, 0.01], dtype=numpy.float32)
    graph, kernel = kernel_with([0.0123, 0.7])
    new, wider, _ = scales_with_bias_room(graph, [kernel], codes, scales, NO_ZEROS)
    assert new.tolist() == codes.tolist()
    assert wider[1] == scales[1]
    add_integer_bias(graph, InitializerStore(graph), kernel, wider, "layer")
    found = graph.constant("layer.bias").astype(float) * graph.constant("layer.bias_scale").astype(float)
    assert found[0] == pytest.approx(0.0123, rel=1e-6)
