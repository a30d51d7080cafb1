"""One module that loses channels bit by bit until a budget is met."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.channel_pruning.budget import Budget, Costs, fraction_for
from lightning_compress.channel_pruning.dependency.removable_blocks import with_vanishing
from lightning_compress.channel_pruning.dependency.search import find_groups
from lightning_compress.channel_pruning.functional.group_scores import group_scores
from lightning_compress.channel_pruning.functional.groups import Gone, Group, remaining
from lightning_compress.channel_pruning.functional.unit_selection import most_that_may_go, rounded
from lightning_compress.channel_pruning.statistics import Gathered, offers

LATENCY_STEPS = 6


@dataclass(frozen=True)
class How:
    """What decides which units go, apart from the budget."""

    criterion: Callable[..., Tensor]
    distribution: Callable[..., Gone]
    min_density: float = 0.0
    round_to: int = 1
    seed: int = 0
    remove_blocks: bool = False


class Shrinker:
    """The groups of a module, what it cost at first, and the choice of what goes next.

    Args:
        model: called with `example`.
        allowed: names of the weights whose channels may go.
        frozen: names of parameters that do not train in any step; None: those that do not train now.
        whole: names of modules that must give all that they give.
        first: what an interrupted run knew of the beginning: see `state`.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        budget: Budget,
        how: How,
        allowed: Collection[str],
        first: Mapping[str, Any] | None = None,
        frozen: Collection[str] | None = None,
        whole: Collection[str] = (),
    ) -> None:
        self.model, self.example, self.budget, self.how = model, example, budget, how
        found, self.small = find_groups(model, example)
        frozen = frozen_in(model) if frozen is None else frozen
        self.groups = [_if_allowed(_if_not_passed_on(group, whole), allowed, frozen) for group in found]
        if how.remove_blocks:
            known = None if first is None else first["vanishing"]
            self.groups = with_vanishing(model, self.small, self.groups, known)
        self.vanishing = (
            [group.name for group in self.groups if group.may_vanish] if first is None else first["vanishing"]
        )
        self._counted: Costs | None = None
        costs = self._costs()
        self.originals: dict[str, int] = {group.name: group.units for group in self.groups}
        self.initial = {"parameters": float(costs.parameters), "macs": float(costs.total_macs())}
        if budget.kind == "latency_ms" and first is None:
            self.initial["latency_ms"] = costs.latency_after({}, budget.runtime)
        if first is not None:
            self.originals |= {name: int(units) for name, units in first["originals"].items()}
            self.initial = {name: float(value) for name, value in first["initial"].items()}

    @property
    def free(self) -> list[Group]:
        """The groups that may lose units."""
        return [group for group in self.groups if group.whole is None and group.units]

    @property
    def sparsity(self) -> float:
        """Fraction of the units of all free groups that is gone."""
        free = [group for group in self.groups if group.whole is None or group.units < self.originals[group.name]]
        total = sum(self.originals[group.name] for group in free)
        return 1 - sum(group.units for group in free) / total if total else 0.0

    def state(self) -> dict[str, Any]:
        """What was there at first."""
        return {"originals": dict(self.originals), "initial": dict(self.initial), "vanishing": self.vanishing}

    def check(self) -> None:
        """Refuse a budget that cannot be met.

        Raises:
            ValueError: with the nearest one that can, and with what is left whole.
        """
        if not self.free:
            raise ValueError(f"There are no channels that could go. Left whole: {self.left_whole()}.")
        flat = {group.name: torch.arange(group.units, 0, -1).float() for group in self.free}
        costs = self._costs()
        nearest = self._left(costs, self._chosen(flat, 1.0))
        wanted, kind = self.budget.target, self.budget.kind
        met = nearest >= wanted if kind == "sparsity" else nearest <= wanted
        if not met:
            # Four digits, so that what is named can be met.
            shown = Context(4, ROUND_FLOOR if kind == "sparsity" else ROUND_CEILING).create_decimal(str(nearest))
            raise ValueError(
                f"{kind}={wanted} cannot be met: with min_density={self.how.min_density} the nearest is "
                f"{kind}={shown}. Left whole: {self.left_whole() or 'nothing'}."
            )

    def left_whole(self) -> str:
        """Which layers keep all of their channels, and why."""
        return "; ".join(f"{group.name} ({group.whole})" for group in self.groups if group.whole is not None)

    def scores(self, gathered: Gathered) -> dict[str, Tensor]:
        """One tensor for each free group."""
        generator = torch.Generator().manual_seed(self.how.seed)
        return {
            group.name: group_scores(self.how.criterion, offers(gathered, group, generator), group.units)
            for group in self.free
        }

    def choose(self, scores: Mapping[str, Tensor], progress: float) -> Gone:
        """The units that go now, if `progress` of the way to the budget is to be gone."""
        target, kind = self.target_at(progress), self.budget.kind
        if kind == "sparsity":
            return self._chosen(scores, target)
        costs = self._costs()
        steps = {"steps": LATENCY_STEPS} if kind == "latency_ms" else {}
        fraction = fraction_for(lambda one: self._left(costs, self._chosen(scores, one)) <= target, **steps)
        return self._chosen(scores, 1.0 if fraction is None else fraction)

    def target_at(self, progress: float) -> float:
        """The budget part of the way: from all that was there at first."""
        start = {"sparsity": 0.0, "latency_ms": self.initial.get("latency_ms", 0.0)}.get(self.budget.kind, 1.0)
        return start + (self.budget.target - start) * progress

    def went(self, gone: Gone) -> None:
        """Those units are gone."""
        self.groups, self._counted = remaining(self.groups, gone), None

    def measured(self) -> dict[str, float]:
        """What the module costs now: parameters and MACs as fractions of those at first."""
        costs = self._costs()
        return {
            "parameters": costs.parameters / self.initial["parameters"],
            "macs": costs.total_macs() / max(self.initial["macs"], 1.0),
        }

    def _costs(self) -> Costs:
        if self._counted is None:
            self._counted = Costs.of(self.model, self.example, self.groups)
        return self._counted

    def _left(self, costs: Costs, gone: Gone) -> float:
        if self.budget.kind == "parameters":
            return costs.parameters_after(gone) / self.initial["parameters"]
        if self.budget.kind == "macs":
            return costs.macs_after(gone) / max(self.initial["macs"], 1.0)
        if self.budget.kind == "latency_ms":
            return costs.latency_after(gone, self.budget.runtime)
        total = sum(self.originals[group.name] for group in self.free)
        return (total - sum(group.units for group in self.free) + sum(map(len, gone.values()))) / total

    def _chosen(self, scores: Mapping[str, Tensor], fraction: float) -> Gone:
        how, free = self.how, self.free
        gone = how.distribution(free, scores, self.originals, fraction, how.min_density)
        floors = {
            group.name: group.units - most_that_may_go(group, self.originals[group.name], how.min_density)
            for group in free
        }
        return rounded(free, gone, scores, how.round_to, floors)


def frozen_in(model: nn.Module) -> set[str]:
    """All names of the parameters that do not train now."""
    return {name for name, one in model.named_parameters(remove_duplicate=False) if not one.requires_grad}


def inside(name: str, modules: Collection[str]) -> bool:
    """Whether a tensor or module is one of these modules, or lies in one."""
    return any(name == one or name.startswith(f"{one}.") for one in modules)


def _if_not_passed_on(group: Group, whole: Collection[str]) -> Group:
    """Left whole if a module that must give all that it gives passes the group's channels on, as a norm does."""
    passing = [one.place.module for one in group.members if one.place.side == "channels"]
    kept = next((one for one in passing if inside(one, whole)), None)
    return group if kept is None or group.whole is not None else replace(group, whole=f"'{kept}' must stay as it is")


def _if_allowed(group: Group, allowed: Collection[str], frozen: Collection[str]) -> Group:
    """Left whole if one of the layers that make its channels is not among the targets, or anything of it is frozen."""
    if group.whole is not None:
        return group
    for member in group.makers:
        if member.place.slices[0].tensor not in allowed:
            return replace(group, whole=f"'{member.place.module}' is not among the targets")
    for member in group.members:
        for one in member.place.slices:
            if one.tensor in frozen:
                return replace(group, whole=f"'{one.tensor}' is frozen")
    return group
