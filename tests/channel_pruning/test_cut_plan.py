"""From units to indices: which stay of every tensor, and what modules then remember, by hand."""

import pytest
import torch

from lightning_compress.channel_pruning.cut_plan import indices_of, lost_channels, plan_cut
from lightning_compress.channel_pruning.functional.groups import (
    ChannelAxis,
    ChannelGroup,
    GroupMember,
    ModuleAttribute,
    TensorSlice,
)

CONV = ChannelAxis(
    "conv",
    "out",
    4,
    (TensorSlice("conv.weight", 0, 4), TensorSlice("conv.bias", 0, 4)),
    (ModuleAttribute("conv", "out_channels"),),
)
DEPTH = ChannelAxis(
    "depth", "channels", 4, (TensorSlice("depth.weight", 0, 8, 2),),
    (ModuleAttribute("depth", "groups"), ModuleAttribute("depth", "out_channels", 2)),
)  # fmt: skip
HEAD = ChannelAxis("head", "in", 10, (TensorSlice("head.weight", 1, 10),), (ModuleAttribute("head", "in_features"),))
FIRST = ChannelGroup(
    "conv",
    4,
    (
        GroupMember(CONV, (0, 1, 2, 3)),
        GroupMember(DEPTH, (0, 1, 2, 3)),
        GroupMember(HEAD, (-1, -1, 0, 0, 1, 1, 2, 2, 3, 3)),
    ),
)
SECOND = ChannelGroup(
    "other",
    2,
    (
        GroupMember(ChannelAxis("other", "out", 2, (TensorSlice("other.weight", 0, 2),)), (0, 1)),
        GroupMember(HEAD, (0, 1) + (-1,) * 8),
    ),
)


def kept(cut):
    return {name: {dim: one.tolist() for dim, one in dims.items()} for name, dims in cut.kept.items()}


def test_every_tensor_keeps_the_indices_of_the_units_that_stay():
    cut = plan_cut([FIRST], {"conv": (1, 2)})
    assert kept(cut) == {
        "conv.weight": {0: [0, 3]},
        "conv.bias": {0: [0, 3]},
        "depth.weight": {0: [0, 1, 6, 7]},
        "head.weight": {1: [0, 1, 2, 3, 8, 9]},
    }
    assert cut.attributes == {
        "conv": {"out_channels": 2},
        "depth": {"groups": 2, "out_channels": 4},
        "head": {"in_features": 6},
    }


def test_a_place_of_two_groups_is_cut_once_for_both():
    cut = plan_cut([FIRST, SECOND], {"conv": (0,), "other": (1,)})
    assert kept(cut)["head.weight"] == {1: [0, 4, 5, 6, 7, 8, 9]}
    assert cut.attributes["head"] == {"in_features": 7}
    assert kept(cut)["other.weight"] == {0: [0]}


def test_groups_that_lose_nothing_are_not_in_the_cut():
    assert set(plan_cut([FIRST, SECOND], {"other": (0,), "conv": ()}).kept) == {"other.weight", "head.weight"}
    assert plan_cut([FIRST, SECOND], {}).kept == {}


def test_both_dimensions_of_a_tensor_are_cut():
    square = (
        ChannelAxis("square", "out", 3, (TensorSlice("square.weight", 0, 3),)),
        ChannelAxis("square", "in", 3, (TensorSlice("square.weight", 1, 3),)),
    )
    one, other = (ChannelGroup(place.side, 3, (GroupMember(place, (0, 1, 2)),)) for place in square)
    assert kept(plan_cut([one, other], {"out": (0,), "in": (1, 2)})) == {"square.weight": {0: [1, 2], 1: [0]}}


def test_attributes_of_a_group_count_its_units():
    heads = ChannelGroup(
        "qkv",
        2,
        (GroupMember(ChannelAxis("qkv", "out", 4), (0, 0, 1, 1)),),
        attributes=(ModuleAttribute("attention", "num_heads"), ModuleAttribute("attention", "width", 2)),
    )
    assert plan_cut([heads], {"qkv": (1,)}).attributes == {"attention": {"num_heads": 1, "width": 2}}


def test_a_place_that_would_be_empty_is_refused():
    with pytest.raises(ValueError, match=r"All 4 channels of conv \(out\) would go.*min_density"):
        plan_cut([FIRST], {"conv": (0, 1, 2, 3)})


def test_lost_channels_are_those_of_the_units_wherever_they_are():
    assert lost_channels([FIRST, SECOND], {"conv": (3,), "other": (0,)}) == {
        CONV: {3}, DEPTH: {3}, HEAD: {0, 8, 9}, SECOND.members[0].axis: {0},
    }  # fmt: skip


def test_sections_of_a_grouped_layer_share_their_indices():
    reads = ChannelAxis("grouped", "in", 6, (TensorSlice("grouped.weight", 1, 3),))
    assert indices_of(reads, reads.slices[0], [1, 4]).tolist() == [1]
    assert torch.equal(indices_of(DEPTH, DEPTH.slices[0], [2]), torch.tensor([4, 5]))
