"""How layers share a sparsity: against sorting everything, the papers' formulas, and counts by hand."""

from itertools import product

import pytest
import torch

from lightning_compress.core.registry import call_with_supported_args, registered, required_args
from lightning_compress.pruning.functional import distributions
from lightning_compress.pruning.functional.distributions import erk, global_, lamp, uniform

SPARSITIES = (0.0, 0.1, 1 / 3, 0.5, 0.77, 0.9, 0.99)
INF = float("inf")


def drawn(sizes, levels=None, seed=0, dtype=torch.float32):
    """Positive scores of layers by name, rounded to so many levels if there are to be ties."""
    generator = torch.Generator().manual_seed(seed)
    scores = {
        name: torch.rand(size, generator=generator) * (index + 1) for index, (name, size) in enumerate(sizes.items())
    }
    return {name: (one if levels is None else (one * levels).ceil() / levels).to(dtype) for name, one in scores.items()}


def sorted_counts(scores, kept):
    """How many of the best entries of all layers lie in each: all in one list, sorted, the first layer first."""
    ranked = sorted(
        (-score, order, index)
        for order, one in enumerate(scores.values())
        for index, score in enumerate(one.double().tolist())
    )
    owners = [order for _, order, _ in ranked[:kept]]
    return {name: owners.count(order) for order, name in enumerate(scores)}


def naive_lamp(scores):
    """Section 3 of the paper, with two loops: the square over the sum of the squares of all that are not smaller."""
    lamps = {}
    for name, one in scores.items():
        numbers = one.double().tolist()
        order = sorted(range(len(numbers)), key=lambda index: (numbers[index], index))
        place = {index: rank for rank, index in enumerate(order)}
        lamps[name] = torch.tensor(
            [
                numbers[u] ** 2 / sum(numbers[v] ** 2 for v in range(len(numbers)) if place[v] >= place[u])
                for u in range(len(numbers))
            ],
            dtype=torch.float64,
        )
    return lamps


@pytest.mark.parametrize("distribution", registered(distributions).values(), ids=registered(distributions))
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_every_distribution_gives_counts_within_the_layers(distribution, sparsity):
    shapes = {"a": torch.Size([7, 9]), "b": torch.Size([3, 4, 3, 3]), "c": torch.Size([2, 5])}
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    scores = drawn(sizes)
    before = {name: one.clone() for name, one in scores.items()}
    assert required_args(distribution) <= set(distributions.OFFERED)
    counts = call_with_supported_args(
        distribution, sizes=sizes, costs=dict.fromkeys(sizes, 1), shapes=shapes, scores=scores, sparsity=sparsity
    )
    assert counts.keys() == sizes.keys()
    for name, count in counts.items():
        assert isinstance(count, int)
        assert 0 <= count <= sizes[name]
        assert torch.equal(scores[name], before[name])
    total = sum(sizes.values())
    if distribution is uniform:
        assert all(count == sizes[name] - round(sparsity * sizes[name]) for name, count in counts.items())
    else:
        assert sum(counts.values()) == total - round(sparsity * total)


def test_uniform_by_hand():
    assert uniform({"a": 10, "b": 7, "c": 1}, sparsity=0.5) == {"a": 5, "b": 3, "c": 1}  # of 7 round(3.5) = 4 go


@pytest.mark.parametrize("levels", [1, 4, 30, None], ids=["all-tied", "many-ties", "some-ties", "distinct"])
def test_global_is_one_list_of_all_weights_sorted(levels):
    sizes = {"a": 13, "b": 40, "c": 1, "d": 29}
    for seed, sparsity in product(range(3), SPARSITIES):
        scores = drawn(sizes, levels, seed)
        counts = global_(scores, dict.fromkeys(sizes, 1), sizes, sparsity)
        assert counts == sorted_counts(scores, 83 - round(sparsity * 83))


def test_global_counts_weights_and_not_units():
    # 3 rows of 10 weights and 5 of 2: 20 of 40 weights to keep. From the top: b 9, a 8, b 7, then a 6 costs too much.
    scores = {"a": torch.tensor([8.0, 6.0, 1.0]), "b": torch.tensor([9.0, 7.0, 5.0, 4.0, 3.0])}
    assert global_(scores, {"a": 10, "b": 2}, {"a": 3, "b": 5}, 0.5) == {"a": 1, "b": 2}


@pytest.mark.parametrize("distribution", [global_, lamp])
def test_no_more_is_kept_than_the_budget_where_units_have_costs(distribution):
    sizes, costs = {"a": 9, "b": 30, "c": 4}, {"a": 6, "b": 1, "c": 25}
    for seed, sparsity in product(range(3), SPARSITIES):
        counts = distribution(drawn(sizes, seed=seed), costs, sizes, sparsity)
        kept = sum(count * costs[name] for name, count in counts.items())
        budget = 184 - round(sparsity * 184)
        assert budget - max(costs.values()) < kept <= budget


@pytest.mark.parametrize("levels", [3, None], ids=["ties", "distinct"])
def test_lamp_is_the_formula_of_the_paper(levels):
    sizes = {"a": 17, "b": 33, "c": 5}
    for seed, sparsity in product(range(3), SPARSITIES):
        scores = drawn(sizes, levels, seed)
        rounded = {name: one.float() for name, one in naive_lamp(scores).items()}  # ranked as float32
        counts = lamp(scores, dict.fromkeys(sizes, 1), sizes, sparsity)
        assert counts == sorted_counts(rounded, 55 - round(sparsity * 55))


def test_lamp_by_hand():
    # Of 1, 2, 2: 1/9, 4/8, 4/4. Of 3, 4: 9/25, 16/16. The two best are the last ones, then 4/8, then 9/25.
    scores = {"a": torch.tensor([1.0, 2.0, 2.0]), "b": torch.tensor([4.0, 3.0])}
    sizes, costs = {"a": 3, "b": 2}, {"a": 1, "b": 1}
    expected = {0.8: (1, 0), 0.6: (1, 1), 0.4: (2, 1), 0.2: (2, 2), 0.0: (3, 2)}
    assert {sparsity: tuple(lamp(scores, costs, sizes, sparsity).values()) for sparsity in expected} == expected


def test_lamp_does_not_mind_the_scale_of_a_layer():
    scores = drawn({"a": 20, "b": 30})
    scaled = {"a": scores["a"] * 1e-18, "b": scores["b"] * 1e18}
    for sparsity in SPARSITIES:
        about = {"a": 1, "b": 1}, {"a": 20, "b": 30}, sparsity
        assert lamp(scaled, *about) == lamp(scores, *about)


def test_what_is_pruned_does_not_count_among_what_outlives():
    scores = {"a": torch.tensor([-INF, 1.0, -INF, 2.0, 2.0]), "b": torch.tensor([4.0, -INF, 3.0])}
    alive = {name: one[one.isfinite()] for name, one in scores.items()}
    for kept in range(1, 6):
        counts = lamp(scores, {"a": 1, "b": 1}, {"a": 5, "b": 3}, 1 - kept / 8)
        assert counts == sorted_counts(naive_lamp(alive), kept)
    # 9 / 25 and 16 / 16; 1 / 6, 1 / 5 and 4 / 4: equal scores count in the order of their indices.
    scores = {"a": torch.tensor([-INF, 3.0, 4.0]), "b": torch.tensor([1.0, 1.0, 2.0])}
    assert lamp(scores, {"a": 1, "b": 1}, {"a": 3, "b": 3}, 0.5) == {"a": 2, "b": 1}


def test_lamp_keeps_what_must_be_kept_first():
    scores = {"a": torch.tensor([INF, 1.0, INF, 2.0]), "b": torch.tensor([4.0, 3.0, 5.0, 6.0])}
    assert lamp(scores, {"a": 1, "b": 1}, {"a": 4, "b": 4}, 0.75) == {"a": 2, "b": 0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lamp_of_half_precision_loses_nothing_more(dtype):
    sizes = {"a": 4000, "b": 3000}
    scores = drawn(sizes, dtype=dtype)
    exact = {name: one.double() for name, one in scores.items()}
    for sparsity in (0.02, 0.1, 0.5, 0.9):
        about = dict.fromkeys(sizes, 1), sizes, sparsity
        assert lamp(scores, *about) == lamp(exact, *about)


def test_lamp_of_a_layer_of_zeros_is_zero():
    scores = {"a": torch.zeros(4), "b": torch.ones(4)}
    assert lamp(scores, {"a": 1, "b": 1}, {"a": 4, "b": 4}, 0.5) == {"a": 0, "b": 4}


def erk_of(shapes, sparsity, units=None):
    shapes = {name: torch.Size(shape) for name, shape in shapes.items()}
    costs = {name: 1 if units is None else units[name] for name in shapes}
    sizes = {name: shape.numel() // costs[name] for name, shape in shapes.items()}
    return erk(shapes, sizes, costs, sparsity)


def test_erk_by_hand():
    # Ratios 20/100 and 52/100; 100 to keep: scale 100 / 72, densities 0.2778 and 0.7222.
    assert erk_of({"a": (10, 10), "b": (2, 50)}, 0.5) == {"a": 28, "b": 72}
    # 160 to keep: b would need 1.156 and is kept whole; the 60 left are a density of 0.6.
    assert erk_of({"a": (10, 10), "b": (2, 50)}, 0.2) == {"a": 60, "b": 100}
    # Kernels count: (4 + 2 + 3 + 3) / 72 = 1/6 and (8 + 9) / 72; 29 to keep: 12 and 17 of 29.
    assert erk_of({"conv": (4, 2, 3, 3), "linear": (8, 9)}, 1 - 29 / 144) == {"conv": 12, "linear": 17}


def test_erk_keeps_several_small_layers_whole_one_after_the_other():
    # Ratios 0.2, 4/4 and 7/12, 80 of 116 to keep. Scale 80/31: small and middle are over 1, and the 64 left go to a.
    shapes = {"a": (10, 10), "small": (2, 2), "middle": (3, 4)}
    assert erk_of(shapes, 1 - 80 / 116) == {"a": 64, "small": 4, "middle": 12}
    # 40 to keep: scale 40/31 and small is over 1. Then 36/27 = 1.33: a has 26.67 and middle 9.33.
    assert erk_of(shapes, 1 - 40 / 116) == {"a": 27, "small": 4, "middle": 9}
    assert erk_of(shapes, 0.0) == {"a": 100, "small": 4, "middle": 12}


def test_erk_densities_are_in_proportion_to_their_ratio():
    shapes = {"a": (30, 40), "b": (50, 20), "c": (16, 8, 3, 3)}
    counts = erk_of(shapes, 0.9)
    ratio = {"a": 70 / 1200, "b": 70 / 1000, "c": 30 / 1152}
    scale = {name: counts[name] / torch.Size(shapes[name]).numel() / ratio[name] for name in shapes}
    assert max(scale.values()) == pytest.approx(min(scale.values()), rel=0.05)


def test_erk_with_costs_stays_within_one_unit_below_the_budget():
    shapes, units = {"a": (10, 10), "b": (2, 50), "c": (7, 3, 3)}, {"a": 10, "b": 50, "c": 9}
    for sparsity in SPARSITIES:
        counts = erk_of(shapes, sparsity, units)
        kept = sum(count * units[name] for name, count in counts.items())
        budget = 263 - round(sparsity * 263)
        assert budget - 50 < kept <= budget
