"""Channels that can only leave together, as plain data."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class TensorSlice:
    """A dimension of a stored tensor along which a place has its channels: index `i` is of channel `i // repeat`.

    >>> TensorSlice("fc.weight", dim=1, size=400, repeat=25)  # 16 channels of 5 x 5 values each, flattened
    TensorSlice(tensor='fc.weight', dim=1, size=400, repeat=25)
    """

    tensor: str
    dim: int
    size: int
    repeat: int = 1


@dataclass(frozen=True)
class ModuleAttribute:
    """A number that a module remembers: its channels times `repeat`, or a tuple that holds them.

    >>> ModuleAttribute("attention", "embed_dim", repeat=8).value(channels=3)
    24
    """

    module: str
    name: str
    repeat: int = 1
    as_tuple: bool = False

    def value(self, channels: int) -> int | tuple[int, ...]:
        """What it is for that many channels."""
        return (channels * self.repeat,) if self.as_tuple else channels * self.repeat


@dataclass(frozen=True)
class ChannelAxis:
    """Where a module has channels: among what it takes ("in"), what it gives ("out"), or both ("channels").

    A bare parameter's place is its dimension, such as "dim 2".

    >>> print(ChannelAxis("conv1", "out", 16, (TensorSlice("conv1.weight", 0, 16), TensorSlice("conv1.bias", 0, 16))))
    conv1 (out)
    """

    module: str
    side: str
    size: int
    slices: tuple[TensorSlice, ...] = ()
    attributes: tuple[ModuleAttribute, ...] = ()

    def __str__(self) -> str:
        return f"{self.module} ({self.side})"


@dataclass(frozen=True)
class GroupMember:
    """A place of a group: which unit each of its channels belongs to, -1 for another group's.

    >>> GroupMember(ChannelAxis("conv", "out", 4), (0, 1, 0, -1)).units.count(0)  # two channels of the first unit
    2
    """

    axis: ChannelAxis
    units: tuple[int, ...]


@dataclass(frozen=True)
class ChannelGroup:
    """Units that are coupled in the same way: each is removed at all of its places, or stays.

    Attributes:
        name: of the first layer that makes its channels.
        units: how many there are.
        members: the places.
        unprunable_reason: why none of them may be pruned; None if they may.
        attributes: numbers that modules around the layers remember, as multiples of the number of units.
        removable: whether all of them may be pruned, because what their consumers give is only added to something else.

    >>> made, read = ChannelAxis("conv1", "out", 2), ChannelAxis("conv2", "in", 2)
    >>> group = ChannelGroup("conv1", units=2, members=(GroupMember(made, (0, 1)), GroupMember(read, (0, 1))))
    >>> [str(member.axis) for member in group.consumers]
    ['conv2 (in)']
    """

    name: str
    units: int
    members: tuple[GroupMember, ...]
    unprunable_reason: str | None = None
    attributes: tuple[ModuleAttribute, ...] = ()
    removable: bool = False

    @property
    def producers(self) -> tuple[GroupMember, ...]:
        """The places that make the units: layers' outputs."""
        return tuple(member for member in self.members if member.axis.side == "out")

    @property
    def consumers(self) -> tuple[GroupMember, ...]:
        """The places that are given the units, and mix them."""
        return tuple(member for member in self.members if member.axis.side == "in")


PrunedUnits = dict[str, tuple[int, ...]]  # units that are removed, by the name of their group


def pruned_channels(member: GroupMember, pruned: Collection[int]) -> set[int]:
    """The channels of a place that leave with these units of its group.

    >>> sorted(pruned_channels(GroupMember(ChannelAxis("conv", "out", 4), (0, 1, 0, -1)), [0]))
    [0, 2]
    """
    leaving = set(pruned)
    return {channel for channel, unit in enumerate(member.units) if unit in leaving}


def remaining_group(groups: Iterable[ChannelGroup], pruned: PrunedUnits) -> list[ChannelGroup]:
    """The groups as they are when those units are gone: places shrink, units are numbered anew.

    >>> group = ChannelGroup("conv", 3, (GroupMember(ChannelAxis("conv", "out", 3), (0, 1, 2)),))
    >>> [smaller] = remaining_group([group], {"conv": (1,)})
    >>> smaller.units, smaller.members[0].units
    (2, (0, 1))
    """
    groups = list(groups)
    lost: dict[ChannelAxis, set[int]] = {}
    for group in groups:
        for member in group.members:
            lost.setdefault(member.axis, set()).update(pruned_channels(member, pruned.get(group.name, ())))
    places = {place: _smaller(place, len(channels)) for place, channels in lost.items()}
    return [_without(group, set(pruned.get(group.name, ())), lost, places) for group in groups]


def _without(
    group: ChannelGroup, pruned: set[int], lost: dict[ChannelAxis, set[int]], places: dict[ChannelAxis, ChannelAxis]
) -> ChannelGroup:
    new_number = {old: new for new, old in enumerate(unit for unit in range(group.units) if unit not in pruned)}
    members = tuple(
        GroupMember(
            places[member.axis],
            tuple(
                new_number.get(unit, -1)
                for channel, unit in enumerate(member.units)
                if channel not in lost[member.axis]
            ),
        )
        for member in group.members
    )
    return replace(group, units=len(new_number), members=members)


def _smaller(place: ChannelAxis, channels: int) -> ChannelAxis:
    if not channels:
        return place
    size = place.size - channels
    slices = tuple(
        replace(one, size=size * one.repeat if one.size == place.size * one.repeat else one.size * size // place.size)
        for one in place.slices
    )
    return replace(place, size=size, slices=slices)
