"""What a deployed model computes with, beside the user's own modules: grids of activations, and who holds them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_compress.nn.dataflow import is_plain_norm
from lightning_compress.quantization.placement.gates import GATES

# A power of two, and far below what numbers in a network are.
NEXT_TO_NOTHING = 2.0**-40


class FixedFakeQuantize(nn.Module):
    """Puts numbers on a grid of at most 8 bits from zero on, as `QuantizeLinear` and `DequantizeLinear` do.

    Args:
        scale: 0-d, the distance of neighbours.
        zero_point: the whole number that stands for 0.
        lowest, highest: whole numbers of the ends, within [0, 255].
        signs: whether only the sign counts: what is not zero goes to one of the ends.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: Tensor, zero_point: int, lowest: int, highest: int, signs: bool = False) -> None:
        super().__init__()
        # Steps of next to nothing take every number to an end, as kernels can; the gain gives the ends their size.
        self.gain = 1 / NEXT_TO_NOTHING if signs else None
        step = scale.detach().float() * (NEXT_TO_NOTHING if signs else 1.0)
        self.register_buffer("scale", step)
        self.register_buffer("zero_point", torch.tensor(zero_point, dtype=torch.int32, device=scale.device))
        self.lowest, self.highest = lowest, highest

    def forward(self, values: Tensor) -> Tensor:
        steps = torch.fake_quantize_per_tensor_affine(values, self.scale, self.zero_point, self.lowest, self.highest)
        return steps if self.gain is None else steps * self.gain


class FakeQuantizeSteps(nn.ModuleDict):
    """The quantizers of a deployed model, by their keys."""


class Chain(nn.Sequential):
    """A sequence that does not take the quantizers, which it holds for others, for a part of itself."""

    def forward(self, values: Any) -> Any:
        for module in self._modules.values():  # children would leave out what comes a second time
            if module is not None and not isinstance(module, FakeQuantizeSteps):
                values = module(values)
        return values


class RoundToDtype(nn.Module):
    """Rounds numbers to a shorter floating point format."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, values: Tensor) -> Tensor:
        largest = torch.finfo(self.dtype).max
        return values.clamp(-largest, largest).to(self.dtype).to(values.dtype)


class Gated(nn.Module):
    """An activation function as its input times a gate on a grid.

    Args:
        original: one of `GATES`.
        quantizer: of the gate, which the model holds among its quantizers.
    """

    def __init__(self, original: nn.Module, quantizer: nn.Module) -> None:
        super().__init__()
        self.function, self.quantizer = GATES[type(original)], (quantizer,)  # in a tuple, it is no submodule

    def forward(self, values: Tensor) -> Tensor:
        gate: Tensor = self.quantizer[0](self.function(values))
        return values * gate


class _NormLeftOut(TorchFunctionMode):
    """Lets `batch_norm` return what it is given."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.batch_norm:
            return args[0] if args else kwargs["input"]
        return func(*args, **(kwargs or {}))


def without_norm(norm: nn.Module) -> nn.Module:
    """What is left of a BatchNorm when the layer before it does what it did.

    Args:
        norm: `nn.BatchNorm2d` and the like, of which nothing is left, or a subclass whose forward does more, such as an
            activation function; that one is changed.
    """
    if is_plain_norm(norm):
        return nn.Identity()
    own = type(norm)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _NormLeftOut():
            return own.forward(self, *args, **kwargs)

    norm.__class__ = type(own.__name__, (own,), {"forward": forward})
    for name in ("weight", "bias", "running_mean", "running_var"):
        setattr(norm, name, None)
    return norm
