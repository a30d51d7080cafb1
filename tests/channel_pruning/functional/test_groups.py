"""Groups shrink as their modules do: places, sizes and the numbers of units, by hand and against observing again."""

import pytest
import torch

from lightning_compress.channel_pruning.cut_plan import cut_of
from lightning_compress.channel_pruning.dependency.graph import observe
from lightning_compress.channel_pruning.functional.groups import (
    Attribute,
    Group,
    Member,
    Place,
    Slice,
    gone_channels,
    remaining,
)
from lightning_compress.nn.surgery import cut_model
from tests.channel_pruning.zoo import ZOO

MAKER = Place("conv", "out", 4, (Slice("conv.weight", 0, 4), Slice("conv.bias", 0, 4)))
READER = Place("linear", "in", 12, (Slice("linear.weight", 1, 12),))
FLATTENED = Group(
    "conv", 4, (Member(MAKER, (0, 1, 2, 3)), Member(READER, tuple(unit for unit in range(4) for _ in "abc")))
)


def test_the_channels_of_a_unit_leave_wherever_it_has_some():
    assert gone_channels(FLATTENED.members[0], [1, 3]) == {1, 3}
    assert gone_channels(FLATTENED.members[1], [1, 3]) == {3, 4, 5, 9, 10, 11}
    assert gone_channels(FLATTENED.members[1], []) == set()


def test_channels_of_other_groups_do_not_leave():
    assert gone_channels(Member(READER, (-1,) * 6 + (0, 1) * 3), [0]) == {6, 8, 10}


def test_makers_give_and_readers_take():
    assert [one.place.module for one in FLATTENED.makers] == ["conv"]
    assert [one.place.module for one in FLATTENED.readers] == ["linear"]
    assert str(MAKER) == "conv (out)"


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        (Attribute("conv", "out_channels"), 3),
        (Attribute("attention", "heads", 2), 6),
        (Attribute("norm", "shape", as_tuple=True), (3,)),
    ],
)
def test_an_attribute_counts_channels(attribute, value):
    assert attribute.value(3) == value


def test_units_are_numbered_anew_and_places_shrink():
    [left] = remaining([FLATTENED], {"conv": (1,)})
    assert left.units == 3
    assert [list(one.units) for one in left.members] == [[0, 1, 2], [0, 0, 0, 1, 1, 1, 2, 2, 2]]
    assert [one.place.size for one in left.members] == [3, 9]
    assert [one.size for one in left.members[0].place.slices] == [3, 3]
    assert [one.size for one in left.members[1].place.slices] == [9]


def test_a_place_of_two_groups_loses_the_channels_of_both():
    half = Place("head", "in", 4, (Slice("head.weight", 1, 4),))
    first = Group("a", 2, (Member(Place("a", "out", 2), (0, 1)), Member(half, (0, 1, -1, -1))))
    second = Group("b", 2, (Member(Place("b", "out", 2), (0, 1)), Member(half, (-1, -1, 0, 1))))
    left = remaining([first, second], {"a": (0,), "b": (1,)})
    assert [one.members[1].place.size for one in left] == [2, 2]
    assert [list(one.members[1].units) for one in left] == [[0, -1], [-1, 0]]


def test_nothing_gone_leaves_all_as_it_was():
    assert remaining([FLATTENED], {}) == [FLATTENED]


def of_interest(groups):
    return [
        (one.units, one.whole, {(str(m.place), m.place.size, m.place.slices, m.units) for m in one.members})
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
    groups = observe(model, example)
    gone = {
        one.name: tuple(range(0, one.units - 1, 2)) if one.units > 3 else (0,)
        for one in groups
        if one.whole is None and "qkv" not in one.name
    }
    cut_model(model, cut_of(groups, gone))
    again = {one.name: one for one in observe(model, example)}
    left = remaining(groups, gone)
    assert {one.name for one in left} == set(again)
    assert of_interest(left) == of_interest([again[one.name] for one in left])
