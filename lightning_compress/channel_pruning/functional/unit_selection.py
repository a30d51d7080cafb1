"""Which units of a group are the first to go, and how many may."""

from collections.abc import Mapping, Sequence
from math import ceil

from torch import Tensor

from lightning_compress.channel_pruning.functional.groups import ChannelGroup, PrunedUnits


def max_prunable_units(group: ChannelGroup, original: int, min_density: float) -> int:
    """How many of a group's units may go: `min_density` of the original ones stay, and one if not all are removable.

    >>> max_prunable_units(ChannelGroup("conv", 8, ()), original=10, min_density=0.25)
    5
    """
    return max(group.units - max(ceil(min_density * original - 1e-9), not group.removable), 0)


def round_units(
    groups: Sequence[ChannelGroup],
    pruned: PrunedUnits,
    scores: Mapping[str, Tensor],
    round_to: int,
    floors: Mapping[str, int],
) -> PrunedUnits:
    """Let units go or stay until the channels that stay are the nearest multiple of `round_to`.

    Args:
        floors: how many units of each group must stay.

    >>> from torch import arange
    >>> from lightning_compress.channel_pruning.functional.groups import ChannelAxis, GroupMember
    >>> group = ChannelGroup("conv", 16, (GroupMember(ChannelAxis("conv", "out", 16), tuple(range(16))),))
    >>> round_units([group], {"conv": (0, 1, 2, 3, 4)}, {"conv": arange(16)}, round_to=4, floors={"conv": 1})  # 12 stay
    {'conv': (0, 1, 2, 3)}
    """
    if round_to == 1:
        return pruned
    found = {}
    for group in groups:
        channels = max(sum(unit >= 0 for unit in member.units) for member in group.producers) // group.units
        stays = group.units - len(pruned[group.name])
        multiple = max(round(stays * channels / round_to), not group.removable) * round_to
        wanted = multiple // channels if multiple % channels == 0 else stays
        wanted = max(wanted, floors[group.name]) if wanted <= group.units else group.units
        found[group.name] = lowest_scores(scores[group.name], group.units - wanted)
    return found


def lowest_scores(scores: Tensor, count: int) -> tuple[int, ...]:
    """The units of the lowest scores; among equals the later ones go.

    >>> from torch import tensor
    >>> lowest_scores(tensor([1.0, 3.0, 1.0]), count=1)
    (2,)
    """
    order = len(scores) - 1 - scores.flip(0).argsort(stable=True)
    return tuple(order[:count].sort().values.tolist())
