"""Which parameters of a model a phase is about, and how."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_compress.finetuning.freezing import FrozenParameters, freeze_layers, frozen_by_layer, split_layers
from lightning_compress.finetuning.functional.layers import layer_decay_multipliers
from lightning_compress.finetuning.lr_overrides import parameter_lr_multipliers
from lightning_compress.nn.selection import Patterns, candidates, select_matching


@dataclass(frozen=True)
class FreezeSpec:
    """The arguments that name parameters."""

    freeze: Patterns
    unfreeze: Patterns
    gradual: bool
    layers: Sequence[Patterns] | None
    lr_multipliers: Mapping[Any, float]
    layer_decay: float | None


@dataclass(frozen=True)
class ResolvedPhase:
    """Parameters resolved from the arguments of a phase.

    Args:
        frozen: parameters that do not train, by layer from the input to the head if it unfreezes gradually.
        lr_multipliers: of learning rates where they are not 1.
        touched: names of the parameters that the phase is about, if not about all.
        everything: names of all.
    """

    frozen: list[FrozenParameters] = field(default_factory=list)
    lr_multipliers: dict[nn.Parameter, float] = field(default_factory=dict)
    touched: frozenset[str] = frozenset()
    everything: frozenset[str] = frozenset()


def resolve_phase(model: nn.Module, asked: FreezeSpec, without_graph: bool) -> ResolvedPhase:
    """Find the parameters of each part, and check whatever can be checked about them.

    Raises:
        ValueError: if a pattern matches nothing, nothing is left to train, or a parameter belongs to no layer.
    """
    layers = split_layers(model, asked.layers)
    frozen = frozen_by_layer(model, asked.freeze, asked.unfreeze, layers)
    pieces = frozen if asked.gradual else [[one for layer in frozen for one in layer]]
    slower = [one.name for pattern in asked.lr_multipliers for one in select_matching(model, pattern, "lr_multipliers")]
    by_layer = {} if asked.layer_decay is None else layer_decay_multipliers(layers, asked.layer_decay)
    return ResolvedPhase(
        freeze_layers(pieces, without_graph),
        parameter_lr_multipliers(candidates(model), asked.lr_multipliers, by_layer),
        frozenset([*slower, *(one.name for layer in frozen for one in layer)]),
        frozenset(one.name for one in candidates(model)),
    )
