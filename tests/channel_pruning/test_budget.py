"""What a cut would cost is what it costs when it is done: by cutting and counting, and by hand."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_compress.channel_pruning.budget import Costs, fraction_for_budget
from lightning_compress.channel_pruning.cut_plan import plan_cut
from lightning_compress.channel_pruning.dependency.graph import build_dependency_graph
from lightning_compress.channel_pruning.dependency.verification import verified_groups
from lightning_compress.channel_pruning.functional.groups import remaining_group
from lightning_compress.nn.surgery import cut_model
from tests.channel_pruning.zoo import ZOO


@pytest.mark.parametrize(
    "name", ["plain_cnn", "mobilenet_v2", "resnext", "transformer_separate", "cross_attention", "gpt_tied"]
)
def test_costs_after_a_cut_are_those_of_the_module_that_is_cut(name):
    """Twice, so that the second time all starts from numbers of units that a cut has left."""
    torch.manual_seed(0)
    model, example = ZOO[name]()
    groups = verified_groups(model, example, build_dependency_graph(model, example))
    whole = sum(one.numel() for one in model.parameters())
    for step in (3, 2):
        gone = {one.name: tuple(range(1, one.units, step)) for one in groups if one.unprunable_reason is None}
        costs = Costs.measure(model, example, groups)
        expected = costs.parameters_after(gone), costs.macs_after(gone)
        cut_model(model, plan_cut(groups, gone))
        groups = remaining_group(groups, gone)
        now = Costs.measure(model, example, groups)
        assert (sum(one.numel() for one in model.parameters()), now.total_macs()) == expected
        assert expected[0] < costs.parameters <= whole
        assert expected[1] < costs.total_macs()


def test_costs_by_hand_and_for_nothing_gone():
    model, example = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    costs = Costs.measure(model, example, build_dependency_graph(model, example))
    assert (costs.parameters, costs.total_macs()) == (4 * 8 + 8 + 8 * 2 + 2, 3 * (4 * 8 + 8 * 2))
    assert (costs.parameters_after({}), costs.macs_after({})) == (58, 144)
    assert (costs.parameters_after({"0": (2, 5, 7)}), costs.macs_after({"0": (2, 5, 7)})) == (37, 90)  # 5 of 8 stay


def test_a_compiled_part_costs_what_it_costs_plain():
    model, example = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    around = nn.Sequential(torch.compile(model, backend="eager"))
    costs = Costs.measure(around, example, build_dependency_graph(around, example))
    assert (costs.parameters_after({"0.0": (2, 5, 7)}), costs.macs_after({"0.0": (2, 5, 7)})) == (37, 90)


def test_the_smallest_fraction_by_hand():
    assert fraction_for_budget(lambda _: True) == 0.0
    assert fraction_for_budget(lambda _: False) is None
    assert fraction_for_budget(lambda fraction: fraction >= 1.0) == 1.0
    # 0.5 is enough, 0.25 is not, 0.375 is, 0.3125 is, 0.28125 is not.
    halves = [fraction_for_budget(lambda fraction: fraction >= 0.3, steps) for steps in range(6)]
    assert halves == [1.0, 0.5, 0.5, 0.375, 0.3125, 0.3125]
    assert all(later <= earlier for earlier, later in pairwise(halves))
    assert 0.3 <= fraction_for_budget(lambda fraction: fraction >= 0.3) < 0.3 + 2e-6
