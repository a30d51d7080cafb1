"""Whole branches of a residual sum that may go: what their last layers give is only added to something else."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_compress.channel_pruning.dependency.verification import verify_cut
from lightning_compress.channel_pruning.functional.groups import ChannelGroup
from lightning_compress.nn.empty_layers import EMPTY, is_empty


def mark_removable(
    model: nn.Module, example: Any, groups: Sequence[ChannelGroup], known: Collection[str] | None = None
) -> list[ChannelGroup]:
    """The same groups, with those marked that may lose all of their units.

    Something must be left in every sum: of the branches that alone make a channel, the last one stays. Each is tried:
    without the branch the module must give what it gives with a silent one.

    Args:
        known: names of those that are known to, in a run that goes on; None: try.
    """
    if known is not None:
        return [replace(group, removable=group.name in known) for group in groups]
    dead = {name for name, module in model.named_modules() if is_empty(module)}
    found = list(groups)
    for number, group in enumerate(groups):
        readers = {member.axis.module for member in group.consumers}
        if group.unprunable_reason is not None or group.attributes or not _plain(model, group):
            continue
        sums = _made_by(groups, readers)
        if not sums or not all(makers - readers - dead for makers in sums):
            continue
        marked = replace(group, removable=True)
        if verify_cut(model, example, [marked], {group.name: tuple(range(group.units))}) is None:
            found[number], dead = marked, dead | readers
    return found


def _plain(model: nn.Module, group: ChannelGroup) -> bool:
    """Whether each of its layers runs without channels, and has no others than those of this group."""
    kinds = (*EMPTY, nn.Linear)
    return all(
        type(model.get_submodule(member.axis.module)) in kinds and min(member.units) >= 0 for member in group.members
    )


def _made_by(groups: Sequence[ChannelGroup], layers: Collection[str]) -> list[set[str]]:
    """For each group that these layers make channels of: all layers that do."""
    makers = [{member.axis.module for member in group.producers} for group in groups]
    return [one for one in makers if one & set(layers)]
