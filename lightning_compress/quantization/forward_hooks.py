"""How quantizers act while a module runs: by hooks, which a copy of the module takes along with copies of their own."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.registry import call_with_supported_args
from lightning_compress.nn.forward_capture import display_name, ordered_arguments
from lightning_compress.quantization.fake_quantizers import ActivationFakeQuantize, QuantState, WeightFakeQuantize
from lightning_compress.quantization.functional.gradients import quantize_gradient
from lightning_compress.quantization.functional.rounding import straight_through
from lightning_compress.quantization.integer_bias import IntegerBias
from lightning_compress.quantization.layers import Layer, WeightRef


def quantizer_hooks(model: nn.Module) -> Iterator[tuple[str, nn.Module, "PreForwardHook"]]:
    """The names of the modules in which quantizers act, the modules, and the hooks at their beginning."""
    for name, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, PreForwardHook):
                yield display_name(name), module, hook


class WeightSwap:
    """Puts a layer's weights on their grids, and its bias where it is deployed, for as long as its forward runs.

    Python looks an attribute up among the instance's own before torch looks among its parameters.
    """

    def __init__(
        self, layer: Layer, quantizers: dict[str, WeightFakeQuantize], bias: IntegerBias | None = None
    ) -> None:
        attention = isinstance(layer.module, nn.MultiheadAttention)
        self.weights = [
            (_path(weight, attention), weight.leaf, quantizers[weight.name])
            for weight in layer.weights
            if weight.name in quantizers
        ]
        self.recurrent, self.bias = isinstance(layer.module, nn.RNNBase), bias

    def put(self, module: nn.Module) -> None:
        """From now on `module` finds weights on grids."""
        for path, leaf, quantizer in self.weights:
            owner = module.get_submodule(path) if path else module
            weight: Tensor = owner._parameters[leaf]  # type: ignore[assignment]
            owner.__dict__[leaf], scale = quantizer.on_grid(weight)
            if self.bias is not None and self.bias.acts(module):
                _put_bias(module, self.bias(module._parameters["bias"], scale), weight.dtype)
        if self.recurrent:
            _flatten(module)

    def take(self, module: nn.Module) -> None:
        """From now on it finds its own weights again."""
        found = False
        for path, leaf, _ in self.weights:
            owner = module.get_submodule(path) if path else module
            found |= owner.__dict__.pop(leaf, None) is not None
        if self.bias is not None:
            module.__dict__.pop("bias", None)
        if found and self.recurrent:
            _flatten(module)


class GateSwap:
    """Computes an activation function as its input times a gate that lies on a grid.

    Args:
        function: makes the gate of the input.
        quantizer: puts it on its grid.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], quantizer: ActivationFakeQuantize) -> None:
        self.function, self.quantizer = function, quantizer
        self.given: Tensor | None = None

    def put(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Note what is given; what writes into it is given a copy."""
        (self.given,) = ordered_arguments(module, args, kwargs)
        return ((self.given.clone(),), {}) if getattr(module, "inplace", False) else (args, kwargs)

    def take(self, output: Any) -> Any:
        """What takes the place of the output, if an input was noted."""
        given, self.given = self.given, None
        return output if given is None else given * self.quantizer(self.function(given))


class PreForwardHook:
    """Before a module's forward: its weights and what it is given go on their grids.

    Args:
        mode: shared by all quantizers of a model.
        doors: quantizers of what the module is given, by position.
        swap: of its weights.
        owner: all quantizers of the model, so that whoever has the module, or a copy, finds them.
        name: of the module in the owner's model.
    """

    is_a_quantizers = True

    def __init__(
        self,
        mode: QuantState,
        doors: dict[int, ActivationFakeQuantize],
        swap: WeightSwap | None,
        gating: GateSwap | None = None,
        owner: Any = None,
        name: str = "",
    ) -> None:
        self.mode, self.doors, self.swap, self.gating, self.owner, self.name = mode, doors, swap, gating, owner, name

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not self.mode.enabled:
            return None
        if self.swap is not None and self.mode.fake_quant_enabled:
            self.swap.put(module)
        if self.doors:
            args, kwargs = _with_quantized(module, args, kwargs, self.doors)
        if self.gating is not None and self.mode.fake_quant_enabled:
            args, kwargs = self.gating.put(module, args, kwargs)
        return (args, kwargs) if self.doors or self.gating is not None else None


class PostForwardHook:
    """After a module's forward: its own weights come back, and what it returns goes on its grid."""

    is_a_quantizers = True

    def __init__(
        self,
        mode: QuantState,
        end: ActivationFakeQuantize | None,
        swap: WeightSwap | None,
        errors: "GradientQuantizer | None" = None,
        gating: GateSwap | None = None,
        owner: Any = None,
    ) -> None:
        self.mode, self.end, self.swap, self.errors, self.gating, self.owner = mode, end, swap, errors, gating, owner

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self.swap is not None:
            self.swap.take(module)
        if self.gating is not None:
            output = self.gating.take(output)
        if not self.mode.enabled or not isinstance(output, Tensor):
            return None
        if self.errors is not None and self.mode.fake_quant_enabled and output.requires_grad:
            output = quantize_gradient(output, self.errors)
        return output if self.end is None else self.end(output)


class GradientQuantizer:
    """Quantizes what flows back from a layer to those before it."""

    def __init__(self, function: Callable[..., Tensor], bits: int, mode: QuantState, seed: int) -> None:
        self.function, self.bits, self.mode, self.seed = function, bits, mode, seed

    def __call__(self, error: Tensor) -> Tensor:
        """`error` on its grid; a function of gradients names it so."""
        offered = {"error": error, "gradient": error, "bits": self.bits}
        found: Tensor = call_with_supported_args(
            self.function, generator=self.mode.generator(self.seed, error.device), **offered
        )
        return found


def _path(weight_ref: WeightRef, attention: bool) -> str:
    """Where in its layer a weight is: attention reads that of its output projection itself."""
    return "out_proj" if attention and isinstance(weight_ref.owner, nn.Linear) else ""


def _put_bias(module: nn.Module, bias: Tensor | None, dtype: torch.dtype) -> None:
    """Let a layer find this bias, and the gradient its own."""
    own = module._parameters["bias"]
    if bias is not None:
        module.__dict__["bias"] = bias.to(dtype) if own is None else straight_through(own, bias)


def _flatten(module: nn.Module) -> None:
    """Let a recurrent layer look its weights up anew: it keeps a list of them."""
    names: list[str] = module._flat_weights_names  # type: ignore[assignment]
    module.__dict__["_flat_weights"] = [getattr(module, name) for name in names]


def _with_quantized(
    module: nn.Module, args: Any, kwargs: Any, doors: dict[int, ActivationFakeQuantize]
) -> tuple[Any, Any]:
    """The arguments with the tensors at these positions on their grids."""
    given = [value for value in ordered_arguments(module, args, kwargs) if isinstance(value, Tensor)]
    # Attention asks whether its query, key and value are one tensor: they stay one.
    known = {
        id(given[position]): quantizer(given[position])
        for position, quantizer in doors.items()
        if position < len(given)
    }
    new_args = tuple(known.get(id(value), value) for value in args)
    return new_args, {name: known.get(id(value), value) for name, value in kwargs.items()}
