"""A module and what takes its place, as a plan of plain values that a checkpoint can hold."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from importlib import import_module
from inspect import isclass
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_compress.core.registry import near_miss
from lightning_compress.nn.isolation import kept_random_streams

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])

PACKAGE = __name__.partition(".")[0]
PLAIN = (bool, int, float, str, type(None))
_builders: dict[str, Callable[..., nn.Module]] = {}


def module_builder(builder: Builder) -> Builder:
    """Allow plans to name this function or class, which makes a module from plain arguments alone.

    A checkpoint decides which builder runs and with what, so only those that are marked do, and one that is marked must
    be safe with any arguments. Its module's values do not matter when a checkpoint is loaded.

    >>> @module_builder
    ... def two_layers(width: int) -> nn.Module:
    ...     return nn.Sequential(nn.Linear(width, 2), nn.Linear(2, width))
    >>> Replacement("head", builder_path(two_layers), {"width": 8}).build()[0]
    Linear(in_features=8, out_features=2, bias=True)
    """
    _builders[builder_path(builder)] = builder
    return builder


def builder_path(builder: Callable[..., nn.Module]) -> str:
    """The dotted path by which a plan names a builder."""
    return f"{builder.__module__}.{builder.__qualname__}"


@module_builder
def torch_layer(kind: str, **arguments: Any) -> nn.Module:
    """One layer of `torch.nn`, by the name of its class.

    >>> torch_layer("Identity")
    Identity()
    """
    found = getattr(nn, kind, None)
    if not (isclass(found) and issubclass(found, nn.Module)):
        raise ValueError(f"torch.nn has no module '{kind}'.{near_miss(kind, dir(nn))}")
    return found(**arguments)


@module_builder
def torch_layers(layers: Sequence[tuple[str, Mapping[str, Any]]]) -> nn.Module:
    """A `Sequential` of layers of `torch.nn`, each a class's name and its arguments.

    >>> torch_layers([("Linear", {"in_features": 8, "out_features": 2, "bias": False}), ("ReLU", {})])
    Sequential(
      (0): Linear(in_features=8, out_features=2, bias=False)
      (1): ReLU()
    )
    """
    return nn.Sequential(*(torch_layer(kind, **arguments) for kind, arguments in layers))


@dataclass(frozen=True)
class Replacement:
    """The name of a module, and what builds the one that takes its place, as plain values.

    Attributes:
        name: of the module in the model, without what `torch.compile` puts into names.
        builder: dotted path of a `module_builder`, such as `builder_path(torch_layers)`.
        arguments: of the builder: numbers, words, lists, tuples and dicts. All sizes are among them, because a module
            of the same name may have another size when the plan is replayed.
        sources: for parameters of the new module, by name, the one of the old module whose place in the optimizer and
            whose `requires_grad` they take, where that is not the one of the same name or kind.
        order: how many modules of the model were replaced before this one. Plans of several callbacks are replayed
            together, by this number.

    Raises:
        ValueError: if an argument is not plain.

    >>> Replacement("net.0", builder_path(torch_layer), {"kind": "Identity"}).state_dict()["arguments"]
    {'kind': 'Identity'}
    """

    name: str
    builder: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    order: int = 0

    def __post_init__(self) -> None:
        for key, value in self.arguments.items():
            _refuse_not_plain(f"{self.builder}({key}=...) of '{self.name}'", value)

    def build(self, seed: int = 0) -> nn.Module:
        """Make the module; random streams are not advanced.

        Raises:
            ValueError: if the builder is not known here, or fails.
        """
        builder = _find_builder(self.builder)
        with kept_random_streams():
            torch.default_generator.manual_seed(seed)
            try:
                return builder(**self.arguments)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(
                    f"{self.builder} cannot build the module for '{self.name}' from {dict(self.arguments)}: {error}"
                ) from error

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        own = {"name": self.name, "builder": self.builder, "order": self.order}
        return {**own, "arguments": deepcopy(dict(self.arguments)), "sources": dict(self.sources)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "Replacement":
        """The replacement that `state` describes."""
        arguments, sources = dict(state["arguments"]), dict(state["sources"])
        return cls(str(state["name"]), str(state["builder"]), arguments, sources, int(state["order"]))

    def restricted_to(self, prefix: str) -> "Replacement | None":
        """The same by the names of the submodule whose names begin with `prefix`; None if it lies outside of it."""
        inside = self.name.startswith(prefix) and self.name != prefix.rstrip(".")
        return replace(self, name=self.name.removeprefix(prefix)) if inside else None


def _find_builder(path: str) -> Callable[..., nn.Module]:
    module = path.rpartition(".")[0]
    if path not in _builders and f"{module}.".startswith(f"{PACKAGE}.") and "__" not in path:
        with suppress(ImportError):  # such as another version's: said below
            import_module(module)
    if path not in _builders:
        raise ValueError(
            f"'{path}' is no builder that is known here. Import the file that marks it with @module_builder first, if "
            f"you trust it."
        )
    return _builders[path]


def _refuse_not_plain(where: str, value: Any) -> None:
    if isinstance(value, list | tuple):
        for one in value:
            _refuse_not_plain(where, one)
    elif isinstance(value, Mapping):
        for key, one in value.items():
            _refuse_not_plain(where, key)
            _refuse_not_plain(where, one)
    elif type(value) not in PLAIN:
        raise ValueError(
            f"{where} is {value!r}, but a checkpoint holds plain values only. Write numbers, words, lists and dicts."
        )
