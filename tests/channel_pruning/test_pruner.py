"""What goes for each kind of budget, and what is said if one cannot be met: all by hand."""

import pytest
import torch
from torch import nn

from lightning_compress.channel_pruning.budget import Budget
from lightning_compress.channel_pruning.functional.criteria import l2
from lightning_compress.channel_pruning.functional.distributions import uniform
from lightning_compress.channel_pruning.pruner import ChannelPruner, ChannelPruningConfig

# Of u hidden units: 7 u + 2 parameters (58 of 8 at first) and 6 u multiplications.
ALLOWED = {"0.weight", "2.weight"}


def shrinker(kind, target, units=8, **how):
    model = nn.Sequential(nn.Linear(4, units), nn.ReLU(), nn.Linear(units, 2))
    return ChannelPruner(
        model, torch.randn(1, 4), Budget(kind, target), ChannelPruningConfig(l2, uniform, **how), ALLOWED
    )


@pytest.mark.parametrize(
    ("kind", "target", "progress", "stay"),
    [
        ("sparsity", 0.5, 1.0, 4),
        ("sparsity", 0.5, 0.5, 6),
        ("parameters", 0.5, 1.0, 3),  # 4 would have 30 of 58
        ("parameters", 30 / 58, 1.0, 4),
        ("parameters", 0.5, 0.5, 5),  # three quarters are 43.5; 6 would have 44
        ("macs", 0.5, 1.0, 4),
        ("macs", 0.5, 0.5, 6),
        ("macs", 0.49, 1.0, 3),
    ],
)
def test_as_few_units_go_as_the_budget_asks_for(kind, target, progress, stay):
    ours = shrinker(kind, target)
    scores = {"0": torch.tensor([5.0, 1.0, 7.0, 2.0, 8.0, 3.0, 6.0, 4.0])}  # lowest first: 1, 3, 5, 7, 0, 6, 2, 4
    gone = ours.select_units(scores, progress)
    assert gone == {"0": tuple(sorted([1, 3, 5, 7, 0, 6, 2, 4][: 8 - stay]))}


@pytest.mark.parametrize(
    ("kind", "target", "units", "min_density", "nearest"),
    [
        ("sparsity", 0.6, 8, 0.5, 0.5),
        ("sparsity", 0.9, 3, 0.0, 0.6666),  # 2 of 3 may go: 0.6667 would be refused again
        ("parameters", 0.5, 8, 0.5, 0.5173),  # 30 / 58 = 0.51724: 0.5172 would be
        ("macs", 0.1, 8, 0.0, 0.125),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused_with_the_nearest_one_that_can(
    kind, target, units, min_density, nearest
):
    with pytest.raises(ValueError, match=f"{kind}={target} cannot be met: .* the nearest is {kind}={nearest}\\."):
        shrinker(kind, target, units, min_density=min_density).check()
    shrinker(kind, nearest, units, min_density=min_density).check()


@pytest.mark.parametrize("tenths", range(1, 10))
def test_a_sparsity_that_is_what_the_floor_leaves_is_no_more_than_that(tenths):
    shrinker("sparsity", tenths / 10, units=10, min_density=1 - tenths / 10).check()
