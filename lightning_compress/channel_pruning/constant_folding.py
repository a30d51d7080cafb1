"""What a unit that always has the same value adds to the layers that read it belongs into their biases."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.channel_pruning.dependency.layer_types import channel_dim
from lightning_compress.channel_pruning.functional.groups import ChannelGroup, GroupMember, PrunedUnits
from lightning_compress.channel_pruning.functional.reconstruction import constant_units
from lightning_compress.channel_pruning.statistics import sum_by_unit
from lightning_compress.nn.example_inputs import call_model, copy_example, map_tensors
from lightning_compress.nn.isolation import isolated_eval, preserved_random_state


def fold_constants(model: nn.Module, example: Any, groups: Sequence[ChannelGroup], pruned: PrunedUnits) -> int:
    """Add what constant units among those that go give to each layer that reads them to its bias, where that is exact.

    It is exact for linear layers and for convolutions without padding that have a bias. Call it before the cut.

    Returns:
        How many units of how many layers were folded, all counted.
    """
    readers = [(group, member) for group in groups if pruned.get(group.name) for member in group.consumers]
    readers = [(group, member) for group, member in readers if _can_fold(model.get_submodule(member.axis.module))]
    if not readers:
        return 0
    seen = _inputs(model, example, {member.axis.module for _, member in readers})
    return sum(
        _fold(
            model.get_submodule(member.axis.module), seen[member.axis.module], member, group.units, pruned[group.name]
        )
        for group, member in readers
        if member.axis.module in seen
    )


def _can_fold(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return module.bias is not None
    is_plain = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1
    return is_plain and module.bias is not None and module.padding != "same" and not any(_padding(module))


def _padding(module: Any) -> tuple[int, ...]:
    return (0,) if isinstance(module.padding, str) else tuple(module.padding)


def _inputs(model: nn.Module, example: Any, names: set[str]) -> dict[str, Tensor]:
    """What these layers are given by the example and by noise, if each is called once."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0].detach())
        )
        for name in names
    ]
    try:
        with isolated_eval(model), preserved_random_state(), torch.compiler.set_stance("force_eager"):
            call_model(model, copy_example(example))
            torch.manual_seed(0)
            call_model(model, map_tensors(example, _drawn))  # what an example of equal samples would hide
    except Exception:  # whatever the user's code says to noise: in a column of floats may stand numbers of categories
        return {}  # the example alone does not tell what is constant
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(both) for name, both in seen.items() if len(both) == 2 and both[0].shape == both[1].shape}


def _drawn(value: Tensor) -> Tensor:
    return torch.randn_like(value) if value.is_floating_point() else value.clone()


@torch.no_grad()
def _fold(module: Any, given: Tensor, member: GroupMember, units: int, pruned: Sequence[int]) -> int:
    dim = channel_dim(module, given, member.axis)
    apart = sum_by_unit(given, member, units, dim)  # (units, channels of a unit, *others)
    if all(bool(constant_units(one.reshape(1, apart.shape[1], -1))[0].all()) for one in apart):
        return 0  # the example tells nothing
    folded = 0
    for unit in pruned:
        constant, values = constant_units(apart[unit].reshape(1, apart.shape[1], -1))
        if bool(constant.all()) and bool((values != 0).any()):
            weight = sum_by_unit(module.weight, member, units, 1)[unit]
            weight = weight.reshape(*weight.shape[:2], -1).sum(2)  # (channels, outputs)
            module.bias += (values.to(weight) @ weight).to(module.bias)
            folded += 1
    return folded
