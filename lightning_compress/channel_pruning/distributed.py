"""Ranks that train together lose the same units, although each has seen other batches."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_compress.channel_pruning.functional.groups import ChannelGroup, PrunedUnits
from lightning_compress.core.distributed import (
    all_ranks_equal,
    all_reduce_sum_,
    broadcast_,
    is_distributed,
    tensor_hash,
)


def all_reduce_mean_scores(scores: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The mean over all ranks."""
    if not is_distributed():
        return dict(scores)
    moved = {name: one.to(device) for name, one in scores.items()}
    all_reduce_sum_(moved.values())  # as many on each rank, so that a sum ranks units as the mean does
    return {name: one.cpu() for name, one in moved.items()}


def broadcast_units(pruned: PrunedUnits, groups: Sequence[ChannelGroup], device: torch.device) -> PrunedUnits:
    """What rank 0 has chosen: sums and times may differ in their last bits."""
    if not is_distributed():
        return pruned
    chosen = {group.name: torch.zeros(group.units, dtype=torch.uint8, device=device) for group in groups}
    for name, units in pruned.items():
        chosen[name][list(units)] = 1
    broadcast_(chosen.values())
    return {name: tuple(one.nonzero()[:, 0].tolist()) for name, one in chosen.items()}


def check_equal_groups(groups: Sequence[ChannelGroup], device: torch.device) -> None:
    """Refuse ranks whose modules differ.

    Raises:
        ValueError: on every rank.
    """
    description = repr([(group.name, group.units, group.unprunable_reason is None) for group in groups]).encode()
    if is_distributed() and not all_ranks_equal(
        tensor_hash([torch.tensor(list(description), dtype=torch.uint8)]), device
    ):
        raise ValueError("The ranks have different modules: their layers or widths differ. Build the same on each.")
