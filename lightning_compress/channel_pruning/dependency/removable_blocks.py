"""Whole branches of a residual sum that may go: what their last layers give is only added to something else."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_compress.channel_pruning.dependency.verification import problem
from lightning_compress.channel_pruning.functional.groups import Group
from lightning_compress.nn.empty_layers import EMPTY, is_empty


def with_vanishing(
    model: nn.Module, example: Any, groups: Sequence[Group], known: Collection[str] | None = None
) -> list[Group]:
    """The same groups, with those marked that may lose all of their units.

    Something must be left in every sum: of the branches that alone make a channel, the last one stays. Each is tried:
    without the branch the module must give what it gives with a silent one.

    Args:
        known: names of those that are known to, in a run that goes on; None: try.
    """
    if known is not None:
        return [replace(group, may_vanish=group.name in known) for group in groups]
    dead = {name for name, module in model.named_modules() if is_empty(module)}
    found = list(groups)
    for number, group in enumerate(groups):
        readers = {member.place.module for member in group.readers}
        if group.whole is not None or group.attributes or not _plain(model, group):
            continue
        sums = _made_by(groups, readers)
        if not sums or not all(makers - readers - dead for makers in sums):
            continue
        marked = replace(group, may_vanish=True)
        if problem(model, example, [marked], {group.name: tuple(range(group.units))}) is None:
            found[number], dead = marked, dead | readers
    return found


def _plain(model: nn.Module, group: Group) -> bool:
    """Whether each of its layers runs without channels, and has no others than those of this group."""
    kinds = (*EMPTY, nn.Linear)
    return all(
        type(model.get_submodule(member.place.module)) in kinds and min(member.units) >= 0 for member in group.members
    )


def _made_by(groups: Sequence[Group], layers: Collection[str]) -> list[set[str]]:
    """For each group that these layers make channels of: all layers that do."""
    makers = [{member.place.module for member in group.makers} for group in groups]
    return [one for one in makers if one & set(layers)]
