"""How much of a module is to stay, in the unit in which it was asked for, and what a cut would leave of that."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_compress.channel_pruning.cut_plan import lost_channels, plan_cut
from lightning_compress.channel_pruning.functional.groups import ChannelGroup, PrunedUnits
from lightning_compress.measure.latency import Latency, measure_latency
from lightning_compress.measure.macs import count_macs
from lightning_compress.measure.onnx_latency import measure_onnx_latency
from lightning_compress.nn.example_inputs import copy_example
from lightning_compress.nn.isolation import on_cpu
from lightning_compress.nn.surgery import temporarily_cut, tensors_by_name

KINDS = ("sparsity", "parameters", "macs", "latency_ms")
STEPS = 20  # of a bisection over fractions of units
LATENCY_RUNS = 30
RUNTIMES: dict[str, Callable[..., Latency]] = {"torch": measure_latency, "onnxruntime": measure_onnx_latency}


@dataclass(frozen=True)
class Budget:
    """What is to be reached: `sparsity` is the fraction of units that goes, `parameters` and `macs` what is kept.

    Latency is taken in `runtime`, one of `RUNTIMES`.
    """

    kind: str
    target: float
    runtime: str = "torch"


@dataclass
class Costs:
    """What a module costs now, and would cost after a cut."""

    model: nn.Module
    example: Any
    groups: Sequence[ChannelGroup]
    parameters: int = 0
    macs: dict[str, int] = field(default_factory=dict)

    @classmethod
    def measure(cls, model: nn.Module, example: Any, groups: Sequence[ChannelGroup]) -> "Costs":
        """Measured now."""
        macs = {name: one.dense for name, one in count_macs(model, example).items()}
        return cls(model, example, groups, sum(one.numel() for one in model.parameters()), macs)

    def total_macs(self) -> int:
        """Of the whole module."""
        return sum(self.macs.values())

    def parameters_after(self, pruned: PrunedUnits) -> int:
        """Exactly counted."""
        cut = plan_cut(self.groups, pruned)
        left = self.parameters
        for name, tensor in tensors_by_name(self.model, cut.kept).items():
            if isinstance(tensor, nn.Parameter):
                size = tensor.numel()
                for dim, kept in cut.kept[name].items():
                    size = size // tensor.shape[dim] * len(kept)
                left -= tensor.numel() - size
        return left

    def macs_after(self, pruned: PrunedUnits) -> int:
        """Reckoned from what each layer costs now: in proportion to the channels that it takes and gives."""
        ratios: dict[str, float] = {}
        for place, lost in lost_channels(self.groups, pruned).items():
            ratios[place.module] = ratios.get(place.module, 1.0) * (1 - len(lost) / place.size)
        for group in self.groups:
            for attribute in group.attributes:  # attention: heads work side by side, without a layer of their own
                if attribute.repeat == 1 and attribute.module not in ratios:
                    ratios[attribute.module] = 1 - len(pruned.get(group.name, ())) / group.units
        return round(sum(macs * ratios.get(name, 1.0) for name, macs in self.macs.items()))

    def latency_after(self, pruned: PrunedUnits, runtime: str) -> float:
        """Median milliseconds of the example on one thread of the CPU, measured on the module as it would be."""
        cut, example = plan_cut(self.groups, pruned), copy_example(self.example, torch.device("cpu"))
        with temporarily_cut(self.model, cut), on_cpu(self.model):
            return RUNTIMES[runtime](self.model, example, 1, runs=LATENCY_RUNS, seconds=1.0).median_ms


def fraction_for_budget(reached: Callable[[float], bool], steps: int = STEPS) -> float | None:
    """The smallest fraction of units at which a budget is met, by bisection; None if none is small enough."""
    if reached(0.0):
        return 0.0
    low, high = 0.0, 1.0
    if not reached(high):
        return None
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high
