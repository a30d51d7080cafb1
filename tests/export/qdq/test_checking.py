import numpy
import pytest
import torch
from onnx import numpy_helper

from lightning_compress.export.onnx.qdq.activations import ActivationGrid
from lightning_compress.export.onnx.qdq.build import build_qdq_model
from lightning_compress.export.onnx.qdq.capture import capture_model
from lightning_compress.export.onnx.qdq.checking import _beyond_rounding, check_differences, measure_differences
from tests.export import handmade


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    one = handmade.deployable(handmade.Residual())
    example = torch.randn(2, 3, 16, 16)
    return one, build_qdq_model(one, capture_model(one, example, dynamic_batch=True, opset=21), "auto"), example


def changed(model, name, change):
    """The same graph with another constant."""
    copy = type(model)()
    copy.CopyFrom(model)
    (constant,) = [one for one in copy.graph.initializer if one.name == name]
    constant.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(constant)), name))
    return copy


def test_a_graph_that_is_right_is_within_rounding_everywhere(made):
    one, graph, example = made
    found = measure_differences(one, graph.model, graph.places, example)
    check_differences(found, 0.01, "")
    assert list(found.steps) == list(one.quantizers)
    assert len(found.outputs) == len(found.local) == 1


def flipped(codes):
    codes = codes.copy()
    codes.reshape(-1)[::7] ^= 32
    return codes


def clipped(codes):
    middle = 128 if codes.dtype == numpy.uint8 else 0
    return codes.clip(middle - 64, middle + 63)


@pytest.mark.parametrize(
    ("constant", "change", "first"),
    [
        ("first.weight.codes", flipped, "first"),
        ("first.weight.codes", clipped, "first"),
        ("depthwise.weight.bias", numpy.zeros_like, "depthwise"),
        ("depthwise.weight.scale", lambda scale: scale * numpy.float32(1.05), "depthwise"),
        ("point.weight.bias", lambda bias: bias + 2000, "point"),
        ("sum.zero_point", lambda zero_point: zero_point + numpy.uint8(2), "sum"),
    ],
)
def test_the_first_place_that_is_wrong_is_named_and_those_before_it_are_right(made, constant, change, first):
    one, graph, example = made
    found = measure_differences(one, changed(graph.model, constant, change), graph.places, example)
    with pytest.raises(ValueError, match=f"first at '{first}': by .* steps .*beyond rounding.* a hint"):
        check_differences(found, 0.1, " a hint")
    steps = list(found.steps.values())
    assert max(steps[: list(found.steps).index(first)]) < 0.01


def test_what_is_wrong_behind_the_last_quantizer_is_seen_in_the_output(made):
    one, graph, example = made
    wrong = changed(graph.model, "head.weight.bias", lambda bias: bias + numpy.int32(10000))
    found = measure_differences(one, wrong, graph.places, example)
    with pytest.raises(ValueError, match="at output 0, behind the last quantizer: by .* %"):
        check_differences(found, 0.1, "")


def test_numbers_that_are_none_are_no_agreement():
    from lightning_compress.export.onnx.qdq.checking import Differences

    with pytest.raises(ValueError, match="first at 'a': by nan steps"):
        check_differences(Differences(steps={"a": float("nan")}), 0.1, "")


@pytest.mark.parametrize(
    ("values", "codes", "right"),
    [
        ([-2.0, 1.0, 0.5], [0, 2, 2], True),
        ([-2.0, 1.0, 1e-5], [0, 2, 0], True),  # next to nothing may be on either side
        ([-2.0, 1.0, 0.5], [0, 2, 0], False),
        ([-2.0, 1.0, 0.0], [0, 2, 1], True),
    ],
)
def test_of_signs_none_may_be_wrong(values, codes, right):
    place = ActivationGrid("sign", 0, "codes", 2.0**-40, 1, 0, 2, gain=2.0**40)
    found = _beyond_rounding(torch.tensor(codes, dtype=torch.uint8), torch.tensor(values), place)
    assert found == (0.0 if right else numpy.inf)
