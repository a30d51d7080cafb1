"""Activation functions that multiply their input with a gate between 0 and 1, which kernels compute as two operators.

With the gate on a grid both take and make whole numbers; without, the input is dequantized, computed with in floating
point and quantized again, which takes two to three times as long.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

GATE = "gate"
GATES: Mapping[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.SiLU: torch.sigmoid,
    nn.Hardswish: functional.hardsigmoid,
}


def gated_modules(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """The names of modules that are such a function, and have no other name."""
    names: dict[int, list[str]] = {}
    for name, module in modules.items():
        if type(module) in GATES:
            names.setdefault(id(module), []).append(name)
    yield from (own[0] for own in names.values() if len(own) == 1)
