"""Make tensors of a model smaller in place, and with them everything that was made for their old shape."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.nn.channel_cut import Cut, Kept, merge_attributes
from lightning_compress.nn.empty_layers import layer_class_for_size
from lightning_compress.nn.selection import canonical_name


def slice_tensor(tensor: Tensor, kept: Kept) -> Tensor:
    """A copy with only those indices, in the memory format of the old one."""
    layout = _memory_format(tensor)
    for dim, indices in kept.items():
        tensor = tensor.index_select(dim, indices.to(tensor.device))
    return tensor.contiguous(memory_format=layout)


def cut_model(model: nn.Module, cut: Cut) -> Callable[[], None]:
    """Cut parameters with their gradients, buffers and attributes; parameters stay the same objects.

    Returns:
        What puts everything back.

    Raises:
        KeyError: if the model lacks a tensor that the cut names; nothing is changed then.
    """
    undo = ExitStack()
    new = [
        (tensor, slice_tensor(tensor.detach(), cut.kept[name]))
        for name, tensor in tensors_by_name(model, cut.kept).items()
    ]
    gradients = [
        (tensor, slice_tensor(tensor.grad, cut.kept[name]))
        for name, tensor in tensors_by_name(model, cut.kept).items()
        if tensor.grad is not None
    ]
    modules = {canonical_name(name): module for name, module in model.named_modules()}
    owners = [(modules[name], values) for name, values in cut.attributes.items()]
    for tensor, _ in gradients:  # a gradient must never have another shape than its tensor
        undo.callback(setattr, tensor, "grad", tensor.grad)
        tensor.grad = None
    for tensor, value in new:
        undo.callback(_set_data, tensor, tensor.data)
        tensor.data = value
    for tensor, value in gradients:
        tensor.grad = value
    for tensor, _ in new:
        undo.callback(setattr, tensor, "grad", None)
    for module, values in owners:
        for key, value in values.items():
            undo.callback(setattr, module, key, getattr(module, key))
            setattr(module, key, value)
    for module in modules.values():
        undo.callback(setattr, module, "__class__", type(module))
        module.__class__ = layer_class_for_size(module)
    return undo.close


def cut_optimizer(optimizer: Optimizer, kept: Mapping[Tensor, Kept], shapes: Mapping[Tensor, torch.Size]) -> None:
    """Cut what an optimizer remembers of each parameter by the same indices; groups and their order stay.

    Args:
        optimizer: of the user.
        kept: by parameter.
        shapes: what the parameters' shapes were before they were cut.

    Raises:
        ValueError: if it remembers something whose shape tells nothing about the parameter's; nothing is changed then.
    """
    entries = [
        (parameter, key, value)
        for parameter in kept
        for key, value in _remembered(optimizer, parameter, shapes[parameter])
    ]
    for parameter, key, value in entries:
        # As long as the parameter, or of length 1: Adafactor's rows and columns.
        long = {dim: one for dim, one in kept[parameter].items() if value.shape[dim] == shapes[parameter][dim]}
        optimizer.state[parameter][key] = slice_tensor(value, long)


def cut_in_training(
    model: nn.Module, cut: Cut, optimizers: Iterable[Optimizer], copies: Iterable[tuple[nn.Module, str]] = ()
) -> None:
    """Cut a model, what optimizers remember of it, and copies of it or of its parts.

    Args:
        model: with the tensors that the cut names.
        cut: what stays.
        optimizers: of the model's parameters, or of some of them.
        copies: such as averages, each with the prefix of its names in the model.

    Raises:
        ValueError: if an optimizer's memory cannot be cut; nothing is changed then.
        KeyError: if the model or a copy lacks a tensor; nothing is changed then.
    """
    optimizers, copies = list(optimizers), list(copies)
    refuse_unknown_state(optimizers)
    kept = {tensor: cut.kept[name] for name, tensor in tensors_by_name(model, cut.kept).items()}
    shapes = {tensor: tensor.shape for tensor in kept}
    with ExitStack() as undo:
        for copy, prefix in [(model, ""), *copies]:
            undo.callback(cut_model(copy, cut.restricted_to(prefix)))
        undo.pop_all()
    for tensor in kept:
        if tensor.requires_grad:
            _renew_accumulation(tensor)
    for optimizer in optimizers:
        trained = {one for group in optimizer.param_groups for one in group["params"]}
        cut_optimizer(optimizer, {one: dims for one, dims in kept.items() if one in trained}, shapes)


def refuse_unknown_state(optimizers: Iterable[Optimizer]) -> None:
    """Refuse optimizers whose memory of a parameter cannot be cut, as far as it is seen from what they hold now.

    Raises:
        ValueError: with the optimizer and the entry.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise _unknown(optimizer, "old_dirs", "flat vector over all parameters")
        for parameter in optimizer.state:
            _remembered(optimizer, parameter, parameter.shape)


def reshape_model(model: nn.Module, state_dict: Mapping[str, Tensor], cut: Cut, now: Cut | None = None) -> None:
    """Give a model the shapes that a `state_dict` has, and what its modules remember of them.

    Values are whatever memory holds: they are to be loaded next.

    Args:
        model: as it was built, or cut already, more or less than the file.
        state_dict: of the file.
        cut: what the file's model had lost of the one that was built.
        now: what `model` has lost of it.

    Raises:
        ValueError: if a buffer that the file does not hold has lost what it should have.
    """
    now = now or Cut()
    tensors = _names(model)
    for name, tensor in tensors_by_name(model, [name for name in {**now.kept, **cut.kept} if name in tensors]).items():
        value = _found(state_dict, name)
        if value is None:
            tensor.data = _unsaved(name, tensor, cut.kept.get(name, {}), now.kept.get(name, {}))
        elif value.shape != tensor.shape:
            tensor.grad = None
            tensor.data = torch.empty(value.shape, dtype=tensor.dtype, device=tensor.device)
    modules = {canonical_name(name): module for name, module in model.named_modules()}
    for name, values in merge_attributes(now.before, cut.attributes).items():
        for key, value in values.items():
            setattr(modules[name], key, value)
    for module in modules.values():
        module.__class__ = layer_class_for_size(module)


def tensors_by_name(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Parameters and buffers by name, each once.

    Raises:
        KeyError: if there is none of that name.
    """
    tensors = _names(model)
    found: dict[str, Tensor] = {}
    seen = set()
    for name in names:
        tensor = tensors[name]
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def get_tensor(model: nn.Module, name: str) -> Tensor:
    """One parameter or buffer, without a walk through all of them.

    Raises:
        KeyError: if there is none of that name.
    """
    owner, _, leaf = name.rpartition(".")
    try:
        found = getattr(model.get_submodule(owner), leaf)
    except AttributeError:
        found = None  # `torch.compile` puts something into names
    return found if isinstance(found, Tensor) else tensors_by_name(model, [name])[name]


def _names(model: nn.Module) -> dict[str, Tensor]:
    parameters = model.named_parameters(remove_duplicate=False)
    buffers = model.named_buffers(remove_duplicate=False)
    return {canonical_name(name): tensor for pairs in (parameters, buffers) for name, tensor in pairs}


def _found(state_dict: Mapping[str, Tensor], name: str) -> Tensor | None:
    return state_dict.get(name, next((one for key, one in state_dict.items() if canonical_name(key) == name), None))


def _unsaved(name: str, buffer: Tensor, wanted: Kept, lost: Kept) -> Tensor:
    """A buffer that no file holds, with the `wanted` indices of what it was at first."""
    # A fresh model has not lost what another one, cut in an earlier run, has.
    has = lost if all(buffer.shape[dim] == len(one) for dim, one in lost.items()) else {}
    for dim in {**has, **wanted}:
        at = has.get(dim, torch.arange(buffer.shape[dim]))
        where = None if dim not in wanted else torch.searchsorted(at, wanted[dim]).clamp(max=len(at) - 1)
        if where is None or not torch.equal(at[where], wanted[dim]):
            if where is not None and dim not in has and buffer.shape[dim] == len(wanted[dim]):
                continue  # it has been cut so before
            raise ValueError(
                f"The buffer '{name}' is in no file, and what the checkpoint needs of it has been cut away. Load the "
                f"checkpoint into a module that is built anew."
            )
        buffer = slice_tensor(buffer.detach(), {dim: where})
    return buffer.detach()


def _remembered(optimizer: Optimizer, parameter: Tensor, shape: torch.Size) -> list[tuple[str, Tensor]]:
    """What is remembered of a parameter of that shape, weight by weight.

    Raises:
        ValueError: if any of it is of another shape.
    """
    found = []
    for key, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, list | tuple | dict) and any(isinstance(one, Tensor) for one in _values(value)):
            raise _unknown(optimizer, key, type(value).__name__)
        if not isinstance(value, Tensor) or value.numel() == 1:
            continue
        if value.ndim != len(shape) or any(mine not in (1, its) for mine, its in zip(value.shape, shape, strict=True)):
            raise _unknown(optimizer, key, f"shape {tuple(value.shape)}, with a parameter of shape {tuple(shape)}")
        found.append((key, value))
    return found


def _unknown(optimizer: Optimizer, key: str, what: str) -> ValueError:
    return ValueError(
        f"{type(optimizer).__name__} remembers '{key}' of each parameter as a {what}, which cannot be cut by the "
        f"parameter's indices. Use an optimizer with one number for each weight, such as SGD, Adam or AdamW."
    )


def _values(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _set_data(tensor: Tensor, data: Tensor) -> None:
    tensor.data = data


def _renew_accumulation(tensor: Tensor) -> None:
    """Let torch make anew what accumulates this tensor's gradient, which it does when the type of the data changes.

    The old one insists on the old shape, and lives as long as any graph that somebody keeps (a loss in a list), or as
    DistributedDataParallel does.
    """
    data, gradient = tensor.data, tensor.grad
    other = torch.float64 if tensor.dtype != torch.float64 else torch.float32
    tensor.grad = None
    tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data, tensor.grad = data, gradient


def _memory_format(tensor: Tensor) -> torch.memory_format:
    for one in (torch.channels_last, torch.channels_last_3d):
        if tensor.ndim == (4 if one is torch.channels_last else 5) and tensor.is_contiguous(memory_format=one):
            return torch.contiguous_format if tensor.is_contiguous() else one
    return torch.contiguous_format


@contextmanager
def temporarily_cut(model: nn.Module, cut: Cut) -> Iterator[None]:
    """The model as it would be after a cut, within the context."""
    undo = cut_model(model, cut)
    try:
        yield
    finally:
        undo()
