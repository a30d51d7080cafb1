"""From a module to the quantizers that act in it, and the way to take them off."""

from collections.abc import Callable
from weakref import WeakKeyDictionary

from torch import nn

from lightning_compress.quantization.forward_hooks import quantizer_hooks
from lightning_compress.quantization.quantized_model import QuantizedModel

# Modules that compute in floating point although somebody may think that they do not, and why.
_unquantized: "WeakKeyDictionary[nn.Module, str]" = WeakKeyDictionary()
NOT_REACHED, REMOVED = "not reached", "removed"


def quantized_of(model: nn.Module) -> QuantizedModel | None:
    """The quantizers that act in a module: one that was quantized, a copy of it, a part, or what holds it.

    Raises:
        ValueError: if it is a part of a model that is quantized outside of it too, or holds two that were quantized
            apart.

    >>> import copy, torch
    >>> from lightning_compress import quantize
    >>> model = quantize(nn.Sequential(nn.Linear(4, 2)), [torch.randn(8, 4)])
    >>> quantized_of(copy.deepcopy(model)).quantized_weights().keys()
    dict_keys(['0.weight'])
    """
    hooks = list(quantizer_hooks(model))
    if not hooks:
        return None
    name, _, first = hooks[0]
    owner: QuantizedModel = first.owner
    if apart := [other for other, _, hook in hooks if hook.owner is not owner]:
        raise ValueError(
            f"'{name}' and '{apart[0]}' of this {type(model).__name__} were quantized apart from one another, so that "
            f"nothing is known of what flows between them. Quantize the whole model."
        )
    return owner if owner.is_of(model) else owner.seen_from(model, _renaming(first.name, name))


def remove_quantizers(model: nn.Module) -> None:
    """Let a quantized model, or a copy or part of one, compute in floating point again.

    Its weights stay on their grids; what it is given and returns is rounded no more.

    >>> import torch
    >>> from lightning_compress import quantize
    >>> layer = nn.Linear(4, 2)
    >>> model = quantize(layer, [torch.randn(8, 4)])
    >>> remove_quantizers(model)
    >>> torch.equal(model(torch.ones(1, 4)), torch.nn.functional.linear(torch.ones(1, 4), model.weight, model.bias))
    True
    """
    owners = {id(hook.owner): hook.owner for _, _, hook in quantizer_hooks(model)}
    for owner in owners.values():
        owner.remove(model)
    if owners:
        _unquantized[model] = REMOVED


def mark_quantization_pending(model: nn.Module) -> None:
    """From now on this model is one that is to be quantized, and is not yet."""
    _unquantized[model] = NOT_REACHED


def unquantized_reason(model: nn.Module) -> str | None:
    """Why a module that was, or was to be, quantized is not: `NOT_REACHED`, `REMOVED`, or None."""
    if next(quantizer_hooks(model), None) is not None:
        return None
    for root, reason in _unquantized.items():
        if any(part is model for part in root.modules()) and next(quantizer_hooks(root), None) is None:
            return reason
    return None


def _renaming(before: str, now: str) -> Callable[[str], str]:
    """From names in one model to those in another, which holds it, or is a part or a copy of it.

    Args:
        before, now: the names of one module in both.

    >>> to_part = _renaming("net.encoder.0", "encoder.0")
    >>> to_part("net.encoder.1"), _renaming("0", "model.0")("1"), _renaming("net", "")("net.0")
    ('encoder.1', 'model.1', '0')
    """
    old, new = ([part for part in name.split(".") if part] for name in (before, now))
    while old and new and old[-1] == new[-1]:
        old.pop(), new.pop()

    def rename(name: str) -> str:
        parts = [part for part in name.split(".") if part]
        if parts[: len(old)] != old:
            raise ValueError(
                f"'{name}' is quantized too, but it lies outside of '{'.'.join(old)}': take the whole model."
            )
        return ".".join([*new, *parts[len(old) :]])

    return rename
