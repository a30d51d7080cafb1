"""How a trained model differs from the one that its class builds: modules that were replaced, channels cut."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.core.checkpoint import saved_entries
from lightning_compress.nn.channel_cut import Cut, cut_prefix
from lightning_compress.nn.module_replacement import Replaced, replay, undo_replay
from lightning_compress.nn.replacement import Replacement
from lightning_compress.nn.selection import canonical_name
from lightning_compress.nn.surgery import reshape_model

STRUCTURE = "structure"  # kind of the entries of a checkpoint that hold one
NAMES_SHOWN = 8


@dataclass(frozen=True)
class Structure:
    """The plan that makes of a model, as its class builds it, the one that was trained.

    Attributes:
        replacements: in their order.
        cut: of the model in which they were made. What was cut of a module before it was replaced is not in it.
    """

    replacements: tuple[Replacement, ...] = ()
    cut: Cut = field(default_factory=Cut)

    def restricted_to(self, prefix: str) -> "Structure":
        """The part that is about the submodule whose names begin with `prefix`, by that module's names."""
        inside = (one.restricted_to(prefix) for one in self.replacements)
        return Structure(tuple(one for one in inside if one is not None), self.cut.restricted_to(prefix))

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, for a checkpoint."""
        return {"replacements": [one.state_dict() for one in self.replacements], "cut": self.cut.state_dict()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "Structure":
        """The structure that `state` describes."""
        replacements = tuple(map(Replacement.from_state_dict, state["replacements"]))
        return cls(replacements, Cut.from_state_dict(state["cut"]))

    @classmethod
    def combined(cls, several: Iterable["Structure"]) -> "Structure":
        """What several callbacks have done to one model."""
        replacements, cut = list[Replacement](), Cut()
        for one in several:
            replacements += one.replacements
            cut = one.cut.composed_with(cut)
        return cls(tuple(sorted(replacements, key=lambda one: one.order)), cut)


def saved_structure(content: Any, path: str | Path) -> Structure:
    """The structure of the model of a checkpoint, from the entries of all callbacks.

    Raises:
        ValueError: if an entry is damaged.
    """
    found = []
    for entry in saved_entries(content, STRUCTURE):
        try:
            found.append(Structure.from_state_dict(entry))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} has a damaged structure: {type(error).__name__} {error}.") from error
    return Structure.combined(found)


def rebuild(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    structure: Structure,
    path: str | Path,
    now: Cut | None = None,
    replaced: Sequence[Replaced] = (),
    optimizers: Sequence[Optimizer] = (),
) -> list[Replaced]:
    """Give a model the structure of a checkpoint. Values are any: they are to be loaded next.

    Args:
        model: as its class builds it, but for `now` and `replaced`.
        weights: the `state_dict` of the checkpoint, which may be about more than this model.
        structure: of the checkpoint's model.
        path: of the checkpoint, for the words of an error.
        now: what has been cut of the model.
        replaced: what has been replaced in it.
        optimizers: of the model, if there are some already.

    Returns:
        What is replaced in it now.

    Raises:
        ValueError: if the model has no such modules, or weights to be cut by other sizes.
    """
    if [one.replacement for one in replaced] != list(structure.replacements):
        undo_replay(model, replaced)
        replaced = replay(model, structure.replacements, optimizers)
    names = {canonical_name(f"{name}.").rstrip(".") for name, _ in model.named_modules()}
    if unknown := [name for name in structure.cut.attributes if name not in names]:
        raise ValueError(
            f"{path} is of a module that had lost channels of {', '.join(unknown[:NAMES_SHOWN])}, which "
            f"{type(model).__name__} does not have. Build the module that was trained."
        )
    reshape_model(model, weights, structure.cut, now)
    return list(replaced)


def structure_prefix(structure: Structure, model: nn.Module) -> str:
    """Where in the model of a structure a module like `model` lies: the prefix under which most of its names are."""
    modules = {canonical_name(f"{name}.").rstrip(".") for name, _ in model.named_modules(remove_duplicate=False)} - {""}
    names = [one.name for one in structure.replacements]
    prefixes = {full[: len(full) - len(name)] for full in names for name in modules if f".{full}".endswith(f".{name}")}
    if not prefixes:
        return cut_prefix(structure.cut, [name for name, _ in (*model.named_parameters(), *model.named_buffers())])
    return max(sorted(prefixes), key=lambda prefix: sum(f"{prefix}{name}" in names for name in modules))
