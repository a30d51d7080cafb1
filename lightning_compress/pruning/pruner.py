"""Bring the masks of a model to a sparsity: all of pruning but when to do it. Works in any training loop."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.core import distributed as ranks
from lightning_compress.core.arguments import check_fraction
from lightning_compress.core.registry import call_with_supported_args, required_args
from lightning_compress.nn.channel_cut import Cut, kept_indices
from lightning_compress.pruning.allocation import Distribution, PrunableLayers, allocate, compute_masks
from lightning_compress.pruning.masks import MaskedParameters
from lightning_compress.pruning.statistics import CriterionStatistics


class Pruner:
    """Masks for some weights, made by a criterion and a distribution.

    Args:
        layers: the weights and the units they are pruned in.
        criterion: a function as in `pruning.functional.criteria`.
        distribution: a function as in `pruning.functional.distributions`.
        final_sparsity: what `sparsity` will reach in the end; overrides rise in step with it.
        overrides: final sparsity of single weights, by name.
        min_density: smallest fraction of a layer's units that stays; one unit always does.
        seed: of criteria that ask for a generator.
    """

    def __init__(
        self,
        layers: PrunableLayers,
        criterion: Callable[..., Tensor],
        distribution: Distribution,
        *,
        final_sparsity: float = 1.0,
        overrides: Mapping[str, float] | None = None,
        min_density: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.layers, self.criterion, self.distribution = layers, criterion, distribution
        self.final_sparsity, self.overrides = final_sparsity, dict(overrides or {})
        self.min_density, self.seed = min_density, seed
        self.masked = MaskedParameters({name: one.parameter for name, one in layers.by_name.items()})
        self.statistics = CriterionStatistics(layers.by_name, required_args(criterion))
        self.sparsity = 0.0

    @torch.no_grad()
    def update(self, sparsity: float, optimizers: Iterable[Optimizer] = ()) -> bool:
        """Make new masks for a sparsity in [0, 1), and zero weights, moments and averages by them.

        What is pruned stays pruned unless `sparsity` falls.

        Returns:
            False if several ranks had made different masks; all have those of rank 0 then.

        Raises:
            ValueError: if the criterion's scores have the wrong shape, or are NaN. The masks are left as they were.
        """
        check_fraction("sparsity", sparsity)
        self.statistics.all_reduce()
        monotone = sparsity >= self.sparsity
        score = partial(self.score, monotone=monotone)
        for name in self.layers.by_name:
            score(name)  # what is to be refused is refused before the first mask changes
        share = sparsity / self.final_sparsity if self.final_sparsity else 0.0
        overrides = {name: value * share for name, value in self.overrides.items()}
        most = self._alive() if monotone else None
        kept = allocate(self.layers, score, self.distribution, sparsity, overrides, self.min_density, most)
        self.masked.allocate()
        for name, mask in compute_masks(self.layers, score, kept):
            self.masked.set(name, mask)
        agreed = self._agree()
        self.statistics.reset_inputs()
        self.masked.apply()
        self.masked.apply_to_state(optimizers)
        for average in self.masked.averaged_copies:
            self.masked.apply_to(average)
        self.sparsity = sparsity
        return agreed

    def score(self, name: str, monotone: bool = True) -> Tensor:
        """The criterion's scores of one weight; what is pruned gets the lowest if it is to stay so."""
        parameter = self.layers.by_name[name].parameter
        offered: dict[str, Any] = {"weight": parameter.detach(), **self.statistics.inputs_for(name)}
        named = signature(self.criterion).parameters
        if "grad" in named:
            # No gradient means that the loss does not depend on it: its gradient is zero.
            offered["grad"] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if "generator" in named:
            place = list(self.layers.by_name).index(name)
            offered["generator"] = torch.Generator().manual_seed(self.seed * 1_000_003 + place)
        scores: Tensor = call_with_supported_args(self.criterion, **offered)
        _refuse_bad_scores(scores, parameter, name, self.criterion)
        mask = self.masked.masks.get(name)
        return scores if mask is None or not monotone else torch.where(mask != 0, scores, -torch.inf)

    def has_gradients(self, several_optimizers: bool = False, scaled: bool = False) -> bool:
        """Whether a criterion that asks for gradients can have them now.

        Args:
            several_optimizers: a weight without a gradient may get one later, when its optimizer's turn comes.
            scaled: a gradient that is not finite has overflowed, and its step will be skipped.
        """
        if "grad" not in required_args(self.criterion):
            return True
        grads = [one.parameter.grad for one in self.layers.by_name.values()]
        present = [grad for grad in grads if grad is not None]
        if not present or (several_optimizers and len(present) < len(grads)):
            return False
        return not scaled or all(bool(grad.isfinite().all()) for grad in present)

    def state_dict(self) -> dict[str, Any]:
        """Masks and running sums as plain values."""
        return {"masks": self.masked.state_dict(), "gathered": self.statistics.state_dict(), "sparsity": self.sparsity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state` gave.

        Raises:
            ValueError: if it belongs to another model, or is damaged.
        """
        if lacking := {"masks", "gathered", "sparsity"} - state.keys():
            raise ValueError(f"The checkpoint's part on pruning is damaged: it has no {', '.join(sorted(lacking))}.")
        if state["masks"] and (missing := [name for name in self.layers.by_name if name not in state["masks"]]):
            raise ValueError(
                f"The checkpoint has no mask for {', '.join(missing)}, which that run did not prune. Resume with its "
                f"targets: they were {', '.join(state['masks'])}."
            )
        self.masked.load_state_dict(state["masks"])
        self.statistics.load_state_dict(state["gathered"])
        self.sparsity = float(state["sparsity"])

    def slice_channels(self, cut: Cut) -> None:
        """The weights have been cut in place: cut masks and sums, and count units anew.

        Raises:
            ValueError: if the granularity's units do not divide the weights that are left.
        """
        kept = {name: kept_indices(cut, one.names) for name, one in self.layers.by_name.items()}
        self.layers = PrunableLayers(self.layers.by_name, self.layers.granularity)
        misfits = {
            name: why for name, why in self.layers.misfits().items() if self.layers.by_name[name].parameter.numel()
        }
        if misfits:
            reasons = "; ".join(f"{name}: {why}" for name, why in misfits.items())
            raise ValueError(
                f"After a cut of channels the granularity does not fit: {reasons}. Use round_to or ignore."
            )
        self.masked.slice_channels(kept)
        self.statistics.slice_channels(kept)
        for name in [name for name, one in self.layers.by_name.items() if not one.parameter.numel()]:
            self._leave(name)

    def take_over(self, older: "Pruner") -> None:
        """Go on where another pruner of the model was before modules were replaced; new weights are dense."""
        known = older.masked.parameters
        same = {name for name, one in self.masked.parameters.items() if name in known and known[name] is one}
        self.masked.masks = {name: mask for name, mask in older.masked.masks.items() if name in same}
        if older.masked.masks:
            self.masked.allocate()
        self.statistics.take_over(older.statistics)
        self.sparsity = older.sparsity

    def _leave(self, name: str) -> None:
        """The weight has lost its last element: it is no longer one of those that are pruned."""
        self.layers = PrunableLayers(
            {key: one for key, one in self.layers.by_name.items() if key != name}, self.layers.granularity
        )
        self.overrides.pop(name, None)
        self.masked.drop(name)
        self.statistics.drop(name)

    def _alive(self) -> dict[str, int]:
        """Units of each weight that are not pruned. Rounding may give a layer one more than before: it has none."""
        costs, sizes = self.layers.weights_per_unit, self.layers.num_units
        alive = {name: int(mask.count_nonzero()) // costs[name] for name, mask in self.masked.masks.items()}
        return {**sizes, **alive}

    def _agree(self) -> bool:
        if not ranks.is_distributed():
            return True
        tensors = list(self.masked.masks.values())
        if ranks.all_ranks_equal(ranks.tensor_hash(tensors), tensors[0].device):
            return True
        ranks.broadcast_(tensors)
        return False


def _refuse_bad_scores(scores: object, parameter: nn.Parameter, name: str, criterion: Callable[..., Any]) -> None:
    title = getattr(criterion, "__name__", criterion)
    if not isinstance(scores, Tensor) or scores.shape != parameter.shape:
        found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(
            f"Criterion {title} must return scores of the shape {tuple(parameter.shape)} of '{name}', but returned "
            f"{found}."
        )
    if bool(scores.isnan().any()):
        raise ValueError(
            f"Criterion {title} gave NaN for '{name}'. Is its gradient or the weight itself NaN? The masks were not "
            f"changed."
        )
