"""From "this channel depends on that one" to groups of units that can only leave together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from lightning_compress.channel_pruning.functional.groups import ChannelAxis, ChannelGroup, GroupMember


@dataclass
class ChannelUnion:
    """Places, edges between their channels, and channels that must stay with the reason."""

    places: list[ChannelAxis] = field(default_factory=list)
    edges: list[tuple[int, int, Tensor]] = field(default_factory=list)
    fixed: list[tuple[int, Tensor, str]] = field(default_factory=list)

    def add(self, place: ChannelAxis) -> int:
        """A new place; its number is returned."""
        self.places.append(place)
        return len(self.places) - 1

    def join(self, one: int, other: int, pairs: Tensor) -> None:
        """Channels of two places belong together: `pairs` has shape (pairs, 2)."""
        if len(pairs):
            self.edges.append((one, other, pairs.cpu()))

    def fix(self, place: int, channels: Tensor, reason: str) -> None:
        """These channels of a place must stay."""
        if len(channels):
            self.fixed.append((place, channels.cpu(), reason))

    def groups(self) -> list[ChannelGroup]:
        """The groups, in the order of their first places."""
        offsets = _offsets(self.places)
        labels = connected_components(offsets[-1], self._edges(offsets))
        reasons = self._reasons(offsets, labels)
        return _grouped(self.places, [labels[a:b].tolist() for a, b in pairwise(offsets)], reasons)

    def _edges(self, offsets: list[int]) -> Tensor:
        apart = [torch.stack([pairs[:, 0] + offsets[a], pairs[:, 1] + offsets[b]]) for a, b, pairs in self.edges]
        return torch.cat([*apart, *_shared(self.places, offsets), torch.zeros(2, 0, dtype=torch.long)], dim=1)

    def _reasons(self, offsets: list[int], labels: Tensor) -> dict[int, str]:
        found: dict[int, str] = {}
        for place, channels, reason in self.fixed:
            for label in set(labels[channels + offsets[place]].tolist()):
                found.setdefault(label, reason)
        return found


def connected_components(nodes: int, edges: Tensor) -> Tensor:
    """The smallest node that each node is connected with.

    Args:
        nodes: how many there are.
        edges: shape (2, edges).

    >>> connected_components(5, torch.tensor([[0, 3], [3, 4]])).tolist()
    [0, 1, 2, 0, 0]
    """
    labels = torch.arange(nodes)
    if not edges.shape[1]:
        return labels
    one, other = edges
    while True:
        least = torch.minimum(labels[one], labels[other])
        new = labels.scatter_reduce(0, one, least, "amin").scatter_reduce(0, other, least, "amin")
        new = new[new]
        if torch.equal(new, labels):
            return labels
        labels = new


def _offsets(places: Sequence[ChannelAxis]) -> list[int]:
    offsets = [0]
    for place in places:
        offsets.append(offsets[-1] + place.size)
    return offsets


def _shared(places: Sequence[ChannelAxis], offsets: list[int]) -> list[Tensor]:
    """Edges between channels of several places that lie at the same index of one tensor (tied weights)."""
    first: dict[tuple[str, int], tuple[int, int]] = {}
    edges = []
    for number, place in enumerate(places):
        for one in place.slices:
            start, repeat = first.setdefault((one.tensor, one.dim), (offsets[number], one.repeat))
            if start != offsets[number]:
                index = torch.arange(one.size)
                edges.append(torch.stack([start + index // repeat, offsets[number] + index // one.repeat]))
    return edges


def _grouped(places: Sequence[ChannelAxis], labels: list[list[int]], reason: Mapping[int, str]) -> list[ChannelGroup]:
    """Units with the same number of channels at the same places make a group."""
    spots: dict[int, dict[int, int]] = {}
    for number, own in enumerate(labels):
        for label in own:
            counts = spots.setdefault(label, {})
            counts[number] = counts.get(number, 0) + 1
    together: dict[tuple[tuple[tuple[int, int], ...], str | None], list[int]] = {}
    for label, counts in spots.items():
        together.setdefault((tuple(counts.items()), reason.get(label)), []).append(label)
    groups = [
        _group(places, {number: labels[number] for number, _ in where}, why, units)
        for (where, why), units in together.items()
    ]
    return _with_own_names([group for group in groups if group.producers])


def _group(
    places: Sequence[ChannelAxis], labels: dict[int, list[int]], reason: str | None, units: list[int]
) -> ChannelGroup:
    """Of the units with these labels; `labels` are those of the places, by number, at which they are."""
    number_of = {label: number for number, label in enumerate(sorted(units))}
    members = tuple(
        GroupMember(places[number], tuple(number_of.get(label, -1) for label in own)) for number, own in labels.items()
    )
    name = next((member.axis.module for member in members if member.axis.side == "out"), members[0].axis.module)
    if reason is None and len(units) == 1:
        reason = "all of its channels depend on each other"
    if reason is None and not any(member.axis.side == "in" for member in members):
        reason = "no layer reads it"
    return ChannelGroup(name, len(units), members, reason)


def _with_own_names(groups: list[ChannelGroup]) -> list[ChannelGroup]:
    """A layer may make channels of several groups: the later ones get a number."""
    seen: dict[str, int] = {}
    named = []
    for group in groups:
        seen[group.name] = seen.get(group.name, 0) + 1
        count = seen[group.name]
        named.append(group if count == 1 else replace(group, name=f"{group.name}#{count}"))
    return named
