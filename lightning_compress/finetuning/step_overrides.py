"""Within the step of an optimizer parameters may have a learning rate and weight decay of their own.

The user's parameter groups are split by the values that their parameters shall have, right before the weights change,
and are themselves again, untouched, right after it: schedulers, checkpoints and loggers never see anything else. The
state of an optimizer belongs to its parameters, not to its groups, so that nothing else changes: each parameter is
stepped exactly as in a group of its own with these values.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

# (place of the group, the group, a parameter of it) -> the settings that it shall have instead.
Values = Callable[[int, dict[str, Any], nn.Parameter], dict[str, Any]]


class PerStepParamGroups:
    """Changes an optimizer's groups when its step has its gradients, and takes the changes back after it.

    Args:
        optimizer: of the user.
        prepare: called right before the weights change; None if all shall be as it is.
        still: what must not move in this step.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        prepare: Callable[[], Values | None],
        still: Callable[[], Iterable[nn.Parameter]],
    ) -> None:
        self.optimizer, self.prepare, self.still = optimizer, prepare, still
        self.groups: list[dict[str, Any]] | None = None
        self.parts: list[list[dict[str, Any]]] = []
        self.saved_weights: list[tuple[nn.Parameter, Tensor]] = []

    def enter(self) -> None:
        """Split the groups."""
        self.leave()
        for parameter in self.still():
            parameter.grad = None
            if isinstance(self.optimizer, LBFGS):  # the one that moves what has no gradient
                self.saved_weights.append((parameter, parameter.detach().clone()))
        values = self.prepare()
        if values is None:
            return
        self.groups = list(self.optimizer.param_groups)
        self.parts = [split_param_groups(place, group, values) for place, group in enumerate(self.groups)]
        self.optimizer.param_groups[:] = [part for parts in self.parts for part in parts]

    def leave(self) -> None:
        """The user's own groups again, with whatever the optimizer itself has written into them."""
        with torch.no_grad():
            for parameter, value in self.saved_weights:
                parameter.copy_(value)
        self.saved_weights = []
        if self.groups is None:
            return
        for group, parts in zip(self.groups, self.parts, strict=True):
            _take_over(group, parts[0])
        self.optimizer.param_groups[:] = self.groups
        self.groups, self.parts = None, []

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """As an optimizer's step pre hook: a closure computes gradients first, under the user's own settings."""
        place = next((index for index, one in enumerate(args) if index > 0 and callable(one)), None)
        closure = kwargs.get("closure") if place is None else args[place]
        if closure is None or isinstance(self.optimizer, LBFGS):  # which reads its settings before its closure runs
            return self.enter()

        def closure_then_enter(*closure_args: Any, **closure_kwargs: Any) -> Any:
            self.leave()
            result = closure(*closure_args, **closure_kwargs)
            self.enter()
            return result

        if place is None:
            return args, {**kwargs, "closure": closure_then_enter}
        return (*args[:place], closure_then_enter, *args[place + 1 :]), kwargs


@contextmanager
def override_param_groups(
    optimizer: Optimizer, prepare: Callable[[], Values | None], still: Callable[[], Iterable[nn.Parameter]]
) -> Iterator[PerStepParamGroups]:
    """Within the context, every step of `optimizer` is taken with the values of `PerStepParamGroups`."""
    around = PerStepParamGroups(optimizer, prepare, still)
    handles = [
        optimizer.register_step_pre_hook(around.before_step),
        optimizer.register_step_post_hook(lambda *_: around.leave()),
    ]
    try:
        yield around
    finally:
        around.leave()
        for handle in handles:
            handle.remove()


def split_param_groups(place: int, group: dict[str, Any], values: Values) -> list[dict[str, Any]]:
    """The group in parts of equal settings, in the order of their first parameters; itself if nothing changes."""
    parts: dict[tuple[Any, ...], dict[str, Any]] = {}
    names = group.get("param_names")
    for index, parameter in enumerate(group["params"]):
        changed = {key: value for key, value in values(place, group, parameter).items() if value != group[key]}
        key = tuple(sorted(changed.items()))
        part = parts.setdefault(key, {**group, **_like(group, changed), "params": []})
        part["params"].append(parameter)
        if names is not None:
            part["param_names"] = [*(part["param_names"] if len(part["params"]) > 1 else ()), names[index]]
    return [group] if set(parts) <= {()} else list(parts.values())


def _like(group: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """The changed settings, as tensors where the group has tensors."""
    return {
        key: torch.full_like(group[key], value) if isinstance(group[key], Tensor) else value
        for key, value in changed.items()
    }


def _take_over(group: dict[str, Any], part: dict[str, Any]) -> None:
    ours = {"params", "param_names", "lr", "weight_decay"}
    if part is not group:
        group.update({key: value for key, value in part.items() if key not in ours})
