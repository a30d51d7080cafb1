"""Make tensors of a model smaller in place, and with them everything that was made for their old shape."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.core.selection import canonical

Kept = dict[int, Tensor]  # dimension -> indices that stay, in order


@dataclass(frozen=True)
class Cut:
    """What stays of which tensors, and what modules remember of their sizes.

    Attributes:
        kept: by the name of a parameter or buffer.
        attributes: new values by the name of a module and of its attribute.
    """

    kept: dict[str, Kept] = field(default_factory=dict)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def after(self, first: "Cut") -> "Cut":
        """One cut in the place of `first` and then this one."""
        kept = {name: dict(dims) for name, dims in first.kept.items()}
        for name, dims in self.kept.items():
            for dim, indices in dims.items():
                older = kept.setdefault(name, {}).get(dim)
                kept[name][dim] = indices if older is None else older[indices]
        attributes = {name: dict(values) for name, values in first.attributes.items()}
        for name, values in self.attributes.items():
            attributes.setdefault(name, {}).update(values)
        return Cut(kept, attributes)

    def under(self, name: str) -> "Cut":
        """The same cut by the names that tensors have in a model that holds this one as `name`."""
        at = f"{name}." if name else ""
        return Cut(
            {f"{at}{tensor}": dims for tensor, dims in self.kept.items()},
            {f"{at}{module}".rstrip("."): values for module, values in self.attributes.items()},
        )

    def inside(self, prefix: str) -> "Cut":
        """The part of the cut that is about the submodule whose names begin with `prefix`, by that module's names."""
        return Cut(
            {name.removeprefix(prefix): dims for name, dims in self.kept.items() if name.startswith(prefix)},
            {
                name.removeprefix(prefix) if name != prefix.rstrip(".") else "": values
                for name, values in self.attributes.items()
                if f"{name}.".startswith(prefix)
            },
        )

    def state(self) -> dict[str, Any]:
        """Plain values and tensors, for a checkpoint."""
        kept = {name: {str(dim): one.int() for dim, one in dims.items()} for name, dims in self.kept.items()}
        attributes = {
            name: {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
            for name, values in self.attributes.items()
        }
        return {"kept": kept, "attributes": attributes}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Cut":
        """The cut that `state` tells of."""
        kept = {name: {int(dim): one.long() for dim, one in dims.items()} for name, dims in state["kept"].items()}
        attributes = {
            name: {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
            for name, values in state["attributes"].items()
        }
        return cls(kept, attributes)


def sliced(tensor: Tensor, kept: Kept) -> Tensor:
    """A copy with only those indices, in the memory format of the old one."""
    layout = _memory_format(tensor)
    for dim, indices in kept.items():
        tensor = tensor.index_select(dim, indices.to(tensor.device))
    return tensor.contiguous(memory_format=layout)


def kept_of(cut: Cut, names: Iterable[str]) -> Kept:
    """What stays of a tensor that has all of these names."""
    return next((cut.kept[name] for name in names if name in cut.kept), {})


def part_of(cut: Cut, names: Collection[str]) -> str:
    """Where in a cut model a module with these tensors lies: the prefix under which most of its names are cut."""
    ends = {canonical(name) for name in names}
    prefixes = {full[: len(full) - len(name)] for full in cut.kept for name in ends if f".{full}".endswith(f".{name}")}
    return max(sorted(prefixes | {""}), key=lambda prefix: sum(f"{prefix}{name}" in cut.kept for name in ends))


def cut_model(model: nn.Module, cut: Cut) -> Callable[[], None]:
    """Cut parameters with their gradients, buffers and attributes; parameters stay the same objects.

    Returns:
        What puts everything back.

    Raises:
        KeyError: if the model lacks a tensor that the cut names; nothing is changed then.
    """
    undo = ExitStack()
    new = [(tensor, sliced(tensor.detach(), cut.kept[name])) for name, tensor in named(model, cut.kept).items()]
    gradients = [
        (tensor, sliced(tensor.grad, cut.kept[name]))
        for name, tensor in named(model, cut.kept).items()
        if tensor.grad is not None
    ]
    modules = {canonical(name): module for name, module in model.named_modules()}
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
    return undo.close


def cut_optimizer(optimizer: Optimizer, kept: Mapping[Tensor, Kept], shapes: Mapping[Tensor, torch.Size]) -> None:
    """Cut what an optimizer remembers of each parameter by the same indices; groups and their order stay.

    Args:
        kept: by parameter.
        shapes: what the parameters' shapes were before they were cut.

    Raises:
        ValueError: if it remembers something whose shape tells nothing about the parameter's; nothing is changed then.
    """
    changes = []
    for parameter, dims in kept.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.numel() > 1:
                changes.append(
                    (optimizer.state[parameter], key, _cut_state(optimizer, key, value, dims, shapes[parameter]))
                )
            elif isinstance(value, list | tuple | dict) and any(isinstance(one, Tensor) for one in _values(value)):
                raise _unknown(optimizer, key, type(value).__name__)
    for state, key, value in changes:
        state[key] = value


def refuse_unknown_state(optimizers: Iterable[Optimizer]) -> None:
    """Refuse optimizers whose memory of a parameter cannot be cut, as far as it is seen from what they hold now.

    Raises:
        ValueError: with the optimizer and the entry.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise _unknown(optimizer, "old_dirs", "flat vector over all parameters")
        for parameter, state in optimizer.state.items():
            kept = {dim: torch.arange(size) for dim, size in enumerate(parameter.shape)}
            for key, value in state.items():
                if isinstance(value, Tensor) and value.numel() > 1:
                    _cut_state(optimizer, key, value, kept, parameter.shape)
                elif isinstance(value, list | tuple | dict) and any(isinstance(one, Tensor) for one in _values(value)):
                    raise _unknown(optimizer, key, type(value).__name__)


def reshape(model: nn.Module, state_dict: Mapping[str, Tensor], cut: Cut) -> None:
    """Give the tensors that a cut has named the shapes that a `state_dict` has, and modules what they remember.

    Values are whatever memory holds: they are to be loaded next. A model that was already cut, more or less than the
    file, is led to the file's shapes too.
    """
    for name, tensor in named(model, [name for name in cut.kept if name in _names(model)]).items():
        value = _found(state_dict, name)
        if value is not None and value.shape != tensor.shape:
            tensor.grad = None
            tensor.data = torch.empty(value.shape, dtype=tensor.dtype, device=tensor.device)
        elif value is None:  # a buffer that is not saved
            _reshape_unsaved(tensor, cut.kept[name])
    modules = {canonical(name): module for name, module in model.named_modules()}
    for name, values in cut.attributes.items():
        for key, value in values.items():
            setattr(modules[name], key, value)


def named(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
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


def _names(model: nn.Module) -> dict[str, Tensor]:
    parameters = model.named_parameters(remove_duplicate=False)
    buffers = model.named_buffers(remove_duplicate=False)
    return {canonical(name): tensor for pairs in (parameters, buffers) for name, tensor in pairs}


def _found(state_dict: Mapping[str, Tensor], name: str) -> Tensor | None:
    return state_dict.get(name, next((one for key, one in state_dict.items() if canonical(key) == name), None))


def _reshape_unsaved(tensor: Tensor, kept: Kept) -> None:
    if all(len(indices) <= tensor.shape[dim] for dim, indices in kept.items()):
        with suppress(IndexError):  # it has been cut already
            tensor.data = sliced(tensor.detach(), kept)


def _cut_state(optimizer: Optimizer, key: str, value: Tensor, kept: Kept, shape: torch.Size) -> Tensor:
    """As long as the parameter along each dimension, or of length 1 there (Adafactor's rows and columns)."""
    if value.ndim != len(shape) or any(mine not in (1, its) for mine, its in zip(value.shape, shape, strict=True)):
        raise _unknown(optimizer, key, f"shape {tuple(value.shape)}, with a parameter of shape {tuple(shape)}")
    return sliced(value, {dim: indices for dim, indices in kept.items() if value.shape[dim] == shape[dim]})


def _unknown(optimizer: Optimizer, key: str, what: str) -> ValueError:
    return ValueError(
        f"{type(optimizer).__name__} remembers '{key}' of each parameter as a {what}, which cannot be cut by the "
        f"parameter's indices. Use an optimizer with one number for each weight, such as SGD, Adam or AdamW."
    )


def _values(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _set_data(tensor: Tensor, data: Tensor) -> None:
    tensor.data = data


def _memory_format(tensor: Tensor) -> torch.memory_format:
    for one in (torch.channels_last, torch.channels_last_3d):
        if tensor.ndim == (4 if one is torch.channels_last else 5) and tensor.is_contiguous(memory_format=one):
            return torch.contiguous_format if tensor.is_contiguous() else one
    return torch.contiguous_format


@contextmanager
def tried(model: nn.Module, cut: Cut) -> Iterator[None]:
    """The model as it would be after a cut, within the context."""
    undo = cut_model(model, cut)
    try:
        yield
    finally:
        undo()
