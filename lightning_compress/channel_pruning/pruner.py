"""One module that loses channels bit by bit until a budget is met."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.channel_pruning.budget import Budget, Costs, fraction_for_budget
from lightning_compress.channel_pruning.dependency.removable_blocks import mark_removable
from lightning_compress.channel_pruning.dependency.search import find_groups
from lightning_compress.channel_pruning.functional.group_scores import group_scores
from lightning_compress.channel_pruning.functional.groups import ChannelGroup, PrunedUnits, remaining_group
from lightning_compress.channel_pruning.functional.unit_selection import max_prunable_units, round_units
from lightning_compress.channel_pruning.statistics import ChannelStatistics, criterion_inputs
from lightning_compress.core.interpolation import interpolate

LATENCY_STEPS = 6


@dataclass(frozen=True)
class ChannelPruningConfig:
    """What decides which units go, apart from the budget."""

    criterion: Callable[..., Tensor]
    distribution: Callable[..., PrunedUnits]
    min_density: float = 0.0
    round_to: int = 1
    seed: int = 0
    remove_blocks: bool = False


class ChannelPruner:
    """The groups of a module, what it cost at first, and the choice of what goes next.

    Args:
        model: called with `example`.
        allowed: names of the weights whose channels may go.
        frozen: names of parameters that do not train in any step; None: those that do not train now.
        protected: names of modules whose outputs must all stay.
        first: what an interrupted run knew of the beginning: see `state_dict`.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        budget: Budget,
        config: ChannelPruningConfig,
        allowed: Collection[str],
        first: Mapping[str, Any] | None = None,
        frozen: Collection[str] | None = None,
        protected: Collection[str] = (),
    ) -> None:
        self.model, self.example, self.budget, self.config = model, example, budget, config
        found, self.small = find_groups(model, example)
        frozen = frozen_parameters(model) if frozen is None else frozen
        self.groups = [_if_allowed(_if_not_passed_on(group, protected), allowed, frozen) for group in found]
        if config.remove_blocks:
            known = None if first is None else first["vanishing"]
            self.groups = mark_removable(model, self.small, self.groups, known)
        self.removable_blocks = (
            [group.name for group in self.groups if group.removable] if first is None else first["vanishing"]
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
    def prunable_groups(self) -> list[ChannelGroup]:
        """The groups that may lose units."""
        return [group for group in self.groups if group.unprunable_reason is None and group.units]

    @property
    def sparsity(self) -> float:
        """Fraction of the units of all free groups that is gone."""
        free = [
            group
            for group in self.groups
            if group.unprunable_reason is None or group.units < self.originals[group.name]
        ]
        total = sum(self.originals[group.name] for group in free)
        return 1 - sum(group.units for group in free) / total if total else 0.0

    def state_dict(self) -> dict[str, Any]:
        """What was there at first."""
        return {"originals": dict(self.originals), "initial": dict(self.initial), "vanishing": self.removable_blocks}

    def check(self) -> None:
        """Refuse a budget that cannot be met.

        Raises:
            ValueError: with the nearest one that can, and with what is left whole.
        """
        if not self.prunable_groups:
            raise ValueError(f"There are no channels that could go. Left whole: {self.unprunable_report()}.")
        flat = {group.name: torch.arange(group.units, 0, -1).float() for group in self.prunable_groups}
        costs = self._costs()
        nearest = self._left(costs, self._chosen(flat, 1.0))
        wanted, kind = self.budget.target, self.budget.kind
        met = nearest >= wanted if kind == "sparsity" else nearest <= wanted
        if not met:
            # Four digits, so that what is named can be met.
            shown = Context(4, ROUND_FLOOR if kind == "sparsity" else ROUND_CEILING).create_decimal(str(nearest))
            raise ValueError(
                f"{kind}={wanted} cannot be met: with min_density={self.config.min_density} the nearest is "
                f"{kind}={shown}. Left whole: {self.unprunable_report() or 'nothing'}."
            )

    def unprunable_report(self) -> str:
        """Which layers keep all of their channels, and why."""
        return "; ".join(
            f"{group.name} ({group.unprunable_reason})" for group in self.groups if group.unprunable_reason is not None
        )

    def scores(self, gathered: ChannelStatistics) -> dict[str, Tensor]:
        """One tensor for each free group."""
        generator = torch.Generator().manual_seed(self.config.seed)
        return {
            group.name: group_scores(self.config.criterion, criterion_inputs(gathered, group, generator), group.units)
            for group in self.prunable_groups
        }

    def select_units(self, scores: Mapping[str, Tensor], progress: float) -> PrunedUnits:
        """The units that go now, if `progress` of the way to the budget is to be gone."""
        target, kind = self.target_at(progress), self.budget.kind
        if kind == "sparsity":
            return self._chosen(scores, target)
        costs = self._costs()
        steps = {"steps": LATENCY_STEPS} if kind == "latency_ms" else {}
        fraction = fraction_for_budget(lambda one: self._left(costs, self._chosen(scores, one)) <= target, **steps)
        return self._chosen(scores, 1.0 if fraction is None else fraction)

    def target_at(self, progress: float) -> float:
        """The budget part of the way: from all that was there at first."""
        start = {"sparsity": 0.0, "latency_ms": self.initial.get("latency_ms", 0.0)}.get(self.budget.kind, 1.0)
        return interpolate(start, self.budget.target, progress)

    def record_pruned(self, pruned: PrunedUnits) -> None:
        """Those units are gone."""
        self.groups, self._counted = remaining_group(self.groups, pruned), None

    def metrics(self) -> dict[str, float]:
        """What the module costs now: parameters and MACs as fractions of those at first."""
        costs = self._costs()
        return {
            "parameters": costs.parameters / self.initial["parameters"],
            "macs": costs.total_macs() / max(self.initial["macs"], 1.0),
        }

    def _costs(self) -> Costs:
        if self._counted is None:
            self._counted = Costs.measure(self.model, self.example, self.groups)
        return self._counted

    def _left(self, costs: Costs, pruned: PrunedUnits) -> float:
        if self.budget.kind == "parameters":
            return costs.parameters_after(pruned) / self.initial["parameters"]
        if self.budget.kind == "macs":
            return costs.macs_after(pruned) / max(self.initial["macs"], 1.0)
        if self.budget.kind == "latency_ms":
            return costs.latency_after(pruned, self.budget.runtime)
        total = sum(self.originals[group.name] for group in self.prunable_groups)
        return (total - sum(group.units for group in self.prunable_groups) + sum(map(len, pruned.values()))) / total

    def _chosen(self, scores: Mapping[str, Tensor], fraction: float) -> PrunedUnits:
        config, free = self.config, self.prunable_groups
        pruned = config.distribution(free, scores, self.originals, fraction, config.min_density)
        floors = {
            group.name: group.units - max_prunable_units(group, self.originals[group.name], config.min_density)
            for group in free
        }
        return round_units(free, pruned, scores, config.round_to, floors)


def frozen_parameters(model: nn.Module) -> set[str]:
    """All names of the parameters that do not train now."""
    return {name for name, one in model.named_parameters(remove_duplicate=False) if not one.requires_grad}


def is_inside(name: str, modules: Collection[str]) -> bool:
    """Whether a tensor or module is one of these modules, or lies in one."""
    return any(name == one or name.startswith(f"{one}.") for one in modules)


def _if_not_passed_on(group: ChannelGroup, protected: Collection[str]) -> ChannelGroup:
    """Left whole if a module that must give all that it gives passes the group's channels on, as a norm does."""
    passing = [one.axis.module for one in group.members if one.axis.side == "channels"]
    kept = next((one for one in passing if is_inside(one, protected)), None)
    return (
        group
        if kept is None or group.unprunable_reason is not None
        else replace(group, unprunable_reason=f"'{kept}' must stay as it is")
    )


def _if_allowed(group: ChannelGroup, allowed: Collection[str], frozen: Collection[str]) -> ChannelGroup:
    """Left whole if one of the layers that make its channels is not among the targets, or anything of it is frozen."""
    if group.unprunable_reason is not None:
        return group
    for member in group.producers:
        if member.axis.slices[0].tensor not in allowed:
            return replace(group, unprunable_reason=f"'{member.axis.module}' is not among the targets")
    for member in group.members:
        for one in member.axis.slices:
            if one.tensor in frozen:
                return replace(group, unprunable_reason=f"'{one.tensor}' is frozen")
    return group
