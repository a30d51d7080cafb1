"""Give a module the weights of a checkpoint, all of them and nothing else; the module keeps its parameters."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_compress.core.checkpoint import load_checkpoint, saved_entries, state_dict_of
from lightning_compress.nn.channel_cut import Cut
from lightning_compress.nn.selection import canonical_name
from lightning_compress.nn.surgery import reshape_model

NAMES_SHOWN = 8


def load_weights(model: nn.Module, path: str | Path, copies: Iterable[tuple[nn.Module, str]] = ()) -> Cut:
    """Load a Lightning checkpoint's weights, or those of a bare `state_dict`, into a module.

    Channels that the checkpoint's model had lost go from the module too. Masks, grids and whatever else stands in the
    file are not taken.

    Args:
        model: the whole module that the file is of.
        path: of the file.
        copies: averages of the module or of its parts, each with the prefix of its names; they lose the same channels.

    Returns:
        What the module has lost.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds more than tensors and plain values, is damaged, or is not of this module; with the
            names that one of them lacks, and both shapes where they differ.
    """
    content = load_checkpoint(path)
    weights = {canonical_name(name): value for name, value in state_dict_of(content, path).items()}
    cut = saved_cut(content, path)
    for one, prefix in [(model, ""), *copies]:
        reshape_to_checkpoint(one, weights, cut.restricted_to(prefix), Cut(), path)
    _refuse_misfits(model, weights, path)
    model.load_state_dict({name: weights[canonical_name(name)] for name in model.state_dict()})
    return cut


def saved_cut(content: Any, path: str | Path) -> Cut:
    """What the model of a checkpoint had lost of the one that was built.

    Raises:
        ValueError: if that is damaged.
    """
    total = Cut()
    for entry in saved_entries(content):
        if "cut" in entry:
            try:
                total = Cut.from_state_dict(entry["cut"]).composed_with(total)
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise ValueError(f"{path} has a damaged cut: {type(error).__name__} {error}.") from error
    return total


def reshape_to_checkpoint(
    model: nn.Module, weights: Mapping[str, Tensor], cut: Cut, now: Cut, path: str | Path
) -> None:
    """Let a module lose what the file's has lost.

    Args:
        model: that has lost `now`.
        weights: of the file, which may be about more than this module.
        cut: what the file's module had lost.

    Raises:
        ValueError: if the module has no such layers.
    """
    names = {canonical_name(name) for name, _ in model.named_modules()}
    if unknown := [name for name in cut.attributes if name not in names]:
        raise ValueError(
            f"{path} is of a module that had lost channels of {', '.join(unknown[:NAMES_SHOWN])}, which "
            f"{type(model).__name__} does not have. Build the module that was trained."
        )
    reshape_model(model, weights, cut, now)


def _refuse_misfits(model: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    wanted = {canonical_name(name): value.shape for name, value in model.state_dict().items()}
    both = wanted.keys() & weights.keys()
    found = {
        "It lacks": sorted(wanted.keys() - both),
        "The module lacks": sorted(weights.keys() - both),
        "Shapes differ": [
            f"{name} has {tuple(weights[name].shape)} in the file and {tuple(wanted[name])} in the module"
            for name in wanted
            if name in both and weights[name].shape != wanted[name]
        ],
    }
    if any(found.values()):
        words = " ".join(f"{what}: {_some(names)}." for what, names in found.items() if names)
        raise ValueError(
            f"The weights of {path} are not those of {type(model).__name__}. {words} Build the module that was "
            f"trained, or load what fits yourself, before fit, and leave start_from out."
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
