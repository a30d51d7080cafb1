"""Scores of a group's units from all layers that make or read them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_compress.core.registry import call_with_supported_args

# Their papers compare layers by the raw scores; others depend on how large a layer is.
RAW = frozenset({"slimming", "taylor"})


def group_scores(criterion: Callable[..., Tensor], offers: Sequence[Mapping[str, Any]], units: int) -> Tensor:
    """One score for each unit: the mean over the layers, each divided by its own mean unless the criterion is raw.

    Raises:
        ValueError: if the criterion returns something else than a finite number for each unit.

    >>> def l1(weight):
    ...     return weight.abs().sum(1)
    >>> offers = [{"weight": torch.tensor([[1.0], [3.0]])}, {"weight": torch.tensor([[10.0], [10.0]])}]
    >>> group_scores(l1, offers, units=2)  # the mean of [0.5, 1.5] and [1, 1]
    tensor([0.7500, 1.2500])
    """
    scores = []
    for offer in offers:
        score = call_with_supported_args(criterion, **offer).detach().float().cpu()
        name = getattr(criterion, "__name__", str(criterion))
        if score.shape != (units,) or not bool(score.isfinite().all()):
            raise ValueError(
                f"The criterion {name} must return {units} finite scores, one a unit, but its shape is "
                f"{tuple(score.shape)}" + ("." if score.shape != (units,) else ", and some are not finite.")
            )
        if name not in RAW and float(score.abs().mean()) > 0:
            score = score / score.abs().mean()
        scores.append(score)
    return torch.stack(scores).mean(0)
