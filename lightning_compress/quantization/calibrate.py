"""Quantize a trained model with nothing but a few batches."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_compress.core.capture import random_state_kept
from lightning_compress.core.flow import watched
from lightning_compress.core.selection import Patterns
from lightning_compress.quantization.copying import copied
from lightning_compress.quantization.formats import Bits
from lightning_compress.quantization.layers import layers_of
from lightning_compress.quantization.methods import MethodName
from lightning_compress.quantization.plan import Request
from lightning_compress.quantization.quantized import QuantizedModel, layout_of

Model = TypeVar("Model", bound=nn.Module)
Forward = Callable[[nn.Module, Any], Any]


def quantize(
    model: Model,
    loader: Iterable[Any],
    *,
    weights: Bits = 8,
    activations: Bits = 8,
    method: MethodName = None,
    granularity: str = "channel",
    symmetric: bool = True,
    first: Bits = None,
    last: Bits = None,
    overrides: Mapping[str, Any] | None = None,
    reduce_range: bool = False,
    targets: Patterns = None,
    ignore: Patterns = (),
    batches: int | None = None,
    forward: Forward | None = None,
    seed: int = 0,
) -> Model:
    """Return a copy of a trained model that computes on grids; `export` writes it as an integer model.

    Args:
        model: stays as it is.
        loader: batches like those of training: tensors, dicts of keywords, or tuples whose first part is the input.
        weights, activations, method, granularity, symmetric, first, last, overrides, reduce_range, targets, ignore,
            seed: as in `QuantizationAwareTraining`.
        batches: how many of them to watch; None: all.
        forward: calls the model with a batch, `forward(model, batch)`; None: by the kinds of batches above.

    Returns:
        A copy in eval mode with the same `state_dict`.

    Raises:
        ValueError: if there is no batch, or anything else cannot be done; nothing is changed then.
    """
    request = Request(
        weights, activations, method, granularity, symmetric, first, last, dict(overrides or {}), reduce_range
    )
    copy = copied(model).eval()
    _, layers = layers_of(copy, targets, ignore)
    request.plan(layers)
    call = forward or call_with
    remaining = iter(_limited(loader, batches))
    first_batch = next(remaining, None)
    if first_batch is None:
        raise ValueError("There is no calibration data: the loader gave no batch. A few hundred samples are enough.")
    with torch.no_grad(), random_state_kept():
        with watched(copy) as flow:
            call(copy, _on_device(first_batch, copy))
        quantized = QuantizedModel(copy, layers, request, layout_of(flow, copy, layers, request), seed)
        quantized.draw_anew(0)
        quantized.install()
        mode = quantized.mode
        mode.active, mode.observing = True, True
        for batch in _with_first(first_batch, remaining):
            call(copy, _on_device(batch, copy))
        mode.observing, mode.frozen, mode.quantizing = False, True, True
    quantized.refuse_senseless_ranges()
    return copy


def call_with(model: nn.Module, batch: Any) -> Any:
    """Give a model the input of a batch: the first part of a tuple or list, keywords of a dict, or all of it."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0]) if isinstance(batch, tuple | list) else model(batch)


def _limited(loader: Iterable[Any], batches: int | None) -> Iterable[Any]:
    for number, batch in enumerate(loader):
        if batches is not None and number >= batches:
            return
        yield batch


def _with_first(first: Any, others: Iterable[Any]) -> Iterable[Any]:
    yield first
    yield from others


def _on_device(batch: Any, model: nn.Module) -> Any:
    device = next(model.parameters()).device
    return torch.utils._pytree.tree_map(lambda one: one.to(device) if isinstance(one, torch.Tensor) else one, batch)
