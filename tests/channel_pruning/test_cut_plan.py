"""From units to indices: which stay of every tensor, and what modules then remember, by hand."""

import pytest
import torch

from lightning_compress.channel_pruning.cut_plan import cut_of, indices_of, lost_channels
from lightning_compress.channel_pruning.functional.groups import Attribute, Group, Member, Place, Slice

CONV = Place(
    "conv", "out", 4, (Slice("conv.weight", 0, 4), Slice("conv.bias", 0, 4)), (Attribute("conv", "out_channels"),)
)
DEPTH = Place(
    "depth", "channels", 4, (Slice("depth.weight", 0, 8, 2),),
    (Attribute("depth", "groups"), Attribute("depth", "out_channels", 2)),
)  # fmt: skip
HEAD = Place("head", "in", 10, (Slice("head.weight", 1, 10),), (Attribute("head", "in_features"),))
FIRST = Group(
    "conv", 4, (Member(CONV, (0, 1, 2, 3)), Member(DEPTH, (0, 1, 2, 3)), Member(HEAD, (-1, -1, 0, 0, 1, 1, 2, 2, 3, 3)))
)
SECOND = Group(
    "other",
    2,
    (Member(Place("other", "out", 2, (Slice("other.weight", 0, 2),)), (0, 1)), Member(HEAD, (0, 1) + (-1,) * 8)),
)


def kept(cut):
    return {name: {dim: one.tolist() for dim, one in dims.items()} for name, dims in cut.kept.items()}


def test_every_tensor_keeps_the_indices_of_the_units_that_stay():
    cut = cut_of([FIRST], {"conv": (1, 2)})
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
    cut = cut_of([FIRST, SECOND], {"conv": (0,), "other": (1,)})
    assert kept(cut)["head.weight"] == {1: [0, 4, 5, 6, 7, 8, 9]}
    assert cut.attributes["head"] == {"in_features": 7}
    assert kept(cut)["other.weight"] == {0: [0]}


def test_groups_that_lose_nothing_are_not_in_the_cut():
    assert set(cut_of([FIRST, SECOND], {"other": (0,), "conv": ()}).kept) == {"other.weight", "head.weight"}
    assert cut_of([FIRST, SECOND], {}).kept == {}


def test_both_dimensions_of_a_tensor_are_cut():
    square = (
        Place("square", "out", 3, (Slice("square.weight", 0, 3),)),
        Place("square", "in", 3, (Slice("square.weight", 1, 3),)),
    )
    one, other = (Group(place.side, 3, (Member(place, (0, 1, 2)),)) for place in square)
    assert kept(cut_of([one, other], {"out": (0,), "in": (1, 2)})) == {"square.weight": {0: [1, 2], 1: [0]}}


def test_attributes_of_a_group_count_its_units():
    heads = Group(
        "qkv",
        2,
        (Member(Place("qkv", "out", 4), (0, 0, 1, 1)),),
        attributes=(Attribute("attention", "num_heads"), Attribute("attention", "width", 2)),
    )
    assert cut_of([heads], {"qkv": (1,)}).attributes == {"attention": {"num_heads": 1, "width": 2}}


def test_a_place_that_would_be_empty_is_refused():
    with pytest.raises(ValueError, match=r"All 4 channels of conv \(out\) would go.*min_density"):
        cut_of([FIRST], {"conv": (0, 1, 2, 3)})


def test_lost_channels_are_those_of_the_units_wherever_they_are():
    assert lost_channels([FIRST, SECOND], {"conv": (3,), "other": (0,)}) == {
        CONV: {3}, DEPTH: {3}, HEAD: {0, 8, 9}, SECOND.members[0].place: {0},
    }  # fmt: skip


def test_sections_of_a_grouped_layer_share_their_indices():
    reads = Place("grouped", "in", 6, (Slice("grouped.weight", 1, 3),))
    assert indices_of(reads, reads.slices[0], [1, 4]).tolist() == [1]
    assert torch.equal(indices_of(DEPTH, DEPTH.slices[0], [2]), torch.tensor([4, 5]))
