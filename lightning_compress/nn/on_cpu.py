"""A module on the CPU for a moment, wherever it trains."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def on_cpu(model: nn.Module) -> Iterator[None]:
    """The module's tensors on the CPU, where its latency counts, and back on their devices afterwards."""
    tensors = [one for one in [*model.parameters(), *model.buffers()] if one.device.type != "cpu"]
    known = [module for module in model.modules() if tensors and "_device" in vars(module)]
    before = [(one, one.data) for one in tensors], [(module, vars(module)["_device"]) for module in known]
    try:
        for one in tensors:
            one.data = one.data.cpu()
        for module in known:  # what Lightning and torchmetrics remember
            vars(module)["_device"] = torch.device("cpu")
        yield
    finally:
        for one, data in before[0]:
            one.data = data
        for module, device in before[1]:
            vars(module)["_device"] = device
