"""Zero channels without removing them: gradients may bring them back (SFP, ASFP)."""

from collections.abc import Sequence

import torch
from torch import nn

from lightning_compress.channel_pruning.cut_plan import indices_of, lost_channels
from lightning_compress.channel_pruning.functional.groups import ChannelGroup, PrunedUnits
from lightning_compress.nn.surgery import get_tensor


@torch.no_grad()
def zero_channels_(model: nn.Module, groups: Sequence[ChannelGroup], pruned: PrunedUnits) -> None:
    """Set to zero whatever makes these units: rows of weights, biases, scales and shifts of norms.

    Reference: He et al., 2018, https://arxiv.org/abs/1808.06866
    """
    for place, channels in lost_channels(groups, pruned).items():
        if place.side == "in":
            continue
        for one in place.slices:
            tensor = get_tensor(model, one.tensor)
            if isinstance(tensor, nn.Parameter):
                tensor.index_fill_(one.dim, indices_of(place, one, channels).to(tensor.device), 0)
