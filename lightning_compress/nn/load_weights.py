"""Give a module the weights of a checkpoint, all of them and nothing else; the module keeps its parameters."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.core.checkpoint import load_checkpoint, state_dict_of
from lightning_compress.nn.module_replacement import Replaced
from lightning_compress.nn.selection import canonical_name
from lightning_compress.nn.structure import Structure, rebuild, saved_structure

NAMES_SHOWN = 8


def load_weights(
    model: nn.Module,
    path: str | Path,
    copies: Iterable[tuple[nn.Module, str]] = (),
    optimizers: Sequence[Optimizer] = (),
) -> tuple[Structure, list[Replaced]]:
    """Load a Lightning checkpoint's weights, or those of a bare `state_dict`, into a module.

    The module gets the structure of the checkpoint's: other modules in the place of its own, fewer channels. Masks,
    grids and whatever else stands in the file are not taken.

    Args:
        model: the whole module that the file is of.
        path: of the file.
        copies: averages of the module or of its parts, each with the prefix of its names; they are changed as it is.
        optimizers: of the module: they train the parameters that it has afterwards.

    Returns:
        How the module differs from what it was, and the structure of what was taken out of it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds more than tensors and plain values, is damaged, or is not of this module; with the
            names that one of them lacks, and both shapes where they differ.
    """
    content = load_checkpoint(path)
    weights = {canonical_name(name): value for name, value in state_dict_of(content, path).items()}
    structure = saved_structure(content, path)
    replaced = rebuild(model, weights, structure, path, optimizers=optimizers)
    for one, prefix in copies:
        rebuild(one, weights, structure.restricted_to(prefix), path)
    _refuse_misfits(model, weights, path)
    model.load_state_dict({name: weights[canonical_name(name)] for name in model.state_dict()})
    return structure, replaced


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
