"""Take a compressed model out of a checkpoint, without the callbacks and the Trainer that made it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_compress.core.checkpoint import load_checkpoint, saved_entries, state_dict_of
from lightning_compress.nn.selection import canonical_name
from lightning_compress.nn.structure import rebuild, saved_structure, structure_prefix
from lightning_compress.pruning.masks import MaskedParameters
from lightning_compress.quantization.lookup import mark_quantization_pending
from lightning_compress.quantization.restore import restore_quantization, restrict_state

Model = TypeVar("Model", bound=nn.Module)


def load_compressed(module_class: type[Model], checkpoint: str | Path, **kwargs: Any) -> Model:
    """Build a module and give it the compressed weights of a checkpoint; what is pruned is exactly zero.

    A quantized module computes on the grids of the checkpoint; its weights lie on theirs, under their own names.

    Args:
        module_class: the LightningModule of the run, or the class of the one submodule that is wanted.
        checkpoint: path of a Lightning checkpoint, with or without this package's entries.
        kwargs: arguments of the class; for a LightningModule they add to the saved hyperparameters.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, holds more than tensors and plain values, or does not fit the class.

    >>> from tempfile import TemporaryDirectory
    >>> trained = nn.Linear(2, 1)
    >>> with TemporaryDirectory() as folder:
    ...     torch.save({"state_dict": trained.state_dict()}, f"{folder}/last.ckpt")
    ...     loaded = load_compressed(nn.Linear, f"{folder}/last.ckpt", in_features=2, out_features=1)
    >>> torch.equal(loaded.weight, trained.weight)
    True
    """
    content = load_checkpoint(checkpoint)
    weights = _with_latents(state_dict_of(content, checkpoint), content)
    module = _built(module_class, content, kwargs)
    _restructure(module, content, weights, checkpoint)
    prefix = _fitting_prefix(module, weights, checkpoint)
    module.load_state_dict({name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)})
    for entry in saved_entries(content):
        _mask(module, entry, canonical_name(prefix), checkpoint)
        if entry.get("model") is not None:
            _quantize(module, entry["model"], canonical_name(prefix), checkpoint)
        elif "model" in entry:
            mark_quantization_pending(module)
    return module


def _with_latents(weights: Mapping[str, Tensor], content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights that training went on with, in place of those that lie on grids: they are put there again."""
    found = dict(weights)
    for entry in saved_entries(content):
        latents = entry.get("latents", {})
        found |= {name: value for name, value in latents.items() if name in found and value.shape == found[name].shape}
    return found


def _built(module_class: type[Model], content: Mapping[str, Any], kwargs: dict[str, Any]) -> Model:
    saved = content.get("hyper_parameters", {}) if hasattr(module_class, "load_from_checkpoint") else {}
    arguments = {**saved, **kwargs}
    try:
        return module_class(**arguments)
    except TypeError as error:
        raise ValueError(
            f"{module_class.__name__}({', '.join(arguments)}) cannot be built: {error}. Give its arguments to "
            f"load_compressed, or call save_hyperparameters() in it."
        ) from error


def _restructure(
    module: nn.Module, content: Mapping[str, Any], weights: Mapping[str, Tensor], checkpoint: str | Path
) -> None:
    """Give the module the structure of the checkpoint's: modules that were replaced, channels that were cut."""
    structure = saved_structure(content, checkpoint)
    prefix = structure_prefix(structure, module)
    try:
        rebuild(module, _under(prefix, weights), structure.restricted_to(prefix), checkpoint)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{checkpoint} has a damaged structure: {type(error).__name__} {error}.") from error


def _under(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _fitting_prefix(module: nn.Module, weights: Mapping[str, Tensor], checkpoint: str | Path) -> str:
    """Where in the checkpoint the module's weights are: at the top, or under the name of a submodule."""
    wanted = {name: value.shape for name, value in module.state_dict().items()}
    first = next(iter(wanted), "")
    prefixes = {name[: len(name) - len(first)] for name in weights if name.endswith(first)} | {""}
    fitting = [
        prefix
        for prefix in sorted(prefixes, key=len)
        if all(prefix + name in weights and weights[prefix + name].shape == shape for name, shape in wanted.items())
        and (prefix or len(weights) == len(wanted))
    ]
    if len(fitting) != 1:
        nearest = max(prefixes, key=lambda prefix: sum(prefix + name in weights for name in wanted))
        found = f"fits in several places: {fitting}" if fitting else _difference(wanted, weights, nearest)
        raise ValueError(f"{checkpoint} does not fit {type(module).__name__}: {found}.")
    return fitting[0]


def _difference(wanted: Mapping[str, torch.Size], weights: Mapping[str, Tensor], prefix: str) -> str:
    for name, shape in ((prefix + name, shape) for name, shape in wanted.items()):
        if name not in weights:
            return f"it has no '{name}'; it has {', '.join(list(weights)[:8])}"
        if weights[name].shape != shape:
            return f"its '{name}' has shape {tuple(weights[name].shape)}, the module's {tuple(shape)}"
    return f"it also has {', '.join(sorted(weights.keys() - wanted.keys())[:8])}"


def _mask(module: nn.Module, entry: Mapping[str, Any], prefix: str, checkpoint: str | Path) -> None:
    masks = {
        name.removeprefix(prefix): saved for name, saved in entry.get("masks", {}).items() if name.startswith(prefix)
    }
    masked = MaskedParameters({canonical_name(name): one for name, one in module.named_parameters()})
    try:
        masked.load_state_dict(masks)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{checkpoint} has damaged masks: {type(error).__name__} {error}.") from error
    masked.apply()


def _quantize(module: nn.Module, state: Mapping[str, Any], prefix: str, checkpoint: str | Path) -> None:
    try:
        restore_quantization(module, restrict_state(prefix, state))
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{checkpoint} has damaged grids: {type(error).__name__} {error}.") from error
