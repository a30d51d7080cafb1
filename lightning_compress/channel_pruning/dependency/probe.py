"""Run a module with every mixing layer cut through: what it gives is a fresh marked value, what it takes is noted."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_compress.channel_pruning.dependency.layer_types import (
    ChannelwiseLayer,
    Kind,
    UnsupportedLayer,
    channel_dim,
    is_norm,
    layer_type,
    propagate_shapes,
)
from lightning_compress.nn.example_inputs import call_model, copy_example, map_tensors
from lightning_compress.nn.isolation import isolated_eval
from lightning_compress.nn.selection import canonical_name

LEAST, MOST = 0.1, 0.9  # positive and below 1: no activation function or clamp of the usual ones is flat there


@dataclass(frozen=True, eq=False)
class ProbeSource:
    """A marked value: what a mixing layer gave (`dim` is where its channels are), or a bare parameter or buffer."""

    name: str
    value: Tensor
    dim: int | None


@dataclass(frozen=True)
class Sink:
    """What reached a layer whose channels are known, at dimension `dim`."""

    name: str
    value: Tensor
    dim: int


@dataclass
class ProbeTrace:
    """One run: what was marked, where it arrived, what stays whole and why, and what the module returned."""

    sources: list[ProbeSource] = field(default_factory=list)
    sinks: list[Sink] = field(default_factory=list)
    ends: list[tuple[str, Tensor]] = field(default_factory=list)
    called: set[str] = field(default_factory=set)


class Probe:
    """Runs of one module on one example, with marked values in the place of what its layers compute."""

    def __init__(self, model: nn.Module, example: Any, dtype: torch.dtype = torch.float64) -> None:
        self.model, self.example, self.dtype = model, example, dtype
        self.kinds = _kinds(model)
        self.passage = ProbeTrace()
        self._generator = torch.Generator()

    def run(self, marked: dict[str, Tensor] | None = None) -> ProbeTrace:
        """Call the module once.

        Args:
            marked: values to give again, as an earlier run's sources had them, by name.
        """
        self.passage, self._given = ProbeTrace(), marked or {}
        self._generator.manual_seed(0)
        with install_probe(self.model), ExitStack() as undo:
            for full, module in list(self.model.named_modules(remove_duplicate=True)):
                name = module_name(full)
                if (kind := self.kinds.get(module)) is not None:
                    undo.enter_context(replaced_forward(module, partial(self._layer, name, module, kind)))
                elif is_norm(module):
                    undo.enter_context(replaced_forward(module, _passed))
                else:
                    undo.enter_context(self._bare(name, module))
            with torch.enable_grad():
                returned = call_model(self.model, map_tensors(copy_example(self.example), self._in_precision))
        self.passage.ends += [("the module's output", one) for one in _differentiable(returned)]
        return self.passage

    def _layer(
        self, name: str, module: nn.Module, kind: Kind, original: Callable[..., Any], *args: Any, **kw: Any
    ) -> Any:
        self.passage.called.add(name)
        if isinstance(kind, UnsupportedLayer):
            self.passage.ends += [(kind.reason, one) for one in _differentiable((args, kw))]
            return tree_map(partial(self._opaque, name, kind.reason), _original(module, original, args, kw))
        given: Tensor = args[0] if args else next(iter(kw.values()))
        if isinstance(kind, ChannelwiseLayer):
            self._arrive(name, module, given, kind.channels)
            return propagate_shapes(module, given)
        if kind.reads is not None:
            self._arrive(name, module, given, kind.reads)
        output = _original(module, original, args, kw)
        return self._mark(name, output, channel_dim(module, output, kind.makes))

    def _in_precision(self, value: Tensor) -> Tensor:
        return value.to(self.dtype) if value.is_floating_point() else value

    def _arrive(self, name: str, module: nn.Module, given: Tensor, place: Any) -> None:
        self.passage.sinks.append(Sink(name, given, channel_dim(module, given, place)))

    def _opaque(self, name: str, why: str, value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            return value
        marked = self._mark(f"{name}#", value, None)
        self.passage.ends.append((why, marked))
        return marked

    def _mark(self, name: str, like: Tensor, dim: int | None) -> Tensor:
        key = f"{name}@{sum(one.name == name for one in self.passage.sources)}"
        drawn = torch.rand(like.shape, generator=self._generator, dtype=self.dtype).to(like.device)
        value = self._given.get(key, drawn * (MOST - LEAST) + LEAST).detach().requires_grad_()
        self.passage.sources.append(ProbeSource(name, value, dim))
        return value.clone()  # what comes next may write into it

    @contextmanager
    def _bare(self, name: str, module: nn.Module) -> Iterator[None]:
        """Marked values for the parameters and buffers of a module that is not known."""
        kept: dict[str, dict[str, Any]] = {"_parameters": dict(module._parameters), "_buffers": dict(module._buffers)}
        try:
            for table, entries in kept.items():
                for leaf, one in entries.items():
                    if one is not None and one.is_floating_point() and one.numel() > 1:
                        full = f"{name}.{leaf}" if name else leaf
                        getattr(module, table)[leaf] = self._mark(full, one, None)
            yield
        finally:
            for table, entries in kept.items():
                getattr(module, table).update(entries)


def _passed(original: Callable[..., Any], given: Tensor, *_: Any, **__: Any) -> Tensor:
    return given.clone()


def tensor_keys(sources: list[ProbeSource]) -> list[str]:
    """The name of each source's value for `Probe.run`."""
    seen: dict[str, int] = {}
    found = []
    for source in sources:
        found.append(f"{source.name}@{seen.get(source.name, 0)}")
        seen[source.name] = seen.get(source.name, 0) + 1
    return found


@contextmanager
def install_probe(model: nn.Module) -> Iterator[None]:
    """Run a module uncompiled, in eval mode, in its own precision, by its modules' own forwards, and leave no trace."""
    fast = torch.backends.mha.get_fastpath_enabled()
    device = next((one.device.type for one in model.parameters()), "cpu")
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            isolated_eval(model),
            torch.compiler.set_stance("force_eager"),
            torch.autocast(device, enabled=False),
            torch.inference_mode(False),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def module_name(module: str) -> str:
    """A module's name without what `torch.compile` puts in, as its tensors are called in a cut."""
    return canonical_name(f"{module}.").rstrip(".")


def _kinds(model: nn.Module) -> dict[nn.Module, Kind]:
    found: dict[nn.Module, Kind] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        kind = layer_type(module_name(name), module)
        if kind is not None:
            found[module] = kind
        if isinstance(kind, UnsupportedLayer):
            inside.update(module.modules())
    return found


@contextmanager
def replaced_forward(module: nn.Module, replacement: Callable[..., Any]) -> Iterator[None]:
    """Let calls of a module run `replacement(original forward, ...)`."""
    own = vars(module).get("forward")
    module.forward = partial(replacement, module.forward)
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@torch.no_grad()
def _original(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What the layer really gives, for its shapes: in the layer's own precision."""
    dtype = next((one.dtype for one in module.parameters() if one.is_floating_point()), torch.float32)

    def fitting(value: Any) -> Any:
        return value.detach().to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return forward(*tree_map(fitting, args), **tree_map(fitting, kwargs))


def _differentiable(value: Any) -> list[Tensor]:
    return [one for one in tree_leaves(value) if isinstance(one, Tensor) and one.requires_grad]
