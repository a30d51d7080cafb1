"""Biases as integer kernels add them: whole numbers of steps, which are those of the input times those of the weight.

A kernel adds products of whole numbers up in 32 bits, and its bias with them, before it scales the sum. So a bias is
rounded by up to half such a step. That is little, but the same for all samples and pixels: what lies near the middle of
two neighbours on the next grid comes to the other one, layer after layer. A model that is evaluated as it is deployed
adds what its kernels add.

Reference: Jacob et al., 2018, section 2.4, https://arxiv.org/abs/1712.05877
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_compress.quantization.fake_quantizers import ActivationFakeQuantize, WeightFakeQuantize
from lightning_compress.quantization.layers import Layer

# Two products of 8 bits with weights up to this fit in 16 bits, on CPUs that add them there.
NEVER_SATURATES = 64
# A bias leaves room in 32 bits for the sum of products that it is added to.
LARGEST_BIAS = 2.0**30
KERNELS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
BITS = 8


def finer_scale(highest: int) -> int:
    """How many times as fine a kernel may have the steps of weights whose whole numbers reach this far.

    Numbers of few bits are stored as multiples of a power of two, since biases are rounded to the steps that they have.

    >>> [finer_scale(highest) for highest in (1, 3, 7, 8, 63, 127)]
    [64, 16, 8, 8, 1, 1]
    """
    factor = 1
    while highest * factor * 2 <= NEVER_SATURATES and factor < NEVER_SATURATES:
        factor *= 2
    return factor


@dataclass(frozen=True, eq=False)
class IntegerBias:
    """The bias of a layer as its integer kernel adds it.

    Attributes:
        weights: puts the layer's weight on its grid.
        door: puts its input there.
        norm: the BatchNorm that becomes a part of the layer.
    """

    weights: WeightFakeQuantize
    door: ActivationFakeQuantize
    norm: _BatchNorm | None

    def acts(self, module: nn.Module) -> bool:
        """Whether the layer computes as it is deployed: in training it learns in floating point."""
        return not module.training and not (self.norm is not None and self.norm.training) and self.door.calibrated

    @torch.no_grad()
    def __call__(self, own: Tensor | None, scale: Tensor | None) -> Tensor | None:
        """The bias with which the sum of it and what the BatchNorm adds is a whole number of steps.

        Args:
            own: the layer's bias, if it has one.
            scale: of each row of its weight on the grid, `(rows, 1)`, None if there is none.

        Returns:
            Shape `(channels,)`, in double precision where there is any; None if there is nothing to round. It is `own`
            where int32 has no room for the number of steps.
        """
        self.door.move_qparams_to(self.weights.scale.device)
        input_scale = self.door.on_grid(self.door.scale.new_zeros(1)).scale
        # Accelerators of Apple have no double precision.
        dtype = torch.float32 if self.weights.scale.device.type == "mps" else torch.float64
        offset = self._offset(dtype)
        if scale is None or input_scale is None or (own is None and offset is None):
            return None
        bias, offset = (torch.zeros(1).to(scale) if one is None else one.to(dtype) for one in (own, offset))
        reach = self.weights.quant_max if self.weights.symmetric else self.weights.quant_max - self.weights.quant_min
        step = scale.flatten().to(dtype) * input_scale.to(dtype) / finer_scale(reach)
        places = ((bias + offset) / step).round()
        return torch.where(places.abs() <= LARGEST_BIAS, places * step - offset, bias)

    def _offset(self, dtype: torch.dtype) -> Tensor | None:
        """What the BatchNorm adds, in units of what it is given."""
        norm = self.norm
        if norm is None or norm.running_mean is None or norm.running_var is None:
            return None
        offset = -norm.running_mean.to(dtype)
        if norm.bias is None:
            return offset
        return offset + norm.bias.to(dtype) / norm.weight.to(dtype) * (norm.running_var.to(dtype) + norm.eps).sqrt()


def integer_bias(
    layer: Layer, weights: dict[str, WeightFakeQuantize], door: ActivationFakeQuantize | None, norm: nn.Module | None
) -> IntegerBias | None:
    """The rounding of a layer's bias, if an integer kernel may compute the layer.

    Args:
        layer: of the model.
        weights: quantizers by the names of the weights.
        door: on whose grid the layer's input lies.
        norm: the BatchNorm that alone takes its output.
    """
    quantizer = weights.get(layer.weights[0].name) if len(layer.weights) == 1 else None
    forms = [one.fmt for one in (quantizer, door) if one is not None]
    computes = isinstance(layer.module, KERNELS) and "bias" in layer.module._parameters and len(forms) == 2
    if quantizer is None or door is None or not computes or any(form.bits > BITS for form in forms):
        return None
    if quantizer.channel_groups.group > 0 or any(form.dtype is not None for form in forms):
        return None
    folded = norm if isinstance(norm, _BatchNorm) and norm.running_var is not None else None
    return IntegerBias(quantizer, door, folded)
