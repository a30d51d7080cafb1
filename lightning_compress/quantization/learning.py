"""Who trains what quantizers learn, and what is done to the gradients of weights before an optimizer gets them."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.core.joining import joined
from lightning_compress.core.lookup import call_with_needs
from lightning_compress.quantization.layers import Held
from lightning_compress.quantization.quantized import QuantizedModel

# PACT's clips are pulled down by the decay of the weights, section 3 of the paper; other steps have none.
DECAYED = {"clip"}


@dataclass
class Learner:
    """What one group of an optimizer is to train along.

    Attributes:
        like: a weight of the group.
        learned: by name.
        changed: settings in which the learned differ from the group.
    """

    optimizer: Optimizer
    like: nn.Parameter
    changed: dict[str, Any]
    learned: dict[str, nn.Parameter] = field(default_factory=dict)


def learners(quantized: QuantizedModel, optimizers: Iterable[Optimizer]) -> list[Learner]:
    """What each group is to train: that in which a quantizer's own layer is, or else the first with any layer in it."""
    groups = {
        id(one): (optimizer, index)
        for optimizer in optimizers
        for index, group in enumerate(optimizer.param_groups)
        for one in group["params"]
    }
    weights = [held for layer in quantized.layers.values() for held in layer.weights if id(held.parameter) in groups]
    found: dict[tuple[int, int, bool], Learner] = {}
    for name, parameter in quantized.learned().items() if weights else ():
        place, leaf = name.split("/")[1:]
        layer = next(iter(quantized.takers(place)), None)
        near = [held for held in weights if held.name == place] or [
            held for held in weights if layer is not None and held in quantized.layers[layer].weights
        ]
        like = (near or weights)[0].parameter
        optimizer, index = groups[id(like)]
        changed = {} if leaf in DECAYED else {"weight_decay": 0.0}
        learner = found.setdefault((id(optimizer), index, leaf in DECAYED), Learner(optimizer, like, changed))
        learner.learned[name] = parameter
    return list(found.values())


class _Schedulers:
    """Those of a Trainer at each time of asking: SWA puts one of its own in their place."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def __iter__(self) -> Iterator[Any]:
        return iter([one.scheduler for one in self.trainer.lr_scheduler_configs])


@contextmanager
def training(quantized: QuantizedModel, trainer: Any) -> Iterator[None]:
    """Within the context a Trainer's optimizers train what the quantizers learn, if they do not yet; see `joined`."""
    with ExitStack() as stack:
        for one in [] if quantized.trained else learners(quantized, trainer.optimizers):
            stack.enter_context(joined(one.optimizer, _Schedulers(trainer), one.learned, one.like, **one.changed))
        for optimizer in [] if quantized.trained else trainer.optimizers:
            stack.enter_context(bounded(quantized, optimizer))
        quantized.trained = True
        stack.callback(setattr, quantized, "trained", False)
        yield


@contextmanager
def bounded(quantized: QuantizedModel, optimizer: Optimizer) -> Iterator[None]:
    """Within the context, weights whose method has a bound are clipped to it after each update of the optimizer."""
    own = {one for group in optimizer.param_groups for one in group["params"]}
    weights = {
        held.parameter: quantized.weights[name]
        for name, held in quantized.held().items()
        if held.parameter in own and quantized.weights[name].bound is not None
    }

    @torch.no_grad()
    def clip(*_: Any) -> None:
        for weight, quantizer in weights.items() if quantized.mode.active else ():
            bound = quantizer.bound or 0.0
            weight.clamp_(-bound, bound)

    handle = optimizer.register_step_post_hook(clip) if weights else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


@torch.no_grad()
def quantize_gradients(quantized: QuantizedModel, optimizer: Optimizer) -> None:
    """Put what an optimizer gets of each weight on a grid, where the method has one for it."""
    bits = quantized.request.gradients
    for number, (layer, _, gradient) in enumerate(_of_optimizer(quantized, optimizer)):
        function = quantized.plans[layer].method.gradients
        if function is not None and bits is not None:
            generator = quantized.mode.generator(quantized.seed + 30_000 + number, gradient.device)
            gradient.copy_(call_with_needs(function, gradient=gradient, bits=bits, generator=generator))


@torch.no_grad()
def add_damping(quantized: QuantizedModel, strength: float, optimizer: Optimizer) -> None:
    """Add the gradient of `strength * sum of (weight - its place on the grid) ** 2`, for what is within the grid.

    Reference: Nagel et al., 2022, section 4.2, https://arxiv.org/abs/2203.11086
    """
    for _, held, gradient in _of_optimizer(quantized, optimizer):
        gradient.add_(quantized.weights[held.name].off_grid(held.parameter.detach()), alpha=2 * strength)


def _of_optimizer(quantized: QuantizedModel, optimizer: Optimizer) -> Iterator[tuple[str, Held, Tensor]]:
    """Each quantized weight that has a gradient for this optimizer, once, after the first of its layers."""
    gradients = {one: one.grad for group in optimizer.param_groups for one in group["params"] if one.grad is not None}
    for layer in quantized.layers.values():
        for held in layer.weights:
            if held.name in quantized.weights and (gradient := gradients.pop(held.parameter, None)) is not None:
                yield layer.name, held, gradient
