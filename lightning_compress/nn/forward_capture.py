"""What modules are given and what they give, seen from outside while somebody else's code calls them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
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


class StudentDiscovery:
    """Finds the module that works in a step: the outermost one that turns what needs no gradient into what does.

    Modules inside compiled ones are left alone: hooks that come and go would compile them anew.
    """

    def __init__(self, model: nn.Module) -> None:
        self.listening = False
        self.calls: list[tuple[str, nn.Module, ForwardCall]] = []
        self._depth = 0
        self._handles = []
        for name, module in _uncompiled(model):
            self._handles += [
                module.register_forward_pre_hook(self._enter),
                module.register_forward_hook(self._leave(name), with_kwargs=True),
            ]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Listen within the context; what was noted before is forgotten."""
        self.calls.clear()
        self.listening, self._depth = True, 0
        try:
            yield
        finally:
            self.listening = False

    def remove(self) -> None:
        """Take the hooks away, and forget."""
        for handle in self._handles:
            handle.remove()
        self.calls.clear()

    def found(self) -> tuple[nn.Module, list[ForwardCall]]:
        """The module, and its calls so far.

        Raises:
            ValueError: if there is none, or several work one after the other.
        """
        working = [
            (name, module, call) for name, module, call in self.calls if _needs_gradient(call.output, from_dimension=1)
        ]
        first = [module for _, module, call in working if not _needs_gradient((call.args, call.kwargs))]
        later = [name for name, module, _ in working if first and module is not first[0]]
        if not first:
            seen = ", ".join(dict.fromkeys(name or "the LightningModule" for name, _, _ in self.calls)) or "none"
            raise ValueError(
                f"No module was called in training_step that turns the batch into something with a gradient (modules "
                f"called: {seen}). Name the student: student='net'. What is called by .forward(...) is not seen."
            )
        if later:
            names = list(dict.fromkeys(name for name, _, _ in working))
            raise ValueError(
                f"training_step calls several modules in turn: {', '.join(map(repr, names))}. Name the one that is "
                f"given the batch, and the layer whose output is compared, such as student={names[0]!r}, "
                f"losses={{({names[-1]!r}, 'output'): 'kl_divergence'}}."
            )
        return first[0], [call for _, module, call in working if module is first[0]]

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._depth += self.listening

    def _leave(self, name: str) -> Call_:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self.listening:
                self._depth -= 1
                if self._depth == 0:
                    self.calls.append((name, module, ForwardCall(args, kwargs, output)))

        return hook


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


def _needs_gradient(value: Any, from_dimension: int = 0) -> bool:
    return any(one.requires_grad and one.ndim >= from_dimension for one in tensors_in(value))


def _uncompiled(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    yield name, model
    # `_orig_mod` marks a wrapper of torch.compile, `_compiled_call_impl` a module that was compiled in place.
    if not isinstance(getattr(model, "_orig_mod", None), nn.Module) and model._compiled_call_impl is None:
        for child, module in model.named_children():
            yield from _uncompiled(module, f"{name}.{child}" if name else child)


def is_compiled(model: nn.Module) -> bool:
    """Whether a compiler traces the whole of this module's steps, as in `trainer.fit(torch.compile(module))`."""
    return getattr(model, "_compiler_ctx", None) is not None


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Leave torch's random streams as they were, on the CPU and on this process's accelerator."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices):
        yield


def is_partly_compiled(model: nn.Module) -> bool:
    """Whether any module in this one was compiled, or the whole of it."""
    return is_compiled(model) or any(
        isinstance(getattr(module, "_orig_mod", None), nn.Module) or module._compiled_call_impl is not None
        for module in model.modules()
    )
