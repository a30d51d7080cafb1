"""Criterion, granularity, distribution, overrides and min_density brought together: counts, then masks."""

import math
from itertools import product

import pytest
import torch
from torch import nn

from lightning_compress.core.registry import registered
from lightning_compress.pruning.allocation import UnitScores, allocate, compute_masks
from lightning_compress.pruning.functional import distributions
from lightning_compress.pruning.functional.distributions import erk, global_, lamp, uniform
from tests.pruning.layers_of import layers_of

every_distribution = pytest.mark.parametrize(
    "distribution", registered(distributions).values(), ids=registered(distributions)
)


def network():
    """Weights of 8 x 6 x 3 x 3, 4 x 2 and 12 x 4; those of the small layer are the smallest by far."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 8, 3), nn.Linear(2, 4), nn.ConvTranspose1d(4, 12, 1))
    with torch.no_grad():
        model[1].weight.mul_(1e-3)
    return model


NAMES = ("0.weight", "1.weight", "2.weight")
SIZES = {"0.weight": 432, "1.weight": 8, "2.weight": 48}


def planned(
    model, granularity="weight", distribution=uniform, sparsity=0.5, overrides=None, min_density=0.0, most=None
):
    """The layers of a model, how to score their weights by magnitude, and the units to keep."""
    layers = layers_of(model, granularity)
    score = lambda name: model.get_parameter(name).detach().abs()
    return layers, score, allocate(layers, score, distribution, sparsity, overrides or {}, min_density, most)


def test_layers_know_shapes_costs_and_sizes_with_outputs_first():
    layers = layers_of(network(), "row")
    assert layers.shapes == {"0.weight": (8, 6, 3, 3), "1.weight": (4, 2), "2.weight": (12, 4, 1)}
    assert layers.weights_per_unit == {"0.weight": 54, "1.weight": 2, "2.weight": 4}
    assert layers.num_units == {"0.weight": 8, "1.weight": 4, "2.weight": 12}
    assert layers.misfits() == {}
    assert layers_of(network(), "2:4").misfits() == {
        "0.weight": "6 inputs do not divide into groups of 4",
        "1.weight": "2 inputs do not divide into groups of 4",
    }


def test_scores_of_units_are_computed_when_they_are_read():
    read = []
    layers = layers_of(network(), "row")
    scores = UnitScores(layers, lambda name: read.append(name) or layers.by_name[name].parameter, list(NAMES))
    assert (list(scores), len(scores), read) == (list(NAMES), 3, [])
    assert scores["2.weight"].shape == (12,)
    assert read == ["2.weight"]


@every_distribution
@pytest.mark.parametrize("granularity", ["weight", "row", "column", "kernel", "group", "block 2x2"])
@pytest.mark.parametrize("min_density", [0.0, 0.07, 0.25])
def test_no_layer_empties_and_the_total_is_what_was_asked_for(distribution, granularity, min_density):
    for sparsity in (0.0, 0.3, 0.8, 0.93, 0.99):
        layers, _, kept = planned(network(), granularity, distribution, sparsity, min_density=min_density)
        least = {name: max(1, math.ceil(round(min_density * size, 6))) for name, size in layers.num_units.items()}
        assert all(least[name] <= kept[name] <= size for name, size in layers.num_units.items())
        weights = sum(kept[name] * cost for name, cost in layers.weights_per_unit.items())
        total = sum(SIZES.values())
        held = sum(least[name] * cost for name, cost in layers.weights_per_unit.items())
        slack = max(layers.weights_per_unit.values()) - 1
        if distribution is uniform:
            slack = sum(layers.weights_per_unit.values()) / 2  # each layer is rounded for itself
        assert abs(weights - max(total - round(sparsity * total), held)) <= slack


def test_without_a_floor_the_smallest_layer_would_be_empty():
    layers, _, kept = planned(network(), distribution=global_, sparsity=0.9)
    assert kept["1.weight"] == 1
    assert sum(kept.values()) == 488 - round(0.9 * 488)
    assert global_(
        {name: network().get_parameter(name).detach().abs().flatten() for name in NAMES},
        layers.weights_per_unit,
        SIZES,
        0.9,
    )["1.weight"] == 0  # fmt: skip


def test_the_floor_by_hand():
    # 93 % of 100 and 20: 7 and 1 stay. A `min_density` of 10 % takes 10 and 2 instead, and nothing is left to be
    # shared out.
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 2))
    assert planned(model, sparsity=0.93)[2] == {"0.weight": 7, "1.weight": 1}
    assert planned(model, sparsity=0.93, min_density=0.1)[2] == {"0.weight": 10, "1.weight": 2}
    # A `min_density` that is met just so changes nothing: 0.07 * 100 is a little over 7 for a computer.
    assert planned(model, sparsity=0.93, min_density=0.05)[2] == {"0.weight": 7, "1.weight": 1}
    assert planned(nn.Sequential(nn.Linear(10, 10)), sparsity=0.93, min_density=0.07)[2] == {"0.weight": 7}


def test_what_a_floor_keeps_is_taken_from_the_others():
    # Of 100 and 4 weights 10 are to stay. The four are the smallest, and `min_density` keeps two of them.
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(4, 1))
    with torch.no_grad():
        model[1].weight.mul_(1e-6)
    assert planned(model, distribution=global_, sparsity=1 - 10 / 104)[2] == {"0.weight": 9, "1.weight": 1}
    assert planned(model, distribution=global_, sparsity=1 - 10 / 104, min_density=0.01)[2] == {
        "0.weight": 9,
        "1.weight": 1,
    }
    low = planned(model, distribution=global_, sparsity=1 - 40 / 104, min_density=0.26)[2]
    assert low == {"0.weight": 38, "1.weight": 2}


@every_distribution
def test_an_override_is_met_exactly_and_the_others_share_the_rest(distribution):
    for sparsity, own in product((0.3, 0.8), (0.0, 0.25, 0.5)):
        _, _, kept = planned(network(), distribution=distribution, sparsity=sparsity, overrides={"2.weight": own})
        assert kept["2.weight"] == 48 - round(own * 48)
        others = kept["0.weight"] + kept["1.weight"]
        assert others == 440 - round(sparsity * 440)


def test_an_override_of_everything_leaves_nothing_to_share_out():
    overrides = {"0.weight": 0.5, "1.weight": 0.999, "2.weight": 0.0}
    assert planned(network(), distribution=erk, overrides=overrides)[2] == {
        "0.weight": 216, "1.weight": 1, "2.weight": 48,
    }  # fmt: skip


@every_distribution
def test_what_a_layer_may_keep_at_most_goes_to_the_others(distribution):
    most = {"0.weight": 30, "1.weight": 8, "2.weight": 48}
    _, _, kept = planned(network(), distribution=distribution, sparsity=1 - 61 / 488, most=most)
    assert all(kept[name] <= most[name] for name in NAMES)
    assert kept["0.weight"] == 30 or sum(kept.values()) == 61
    assert abs(sum(kept.values()) - 61) <= 1  # uniform rounds each layer for itself


@pytest.mark.parametrize("granularity", ["weight", "row", "column", "kernel", "group", "block 2x2"])
@pytest.mark.parametrize("distribution", [uniform, lamp])
def test_masks_are_as_stored_and_keep_the_best_units(granularity, distribution):
    model = network()
    layers, score, kept = planned(model, granularity, distribution, 0.6)
    found = dict(compute_masks(layers, score, kept))
    assert list(found) == list(NAMES)
    for name, mask in found.items():
        parameter = model.get_parameter(name)
        assert mask.shape == parameter.shape
        assert mask.dtype == torch.bool
        assert mask.is_contiguous()
        assert mask.sum() == kept[name] * layers.weights_per_unit[name]
        units = UnitScores(layers, score, list(NAMES))[name]
        alive = UnitScores(layers, lambda name: found[name].float(), list(NAMES))[name] == 1.0
        assert alive.sum() == kept[name]
        assert sorted(units[alive]) == sorted(units)[len(units) - kept[name] :]


def test_masked_rows_are_the_weakest_outputs():
    layer = nn.ConvTranspose1d(2, 3, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0]]).view(2, 3, 1))
    layers, score, kept = planned(nn.Sequential(layer), "row", sparsity=1 / 3)
    ((_, mask),) = compute_masks(layers, score, kept)
    assert mask.flatten(1).int().tolist() == [[1, 0, 1], [1, 0, 1]]


def test_n_of_m_is_met_in_every_group_of_every_layer():
    model = nn.Sequential(nn.Linear(8, 6), nn.Conv2d(4, 6, 3), nn.ConvTranspose1d(12, 5, 2))
    layers, score, kept = planned(model, "1:4", sparsity=0.75)
    for name, mask in compute_masks(layers, score, kept):
        inputs_last = mask.transpose(0, -1) if name == "2.weight" else mask.movedim(1, -1)
        assert (inputs_last.unflatten(-1, (-1, 4)).sum(-1) == 1).all()


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (lambda sizes: {"0.weight": 5}, "gave no count for 1.weight, 2.weight"),
        (lambda sizes: {name: size + 1 for name, size in sizes.items()}, "433 units of '0.weight', which has 432"),
        (lambda sizes: {name: size / 2 for name, size in sizes.items()}, "216.0 units of '0.weight'.*whole numbers"),
        (lambda sizes: dict.fromkeys(sizes, -1), "-1 units of '0.weight'"),
        (lambda sizes: None, "NoneType"),
    ],
    ids=["missing", "too-many", "fractions", "negative", "nothing"],
)
def test_a_distribution_that_miscounts_is_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        planned(network(), distribution=counts)
