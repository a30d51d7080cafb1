"""Parameters that stand still for a while, with the BatchNorms among them, and are given back as they were."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from lightning_compress.finetuning.functional.layers import group_by_layer
from lightning_compress.nn.batchnorm import BatchNormFreezer
from lightning_compress.nn.selection import (
    Candidate,
    Pattern,
    Patterns,
    as_patterns,
    candidates,
    pattern_matches,
    select_matching,
)


class FrozenParameters:
    """Parameters that do not move, nor do the statistics of their BatchNorms.

    An optimizer leaves a parameter without a gradient alone, its momentum and weight decay too.

    Args:
        parameters: what stands still.
        norms: BatchNorm modules, put into eval mode.
        without_graph: let no gradient be computed (`requires_grad=False`), which is cheaper; otherwise gradients are
            dropped, so that a process group, or a loss of these parameters alone, finds what it expects.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], norms: Iterable[nn.Module], without_graph: bool) -> None:
        self.parameters, self.norms, self.without_graph = list(parameters), BatchNormFreezer(norms), without_graph
        self.wanted: list[bool] | None = None

    @property
    def holds(self) -> bool:
        """Whether they stand still now."""
        return self.wanted is not None

    def hold(self) -> None:
        """Stand still; again, if others have changed modes or gradients meanwhile."""
        if self.wanted is None:
            self.wanted = [parameter.requires_grad for parameter in self.parameters]
            self._drop()
        if self.without_graph:
            for parameter in self.parameters:
                parameter.requires_grad_(False)
        self.norms.stand_still(True)

    def drop_gradients(self) -> None:
        """Forget the gradients that were computed all the same, before they are clipped or used."""
        if self.holds and not self.without_graph:
            self._drop()

    def release(self) -> None:
        """Give all back as it was."""
        for parameter, wanted in zip(self.parameters, self.wanted or (), strict=False):
            parameter.requires_grad_(wanted)
        self.norms.stand_still(False)
        self.wanted = None

    def _drop(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


class UnfrozenParameters:
    """Parameters that the user has frozen, and that are trained for a while."""

    def __init__(self, parameters: Iterable[nn.Parameter] = ()) -> None:
        self.parameters, self.holds = list(parameters), False

    def hold(self) -> None:
        """Train them."""
        self.holds = True
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    def release(self) -> None:
        """Freeze them as they were."""
        if self.holds:
            for parameter in self.parameters:
                parameter.requires_grad_(False)
                parameter.grad = None
        self.holds = False


def split_layers(model: nn.Module, layers: Sequence[Patterns] | None = None) -> list[list[str]]:
    """The names of the model's parameters by layer, from the input to the head.

    Args:
        model: the module to look through.
        layers: patterns of each layer in this order, the first match counts; None: as
            `functional.layers.group_by_layer` has it, in the order in which the model defines them.

    Raises:
        ValueError: if a pattern matches nothing, or a trainable parameter belongs to no layer.
    """
    entries = _entries(model)
    if layers is None:
        return group_by_layer(entry.name for entry in entries)
    patterns = [as_patterns(layer) for layer in layers]
    for layer in patterns:
        select_matching(model, layer, "layers")
    found = [[entry.name for entry in entries if _place(entry, patterns) == place] for place in range(len(patterns))]
    known = {name for layer in found for name in layer}
    if lost := [one.name for one in entries if one.parameter.requires_grad and one.name not in known]:
        raise ValueError(f"layers: {', '.join(lost[:12])} belong to no layer. Add patterns for them.")
    return [layer for layer in found if layer]


def frozen_by_layer(
    model: nn.Module, freeze: Patterns, unfreeze: Patterns, layers: Sequence[Sequence[str]]
) -> list[list[Candidate]]:
    """What is frozen, by layer from the input to the head; a BatchNorm without parameters stands for itself.

    Raises:
        ValueError: if a pattern matches nothing, or nothing is left to train.
    """
    select_matching(model, freeze, "freeze")
    select_matching(model, unfreeze, "unfreeze")
    entries = _entries(model)
    frozen = {entry.name: entry for entry in entries if _any(freeze, entry) and not _any(unfreeze, entry)}
    moving = [one for one in candidates(model) if one.parameter.requires_grad or _any(unfreeze, one)]
    if frozen and all(one.name in frozen for one in moving):
        raise ValueError(
            f"freeze={freeze!r} leaves nothing to train. Name in unfreeze what shall learn, such as unfreeze=["
            f"'{candidates(model)[-1].name.rpartition('.')[0] or '...'}']."
        )
    by_layer = [[frozen[name] for name in layer if name in frozen] for layer in layers]
    placed = {name for layer in layers for name in layer}
    rest = [entry for name, entry in frozen.items() if name not in placed]
    return [layer for layer in [rest, *by_layer] if layer]


def unfreeze_parameters(
    model: nn.Module, unfreeze: Patterns, optimizers: Iterable[Optimizer], several: bool
) -> UnfrozenParameters:
    """Those of the named parameters that the user has frozen.

    Args:
        model: the module to look through.
        unfreeze: patterns.
        optimizers: one of which must train them.
        several: whether several processes train, which have agreed on what they exchange.

    Raises:
        ValueError: if a pattern matches nothing, or what it matches cannot be trained.
    """
    found = [one for one in select_matching(model, unfreeze, "unfreeze") if not one.parameter.requires_grad]
    trained = {id(one) for optimizer in optimizers for group in optimizer.param_groups for one in group["params"]}
    if lost := [one.name for one in found if id(one.parameter) not in trained]:
        raise ValueError(
            f"unfreeze: {', '.join(lost[:12])} belong to no optimizer, so they will not train. Give the optimizer "
            f"all of the module's parameters in configure_optimizers: it leaves those alone that have no gradient."
        )
    if found and several:
        raise ValueError(
            f"unfreeze: {', '.join(one.name for one in found[:12])} have requires_grad=False, and several processes "
            f"agree before training on what they exchange. Leave requires_grad=True, and freeze by "
            "FineTuning(freeze=...)."
        )
    return UnfrozenParameters(one.parameter for one in found)


def freeze_layers(layers: Iterable[Iterable[Candidate]], without_graph: bool) -> list[FrozenParameters]:
    """One `FrozenParameters` for each layer."""
    made = []
    for entries in map(list, layers):
        norms = {id(one.owner): one.owner for one in entries if isinstance(one.owner, _BatchNorm)}
        made.append(FrozenParameters([one.parameter for one in entries], norms.values(), without_graph))
    return made


def _entries(model: nn.Module) -> list[Candidate]:
    """Every parameter, and a stand-in for each BatchNorm that has none, in the order of the modules."""
    bare = [
        Candidate((f"{name}.running_mean",), nn.Parameter(torch.empty(0), requires_grad=False), module)
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and not list(module.parameters(recurse=False))
    ]
    order = {id(module): place for place, module in enumerate(model.modules())}
    return sorted([*candidates(model), *bare], key=lambda entry: order[id(entry.owner)])


def _any(patterns: Patterns, entry: Candidate) -> bool:
    return any(pattern_matches(pattern, entry) for pattern in as_patterns(patterns))


def _place(entry: Candidate, layers: Sequence[Sequence[Pattern]]) -> int | None:
    return next(
        (place for place, layer in enumerate(layers) if any(pattern_matches(one, entry) for one in layer)), None
    )
