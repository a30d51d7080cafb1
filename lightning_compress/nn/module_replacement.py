"""Put other modules in the place of a model's: while it trains, or before a checkpoint's weights are loaded."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized
from torch.optim import Optimizer

from lightning_compress.core.registry import near_miss
from lightning_compress.nn.isolation import isolated_eval, kept_random_streams
from lightning_compress.nn.optimizer_replacement import CarryState, default_sources, replace_parameters
from lightning_compress.nn.replacement import Replacement
from lightning_compress.nn.selection import STANDS_FOR_OLD, canonical_name

Initialize = Callable[[nn.Module, nn.Module], None]

# Hooks belong to a place in the model; shared dicts keep the handles that their owners hold.
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@dataclass(frozen=True)
class Replaced:
    """A replacement that has been made in a model, and the structure of the module that it took out."""

    replacement: Replacement
    original: nn.Module

    def restricted_to(self, prefix: str) -> "Replaced | None":
        """The same by the names of the submodule whose names begin with `prefix`; None if it lies outside of it."""
        inside = self.replacement.restricted_to(prefix)
        return None if inside is None else Replaced(inside, self.original)


def replay(model: nn.Module, plan: Iterable[Replacement], optimizers: Sequence[Optimizer] = ()) -> list[Replaced]:
    """Give a model the structure of a plan. Values are any: they are to be loaded next.

    Args:
        model: that has the modules which the plan names.
        plan: in any order.
        optimizers: of the model, if there are some already: they train the new parameters.

    Returns:
        What was replaced, in order, for `undo_replay`.

    Raises:
        ValueError: if the model lacks a module, or one cannot be built; nothing is changed then.
    """
    done = []
    with ExitStack() as undo:
        for replacement in sorted(plan, key=lambda one: one.order):
            old = find_module(model, replacement.name)
            new = replacement.build()
            _match_(new, old, model)
            sources = _sources(replacement, new, old)
            _train_alike_(new, old, sources)
            done.append(Replaced(replacement, skeleton(old)))
            before = list(model.parameters())
            undo.callback(put_module(model, replacement.name, new))
            for optimizer in optimizers:
                orders = before, list(model.parameters())
                undo.callback(replace_parameters(optimizer, old, new, sources, orders))
        undo.pop_all()
    return done


def undo_replay(model: nn.Module, replaced: Sequence[Replaced]) -> None:
    """Give a model the modules that it had before. Parameters and buffers of the state_dict are to be loaded next."""
    for one in sorted(replaced, key=lambda one: one.replacement.order, reverse=True):
        device = _device(find_module(model, one.replacement.name), model)
        put_module(model, one.replacement.name, materialized(one.original, device))


def replace_in_training(
    model: nn.Module,
    replacement: Replacement,
    initialize: Initialize | None = None,
    *,
    optimizers: Iterable[Optimizer] = (),
    copies: Iterable[tuple[nn.Module, str]] = (),
    carry_state: CarryState | None = None,
    example_inputs: tuple[Any, ...] | None = None,
    seed: int = 0,
    agree: Callable[[nn.Module], None] | None = None,
) -> Callable[[], None]:
    """Replace one module of a model that is being trained, under all of its names.

    The new module gets the old one's device, dtype, memory format, mode and forward and backward hooks. Hooks of the
    state_dict stay with the old one. Its parameters take the places of old ones in the optimizers' groups: of the one
    of the same name or else of the same kind (weight, or vector). Groups stay, so schedulers need no change. A
    parameter of the old module that `initialize` puts into the new one keeps what optimizers remember of it; new ones
    begin without, as at the first step of training.

    Args:
        model: the one that trains.
        replacement: which module, and what builds the new one.
        initialize: called with the old and the new module, to give the new one its values. None: those that the builder
            draws with `seed`.
        optimizers: of the model's parameters, or of some of them.
        copies: averages of the model or of its parts, each with the prefix of its names. They begin anew for the new
            module, with its values: what was averaged of other parameters is no average of these.
        carry_state: called with what each optimizer remembers of the old parameters and with the new ones, by name
            within the modules; returns what it shall remember of new ones.
        example_inputs: of the module: both must give outputs of the same shapes for them.
        seed: of the builder's random values.
        agree: called with the new module before copies of it are made, to give all ranks the same values.

    Returns:
        What undoes the replacement.

    Raises:
        ValueError: if the module is absent, lazy, parametrized or shares a parameter with another one, if an optimizer
            cannot change its parameters, or if shapes do not fit. Nothing is changed then.

    >>> from lightning_compress.nn.replacement import builder_path, torch_layer
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    >>> undo = replace_in_training(model, Replacement("1", builder_path(torch_layer), {"kind": "Tanh"}))
    >>> model[1]
    Tanh()
    >>> undo()
    >>> model[1]
    ReLU()
    """
    old = find_module(model, replacement.name)
    refuse_irreplaceable(replacement.name, old)
    new = replacement.build(seed)
    _match_(new, old, model)
    if initialize is not None:
        with kept_random_streams(), torch.no_grad():
            initialize(old, new)
    if example_inputs is not None:
        _refuse_other_outputs(replacement.name, old, new, example_inputs)
    _refuse_shared(replacement.name, model, old, new)
    sources = _sources(replacement, new, old)
    _train_alike_(new, old, sources)
    if agree is not None:
        agree(new)
    with ExitStack() as undo:
        before = list(model.parameters())
        undo.callback(put_module(model, replacement.name, new))
        for copy, prefix in copies:
            inner = replacement.restricted_to(prefix)
            if inner is not None:
                undo.callback(put_module(copy, inner.name, _copy_for(find_module(copy, inner.name), new)))
        for optimizer in optimizers:
            orders = before, list(model.parameters())
            undo.callback(replace_parameters(optimizer, old, new, sources, orders, carry_state))
        return undo.pop_all().close


def find_module(model: nn.Module, name: str) -> nn.Module:
    """The submodule of that name, behind what `torch.compile` wraps around it.

    Raises:
        ValueError: if there is none.
    """
    names = {canonical_name(f"{key}.").rstrip("."): one for key, one in model.named_modules(remove_duplicate=False)}
    if not name or name not in names:
        hint = near_miss(name, names) if name else " The model cannot be replaced as a unit: name one of its modules."
        raise ValueError(f"{type(model).__name__} has no module '{name}' that could be replaced.{hint}")
    found: nn.Module = names[name]  # a compiled module comes after its wrapper
    return found


def put_module(model: nn.Module, name: str, new: nn.Module) -> Callable[[], None]:
    """Put `new` wherever the module of that name stands in the model, compiled if that one is; returns what undoes it.

    Raises:
        ValueError: if there is no module of that name.
    """
    old, undo = find_module(model, name), ExitStack()
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is old and not hasattr(parent, "_orig_mod"):
                put: nn.Module = new
            elif child is not None and child is not old and vars(child).get("_modules", {}).get("_orig_mod") is old:
                put = type(child)(new, child.dynamo_ctx)
            else:
                continue
            undo.callback(parent._modules.__setitem__, key, child)
            parent._modules[key] = put
    if old._compiled_call_impl is not None and new._compiled_call_impl is None:
        new.compile()
    for kind in HOOKS:
        _share_hooks(kind, old, new, undo)
    return undo.close


def refuse_irreplaceable(name: str, module: nn.Module) -> None:
    """Refuse a module whose weights are not plain parameters of known shapes.

    Raises:
        ValueError: with what to do.
    """
    if any(isinstance(one, UninitializedParameter) for one in module.parameters()):
        raise ValueError(
            f"'{name}' is lazy: its shapes are not known before the first batch. Run one batch through the module "
            f"before trainer.fit, or ignore=['{name}']."
        )
    hooks = [hook for one in module.modules() for hook in one._forward_pre_hooks.values()]
    computed = any(hasattr(hook, "compute_weight") or hasattr(hook, "apply_mask") for hook in hooks)
    if computed or any(is_parametrized(one) for one in module.modules()):
        raise ValueError(
            f"'{name}' is parametrized: its weight is computed from other tensors in each step. Make it plain first "
            f"(torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, prune.remove), or "
            f"ignore=['{name}']."
        )


def skeleton(module: nn.Module) -> nn.Module:
    """A copy that holds no memory: parameters and saved buffers are on the meta device; without hooks."""
    saved = {id(value) for value in module.state_dict(keep_vars=True).values()}
    tensors = [*module.parameters(), *(one for one in module.buffers() if id(one) in saved)]
    return _copy_with(module, [(one, _empty_like(one, torch.device("meta"))) for one in tensors])


def materialized(module: nn.Module, device: torch.device) -> nn.Module:
    """The module of a skeleton on a device, with whatever values memory holds."""
    tensors = [one for one in (*module.parameters(), *module.buffers()) if one.is_meta]
    return _copy_with(module, [(one, _empty_like(one, device)) for one in tensors]).to(device)


def _copy_with(module: nn.Module, values: Iterable[tuple[Tensor, Tensor]]) -> nn.Module:
    hooks = [(one, kind, getattr(one, kind)) for one in module.modules() for kind in HOOKS]
    try:
        for one, kind, _ in hooks:
            setattr(one, kind, OrderedDict())
        return deepcopy(module, {id(old): new for old, new in values})
    finally:
        for one, kind, kept in hooks:
            setattr(one, kind, kept)


def _empty_like(tensor: Tensor, device: torch.device) -> Tensor:
    empty = torch.empty_like(tensor, device=device)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _copy_for(old: nn.Module, new: nn.Module) -> nn.Module:
    """What an average holds of the new module."""
    copy = _copy_with(new, ())
    copy.to(_device(old, new)).train(old.training)
    trains = any(one.requires_grad for one in old.parameters())
    for parameter in copy.parameters():
        parameter.requires_grad_(trains and parameter.requires_grad)
    return copy


def _device(module: nn.Module, model: nn.Module) -> torch.device:
    tensor = next((one for part in (module, model) for one in (*part.parameters(), *part.buffers())), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _match_(new: nn.Module, old: nn.Module, model: nn.Module) -> None:
    """Device, dtype, memory format and mode of the old module; and patterns that mean that one mean the new one."""
    vars(new)[STANDS_FOR_OLD] = True
    floats = [one for one in (*old.parameters(), *old.buffers()) if one.is_floating_point()]
    new.to(device=_device(old, model), dtype=floats[0].dtype if floats else None)
    for ndim, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        weights = [one for one in old.parameters() if one.ndim == ndim]
        if any(one.is_contiguous(memory_format=layout) and not one.is_contiguous() for one in weights):
            new.to(memory_format=layout)  # type: ignore[call-overload]
    new.train(old.training)


def _train_alike_(new: nn.Module, old: nn.Module, sources: Mapping[str, str]) -> None:
    olds = dict(old.named_parameters())
    for name, parameter in new.named_parameters():
        if name in sources:
            parameter.requires_grad_(olds[sources[name]].requires_grad and parameter.is_floating_point())


def _sources(replacement: Replacement, new: nn.Module, old: nn.Module) -> dict[str, str]:
    news, olds = dict(new.named_parameters()), dict(old.named_parameters())
    for key, source in replacement.sources.items():
        if key not in news or source not in olds:
            raise ValueError(
                f"sources of '{replacement.name}' says {{{key!r}: {source!r}}}, but the new module has the parameters "
                f"{', '.join(news) or 'none'}, and the old one {', '.join(olds) or 'none'}."
            )
    return {**default_sources(new, old), **replacement.sources}


def _refuse_shared(name: str, model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    inside, stays = set(old.modules()), set(new.parameters())
    removed = set(old.parameters()) - stays
    for other, module in model.named_modules():
        shared = [key for key, one in module._parameters.items() if one in removed]
        if module not in inside and shared:
            raise ValueError(
                f"'{name}' shares a parameter with '{canonical_name(f'{other}.')}{shared[0]}', which would be on its "
                f"own afterwards. Untie them first, or ignore=['{name}']."
            )


def _refuse_other_outputs(name: str, old: nn.Module, new: nn.Module, inputs: tuple[Any, ...]) -> None:
    shapes = []
    for module in (old, new):
        with isolated_eval(module):
            try:
                output = module(*inputs)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise ValueError(f"The new module for '{name}' does not take its inputs: {error}") from error
        shapes.append(tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__)
    if shapes[0] != shapes[1]:
        raise ValueError(f"'{name}' returns {shapes[0]}, but the module that would replace it returns {shapes[1]}.")


def _share_hooks(kind: str, old: nn.Module, new: nn.Module, undo: ExitStack) -> None:
    hooks, own = getattr(old, kind), getattr(new, kind)
    for key, hook in own.items():
        hooks[key] = hook
        undo.callback(hooks.pop, key, None)
    undo.callback(setattr, new, kind, own)
    setattr(new, kind, hooks)
