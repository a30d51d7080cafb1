"""Edges between channels become groups of units: against search by hand, and by hand."""

import random

import pytest
import torch

from lightning_compress.channel_pruning.dependency.coupling import ChannelUnion, connected_components
from lightning_compress.channel_pruning.functional.groups import ChannelAxis, TensorSlice


def searched(nodes, edges):
    """Connected components by walking from every node."""
    near = {node: set() for node in range(nodes)}
    for one, other in edges:
        near[one].add(other)
        near[other].add(one)
    labels = {}
    for node in range(nodes):
        waiting = [node]
        while waiting:
            if (next_one := waiting.pop()) not in labels:
                labels[next_one] = node
                waiting += near[next_one]
    return [labels[node] for node in range(nodes)]


@pytest.mark.parametrize("seed", range(20))
def test_components_are_those_of_a_search(seed):
    draw = random.Random(seed)
    nodes = draw.randint(1, 40)
    edges = [(draw.randrange(nodes), draw.randrange(nodes)) for _ in range(draw.randint(0, 45))]
    given = torch.tensor(edges, dtype=torch.long).reshape(-1, 2).T
    assert connected_components(nodes, given).tolist() == searched(nodes, edges)


def test_a_long_chain_is_one_component():
    chain = torch.arange(2000)
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    assert set(connected_components(2000, torch.stack([order[:-1], order[1:]])).tolist()) == {0}
    assert len(connected_components(2000, torch.stack([chain, chain])).unique()) == 2000


def pairs(*several):
    return torch.tensor(several)


def chain(size=3, reader=3):
    coupling = ChannelUnion()
    return coupling, coupling.add(ChannelAxis("a", "out", size)), coupling.add(ChannelAxis("b", "in", reader))


def test_channels_that_are_joined_are_one_unit():
    coupling, maker, reader = chain()
    coupling.join(maker, reader, pairs((0, 2), (1, 1), (2, 0)))
    [group] = coupling.groups()
    assert (group.name, group.units, group.unprunable_reason) == ("a", 3, None)
    assert [one.units for one in group.members] == [(0, 1, 2), (2, 1, 0)]


def test_units_with_other_places_make_a_group_of_their_own():
    coupling, maker, reader = chain(4, 2)
    other = coupling.add(ChannelAxis("c", "in", 2))
    coupling.join(maker, reader, pairs((0, 0), (1, 1)))
    coupling.join(maker, other, pairs((2, 0), (3, 1)))
    groups = coupling.groups()
    assert [(one.name, one.units) for one in groups] == [("a", 2), ("a#2", 2)]
    assert groups[0].members[0].units == (0, 1, -1, -1)
    assert groups[1].members[0].units == (-1, -1, 0, 1)


def test_units_with_other_numbers_of_channels_are_not_mixed():
    coupling, maker, reader = chain(3, 4)
    coupling.join(maker, reader, pairs((0, 0), (0, 1), (1, 2), (2, 3)))
    assert [(one.units, one.unprunable_reason is None) for one in coupling.groups()] == [(1, False), (2, True)]


def test_fixed_channels_stay_with_the_first_reason_and_take_their_partners_along():
    coupling, maker, reader = chain()
    coupling.join(maker, reader, pairs((0, 0), (1, 1), (2, 2)))
    coupling.fix(reader, torch.tensor([1]), "the first")
    coupling.fix(maker, torch.tensor([1]), "the second")
    free, fixed = coupling.groups()
    assert (free.units, free.unprunable_reason) == (2, None)
    assert (fixed.units, fixed.unprunable_reason) == (1, "the first")
    assert fixed.members[0].units == (-1, 0, -1)


def test_units_that_nobody_reads_stay():
    coupling = ChannelUnion()
    coupling.add(ChannelAxis("a", "out", 3))
    assert {one.unprunable_reason for one in coupling.groups()} == {"no layer reads it"}


def test_channels_that_all_hang_together_stay():
    coupling, maker, reader = chain()
    coupling.join(maker, reader, pairs((0, 0), (0, 1), (1, 1), (1, 2), (2, 2)))
    [group] = coupling.groups()
    assert (group.units, group.unprunable_reason) == (1, "all of its channels depend on each other")


def test_what_no_layer_makes_is_no_group():
    coupling = ChannelUnion()
    coupling.add(ChannelAxis("b", "in", 3))
    assert coupling.groups() == []


def test_places_at_the_same_index_of_one_tensor_are_coupled():
    coupling = ChannelUnion()
    embed = coupling.add(ChannelAxis("embed", "out", 3, (TensorSlice("shared", 1, 3),)))
    head = coupling.add(ChannelAxis("head", "in", 3, (TensorSlice("shared", 1, 3),)))
    coupling.add(ChannelAxis("rows", "out", 3, (TensorSlice("shared", 0, 3),)))
    first = coupling.groups()[0]
    assert [(one.axis.module, one.units) for one in first.members] == [("embed", (0, 1, 2)), ("head", (0, 1, 2))]
    assert (embed, head) == (0, 1)


def test_no_pairs_are_no_edge():
    coupling, maker, reader = chain()
    coupling.join(maker, reader, torch.zeros(0, 2, dtype=torch.long))
    coupling.fix(maker, torch.zeros(0, dtype=torch.long), "nothing")
    assert (coupling.edges, coupling.fixed) == ([], [])
