"""Run a module for measuring, and leave everything as it was: modes, buffers, random streams, gradients, devices."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

import numpy as np
import torch
from torch import Tensor, nn

_measuring: ContextVar[bool] = ContextVar("measuring", default=False)


def is_measuring() -> bool:
    """Whether a module is being run by us: its inputs are none that a hook should learn from."""
    return _measuring.get()


@contextmanager
def isolated_eval(model: nn.Module) -> Iterator[None]:
    """Inside, every submodule is in eval mode and no gradient is recorded; afterwards nothing has changed.

    The mode is set flag by flag, because a `train()` of the user's own may do more (merge adapters, freeze layers).
    """
    with ExitStack() as undo:
        undo.callback(_measuring.reset, _measuring.set(True))
        undo.enter_context(kept_random_streams(model))
        undo.enter_context(_kept_buffers(model))
        undo.enter_context(_evaluating(model))
        undo.enter_context(torch.no_grad())
        yield


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    kept = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    values = {buffer: buffer.detach().clone() for buffer in model.buffers()}
    try:
        yield
    finally:
        for module, buffers in kept:
            module._buffers.clear()
            module._buffers.update(buffers)
        for buffer, value in values.items():
            _put_back_(buffer, value)


@torch.no_grad()
def _put_back_(buffer: Tensor, value: Tensor) -> None:
    if buffer.shape == value.shape:
        buffer.copy_(value)
    else:
        buffer.data = value


@contextmanager
def kept_random_streams(model: nn.Module | None = None) -> Iterator[None]:
    """Inside, random numbers may be drawn; afterwards Python's, NumPy's and torch's streams are where they were.

    Args:
        model: the streams of its devices are kept too.
    """
    parameters = () if model is None else model.parameters()
    devices = {tensor.device.index or 0 for tensor in parameters if tensor.device.type == "cuda"}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Leave torch's random streams as they were, on the CPU and on this process's accelerator."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices):
        yield


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
