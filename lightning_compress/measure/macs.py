"""Count multiply-accumulates (MACs) of one call, layer by layer, with torch's own FLOP counter and its gaps filled."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_compress.measure.flop_formulas import WEIGHT_OPERANDS, missing_formulas
from lightning_compress.measure.stored_tensors import count_nonzero, layers_by_module, stored_tensors
from lightning_compress.nn.example_inputs import call_model, map_tensors
from lightning_compress.nn.isolation import isolated_eval


@dataclass
class Macs:
    """Multiply-accumulates of a layer: all, and those with a nonzero weight (saved only if the kernel skips zeros).

    >>> Macs(dense=100, nonzero=25).nonzero
    25
    """

    dense: int = 0
    nonzero: int = 0


def count_macs(model: nn.Module, example: Any) -> dict[str, Macs]:
    """MACs of `model(example)` for each layer that did any; their sum is the model's.

    Counted are matrix products, convolutions, recurrences and attention; not counted are biases, activations,
    normalisation, pooling and look-ups. Padding is multiplied too, and a causal mask saves nothing. A product belongs
    to the layer whose weight is in it, else (attention's scores) to the innermost module that runs. A weight is a
    parameter, or what a parametrization or `torch.nn.utils.prune` makes of it; a weight that the forward pass computes
    in another way counts as having no zeros.

    Raises:
        Exception: whatever the model raises for this input.

    >>> layer = nn.Linear(3, 2)
    >>> layer.weight.data = torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 3.0]])
    >>> count_macs(nn.Sequential(layer, nn.ReLU()), torch.zeros(5, 3))  # 5 samples
    {'0': Macs(dense=30, nonzero=15)}
    """
    from torch.utils.flop_counter import FlopCounterMode, flop_registry

    tally = _Tally(model)
    missing = {operation: _of_shapes(formula) for operation, formula in missing_formulas(flop_registry).items()}
    formulas = {**flop_registry, **missing}
    counting = {operation: tally.watching(operation, formula) for operation, formula in formulas.items()}
    with ExitStack() as undo:
        contexts = (isolated_eval(model), _frozen(model), parametrize.cached(), _whole_operations())
        for context in (*contexts, tally.following_calls()):
            undo.enter_context(context)
        with FlopCounterMode(display=False, custom_mapping=counting):
            call_model(model, map_tensors(example, Tensor.detach))
    return dict(tally.macs)


@dataclass
class _Tally:
    """Which layer runs, which memory is a weight's, and the MACs so far."""

    model: nn.Module
    macs: dict[str, Macs] = field(default_factory=lambda: defaultdict(Macs))
    running: list[str] = field(default_factory=list)
    owners: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    nonzeros: dict[object, int] = field(default_factory=dict)
    kept_alive: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.layers = layers_by_module(self.model)
        for one in stored_tensors(self.model):
            if one.is_parameter:
                self._own(one.layer, one.tensor)

    def watching(self, operation: Any, formula: Callable[..., int]) -> Callable[..., int]:
        """The same formula for raw arguments, which also tallies what it returns."""
        name = str(operation).rpartition(".")[2]

        def flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
            count = formula(*args, out_val=out_val, **kwargs)
            self._add(name, args, count // 2)
            return count

        flops._get_raw = True  # type: ignore[attr-defined]  # the counter's own mark for "wants tensors, not shapes"
        return flops

    @contextmanager
    def following_calls(self) -> Iterator[None]:
        with ExitStack() as undo:
            for module, layer in self.layers.items():
                before = module.register_forward_pre_hook(lambda module, _, layer=layer: self._enter(module, layer))
                undo.callback(before.remove)
                undo.callback(module.register_forward_hook(self._leave, always_call=True).remove)
            yield

    def _enter(self, module: nn.Module, layer: str) -> None:
        self.running.append(layer)
        # The weight in use may be computed: by a parametrization, the hook of an older weight norm or prune, or a
        # quantizer, which lays it before the parameter for the time of a call.
        for name in (*parametrized_names(module), *(module._parameters.keys() & vars(module).keys())):
            if isinstance(weight := getattr(module, name, None), Tensor):
                self._own(layer, weight)

    def _leave(self, *_: Any) -> None:
        self.running.pop()

    def _own(self, layer: str, weight: Tensor) -> None:
        if not weight.numel():
            return
        self.kept_alive.append(weight)  # else its memory could be given to an activation
        owners = self.owners[_memory(weight)]
        if layer not in owners:
            owners.append(layer)

    def _add(self, operation: str, args: tuple[Any, ...], macs: int) -> None:
        operands = [args[place] for place in WEIGHT_OPERANDS.get(operation, ()) if place < len(args)]
        weights = [operand for operand in operands if _memory(operand) in self.owners]
        if operation != "mkldnn_rnn_layer":
            weights = weights[:1]
        elements = sum(weight.numel() for weight in weights)
        nonzeros = sum(self._nonzeros(weight) for weight in weights)
        tally = self.macs[self._layer_of(weights)]
        tally.dense += macs
        tally.nonzero += macs * nonzeros // elements if elements else macs

    def _layer_of(self, weights: list[Tensor]) -> str:
        running = self.running[-1] if self.running else ""
        owners = self.owners[_memory(weights[0])] if weights else [running]
        return running if running in owners else owners[0]

    def _nonzeros(self, weight: Tensor) -> int:
        key = (weight.data_ptr(), weight.shape, weight.stride())
        if key not in self.nonzeros:
            self.nonzeros[key] = count_nonzero(weight)
        return self.nonzeros[key]


def parametrized_names(module: nn.Module) -> list[str]:
    """Attributes that are computed from parameters: by `parametrize`, or by the older `weight_norm` and `prune`.

    >>> parametrized_names(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    ['weight']
    """
    new = list(getattr(module, "parametrizations", {}))
    ends = [(name, end) for name in module._parameters for end in ("_orig", "_v") if name.endswith(end)]
    return [*new, *(name.removesuffix(end) for name, end in ends)]


def _of_shapes(formula: Callable[..., int]) -> Callable[..., int]:
    return lambda *args, **_: formula(*(arg.shape if isinstance(arg, Tensor) else arg for arg in args))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Without parameters that ask for gradients: the counter looks in vain for the graph of views that are given."""
    trained = [one for one in model.parameters() if one.requires_grad]
    try:
        for one in trained:
            one.requires_grad_(False)
        yield
    finally:
        for one in trained:
            one.requires_grad_(True)


@contextmanager
def _whole_operations() -> Iterator[None]:
    """Without the fast path of attention, which is one operation that no counter knows, and without compiled code."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
