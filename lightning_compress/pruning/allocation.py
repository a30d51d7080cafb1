"""From scores to masks: criterion, granularity, distribution, overrides and min_density brought together."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_compress.core.registry import call_with_supported_args
from lightning_compress.nn.selection import Candidate
from lightning_compress.pruning import granularity as grain
from lightning_compress.pruning.functional.topk import top_k_mask

Distribution = Callable[..., dict[str, int]]


@dataclass(frozen=True)
class PrunableLayers:
    """The weights to prune as units: what a distribution asks about them."""

    by_name: dict[str, Candidate]
    granularity: grain.PerWeight
    shapes: dict[str, torch.Size] = field(init=False)
    weights_per_unit: dict[str, int] = field(init=False)
    num_units: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        shapes = {name: _shape(candidate) for name, candidate in self.by_name.items()}
        costs = {name: self.granularity.size(shape) for name, shape in shapes.items()}
        sizes = {name: math.prod(shape) // costs[name] for name, shape in shapes.items()}
        for name, value in {"shapes": shapes, "weights_per_unit": costs, "num_units": sizes}.items():
            object.__setattr__(self, name, value)

    def misfits(self) -> dict[str, str]:
        """Weights that the granularity cannot divide, and why."""
        found = {name: self.granularity.misfit(shape) for name, shape in self.shapes.items()}
        return {name: why for name, why in found.items() if why is not None}


class UnitScores(Mapping[str, Tensor]):
    """Flat scores of units by layer, computed anew each time they are read, so that memory holds one layer's."""

    def __init__(self, layers: PrunableLayers, score: Callable[[str], Tensor], names: list[str]) -> None:
        self.layers, self.score, self.names = layers, score, names

    def __getitem__(self, name: str) -> Tensor:
        return self.layers.granularity.units(grain.outputs_to_front(self.score(name), self.layers.by_name[name].owner))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def allocate(
    layers: PrunableLayers,
    score: Callable[[str], Tensor],
    distribution: Distribution,
    sparsity: float,
    overrides: dict[str, float],
    min_density: float,
    most: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """How many units of each layer to keep.

    Args:
        layers: the weights.
        score: scores of a weight by its name.
        distribution: a function as in `pruning.functional.distributions`.
        sparsity: fraction of the weights without an override to prune, in [0, 1).
        overrides: sparsity of single layers by name.
        min_density: smallest fraction of a layer's units that stays; one unit at least.
        most: units that each layer may keep, such as those not pruned yet; all by default. Stronger than the
            min_density.

    Raises:
        ValueError: if the distribution gives no whole number of each layer's units.
    """
    most = layers.num_units if most is None else most
    bounds = {name: _bounds(size, min_density, most[name]) for name, size in layers.num_units.items()}
    kept = {name: layers.num_units[name] - round(value * layers.num_units[name]) for name, value in overrides.items()}
    kept = {name: _within(count, bounds[name]) for name, count in kept.items()}
    free = [name for name in layers.num_units if name not in kept]
    budget = _budget(layers, free, sparsity)
    while free:
        counts = _distributed(layers, score, distribution, free, sparsity)
        wanting = [name for name in free if counts[name] < bounds[name][0]]
        # One kind after the other: what the first takes from the rest may well mend the second.
        fixed = wanting or [name for name in free if counts[name] > bounds[name][1]]
        if not fixed:
            return kept | counts
        # What these keep by their bounds is taken from the rest, or left to it.
        kept |= {name: _within(counts[name], bounds[name]) for name in fixed}
        free = [name for name in free if name not in fixed]
        budget -= sum(kept[name] * layers.weights_per_unit[name] for name in fixed)
        sparsity = 1 - min(max(budget / max(_weights(layers, free), 1), 0.0), 1.0)
    return kept


def compute_masks(
    layers: PrunableLayers, score: Callable[[str], Tensor], kept: dict[str, int]
) -> Iterator[tuple[str, Tensor]]:
    """The mask of each weight, one after the other: its `kept[name]` best units."""
    scores = UnitScores(layers, score, list(layers.num_units))
    for name in layers.num_units:
        units = top_k_mask(scores[name], kept[name])
        mask = layers.granularity.mask(units, layers.shapes[name])
        yield name, grain.outputs_to_stored(mask, layers.by_name[name].owner).contiguous()


def _distributed(
    layers: PrunableLayers,
    score: Callable[[str], Tensor],
    distribution: Distribution,
    names: list[str],
    sparsity: float,
) -> dict[str, int]:
    known: dict[str, Mapping[str, Any]] = {
        "sizes": layers.num_units, "costs": layers.weights_per_unit, "shapes": layers.shapes,
    }  # fmt: skip
    about = {key: {name: values[name] for name in names} for key, values in known.items()}
    scores = UnitScores(layers, score, names)
    counts: dict[str, int] = call_with_supported_args(distribution, scores=scores, sparsity=sparsity, **about)
    _refuse_miscounts(counts, about["sizes"], distribution)
    return counts


def _refuse_miscounts(counts: object, sizes: dict[str, int], distribution: Distribution) -> None:
    title = f"Distribution {getattr(distribution, '__name__', distribution)}"
    if not isinstance(counts, Mapping):
        raise ValueError(f"{title} must return units to keep by name, but returned a {type(counts).__name__}.")
    if missing := [name for name in sizes if name not in counts]:
        raise ValueError(f"{title} gave no count for {', '.join(missing)}. It must return the units of each to keep.")
    for name, size in sizes.items():
        if not isinstance(counts[name], int) or not 0 <= counts[name] <= size:
            raise ValueError(
                f"{title} keeps {counts[name]} units of '{name}', which has {size}. It must return whole numbers "
                f"from 0 to that."
            )


def _bounds(size: int, min_density: float, most: int) -> tuple[int, int]:
    least = max(1, math.ceil(min_density * size - 1e-9))  # 0.07 * 100 is a little over 7
    return min(least, most), most


def _within(count: int, bounds: tuple[int, int]) -> int:
    return min(max(count, bounds[0]), bounds[1])


def _weights(layers: PrunableLayers, names: list[str]) -> int:
    return sum(layers.num_units[name] * layers.weights_per_unit[name] for name in names)


def _budget(layers: PrunableLayers, names: list[str], sparsity: float) -> int:
    return _weights(layers, names) - round(sparsity * _weights(layers, names))


def _shape(candidate: Candidate) -> torch.Size:
    return grain.outputs_to_front(candidate.parameter.detach(), candidate.owner).shape
