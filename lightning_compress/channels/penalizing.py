"""Penalties on the units of groups, added to the gradients that the user's backward passes have left."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from lightning_compress.channels.groups import Group
from lightning_compress.channels.layers import is_norm
from lightning_compress.channels.penalties import group_lasso_gradient, slimming_gradient
from lightning_compress.core.surgery import named


@torch.no_grad()
def penalize(
    model: nn.Module, groups: Sequence[Group], penalty: str, strength: float, stepping: Collection[Tensor]
) -> None:
    """Add a penalty's gradient to every weight that it is about: scales of norms, or rows of weights.

    Args:
        stepping: the parameters of the optimizer that is about to step; each has a turn.
    """
    if penalty == "slimming":
        for tensor in _scales(model, groups):
            _add(tensor, slimming_gradient(tensor, strength), stepping)
        return
    for group in groups:
        for member in group.makers:
            weight = member.place.slices[0]
            tensor = named(model, [weight.tensor])[weight.tensor]
            rows = tensor.detach().movedim(weight.dim, 0)
            gradient = group_lasso_gradient(rows.flatten(1), strength).reshape(rows.shape)
            own = torch.tensor([unit >= 0 for unit in member.units[: len(rows)]], device=rows.device)
            gradient[~own] = 0
            _add(tensor, gradient.movedim(0, weight.dim), stepping)


def _scales(model: nn.Module, groups: Sequence[Group]) -> list[Tensor]:
    names = {
        one.tensor
        for group in groups
        for member in group.members
        if member.place.side == "channels" and is_norm(model.get_submodule(member.place.module))
        for one in member.place.slices
        if one.tensor.endswith(".weight")
    }
    return list(named(model, sorted(names)).values())


def _add(tensor: Tensor, gradient: Tensor, stepping: Collection[Tensor]) -> None:
    if tensor.grad is not None and tensor in stepping:  # a frozen one, or one not reached by this backward, has none
        tensor.grad += gradient.to(tensor.grad)
