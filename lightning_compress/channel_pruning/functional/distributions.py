"""How groups of channels share what goes. A distribution is a function as these here.

It takes the groups, scores of their units by name, how many units each had at first, the fraction of all the original
units that is to be gone, and the fraction of each group's that must stay; it returns the units that go now, by name.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from lightning_compress.channel_pruning.functional.groups import ChannelGroup, PrunedUnits
from lightning_compress.channel_pruning.functional.unit_selection import lowest_scores, max_prunable_units


def uniform(
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, Tensor],
    originals: Mapping[str, int],
    fraction: float,
    min_density: float,
) -> PrunedUnits:
    """The units of each group with the lowest scores, so that `fraction` of its original ones is pruned.

    >>> from torch import tensor
    >>> groups = [ChannelGroup("a", 4, ()), ChannelGroup("b", 4, ())]
    >>> scores = {"a": tensor([4.0, 1.0, 3.0, 2.0]), "b": tensor([5.0, 6.0, 7.0, 8.0])}
    >>> uniform(groups, scores, originals={"a": 4, "b": 4}, fraction=0.5, min_density=0.0)
    {'a': (1, 3), 'b': (0, 1)}
    """
    pruned = {}
    for group in groups:
        original = originals[group.name]
        wanted = int(fraction * original + 1e-9) - (original - group.units)
        count = min(max(wanted, 0), max_prunable_units(group, original, min_density))
        pruned[group.name] = lowest_scores(scores[group.name], count)
    return pruned


def global_(
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, Tensor],
    originals: Mapping[str, int],
    fraction: float,
    min_density: float,
) -> PrunedUnits:
    """The units of all groups with the lowest scores, so that `fraction` of all the original ones is pruned.

    >>> from torch import tensor
    >>> groups = [ChannelGroup("a", 4, ()), ChannelGroup("b", 4, ())]
    >>> scores = {"a": tensor([4.0, 1.0, 3.0, 2.0]), "b": tensor([5.0, 6.0, 7.0, 8.0])}
    >>> global_(groups, scores, originals={"a": 4, "b": 4}, fraction=0.5, min_density=0.0)  # one of a group stays
    {'a': (1, 2, 3), 'b': (0,)}
    """
    total = sum(originals[group.name] for group in groups)
    wanted = max(int(fraction * total + 1e-9) - sum(originals[group.name] - group.units for group in groups), 0)
    allowed = {group.name: max_prunable_units(group, originals[group.name], min_density) for group in groups}
    counts = dict.fromkeys(allowed, 0)
    ranked = sorted(
        (float(score), number, unit)
        for number, group in enumerate(groups)
        for unit, score in enumerate(scores[group.name].tolist())
    )
    pruned: dict[str, list[int]] = {name: [] for name in allowed}
    for _, number, unit in ranked:
        name = groups[number].name
        if wanted > 0 and counts[name] < allowed[name]:
            counts[name] += 1
            pruned[name].append(unit)
            wanted -= 1
    return {name: tuple(sorted(units)) for name, units in pruned.items()}
