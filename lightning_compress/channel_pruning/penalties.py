"""Penalties on the units of groups, added to the gradients that the user's backward passes have left."""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from lightning_compress.channel_pruning.dependency.layer_types import is_norm
from lightning_compress.channel_pruning.functional.groups import ChannelGroup, GroupMember, TensorSlice
from lightning_compress.channel_pruning.functional.penalties import group_lasso_gradient, slimming_gradient
from lightning_compress.nn.surgery import tensors_by_name


@torch.no_grad()
def add_penalty_gradients(
    model: nn.Module, groups: Sequence[ChannelGroup], penalty: str, strength: float, stepping: Collection[Tensor]
) -> None:
    """Add a penalty's gradient to every weight that it is about: scales of norms, or rows of weights.

    Args:
        stepping: the parameters of the optimizer that is about to step; each has a turn.
    """
    for group in groups:
        met: set[Tensor] = set()
        for member, one in _scales(model, group) if penalty == "slimming" else _weights(group):
            tensor = tensors_by_name(model, [one.tensor])[one.tensor]
            if tensor in met:  # tied: one weight of two layers
                continue
            met.add(tensor)
            rows = tensor.detach().movedim(one.dim, 0)
            if penalty == "slimming":
                gradient = slimming_gradient(rows, strength)
            else:
                gradient = group_lasso_gradient(rows.flatten(1), strength).reshape(rows.shape)
            own = torch.tensor([unit >= 0 for unit in member.units[: len(rows)]], device=rows.device)
            gradient[~own] = 0
            _add(tensor, gradient.movedim(0, one.dim), stepping)


def _weights(group: ChannelGroup) -> Iterator[tuple[GroupMember, TensorSlice]]:
    """The weights that make units."""
    for member in group.producers:
        yield member, member.axis.slices[0]


def _scales(model: nn.Module, group: ChannelGroup) -> Iterator[tuple[GroupMember, TensorSlice]]:
    """The scales of the normalisation layers that units go through."""
    for member in group.members:
        if member.axis.side == "channels" and is_norm(model.get_submodule(member.axis.module)):
            for one in member.axis.slices:
                if one.tensor.endswith(".weight"):
                    yield member, one


def _add(tensor: Tensor, gradient: Tensor, stepping: Collection[Tensor]) -> None:
    if tensor.grad is not None and tensor in stepping:  # a frozen one, or one not reached by this backward, has none
        tensor.grad += gradient.to(tensor.grad)
