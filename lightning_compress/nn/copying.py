"""Copies of a module that carry none of our hooks and none of Lightning's Trainer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def copy_without_hooks(model: Model) -> Model:
    """A copy in the same modes, without quantizers' hooks, wrapped methods and Trainer."""
    with _alone(model):
        copy = deepcopy(model)
    drop_forward_hooks(copy, lambda hook: getattr(hook, "is_a_quantizers", False))
    return copy


def drop_forward_hooks(model: nn.Module, unwanted: Callable[[Any], bool]) -> None:
    """Take hooks off a module and its submodules without the handles that registering them returned."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if unwanted(hook)]:
                del hooks[key]
                for marks in (
                    module._forward_pre_hooks_with_kwargs,
                    module._forward_hooks_with_kwargs,
                    module._forward_hooks_always_called,
                ):
                    marks.pop(key, None)


def unwrap_compiled(model: nn.Module) -> nn.Module:
    """The model with its compiled parts in place of what compiles them, and itself too; it is changed."""
    for module in list(model.modules()):
        module._compiled_call_impl = None
        for name, child in module._modules.items():  # children would leave out what comes a second time
            if child is not None:
                setattr(module, name, _compiled(child) or child)
    return _compiled(model) or model


def copy_uncompiled(model: Model) -> Model:
    """The model with its compiled parts as they were before, under the same names: they run, but nothing compiles them.

    What torch has compiled for one module it takes for its copies too, and does not look whether those have hooks.
    """
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(inner := _compiled(child), nn.Module):
                setattr(parent, name, torch.compiler.disable(inner))  # type: ignore[no-untyped-call]
    inner = _compiled(model)
    return model if inner is None else torch.compiler.disable(inner)  # type: ignore[no-untyped-call]


def _compiled(wrapper: nn.Module) -> nn.Module | None:
    """What a wrapper of `torch.compile` holds."""
    return getattr(wrapper, "_orig_mod", None)


@contextmanager
def _alone(model: nn.Module) -> Iterator[None]:
    """Without what no copy is to have, or can: a Trainer holds data, processes and files, and results hold a graph."""
    tied: list[tuple[nn.Module, str, Any]] = [
        (model, name, vars(model)[name]) for name in ("_trainer", "_fabric") if vars(model).get(name) is not None
    ]
    # A weight that a hook computes anew at each call, as `weight_norm` does, is such a result.
    made = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    for module, name, value in (*tied, *made):
        vars(module)[name] = value.detach() if isinstance(value, Tensor) else None
    try:
        yield
    finally:
        for module, name, value in (*tied, *made):
            vars(module)[name] = value
