"""Modules that train along with a model, and stay beside it: regressors of feature losses, a peer."""

import warnings
from collections.abc import Iterable
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.core.distributed import is_distributed


class AuxiliaryOptimizer:
    """Trains a module as `followed` trains the model: the same class and settings, its learning rate at every step.

    It has an optimizer of its own, so that the user's keeps its groups, its schedulers and its part of a checkpoint.
    """

    def __init__(self, module: nn.Module, followed: Optimizer) -> None:
        self.module, self.followed = module, followed
        self.parameters = [one for one in module.parameters() if one.requires_grad]
        self.optimizer = clone_optimizer(followed, self.parameters) if self.parameters else None

    def step(self, scale: float = 1.0) -> None:
        """Take the step that `followed` has just taken.

        Args:
            scale: by which the loss was multiplied before its backward pass, as a gradient scaler does.
        """
        if self.optimizer is None:
            return
        for gradient in self._gradients():
            gradient.div_(scale * _averaged(gradient))
        self.optimizer.param_groups[0]["lr"] = self.followed.param_groups[0]["lr"]
        self.optimizer.step()
        self.forget()

    def forget(self) -> None:
        """Drop gradients that no step will take."""
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return {
            "module": {name: value.detach().cpu().clone() for name, value in self.module.state_dict().items()},
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        if self.optimizer is not None and state["optimizer"] is not None:
            self.optimizer.load_state_dict(state["optimizer"])

    def _gradients(self) -> Iterable[Tensor]:
        return [one.grad for one in self.parameters if one.grad is not None]


def clone_optimizer(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Make an optimizer of the same class and settings for other parameters.

    A class that cannot be made of these alone gives place to AdamW at the same learning rate, with a warning.
    """
    kind: Any = type(optimizer)
    taken = signature(kind.__init__).parameters
    settings = {name: value for name, value in optimizer.param_groups[0].items() if name in taken and name != "params"}
    parameters = list(parameters)
    try:
        made: Optimizer = kind(parameters, **settings)
    except (TypeError, ValueError) as error:
        warnings.warn(
            f"{kind.__name__} cannot be made of parameters and the settings of its first group ({error}), so AdamW at "
            f"the same learning rate trains what distillation learns.",
            stacklevel=2,
        )
        made = torch.optim.AdamW(parameters, lr=float(optimizer.param_groups[0]["lr"]))
    return made


def optimizer_of(optimizers: Iterable[Optimizer], module: nn.Module) -> Optimizer | None:
    """The optimizer that holds a parameter of `module`."""
    wanted = {id(one) for one in module.parameters()}
    for optimizer in optimizers:
        if any(id(one) in wanted for group in optimizer.param_groups for one in group["params"]):
            return optimizer
    return None


def _averaged(gradient: Tensor) -> int:
    """Sum a gradient over the ranks, in place, and return by what it is to be divided."""
    if not is_distributed():
        return 1
    dist.all_reduce(gradient)
    return dist.get_world_size()
