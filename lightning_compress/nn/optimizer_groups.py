"""Parameters of ours in an optimizer of the user's, and out of it again, schedulers included."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

# What schedulers of torch, and of timm, keep for each group, beside what they write into the groups themselves.
PER_GROUP = {"lr_lambdas", "_last_lr", "base_momentums", "max_momentums", "base_values"}


@contextmanager
def extra_param_group(
    optimizer: Optimizer,
    schedulers: Iterable[Any],
    parameters: Mapping[str, nn.Parameter],
    like: nn.Parameter,
    place: int | None = None,
    **changed: Any,
) -> Iterator[None]:
    """Within the context, `optimizer` trains `parameters` too: a group of their own, set like the one of `like`.

    Schedulers of the optimizer move the new group as they move the one of `like`; the others' numbers stay as they are.

    Args:
        optimizer: of the user.
        schedulers: all of the run, looked through at the beginning and at the end; those of other optimizers are left
            alone.
        parameters: to train along, by name.
        like: a parameter whose group shows the way.
        place: where among the groups the new one comes; None: behind them.
        changed: settings that the new group has instead, such as `weight_decay=0.0`, where the optimizer knows them.
    """
    index = group_index(optimizer, like)
    group = dict(optimizer.param_groups[index])
    named = group.pop("param_names", None) is not None
    group |= {name: value for name, value in changed.items() if name in group}
    before = len(optimizer.param_groups)
    optimizer.add_param_group({**group, "params": list(parameters.items() if named else parameters.values())})
    place = before if place is None else min(place, before)
    optimizer.param_groups.insert(place, optimizer.param_groups.pop())
    for entry in _per_group(optimizer, schedulers, before):
        entry.insert(place, entry[index])
    try:
        yield
    finally:
        place = group_index(optimizer, next(iter(parameters.values())))
        for entry in _per_group(optimizer, schedulers, len(optimizer.param_groups)):
            del entry[place]
        for parameter in optimizer.param_groups.pop(place)["params"]:
            optimizer.state.pop(parameter, None)


def group_index(optimizer: Optimizer, parameter: nn.Parameter) -> int:
    """The place of the group that the parameter is in.

    Raises:
        ValueError: if it is in none.
    """
    for index, group in enumerate(optimizer.param_groups):
        if any(one is parameter for one in group["params"]):
            return index
    raise ValueError("The parameter belongs to no group of this optimizer.")


def _with_parts(scheduler: Any) -> Iterator[Any]:
    yield scheduler
    for part in getattr(scheduler, "_schedulers", ()):
        yield from _with_parts(part)


def _optimizer_of(scheduler: Any) -> Any:
    return getattr(scheduler, "optimizer", getattr(scheduler, "_optimizer", None))


def _per_group(optimizer: Optimizer, schedulers: Iterable[Any], groups: int) -> list[list[Any]]:
    """The lists of an optimizer's schedulers with an entry for each group, such as `base_lrs`, each once."""
    parts = [part for scheduler in schedulers for part in _with_parts(scheduler)]
    lists = {
        id(value): value
        for part in parts
        if _optimizer_of(part) is optimizer
        for name, value in vars(part).items()
        if isinstance(value, list) and (name.endswith("lrs") or name in PER_GROUP) and len(value) == groups
    }
    return list(lists.values())
