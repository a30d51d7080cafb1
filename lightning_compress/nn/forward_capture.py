"""Record inputs and outputs of modules with forward hooks."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

from torch import Tensor, nn

from lightning_compress.core.registry import near_miss

Call_ = Callable[..., Any]


@dataclass
class ForwardCall:
    """One call of a module: what it was given, what it gave, and what its layers gave meanwhile, by their names.

    `older` says that a backward pass has been made since, which may have freed its graph.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    layers: dict[str, Any] = field(default_factory=dict)
    older: bool = False


def ordered_arguments(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """What a module is called with, in the order of its forward's parameters, however the call is written."""
    if not kwargs:
        return list(args)
    try:
        places = {name: place for place, name in enumerate(signature(module.forward).parameters)}
    except (TypeError, ValueError):  # what is compiled may not tell
        places = {}
    return [*args, *(kwargs[name] for name in sorted(kwargs, key=lambda name: places.get(name, len(places))))]


class ForwardCapture:
    """Calls of one module of a tree, with the outputs of named layers, while `listening`.

    The hooks are there from the start and idle outside: one added after the first call of a compiled module never
    fires. A layer that is called several times in one call counts with its last output; one that is called after the
    module has returned counts to the call before.
    """

    def __init__(self, model: nn.Module, layers: Iterable[str] = ()) -> None:
        self.model = model
        self.listening = False
        self.calls: list[ForwardCall] = []
        self._outputs: dict[str, Any] = {}
        self._handles = [get_submodule(model, name).register_forward_hook(self._layer(name)) for name in layers]

    def record_calls_of(self, root: nn.Module) -> None:
        """From now on, note the calls of `root`."""
        self._handles.append(root.register_forward_hook(self._root, with_kwargs=True))

    def add(self, call: ForwardCall) -> None:
        """Note a call that was seen by somebody else."""
        self.calls.append(ForwardCall(call.args, call.kwargs, call.output, self._outputs, call.older))
        self._outputs = {}

    def pop_calls(self) -> list[ForwardCall]:
        """The calls since the last time, each handed out once."""
        if self.calls:
            self.calls[-1].layers.update(self._outputs)
        calls, self.calls, self._outputs = self.calls, [], {}
        return calls

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Listen within the context, and forget at its end what nobody took."""
        self.listening = True
        try:
            yield
        finally:
            self.listening = False
            self.calls, self._outputs = [], {}

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _layer(self, name: str) -> Call_:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self.listening:
                self._outputs[name] = output

        return hook

    def _root(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.listening:
            self.calls.append(ForwardCall(args, kwargs, output, self._outputs))
            self._outputs = {}


def get_submodule(model: nn.Module, name: str) -> nn.Module:
    """The submodule of that name; through wrappers of `torch.compile`, with or without their prefix.

    Raises:
        ValueError: if there is none; the message has the nearest name.
    """
    named: dict[str, nn.Module] = {display_name(one): module for one, module in model.named_modules()}
    if display_name(name) not in named:
        known = [one for one in named if one]
        raise ValueError(
            f"There is no layer '{name}' in {type(model).__name__}.{near_miss(name, known)} Layers are "
            f"{', '.join(known[:30])}{', ...' if len(known) > 30 else ''}."
        )
    return named[display_name(name)]


def display_name(name: str) -> str:
    """A submodule's name as its author knows it.

    >>> display_name("net._orig_mod.0")
    'net.0'
    """
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def tensors_in(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """Every tensor in nested sequences, mappings and plain objects."""
    if isinstance(value, Tensor):
        yield value
    elif depth and not isinstance(value, str | bytes | nn.Module | type):
        if isinstance(value, Mapping):
            parts: Iterable[Any] = value.values()
        elif isinstance(value, list | tuple):
            parts = value
        else:
            parts = vars(value).values() if hasattr(value, "__dict__") else ()
        for part in parts:
            yield from tensors_in(part, depth - 1)


def is_compiled(model: nn.Module) -> bool:
    """Whether a compiler traces the whole of this module's steps, as in `trainer.fit(torch.compile(module))`."""
    return getattr(model, "_compiler_ctx", None) is not None


def is_partly_compiled(model: nn.Module) -> bool:
    """Whether any module in this one was compiled, or the whole of it."""
    return is_compiled(model) or any(
        isinstance(getattr(module, "_orig_mod", None), nn.Module) or module._compiled_call_impl is not None
        for module in model.modules()
    )
