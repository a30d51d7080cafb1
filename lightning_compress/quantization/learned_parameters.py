"""Who trains what quantizers learn, and what is done to the gradients of weights before an optimizer gets them."""

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.core.registry import call_with_supported_args
from lightning_compress.nn.optimizer_groups import extra_param_group, group_index
from lightning_compress.quantization.layers import WeightRef
from lightning_compress.quantization.optimizer_support import check_optimizers_supported
from lightning_compress.quantization.quantized_model import QuantizedModel

# PACT's clips are pulled down by the decay of the weights, section 3 of the paper; other steps have none.
DECAYED = {"clip"}


@dataclass
class OptimizerAttachment:
    """What one group of an optimizer is to train along.

    Attributes:
        reference_param: a weight of the group.
        changed: settings in which the learned differ from the group.
        group_index: of the learned parameters among the optimizer's groups, in the run that is gone on with.
        learned: by name.
    """

    optimizer: Optimizer
    reference_param: WeightRef
    changed: dict[str, Any]
    group_index: int | None = None
    learned: dict[str, nn.Parameter] = field(default_factory=dict)


def attachments(quantized: QuantizedModel, optimizers: Iterable[Optimizer]) -> list[OptimizerAttachment]:
    """What each group is to train: that in which a quantizer's own layer is, or else the first with any layer in it.

    What is learned for a frozen layer that no optimizer has stays as it began. A resumed run trains each as the run did
    that it goes on with, whatever has joined the optimizers since.
    """
    groups = {
        id(one): (optimizer, index)
        for optimizer in optimizers
        for index, group in enumerate(optimizer.param_groups)
        for one in group["params"]
    }
    weights = [
        weight_ref
        for layer in quantized.layers.values()
        for weight_ref in layer.weights
        if id(weight_ref.parameter) in groups
    ]
    found: dict[tuple[Any, ...], OptimizerAttachment] = {}
    for name, parameter in quantized.learned().items() if weights else ():
        like, place = _as_before(quantized, name, weights)
        if like is not None:
            optimizer, index = groups[id(like.parameter)]
            decayed = name.rpartition("/")[2] in DECAYED
            changed = {} if decayed else {"weight_decay": 0.0}
            key = (id(optimizer), index, place, decayed)
            found.setdefault(key, OptimizerAttachment(optimizer, like, changed, place)).learned[name] = parameter
    return sorted(found.values(), key=lambda one: math.inf if one.group_index is None else one.group_index)


def _as_before(quantized: QuantizedModel, name: str, weights: list[WeightRef]) -> tuple[WeightRef | None, int | None]:
    """Like which weight something learned is trained, and where among the groups, if that was so before."""
    if not quantized.attached:
        return _like(quantized, name, weights), None
    like, place = quantized.attached.get(name, (None, None))
    return next((weight_ref for weight_ref in weights if weight_ref.name == like), None), place


def _like(quantized: QuantizedModel, name: str, weights: list[WeightRef]) -> WeightRef | None:
    """The weight like which something learned is trained; None if that is for frozen layers alone."""
    place = name.split("/")[1]
    takers = [weight_ref for layer in quantized.consumers(place) for weight_ref in quantized.layers[layer].weights]
    own = takers or [weight_ref for weight_ref in quantized.quantized_weights().values() if weight_ref.name == place]
    near = [weight_ref for weight_ref in own if weight_ref in weights]
    if own and not near and not any(weight_ref.parameter.requires_grad for weight_ref in own):
        return None
    return (near or weights)[0]


class _Schedulers:
    """Those of a Trainer at each time of asking: SWA puts one of its own in their place."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def __iter__(self) -> Iterator[Any]:
        return iter([one.scheduler for one in self.trainer.lr_scheduler_configs])


@contextmanager
def attached_to_optimizers(quantized: QuantizedModel, trainer: Any) -> Iterator[None]:
    """Within the context a Trainer's optimizers train what the quantizers learn, if they do not yet; see `joined`."""
    with ExitStack() as stack:
        if not quantized.trained:
            _join(quantized, trainer, stack)
            for optimizer in trainer.optimizers:
                stack.enter_context(clamped_after_steps(quantized, optimizer))
        quantized.trained = True
        stack.callback(setattr, quantized, "trained", False)
        yield


def _join(quantized: QuantizedModel, trainer: Any, stack: ExitStack) -> None:
    """Let optimizers train what is learned, and let the rest of it cost no gradient, until the stack is closed."""
    places: dict[str, tuple[str, int]] = {}
    check_optimizers_supported(trainer.optimizers, list(quantized.layers.values()), quantized.config)
    for one in attachments(quantized, trainer.optimizers):
        like, schedulers = one.reference_param.parameter, _Schedulers(trainer)
        stack.enter_context(
            extra_param_group(one.optimizer, schedulers, one.learned, like, one.group_index, **one.changed)
        )
        place = group_index(one.optimizer, next(iter(one.learned.values())))
        places |= dict.fromkeys(one.learned, (one.reference_param.name, place))
    quantized.attached = places
    stack.callback(setattr, quantized, "joined", {})
    for name, parameter in quantized.learned().items():
        parameter.requires_grad_(name in places)
        stack.callback(parameter.requires_grad_, True)


@contextmanager
def clamped_after_steps(quantized: QuantizedModel, optimizer: Optimizer) -> Iterator[None]:
    """Within the context, weights whose method has a bound are clipped to it after each update of the optimizer."""

    @torch.no_grad()
    def clip(*_: Any) -> None:
        for _layer, weight_ref, _gradient in _of_optimizer(quantized, optimizer):
            bound = quantized.weights[weight_ref.name].bound
            if bound is not None and quantized.state.enabled:
                weight_ref.parameter.clamp_(-bound, bound)

    if all(one.bound is None for one in quantized.weights.values()):
        yield
        return
    handle = optimizer.register_step_post_hook(clip)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def quantize_gradients(quantized: QuantizedModel, optimizer: Optimizer) -> None:
    """Put what an optimizer gets of each weight on a grid, where the method has one for it."""
    bits = quantized.config.weight_grad_bits
    for number, (layer, _, gradient) in enumerate(_of_optimizer(quantized, optimizer)):
        function = quantized.plans[layer].method.gradients
        if function is not None and bits is not None:
            generator = quantized.state.generator(quantized.seed + 30_000 + number, gradient.device)
            gradient.copy_(call_with_supported_args(function, gradient=gradient, bits=bits, generator=generator))


@torch.no_grad()
def add_damping(quantized: QuantizedModel, strength: float, optimizer: Optimizer) -> None:
    """Add the gradient of `strength * sum of (weight - its place on the grid) ** 2`, for what is within the grid.

    Reference: Nagel et al., 2022, section 4.2, https://arxiv.org/abs/2203.11086
    """
    for _, weight_ref, gradient in _of_optimizer(quantized, optimizer):
        gradient.add_(quantized.weights[weight_ref.name].off_grid(weight_ref.parameter.detach()), alpha=2 * strength)


def _of_optimizer(quantized: QuantizedModel, optimizer: Optimizer) -> Iterator[tuple[str, WeightRef, Tensor]]:
    """Each quantized weight that has a gradient for this optimizer, once, after the first of its layers."""
    own = [one for group in optimizer.param_groups for one in group["params"]]
    gradients = {one: one.grad for one in own if one.grad is not None and one.requires_grad}
    for layer in quantized.layers.values():
        for weight_ref in layer.weights:
            if (
                weight_ref.name in quantized.weights
                and (gradient := gradients.pop(weight_ref.parameter, None)) is not None
            ):
                yield layer.name, weight_ref, gradient
