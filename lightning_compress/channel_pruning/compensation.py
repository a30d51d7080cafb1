"""Let the layers that read units give, without those that go, as nearly as possible what they gave with them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_compress.channel_pruning.functional.groups import ChannelGroup, GroupMember, PrunedUnits
from lightning_compress.channel_pruning.functional.reconstruction import least_squares
from lightning_compress.channel_pruning.statistics import ChannelStatistics, input_patches, unit_order
from lightning_compress.core.distributed import broadcast_, is_distributed


@torch.no_grad()
def compensate(gathered: ChannelStatistics, groups: Sequence[ChannelGroup], pruned: PrunedUnits) -> None:
    """Set the weights of what stays by least squares on the patches that were seen; call it before the cut.

    Ranks have seen other patches: all get the weights of rank 0.

    Reference: He et al., 2017, section 3.1, https://arxiv.org/abs/1707.06168
    """
    for group in groups:
        stay = [unit for unit in range(group.units) if unit not in set(pruned.get(group.name, ()))]
        for member in group.consumers if len(stay) < group.units else ():
            if seen := gathered.inputs.get(member.axis.module):
                module = gathered.model.get_submodule(member.axis.module)
                _refit(module, *input_patches(module, seen, member, group.units), member, stay)
                if is_distributed():
                    broadcast_([module.weight])  # type: ignore[list-item]


def _refit(module: nn.Module, patches: Tensor, weight: Tensor, member: GroupMember, stay: list[int]) -> None:
    targets = torch.einsum("sut,uto->so", patches.double(), weight.double())
    new = weight.clone()
    new[stay] = least_squares(patches[:, stay], targets.to(patches), weight[stay]).to(weight)
    # (units, taps, outputs) -> (outputs, channels in the order of their units, kernel)
    stored: Tensor = module.weight  # type: ignore[assignment]
    order = unit_order(member).to(stored.device)
    rows = new.reshape(len(order), -1, new.shape[-1]).permute(2, 0, 1)
    stored[:, order] = rows.reshape(len(stored), len(order), *stored.shape[2:])
