"""Learning rates and weight decays while a phase is on: whose, from where, times what."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import lcm
from typing import Any

from torch import nn
from torch.optim import LBFGS, Optimizer

from lightning_compress.core.phases import PhaseWindow, Run
from lightning_compress.finetuning.arguments import LearningRateSpec
from lightning_compress.finetuning.functional.layers import warm_up
from lightning_compress.finetuning.lr_sources import (
    DelayedSchedule,
    DetachedSchedule,
    FixedRate,
    LearningRateSource,
    RelativeRate,
    RestartedSchedule,
)
from lightning_compress.finetuning.step_overrides import Values
from lightning_compress.nn.selection import Candidate, pattern_matches


@dataclass
class HyperparameterOverrides:
    """What a phase does to learning rates and weight decays.

    Args:
        sources: one for each optimizer.
        lr_multipliers: of the learning rates of parameters; 1 for those that are not there.
        weight_decay: as it was asked for.
        warmup: over how many steps the rates rise.
        rates: the rate of the first group in the latest step, for the logs.
    """

    sources: list[LearningRateSource] = field(default_factory=list)
    lr_multipliers: Mapping[nn.Parameter, float] = field(default_factory=dict)
    weight_decay: LearningRateSpec = field(default_factory=lambda: LearningRateSpec("same"))
    warmup: int = 0
    rates: dict[str, float] = field(default_factory=dict)

    @property
    def idle(self) -> bool:
        """Whether it leaves all as it is."""
        plain = all(type(source) is LearningRateSource and source.factor == 1.0 for source in self.sources)
        return plain and not self.lr_multipliers and not self.warmup and self.weight_decay.kind == "same"

    def values(self, place: int, optimizer: Optimizer, step: int, length: float) -> Values | None:
        """The settings of each parameter at a step of the phase; None outside of it.

        Args:
            place: of the optimizer.
            optimizer: with the user's own groups.
            step: of the phase; negative before it.
            length: of the phase, in steps.
        """
        source, inside = self.sources[place], 0 <= step < length
        if step >= length:
            source.forget()
            self.rates.clear()
        if not inside and not (step < 0 and source.remembers):
            return None
        rates = source([float(group["lr"]) for group in optimizer.param_groups], step, length)
        if not inside:
            return None
        rates = [rate * warm_up(step, self.warmup) for rate in rates]
        if place == 0:
            self.rates["learning_rate"] = rates[0]
        decayed = any(group.get("weight_decay") for group in optimizer.param_groups)

        def of(index: int, group: dict[str, Any], parameter: nn.Parameter) -> dict[str, Any]:
            values = {"lr": rates[index] * self.lr_multipliers.get(parameter, 1.0)}
            if "weight_decay" in group and (group["weight_decay"] or not decayed):
                values["weight_decay"] = _decay(self.weight_decay, group["weight_decay"])
            return values

        return of

    def state_dict(self) -> list[dict[str, Any]]:
        return [source.state_dict() for source in self.sources]

    def load_state_dict(self, states: Sequence[dict[str, Any]], whose: str) -> None:
        """Go on from a state.

        Raises:
            ValueError: if it is that of other sources.
        """
        if [state.keys() for state in states] != [state.keys() for state in self.state_dict()]:
            raise ValueError(
                f"{whose} cannot go on from this checkpoint: the checkpoint was written with another learning_rate, or "
                f"other optimizers. Give it the same arguments, or another name."
            )
        for source, state in zip(self.sources, states, strict=True):
            source.load_state_dict(state)


@dataclass(frozen=True)
class OptimizerSnapshot:
    """An optimizer and its schedules at the beginning of the run.

    Args:
        rates: of its groups.
        configs: Lightning's configurations of its schedulers.
        copied: its schedule, where it has one that follows a plan.
    """

    rates: list[float]
    configs: list[Any]
    copied: DetachedSchedule | None = None

    @classmethod
    def capture(
        cls, optimizer: Optimizer, configs: Sequence[Any], module: nn.Module, copy: bool
    ) -> "OptimizerSnapshot":
        """What is there now; with a copy of the schedule if that is wanted and there is one."""
        own = [one for one in configs if _optimizer_of(one.scheduler) is optimizer]
        planned = copy and len(own) == 1 and not own[0].reduce_on_plateau
        copied = DetachedSchedule(own[0].scheduler, optimizer, [module]) if planned else None
        return cls([float(group["lr"]) for group in optimizer.param_groups], own, copied)


def make_lr_source(
    rate: LearningRateSpec, start: OptimizerSnapshot, since: int, window: PhaseWindow, run: Run
) -> LearningRateSource:
    """Where the learning rates of one optimizer come from.

    Args:
        rate: as it was asked for.
        start: the optimizer at the beginning of the run.
        since: the moment that "rewind" goes back to.
        window: of the phase.
        run: how long all is.
    """
    if rate.kind == "rewind":
        return DelayedSchedule(since - window.begin)
    if rate.kind == "restart":
        return _restarted(start, window, run)
    return FixedRate(rate.value) if rate.kind == "fixed" else LearningRateSource(rate.value)


def _restarted(start: OptimizerSnapshot, window: PhaseWindow, run: Run) -> LearningRateSource:
    """The user's schedule begun anew.

    What follows no plan (a plateau), or is not there, begins with the initial rates; what follows one is replayed over
    the phase; and where nobody knows how often it will be stepped, the rates are those of the run's first steps.
    """
    if not start.configs or any(config.reduce_on_plateau for config in start.configs):
        return RelativeRate(start.rates)
    config = start.configs[0]
    ticks = _ticks(config, run)
    if start.copied is None or ticks is None or window.end == float("inf"):
        return DelayedSchedule(-window.begin)
    frequency = config.frequency
    if config.interval == "step":  # Lightning counts batches, and makes a step only where an accumulation ends
        frequency = lcm(frequency, run.accumulate) // run.accumulate
    return RestartedSchedule(start.copied, ticks, frequency)


def combined_source(several: Sequence[Values | None]) -> Values | None:
    """What several phases ask for, of which none changes what another one does."""
    there = [values for values in several if values is not None]
    if not there:
        return None

    def of(index: int, group: dict[str, Any], parameter: nn.Parameter) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for values in there:
            asked = values(index, group, parameter)
            found |= {key: value for key, value in asked.items() if value != group[key]}
        return found

    return of


def parameter_lr_multipliers(
    entries: Sequence[Candidate], by_pattern: Mapping[Any, float], by_layer: Mapping[str, float]
) -> dict[nn.Parameter, float]:
    """The factor of each parameter's learning rate where it is not 1: that of the first pattern times its layer's."""
    found = {}
    for entry in entries:
        own = next((factor for pattern, factor in by_pattern.items() if pattern_matches(pattern, entry)), 1.0)
        factor = own * by_layer.get(entry.name, 1.0)
        if factor != 1.0:
            found[entry.parameter] = factor
    return found


def check_optimizers(optimizers: Sequence[Optimizer], decays: bool, lr_multipliers: bool) -> None:
    """Refuse what these optimizers cannot do.

    Raises:
        ValueError: if weight decay shall change where there is none, or LBFGS shall take several learning rates.
    """
    if decays and optimizers and not any("weight_decay" in group for one in optimizers for group in one.param_groups):
        kinds = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
        raise ValueError(f"weight_decay cannot be changed: {kinds} has none. Leave it out.")
    if lr_multipliers and any(isinstance(optimizer, LBFGS) for optimizer in optimizers):
        raise ValueError(
            "LBFGS moves all parameters along one line, with one learning rate, so lr_multipliers and layer_decay "
            "cannot be had. Leave them out, or take another optimizer."
        )


def _decay(asked: LearningRateSpec, given: float) -> float:
    return {"same": given, "fixed": asked.value, "scaled": given * asked.value}[asked.kind]


def _ticks(config: Any, run: Run) -> int | None:
    """How often a scheduler's interval passes in the run, where that is known."""
    if config.interval == "step":
        return run.steps
    if run.steps is not None and run.steps_per_epoch:
        return -(-run.steps // run.steps_per_epoch)
    return run.epochs


def _optimizer_of(scheduler: Any) -> Any:
    return getattr(scheduler, "optimizer", getattr(scheduler, "_optimizer", None))
