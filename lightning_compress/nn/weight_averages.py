"""Copies of a model that average its weights (EMA, SWA): what holds for the weights must hold for them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_compress.nn.selection import canonical_name

Kept = Iterable[tuple[object, nn.Module]]


@dataclass(frozen=True)
class WeightAverage:
    """A copy that follows the model: its weights by the model's names, and who updates it.

    `owner.update_parameters(...)` is called whenever the copy takes in new weights. `prefix` is where in the model the
    part is that `copy` is one of.
    """

    owner: Any
    parameters: dict[str, nn.Parameter]
    copy: nn.Module
    prefix: str = ""


def find_averages(model: nn.Module, kept: Kept) -> Iterator[WeightAverage]:
    """Every averaging copy of `model`: the `kept` ones, each with the callback that keeps it, and those inside it."""
    for keeper, copy in kept:
        if isinstance(copy, AveragedModel):
            yield WeightAverage(copy, _named(copy.module), copy.module)
        elif hasattr(keeper, "update_parameters"):
            yield WeightAverage(keeper, _named(copy), copy)
    for inner in model.modules():
        if isinstance(inner, AveragedModel):
            prefix = _source_of(inner, model)
            named = {f"{prefix}{name}": value for name, value in _named(inner.module).items()}
            yield WeightAverage(inner, named, inner.module, prefix)


def averaged_copies(model: nn.Module, kept: Kept) -> Iterator[tuple[nn.Module, str]]:
    """The modules of all averages, each with the prefix of its names in `model`."""
    for average in find_averages(model, kept):
        yield average.copy, average.prefix


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    return {canonical_name(name): parameter for name, parameter in model.named_parameters()}


def _source_of(average: AveragedModel, model: nn.Module) -> str:
    """The prefix of the names of that part of `model` which `average` copies: the first one of equal shapes."""
    shapes = {name: value.shape for name, value in _named(average.module).items()}
    copies = {id(part) for inner in model.modules() if isinstance(inner, AveragedModel) for part in inner.modules()}
    for name, part in model.named_modules():
        if id(part) not in copies and {n: value.shape for n, value in _named(part).items()} == shapes:
            return f"{canonical_name(name + '.').rstrip('.')}." if name else ""
    raise ValueError(
        "An AveragedModel inside the module averages nothing that is found in the module, so it cannot be told which "
        "of its weights to prune with. Keep it in a callback (WeightAveraging), or outside the module."
    )
