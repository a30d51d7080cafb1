"""From units that are to go to the indices of every tensor that stay."""

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_compress.channel_pruning.functional.groups import (
    ChannelAxis,
    ChannelGroup,
    PrunedUnits,
    TensorSlice,
    pruned_channels,
)
from lightning_compress.nn.channel_cut import Attributes, Cut


def plan_cut(groups: Iterable[ChannelGroup], pruned: PrunedUnits) -> Cut:
    """What the removal of these units leaves of every tensor, and what modules then remember.

    Raises:
        ValueError: if a place would lose all of its channels.
    """
    kept: dict[str, dict[int, Tensor]] = {}
    attributes: Attributes = {}
    before: Attributes = {}
    groups = [group for group in groups if pruned.get(group.name)]
    vanishing = {member.axis for group in groups if group.removable for member in group.members}
    for place, lost in lost_channels(groups, pruned).items():
        if len(lost) == place.size and place not in vanishing:
            raise ValueError(
                f"All {place.size} channels of {place} would go. At least one must stay: raise `min_density`."
            )
        for one in place.slices:
            kept.setdefault(one.tensor, {})[one.dim] = _kept_indices(place, one, lost)
        for attribute in place.attributes:
            before.setdefault(attribute.module, {})[attribute.name] = attribute.value(place.size)
            value = attribute.value(place.size - len(lost))
            attributes.setdefault(attribute.module, {})[attribute.name] = value
    for group in groups:
        for attribute in group.attributes:
            before.setdefault(attribute.module, {})[attribute.name] = attribute.value(group.units)
            value = attribute.value(group.units - len(pruned[group.name]))
            attributes.setdefault(attribute.module, {})[attribute.name] = value
    return Cut(kept, attributes, before)


def lost_channels(groups: Iterable[ChannelGroup], pruned: PrunedUnits) -> dict[ChannelAxis, set[int]]:
    """The channels that each place loses, in whichever groups it is."""
    lost: dict[ChannelAxis, set[int]] = {}
    for group in groups:
        for member in group.members:
            if channels := pruned_channels(member, pruned.get(group.name, ())):
                lost.setdefault(member.axis, set()).update(channels)
    return lost


def indices_of(place: ChannelAxis, one: TensorSlice, channels: Iterable[int]) -> Tensor:
    """The indices of a tensor that belong to these channels of a place; sections of a grouped layer share theirs."""
    wanted = torch.zeros(place.size, dtype=torch.bool)
    wanted[list(channels)] = True
    index = torch.arange(one.size)
    return index[wanted[index // one.repeat]]


def _kept_indices(place: ChannelAxis, one: TensorSlice, lost: set[int]) -> Tensor:
    return indices_of(place, one, set(range(place.size)) - lost)
