"""Which quantizers a method means for which formats."""

from inspect import signature
from itertools import product

import pytest
import torch

from lightning_compress.core.registry import call_with_supported_args
from lightning_compress.quantization.functional import gradients, quantizers
from lightning_compress.quantization.functional.formats import parse_format
from lightning_compress.quantization.functional.ranges import RangeEstimator, min_max, mse, percentile
from lightning_compress.quantization.methods import (
    METHODS,
    SIDES,
    ResolvedMethod,
    default_name,
    fitting_methods,
    resolve_method,
)
from tests.quantization.own_quantizer import coarse

ALL_BITS = [16, 8, 7, 5, 4, 3, 2, "ternary", "binary", "fp16", "bf16", "fp8", "fp8_e5m2", None]


def resolved(method, weights=None, activations=None):
    return resolve_method(method, parse_format(weights), parse_format(activations, "activations"))


def names(method):
    return tuple(one and one.__name__ for one in (method.weights, method.activations))


# What suits a format ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "weights", "activations"),
    [
        (16, "uniform", "uniform"),
        (8, "uniform", "uniform"),
        (5, "uniform", "uniform"),
        (4, "lsq", "lsq"),
        (2, "lsq", "lsq"),
        ("ternary", "twn", "lsq"),
        ("binary", "xnor", "bnn"),
        ("fp16", "floating", "floating"),
        ("fp8_e5m2", "floating", "floating"),
        (None, None, None),
    ],
)
def test_without_a_method_each_side_gets_what_suits_its_format(bits, weights, activations):
    assert names(resolved(None, bits, bits)) == (weights, activations)
    assert names(resolved({}, bits, bits)) == (weights, activations)


def test_each_side_is_resolved_by_its_own_format():
    assert names(resolved(None, 4, 8)) == ("lsq", "uniform")
    assert names(resolved(None, "ternary", "bf16")) == ("twn", "floating")
    assert names(resolved(None, None, 8)) == (None, "uniform")


def test_without_a_method_ranges_of_activations_are_moving_averages_and_those_of_weights_whole():
    method = resolved(None, 8, 8)
    assert method.range == RangeEstimator(min_max, 0.01)
    assert method.weight_range == RangeEstimator(min_max, None)
    assert method.gradients is method.errors is None


@pytest.mark.parametrize("weights", ALL_BITS, ids=str)
@pytest.mark.parametrize("activations", ALL_BITS, ids=str)
def test_every_pair_of_formats_has_quantizers_that_work(weights, activations):
    method = resolved(None, weights, activations)
    for side, bits in (("weights", weights), ("activations", activations)):
        assert (getattr(method, side) is None) == (bits is None)
        if bits is not None:
            runs(getattr(method, side), parse_format(bits, side), side)


# Named methods ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "weights", "activations", "quantizers_"),
    [
        ("min_max", 4, 4, ("uniform", "uniform")),
        ("moving_average", "ternary", 8, ("uniform", "uniform")),
        ("lsq", 8, 8, ("lsq", "lsq")),
        ("lsq", "ternary", 4, ("lsq", "lsq")),
        ("pact", 4, 4, ("lsq", "pact")),
        ("pact", None, 4, (None, "pact")),
        ("dorefa", 4, 4, ("dorefa_weights", "dorefa_activations")),
        ("dorefa", "binary", 2, ("xnor", "dorefa_activations")),
        ("twn", "ternary", 8, ("twn", "uniform")),
        ("twn", "ternary", None, ("twn", None)),
        ("ttq", "ternary", 4, ("ttq", "lsq")),
        ("binary_connect", "binary", 8, ("binary_connect", "uniform")),
        ("bnn", "binary", "binary", ("binary_connect", "bnn")),
        ("xnor", "binary", "binary", ("xnor", "xnor_activations")),
        ("wage", "ternary", 8, ("wage_weights", "wage_activations")),
        ("wage", 2, 8, ("wage_weights", "wage_activations")),
        ("stochastic", 8, 8, ("stochastic", "stochastic")),
        ("stochastic", "binary", 8, ("stochastic_binary", "stochastic")),
        ("floating", "fp8", "bf16", ("floating", "floating")),
    ],
)
def test_a_name_means_these_quantizers(name, weights, activations, quantizers_):
    assert names(resolved(name, weights, activations)) == quantizers_


@pytest.mark.parametrize(
    ("name", "activations", "weights"),
    [
        ("min_max", RangeEstimator(min_max, None), RangeEstimator(min_max, None)),
        ("moving_average", RangeEstimator(min_max, 0.01), RangeEstimator(min_max, None)),
        ("percentile", RangeEstimator(percentile, 0.01), RangeEstimator(percentile, None)),
        ("mse", RangeEstimator(mse, 0.01), RangeEstimator(mse, None)),
    ],
)
def test_methods_of_ranges_differ_in_how_those_are_found_and_joined(name, activations, weights):
    method = resolved(name, 8, 8)
    assert (method.range, method.weight_range) == (activations, weights)


def test_dorefa_and_wage_quantize_what_flows_back():
    assert resolved("dorefa", 4, 4).errors is gradients.dorefa
    wage = resolved("wage", 2, 8)
    assert (wage.gradients, wage.errors) == (gradients.wage_gradients, gradients.wage_errors)
    assert resolved("wage", 2, None).errors is gradients.wage_errors


@pytest.mark.parametrize("name", METHODS)
def test_every_method_works_on_every_format_that_it_says_it_fits(name):
    fitted = 0
    for side, bits in product(SIDES, ALL_BITS[:-1]):
        form = parse_format(bits, side)
        if name not in fitting_methods(form, side):
            continue
        fitted += 1
        method = resolved({side: name}, **{side: bits})
        runs(getattr(method, side), form, side)
    assert fitted


def runs(quantizer, form, side):
    """Put something on the grid of this format."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 20, generator=generator)
    shape = (4, 1) if side == "weights" else ()
    # Who rounds to two whole numbers is given 0 and 1.
    quant_min = 0 if form.name == "binary" and "quant_max" in signature(quantizer).parameters else form.quant_min
    offered = {"quant_min": quant_min, "quant_max": form.quant_max, "dtype": form.dtype, "generator": generator}
    offered |= {"scale": torch.full(shape, 0.1), "zero_point": torch.zeros(shape, dtype=torch.int32)}
    for name, initial in getattr(quantizer, "learned", {}).items():
        rows = values if side == "weights" else values.reshape(1, -1)
        offered[name] = initial(rows, quant_min, form.quant_max).reshape(shape)
    found = call_with_supported_args(quantizer, values=values, **offered)
    assert found.values.shape == values.shape
    assert found.values.isfinite().all()
    if form.name == "binary":
        assert all(len(row.unique()) == 2 for row in found.values)


@pytest.mark.parametrize("bits", ALL_BITS[:-1], ids=str)
@pytest.mark.parametrize("side", SIDES)
def test_what_suits_a_format_is_among_what_fits_it(bits, side):
    assert default_name(parse_format(bits, side), side) in fitting_methods(parse_format(bits, side), side)


# Sides by name, and your own ----------------------------------------------------------------------------------------


def test_sides_may_have_methods_of_their_own():
    assert names(resolved({"weights": "lsq", "activations": "pact"}, 8, 8)) == ("lsq", "pact")
    assert names(resolved({"weights": "dorefa"}, 8, 8)) == ("dorefa_weights", "uniform")
    assert names(resolved({"weights": "xnor", "activations": None}, "binary", 8)) == ("xnor", "uniform")
    mixed = resolved({"weights": "mse", "activations": "percentile"}, 8, 8)
    assert (mixed.weight_range.estimator, mixed.range.estimator) == (mse, percentile)


@pytest.mark.parametrize("bits", [8, "ternary", "binary", "fp8"])
def test_a_function_of_ones_own_is_taken_for_any_format(bits):
    assert resolved(coarse, bits, bits) == ResolvedMethod(coarse, coarse)
    assert resolved({"weights": coarse}, bits, 8).weights is coarse
    assert names(resolved({"weights": coarse}, bits, 8)) == ("coarse", "uniform")


def test_a_dotted_path_leads_to_ones_own_function():
    path = "tests.quantization.own_quantizer.coarse"
    assert resolved(path, 8).weights is coarse
    assert resolved({"activations": path}, 8, 8).activations is coarse


def test_a_dotted_path_to_a_quantizer_of_ours_knows_its_formats():
    assert resolved("lightning_compress.quantization.functional.quantizers.twn", "ternary").weights is quantizers.twn
    with pytest.raises(ValueError, match="twn is not for weights=8"):
        resolved(quantizers.twn, 8)


def test_a_learned_quantizer_of_ones_own_may_ask_for_what_it_learns():
    @quantizers.learns(size=lambda values, quant_min, quant_max: values.abs().mean(1, keepdim=True))
    def own(values, size):
        return quantizers.Quantized(values, None, None)

    assert resolved(own, 8).weights is own


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "weights", "activations", "parts"),
    [
        ("twn", 8, None, ["'twn' is not for weights=8", "ternary formats", "None for 'moving_average'", "'lsq'"]),
        ("dorefa", "fp8", None, ["'dorefa' is not for weights='fp8'", "None for 'floating'"]),
        ("xnor", "binary", 8, ["activations=8", "For the weights alone: method={'weights': 'xnor'}"]),
        ("bnn", 8, "binary", ["weights=8", "For the activations alone: method={'activations': 'bnn'}"]),
        ("floating", 8, 8, ["weights=8", "float formats"]),
        ({"weights": "twn"}, 4, 8, ["'twn' is not for weights=4", "None for 'lsq'"]),
        ({"weights": "pact"}, 8, 8, ["'pact' is not for weights=8"]),
        ({"activations": "ttq"}, "ternary", 8, ["'ttq' is not for activations=8"]),
        ("pact", 8, None, ["'pact' is about activations", "only weights are", "Give activations bits"]),
        ("twn", None, 8, ["'twn' is about weights", "only activations are"]),
        ({"weights": "lsq"}, None, 8, ["is about weights", "only activations are"]),
        ("lqs", 8, 8, ["no method 'lqs'", "Did you mean 'lsq'?", "moving_average", "dotted path"]),
        ({"weights": "ternary"}, "ternary", None, ["no method 'ternary'"]),
        ({"weight": "lsq"}, 8, 8, ["no side 'weight'", "Did you mean 'weights'?"]),
        ("tests.quantization.own_quantizer.gone", 8, 8, ["cannot be imported", "gone"]),
        ("tests.quantization.own_quantizer.wanting", 8, 8, ["asks for 'moon'", "zero_point"]),
        (3, 8, 8, ["3 is no name"]),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_with_the_mend(method, weights, activations, parts):
    with pytest.raises(ValueError) as refusal:
        resolved(method, weights, activations)
    for part in parts:
        assert part in str(refusal.value)


@pytest.mark.parametrize("method", [*METHODS, None])
def test_where_nothing_is_quantized_nothing_acts(method):
    assert names(resolved(method)) == (None, None)


COMBINATIONS = [(name, side, bits) for name in METHODS for side in SIDES for bits in ALL_BITS[:-1]]


@pytest.mark.parametrize(
    ("name", "side", "bits"),
    [one for one in COMBINATIONS if one[0] in fitting_methods(parse_format(one[2], one[1]), one[1])],
)
def test_what_fits_is_taken(name, side, bits):
    assert getattr(resolved({side: name}, **{side: bits}), side) in METHODS[name].for_format(side)


@pytest.mark.parametrize(
    ("name", "side", "bits"),
    [one for one in COMBINATIONS if one[0] not in fitting_methods(parse_format(one[2], one[1]), one[1])],
)
def test_what_does_not_fit_is_refused_and_all_that_the_refusal_names_does(name, side, bits):
    with pytest.raises(ValueError) as refusal:
        resolved({side: name}, **{side: bits})
    form = parse_format(bits, side)
    for fit in (default_name(form, side), *fitting_methods(form, side)):
        assert f"'{fit}'" in str(refusal.value)
        assert getattr(resolved({side: fit}, **{side: bits}), side) is not None
