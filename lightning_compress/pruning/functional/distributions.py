"""Distributions: how a sparsity of the whole is shared out among layers.

A distribution is a function that asks for what it needs by naming it: `sizes` (units per layer), `costs` (weights per
unit), `shapes` (of the weights), `scores` (flat scores of units per layer, computed when read) and `sparsity`. It
returns how many units of each layer to keep.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lightning_compress.pruning.functional.topk import count_kept, global_threshold

OFFERED = ("sizes", "costs", "shapes", "scores", "sparsity")
Counts = dict[str, int]


def uniform(sizes: Counts, sparsity: float) -> Counts:
    """Prune the same share of every layer.

    >>> uniform({"a": 10, "b": 5}, sparsity=0.8)
    {'a': 2, 'b': 1}
    """
    return {name: size - round(sparsity * size) for name, size in sizes.items()}


def global_(scores: Mapping[str, Tensor], costs: Counts, sizes: Counts, sparsity: float) -> Counts:
    """Prune the lowest scores, in whatever layer they are.

    >>> scores = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([4.0, 5.0, 6.0])}
    >>> global_(scores, costs={"a": 1, "b": 1}, sizes={"a": 3, "b": 3}, sparsity=0.5)
    {'a': 0, 'b': 3}
    """
    total = sum(size * costs[name] for name, size in sizes.items())
    threshold = global_threshold(lambda: _with_costs(scores, costs), total - round(sparsity * total))
    kept = {}
    for name in sizes:
        kept[name], threshold = count_kept(scores[name], threshold, costs[name])
    return kept


def lamp(scores: Mapping[str, Tensor], costs: Counts, sizes: Counts, sparsity: float) -> Counts:
    """Prune the lowest scores over all layers, each squared and divided by the sum of those that outlive it.

    Reference: Lee et al., 2021, section 3, https://arxiv.org/abs/2010.07611

    >>> scores = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([4.0, 5.0, 6.0])}
    >>> lamp(scores, costs={"a": 1, "b": 1}, sizes={"a": 3, "b": 3}, sparsity=0.5)  # the best of each layer has 1
    {'a': 1, 'b': 2}
    """
    return global_(_Lamp(scores), costs, sizes, sparsity)


def erk(shapes: Mapping[str, torch.Size], sizes: Counts, costs: Counts, sparsity: float) -> Counts:
    """Keep a share of each layer in proportion to the sum of its dimensions over their product (Erdős-Rényi kernel).

    Reference: Evci et al., 2020, section 3, https://arxiv.org/abs/1911.11134

    >>> shapes = {"wide": torch.Size([20, 20]), "narrow": torch.Size([5, 20])}
    >>> erk(shapes, sizes={"wide": 400, "narrow": 100}, costs={"wide": 1, "narrow": 1}, sparsity=0.8)
    {'wide': 62, 'narrow': 38}
    """
    weights = {name: size * costs[name] for name, size in sizes.items()}
    budget = sum(weights.values()) - round(sparsity * sum(weights.values()))
    ratio = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    density = _densities(weights, ratio, budget)
    return _rounded({name: density[name] * size for name, size in sizes.items()}, sizes, costs, budget)


class _Lamp(Mapping[str, Tensor]):
    def __init__(self, scores: Mapping[str, Tensor]) -> None:
        self.scores = scores

    def __getitem__(self, name: str) -> Tensor:
        scores = self.scores[name]
        # What is pruned already (-inf) must not count among those that outlive a weight, nor what stays anyway (inf).
        order = scores.argsort(stable=True)
        squared = torch.where(scores.isinf(), 0.0, scores.double().square())[order]
        outliving = squared.flip(0).cumsum(0).flip(0)
        lamp = torch.where(outliving > 0, squared / outliving, 0.0).float()  # half precision would make ties of them
        result = torch.empty_like(lamp).scatter_(0, order, lamp)
        return torch.where(scores.isinf(), scores.float(), result)

    def __iter__(self) -> Iterator[str]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)


def _with_costs(scores: Mapping[str, Tensor], costs: Counts) -> Iterator[tuple[Tensor, int]]:
    for name in scores:
        yield scores[name], costs[name]


def _densities(weights: Counts, ratio: dict[str, float], budget: int) -> dict[str, float]:
    """Densities in proportion to `ratio` that meet the budget; layers that would need more than all are kept whole."""
    dense: set[str] = set()
    while len(dense) < len(weights):
        left = budget - sum(weights[name] for name in dense)
        scale = left / sum(ratio[name] * size for name, size in weights.items() if name not in dense)
        over = {name for name in weights if name not in dense and scale * ratio[name] > 1}
        if not over:
            return {name: 1.0 if name in dense else scale * ratio[name] for name in weights}
        dense |= over
    return dict.fromkeys(weights, 1.0)


def _rounded(exact: dict[str, float], sizes: Counts, costs: Counts, budget: int) -> Counts:
    """Whole numbers near `exact` that cost the budget, or as near below it as units allow: largest remainders first."""
    kept = {name: min(sizes[name], math.floor(value + 1e-9)) for name, value in exact.items()}
    left = budget - sum(count * costs[name] for name, count in kept.items())
    for name in sorted(exact, key=lambda name: kept[name] - exact[name]):
        if kept[name] < sizes[name] and costs[name] <= left:
            kept[name] += 1
            left -= costs[name]
    return kept
