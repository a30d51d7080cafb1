"""Which units go first, how many, and by which rule groups share it: all by hand."""

import pytest
import torch

from lightning_compress.channel_pruning.functional.distributions import global_, uniform
from lightning_compress.channel_pruning.functional.group_scores import group_scores
from lightning_compress.channel_pruning.functional.groups import ChannelAxis, ChannelGroup, GroupMember
from lightning_compress.channel_pruning.functional.unit_selection import lowest_scores, max_prunable_units, round_units


def group(name, units, channels=1):
    numbers = tuple(unit for unit in range(units) for _ in range(channels))
    places = [ChannelAxis(name, "out", units * channels), ChannelAxis(f"after {name}", "in", units * channels)]
    return ChannelGroup(name, units, tuple(GroupMember(place, numbers) for place in places))


GROUPS = [group("a", 4), group("b", 10)]
SCORES = {"a": torch.tensor([4.0, 1.0, 3.0, 2.0]), "b": torch.arange(10.0) + 0.5}
ORIGINALS = {"a": 4, "b": 10}


def test_the_lowest_go_and_among_equals_the_later_ones():
    assert lowest_scores(torch.tensor([2.0, 1.0, 1.0, 5.0]), 2) == (1, 2)
    assert lowest_scores(torch.tensor([1.0, 1.0, 1.0]), 1) == (2,)


def test_one_unit_always_stays_and_more_if_the_floor_says_so():
    assert [max_prunable_units(GROUPS[1], 10, min_density) for min_density in (0.0, 0.25, 0.9, 0.99)] == [9, 7, 1, 0]
    assert max_prunable_units(group("a", 4), 10, 0.5) == 0  # it has lost more than that already


def test_uniform_takes_the_same_fraction_of_what_each_had_at_first():
    assert uniform(GROUPS, SCORES, ORIGINALS, 0.5, 0.0) == {"a": (1, 3), "b": (0, 1, 2, 3, 4)}
    # b had 20: 10 are gone, so that nothing is left to take
    assert uniform(GROUPS, SCORES, {"a": 4, "b": 20}, 0.5, 0.0) == {"a": (1, 3), "b": ()}
    assert uniform(GROUPS, SCORES, ORIGINALS, 1.0, 0.3) == {"a": (1, 3), "b": (0, 1, 2, 3, 4, 5, 6)}


def test_global_takes_the_lowest_wherever_they_are():
    # The six lowest of all are b's 0.5, a's 1, b's 1.5, a's 2, b's 2.5 and a's 3.
    assert global_(GROUPS, SCORES, ORIGINALS, 6 / 14, 0.0) == {"a": (1, 2, 3), "b": (0, 1, 2)}
    assert global_(GROUPS, SCORES, ORIGINALS, 6 / 14, 0.5) == {"a": (1, 3), "b": (0, 1, 2, 3)}


@pytest.mark.parametrize(("gone", "stays"), [(0, 8), (1, 8), (3, 8), (5, 4), (9, 4)])
def test_what_stays_is_the_nearest_multiple(gone, stays):
    found = round_units(GROUPS[1:], {"b": lowest_scores(SCORES["b"], gone)}, SCORES, 4, {"b": 1})
    assert 10 - len(found["b"]) == stays


def test_channels_are_rounded_not_units_and_never_below_the_floor():
    heads = [group("h", 6, channels=4)]
    scores = {"h": torch.arange(6.0)}
    assert round_units(heads, {"h": (0, 1, 2)}, scores, 8, {"h": 1}) == {"h": (0, 1)}  # 12 channels: 16, not 8
    assert round_units(heads, {"h": (0, 1, 2, 3, 4)}, scores, 8, {"h": 3}) == {"h": (0, 1, 2)}


def test_scores_are_the_mean_over_layers_each_by_its_own_mean():
    def size(weight):
        return weight.abs().sum(1)

    offers = [{"weight": torch.tensor([[1.0], [3.0]])}, {"weight": torch.tensor([[300.0], [100.0]])}]
    assert group_scores(size, offers, 2).tolist() == [1.0, 1.0]

    def slimming(gamma):
        return gamma

    assert group_scores(slimming, [{"gamma": torch.tensor([2.0, 6.0])}], 2).tolist() == [
        2.0,
        6.0,
    ]  # as its paper has it


@pytest.mark.parametrize("bad", [lambda weight: weight, lambda weight: weight.sum(1) / 0 * 0])
def test_scores_that_are_none_are_refused(bad):
    with pytest.raises(ValueError, match="must return 2 finite scores"):
        group_scores(bad, [{"weight": torch.ones(2, 3)}], 2)
