"""Groups shrink as their modules do: places, sizes and the numbers of units, by hand and against observing again."""

import pytest
import torch

from lightning_compress.channel_pruning.cut_plan import plan_cut
from lightning_compress.channel_pruning.dependency.graph import build_dependency_graph
from lightning_compress.channel_pruning.functional.groups import (
    ChannelAxis,
    ChannelGroup,
    GroupMember,
    ModuleAttribute,
    TensorSlice,
    pruned_channels,
    remaining_group,
)
from lightning_compress.nn.surgery import cut_model
from tests.channel_pruning.zoo import ZOO

MAKER = ChannelAxis("conv", "out", 4, (TensorSlice("conv.weight", 0, 4), TensorSlice("conv.bias", 0, 4)))
READER = ChannelAxis("linear", "in", 12, (TensorSlice("linear.weight", 1, 12),))
FLATTENED = ChannelGroup(
    "conv", 4, (GroupMember(MAKER, (0, 1, 2, 3)), GroupMember(READER, tuple(unit for unit in range(4) for _ in "abc")))
)


def test_the_channels_of_a_unit_leave_wherever_it_has_some():
    assert pruned_channels(FLATTENED.members[0], [1, 3]) == {1, 3}
    assert pruned_channels(FLATTENED.members[1], [1, 3]) == {3, 4, 5, 9, 10, 11}
    assert pruned_channels(FLATTENED.members[1], []) == set()


def test_channels_of_other_groups_do_not_leave():
    assert pruned_channels(GroupMember(READER, (-1,) * 6 + (0, 1) * 3), [0]) == {6, 8, 10}


def test_makers_give_and_readers_take():
    assert [one.axis.module for one in FLATTENED.producers] == ["conv"]
    assert [one.axis.module for one in FLATTENED.consumers] == ["linear"]
    assert str(MAKER) == "conv (out)"


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        (ModuleAttribute("conv", "out_channels"), 3),
        (ModuleAttribute("attention", "heads", 2), 6),
        (ModuleAttribute("norm", "shape", as_tuple=True), (3,)),
    ],
)
def test_an_attribute_counts_channels(attribute, value):
    assert attribute.value(3) == value


def test_units_are_numbered_anew_and_places_shrink():
    [left] = remaining_group([FLATTENED], {"conv": (1,)})
    assert left.units == 3
    assert [list(one.units) for one in left.members] == [[0, 1, 2], [0, 0, 0, 1, 1, 1, 2, 2, 2]]
    assert [one.axis.size for one in left.members] == [3, 9]
    assert [one.size for one in left.members[0].axis.slices] == [3, 3]
    assert [one.size for one in left.members[1].axis.slices] == [9]


def test_a_place_of_two_groups_loses_the_channels_of_both():
    half = ChannelAxis("head", "in", 4, (TensorSlice("head.weight", 1, 4),))
    first = ChannelGroup("a", 2, (GroupMember(ChannelAxis("a", "out", 2), (0, 1)), GroupMember(half, (0, 1, -1, -1))))
    second = ChannelGroup("b", 2, (GroupMember(ChannelAxis("b", "out", 2), (0, 1)), GroupMember(half, (-1, -1, 0, 1))))
    left = remaining_group([first, second], {"a": (0,), "b": (1,)})
    assert [one.members[1].axis.size for one in left] == [2, 2]
    assert [list(one.members[1].units) for one in left] == [[0, -1], [-1, 0]]


def test_nothing_gone_leaves_all_as_it_was():
    assert remaining_group([FLATTENED], {}) == [FLATTENED]


def of_interest(groups):
    return [
        (one.units, one.unprunable_reason, {(str(m.axis), m.axis.size, m.axis.slices, m.units) for m in one.members})
        for one in groups
    ]


@pytest.mark.parametrize(
    "name",
    [
        "plain_cnn", "lenet5", "resnet_basic", "densenet", "resnext", "mobilenet_v2", "depthwise_multiplier", "unet",
        "super_resolution", "coordconv", "groupnorm_cnn", "autoencoder", "gpt_tied",
    ],
)  # fmt: skip
def test_what_remains_is_what_the_cut_module_shows(name):
    """Heads of attention are left out here: an attribute that only verification finds must follow them."""
    torch.manual_seed(0)
    model, example = ZOO[name]()
    groups = build_dependency_graph(model, example)
    gone = {
        one.name: tuple(range(0, one.units - 1, 2)) if one.units > 3 else (0,)
        for one in groups
        if one.unprunable_reason is None and "qkv" not in one.name
    }
    cut_model(model, plan_cut(groups, gone))
    again = {one.name: one for one in build_dependency_graph(model, example)}
    left = remaining_group(groups, gone)
    assert {one.name for one in left} == set(again)
    assert of_interest(left) == of_interest([again[one.name] for one in left])
