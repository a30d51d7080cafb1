"""What a module keeps on disk: each parameter and persistent buffer, and the layer that it belongs to."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_compress.nn.selection import canonical_name


@dataclass(frozen=True)
class StoredTensor:
    """One tensor under one of its names.

    `layer` is the name of the module that owns it; what a parametrization stores belongs to the parametrized module.
    `tied` is True where the same tensor was met before under another name.

    >>> [(one.name, one.layer, one.is_parameter) for one in stored_tensors(nn.Sequential(nn.Linear(2, 1, bias=False)))]
    [('0.weight', '0', True)]
    """

    name: str
    layer: str
    tensor: Tensor
    is_parameter: bool
    tied: bool


def layers_by_module(model: nn.Module) -> dict[nn.Module, str]:
    """The layer that each module belongs to: its own name, or that of the module whose weight it computes.

    >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 1))
    >>> sorted(set(layers_by_module(nn.Sequential(layer)).values()))  # the modules of the parametrization belong to it
    ['', '0']
    """
    names: dict[nn.Module, str] = {}
    for path, module in model.named_modules():
        names[module] = _layer_name(path)
    return names


def stored_tensors(model: nn.Module) -> list[StoredTensor]:
    """Every parameter and persistent buffer under each of its names, as in `state_dict`.

    Raises:
        ValueError: if a tensor has no values to measure: lazy, on the meta device, sharded, or not one plain tensor.

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    >>> model[1].weight = model[0].weight
    >>> [(one.name, one.tied) for one in stored_tensors(model)]
    [('0.weight', False), ('1.weight', True)]
    """
    layers, seen, found = layers_by_module(model), set[object](), list[StoredTensor]()
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, tensor, is_parameter in _own(module):
            name = canonical_name(f"{path}.{leaf}" if path else leaf)
            _refuse_unmeasurable(name, tensor)
            found.append(StoredTensor(name, layers[module], tensor.detach(), is_parameter, identity(tensor) in seen))
            seen.add(identity(tensor))
    return found


def identity(tensor: Tensor) -> object:
    """A key that is equal for two tensors only if they are the same memory seen the same way: tied weights.

    >>> weight = torch.ones(2, 2)
    >>> identity(weight) == identity(weight.view(2, 2)), identity(weight) == identity(weight.t())
    (True, False)
    """
    if tensor.numel() == 0:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def count_nonzero(tensor: Tensor) -> int:
    """How many elements are not exactly zero; -0.0 is zero, NaN is not.

    >>> count_nonzero(torch.tensor([0.0, -0.0, 1.0, float("nan")]))
    2
    """
    return int(nonzero_count(tensor).item())


def nonzero_count(tensor: Tensor) -> Tensor:
    """Same as `count_nonzero`, as a scalar int64 tensor on the tensor's own device.

    >>> nonzero_count(torch.tensor([0.0, 3.0]))
    tensor(1)
    """
    if tensor.dtype.is_floating_point and tensor.element_size() == 1:
        tensor = tensor.float()  # torch counts no 8-bit floats
    return torch.count_nonzero(tensor.detach())


def _layer_name(path: str) -> str:
    plain = canonical_name(f"{path}.").rstrip(".")
    head, *tail = f".{plain}.".split(".parametrizations.", maxsplit=1)
    return head.strip(".") if tail else plain


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        yield leaf, parameter, True
    for leaf, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
        if leaf not in module._non_persistent_buffers_set:
            yield leaf, buffer, False


def _refuse_unmeasurable(name: str, tensor: Tensor) -> None:
    if is_lazy(tensor):
        raise ValueError(
            f"'{name}' is lazy: it has no shape before the first batch. Run one batch through the model, then measure."
        )
    if tensor.is_meta:
        raise ValueError(
            f"'{name}' is on the meta device, where tensors have no values. Load the weights first, for example with "
            f"model.to_empty(device='cpu') and model.load_state_dict(...)."
        )
    if hasattr(tensor, "full_tensor"):
        raise ValueError(
            f"'{name}' is sharded over processes (DTensor). Load its whole state_dict into a plain model, measure that."
        )
    if tensor.is_quantized or tensor.is_sparse or hasattr(tensor, "__tensor_flatten__"):
        raise ValueError(
            f"'{name}' is a {type(tensor).__name__} of layout {tensor.layout} and type {tensor.dtype}, not one plain "
            f"dense tensor. Convert it first, for example with .dequantize() or .to_dense()."
        )
