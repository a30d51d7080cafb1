"""New parameters take the places of old ones in an optimizer of the user's."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

State = dict[str, Any]
CarryState = Callable[[dict[str, State], dict[str, nn.Parameter]], Mapping[str, State]]


def default_sources(new: nn.Module, old: nn.Module) -> dict[str, str]:
    """For each parameter of a new module, the one of the old module whose place in an optimizer it takes.

    That of the same name, or else of the same last part of the name, or else the first one that is a weight (of two or
    more dimensions) or a vector as it is, or else the first one.

    >>> default_sources(nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 4)), nn.Linear(4, 4))
    {'0.weight': 'weight', '1.weight': 'weight', '1.bias': 'bias'}
    """
    olds = dict(old.named_parameters())
    sources = {}
    for name, parameter in new.named_parameters():
        alike = [
            *(key for key in olds if key == name),
            *(key for key in olds if key.rpartition(".")[2] == name.rpartition(".")[2]),
            *(key for key, one in olds.items() if (one.ndim > 1) == (parameter.ndim > 1)),
            *olds,
        ]
        if alike:
            sources[name] = alike[0]
    return sources


def replace_parameters(
    optimizer: Optimizer,
    old: nn.Module,
    new: nn.Module,
    sources: Mapping[str, str],
    orders: tuple[Sequence[nn.Parameter], Sequence[nn.Parameter]],
    carry_state: CarryState | None = None,
) -> Callable[[], None]:
    """Let an optimizer train the parameters of a new module in the place of those of an old one.

    A group whose parameters stand in the order of the model has them in that order afterwards, as it will have when the
    user's code builds it for the new model: only then can a checkpoint's optimizer state be loaded. In other groups new
    parameters stand where their source stood.

    Args:
        optimizer: of the user.
        old, new: modules; a parameter that both hold keeps its place and state.
        sources: names of parameters of `old` by those of `new`.
        orders: all parameters of the model, before and afterwards.
        carry_state: see `replace_in_training`.

    Returns:
        What undoes it.

    Raises:
        ValueError: if the optimizer's state cannot be kept, or carried state does not fit; nothing is changed then.
    """
    olds, news = dict(old.named_parameters()), dict(new.named_parameters())
    stays = set(news.values()) & set(olds.values())
    removed = {parameter: name for name, parameter in olds.items() if parameter not in stays}
    fresh = {name: parameter for name, parameter in news.items() if parameter not in stays}
    trained = {one for group in optimizer.param_groups for one in group["params"]}
    if not trained & set(olds.values()):
        return lambda: None
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            f"{type(optimizer).__name__} remembers old directions as one flat vector over all parameters, so none can "
            f"be replaced while it trains. Use another optimizer, or replace before the first step."
        )
    incoming: dict[nn.Parameter, list[str]] = {}
    for name in fresh:
        if name in sources and olds[sources[name]] in trained:
            incoming.setdefault(olds[sources[name]], []).append(name)
    carried = _carried(
        optimizer, removed, {name: fresh[name] for names in incoming.values() for name in names}, carry_state
    )
    undo = ExitStack()
    undo.callback(_put_state_back, optimizer, dict(optimizer.state))
    for group in optimizer.param_groups:
        undo.callback(group["params"].__setitem__, slice(None), list(group["params"]))
        if "param_names" in group:
            undo.callback(group["param_names"].__setitem__, slice(None), list(group["param_names"]))
        entries = _entries(group, removed, incoming, olds, fresh, sources)
        if _sorted_by(orders[0], group["params"]):
            places = {parameter: place for place, parameter in enumerate(orders[1])}
            entries.sort(key=lambda entry: places[entry[0]])
        group["params"][:] = [parameter for parameter, _ in entries]
        if "param_names" in group:
            group["param_names"][:] = [name for _, name in entries]
        for parameter in (fresh[name] for names in incoming.values() for name in names):
            if isinstance(optimizer, torch.optim.Adagrad) and any(parameter is one for one in group["params"]):
                # It makes its state when it is built, and steps no parameter without.
                settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
                carried.setdefault(
                    parameter, torch.optim.Adagrad([{**settings, "params": [parameter]}]).state[parameter]
                )
    for parameter in removed:
        optimizer.state.pop(parameter, None)
    for parameter, state in carried.items():
        optimizer.state[parameter] = state
    return undo.close


def _entries(
    group: Mapping[str, Any],
    removed: Mapping[nn.Parameter, str],
    incoming: Mapping[nn.Parameter, Sequence[str]],
    olds: Mapping[str, nn.Parameter],
    fresh: Mapping[str, nn.Parameter],
    sources: Mapping[str, str],
) -> list[tuple[nn.Parameter, str]]:
    """The parameters that a group has afterwards, each with the name by which the user gave it, if he did."""
    entries = []
    names = group.get("param_names", [""] * len(group["params"]))
    for parameter, full in zip(group["params"], names, strict=True):
        entries += [(fresh[name], full.removesuffix(sources[name]) + name) for name in incoming.get(parameter, ())]
        if parameter not in removed:
            entries.append((parameter, full))
    return entries


def _sorted_by(order: Sequence[nn.Parameter], parameters: Sequence[nn.Parameter]) -> bool:
    places = {parameter: place for place, parameter in enumerate(order)}
    found = [places.get(parameter, -1) for parameter in parameters]
    return -1 not in found and found == sorted(found)


def _carried(
    optimizer: Optimizer,
    removed: Mapping[nn.Parameter, str],
    fresh: dict[str, nn.Parameter],
    carry_state: CarryState | None,
) -> dict[nn.Parameter, State]:
    if carry_state is None:
        return {}
    old = {
        name: dict(optimizer.state[parameter]) for parameter, name in removed.items() if parameter in optimizer.state
    }
    carried = {}
    for name, state in carry_state(old, fresh).items():
        if name not in fresh:
            raise ValueError(f"carry_state returns a state for '{name}', but new are {', '.join(fresh) or 'none'}.")
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != fresh[name].shape:
                raise ValueError(
                    f"carry_state returns '{key}' of the shape {tuple(value.shape)} for '{name}', whose shape is "
                    f"{tuple(fresh[name].shape)}."
                )
        carried[fresh[name]] = state
    return carried


def _put_state_back(optimizer: Optimizer, state: Mapping[Any, Any]) -> None:
    optimizer.state.clear()
    optimizer.state.update(state)
