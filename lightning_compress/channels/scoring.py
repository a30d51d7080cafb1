"""Scores of a group's units from all layers that make or read them, and which units go first."""

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor

from lightning_compress.channels.groups import Gone, Group
from lightning_compress.core.lookup import call_with_needs

# Their papers compare layers by the raw scores; others depend on how large a layer is.
RAW = frozenset({"slimming", "taylor"})


def group_scores(criterion: Callable[..., Tensor], offers: Sequence[Mapping[str, Any]], units: int) -> Tensor:
    """One score for each unit: the mean over the layers, each divided by its own mean unless the criterion is raw.

    Raises:
        ValueError: if the criterion returns something else than a finite number for each unit.
    """
    scores = []
    for offer in offers:
        score = call_with_needs(criterion, **offer).detach().float().cpu()
        name = getattr(criterion, "__name__", str(criterion))
        if score.shape != (units,) or not bool(score.isfinite().all()):
            raise ValueError(
                f"The criterion {name} must return {units} finite scores, one a unit, but its shape is "
                f"{tuple(score.shape)}" + ("." if score.shape != (units,) else ", and some are not finite.")
            )
        if name not in RAW and float(score.abs().mean()) > 0:
            score = score / score.abs().mean()
        scores.append(score)
    return torch.stack(scores).mean(0)


def most_that_may_go(group: Group, original: int, floor: float) -> int:
    """How many of a group's units may go, when `floor` of the original ones and at least one must stay."""
    return max(group.units - max(ceil(floor * original - 1e-9), 1), 0)


def uniform(
    groups: Sequence[Group], scores: Mapping[str, Tensor], originals: Mapping[str, int], fraction: float, floor: float
) -> Gone:
    """The lowest units of each group, so that `fraction` of its original ones is gone."""
    gone = {}
    for group in groups:
        original = originals[group.name]
        wanted = int(fraction * original + 1e-9) - (original - group.units)
        count = min(max(wanted, 0), most_that_may_go(group, original, floor))
        gone[group.name] = _lowest(scores[group.name], count)
    return gone


def global_(
    groups: Sequence[Group], scores: Mapping[str, Tensor], originals: Mapping[str, int], fraction: float, floor: float
) -> Gone:
    """The lowest units of all groups together, so that `fraction` of all the original ones is gone."""
    total = sum(originals[group.name] for group in groups)
    wanted = max(int(fraction * total + 1e-9) - sum(originals[group.name] - group.units for group in groups), 0)
    allowed = {group.name: most_that_may_go(group, originals[group.name], floor) for group in groups}
    counts = dict.fromkeys(allowed, 0)
    ranked = sorted(
        (float(score), number, unit)
        for number, group in enumerate(groups)
        for unit, score in enumerate(scores[group.name].tolist())
    )
    gone: dict[str, list[int]] = {name: [] for name in allowed}
    for _, number, unit in ranked:
        name = groups[number].name
        if wanted > 0 and counts[name] < allowed[name]:
            counts[name] += 1
            gone[name].append(unit)
            wanted -= 1
    return {name: tuple(sorted(units)) for name, units in gone.items()}


def rounded(
    groups: Sequence[Group], gone: Gone, scores: Mapping[str, Tensor], round_to: int, floors: Mapping[str, int]
) -> Gone:
    """Let units go or stay until the channels that stay are the nearest multiple of `round_to`.

    Args:
        floors: how many units of each group must stay.
    """
    if round_to == 1:
        return gone
    found = {}
    for group in groups:
        channels = max(sum(unit >= 0 for unit in member.units) for member in group.makers) // group.units
        stays = group.units - len(gone[group.name])
        multiple = max(round(stays * channels / round_to), 1) * round_to
        wanted = multiple // channels if multiple % channels == 0 else stays
        wanted = max(wanted, floors[group.name]) if wanted <= group.units else group.units
        found[group.name] = _lowest(scores[group.name], group.units - wanted)
    return found


def _lowest(scores: Tensor, count: int) -> tuple[int, ...]:
    """The units of the lowest scores; among equals the later ones go."""
    order = sorted(range(len(scores)), key=lambda unit: (float(scores[unit]), -unit))
    return tuple(sorted(order[:count]))
