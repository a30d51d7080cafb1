"""Call a model with an example input, and make a batch of another size of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def call_model(model: nn.Module, example: Any) -> Any:
    """`model(*example)` for a tuple, `model(**example)` for a dict, else `model(example)`."""
    if isinstance(example, tuple) and not hasattr(example, "_fields"):
        return model(*example)
    return model(**example) if isinstance(example, dict) else model(example)


def check_example(example: Any) -> None:
    """Refuse what no model was ever called with.

    Raises:
        ValueError: if there is no tensor in it.
    """
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(example)):
        raise ValueError(
            f"example_input is a tensor, a tuple of arguments or a dict of keywords, but this "
            f"{type(example).__name__} holds no tensor. Give what the model is called with."
        )


def batch_size(example: Any, batch_dim: int = 0) -> int | None:
    """Length of the first tensor along `batch_dim`; None if no tensor has that dimension."""
    for tensor in _tensors(example):
        if tensor.ndim > batch_dim:
            return tensor.shape[batch_dim]
    return None


def resize_batch(example: Any, batch: int, batch_dim: int = 0) -> Any:
    """A copy with `batch` samples, repeated from the start or cut.

    Changed are the tensors that are as long along `batch_dim` as the first one; others are copied as they are.

    Raises:
        ValueError: if no tensor has that dimension, or it is empty.
    """
    size = batch_size(example, batch_dim)
    if not size:
        raise ValueError(f"the example input has no sample along dimension {batch_dim}")

    def resized(tensor: Tensor) -> Tensor:
        if tensor.ndim <= batch_dim or tensor.shape[batch_dim] != size:
            return tensor.clone()
        return tensor.index_select(batch_dim, torch.arange(batch, device=tensor.device) % size)

    return map_tensors(example, resized)


def crop_images(example: Any, side: int) -> Any:
    """The same with images (of 4 dimensions or more) of at most `side` pixels along each of their last dimensions."""

    def small(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.ndim > 3:
            for dim in range(2, tensor.ndim):
                tensor = tensor.narrow(dim, 0, min(side, tensor.shape[dim]))
        return tensor

    return map_tensors(example, small)


def copy_example(example: Any, device: torch.device | None = None) -> Any:
    """A copy, on `device` if one is given: a model may write into its input, and the example is the user's."""
    return map_tensors(example, lambda tensor: tensor.detach().to(device, copy=True))


def map_tensors(example: Any, function: Callable[[Tensor], Any]) -> Any:
    """The same nest of tuples, lists and dicts with `function` of each tensor; anything else stays."""
    if isinstance(example, Tensor):
        return function(example)
    if isinstance(example, dict):
        return {key: map_tensors(value, function) for key, value in example.items()}
    if isinstance(example, list | tuple):
        values = [map_tensors(value, function) for value in example]
        return type(example)(*values) if hasattr(example, "_fields") else type(example)(values)
    return example


def describe_shapes(example: Any) -> str:
    """Shapes instead of values, for a message."""
    return str(map_tensors(example, lambda tensor: _Shape(f"tensor{tuple(tensor.shape)}")))


class _Shape(str):
    __repr__ = str.__str__


def _tensors(example: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(example, found.append)
    return found
