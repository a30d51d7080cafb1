"""From quantizers to the plain data that says what they store."""

import torch
from torch import Tensor

from lightning_compress.quantization.description import ActivationSpec, WeightSpec
from lightning_compress.quantization.fake_quantizers import ActivationFakeQuantize, WeightFakeQuantize
from lightning_compress.quantization.placement.sites import ActivationSite


@torch.no_grad()
def describe_weight(quantizer: WeightFakeQuantize, weight: Tensor) -> WeightSpec | Tensor:
    """The codes of a weight and their grid: a table of levels where there is no one step.

    Args:
        quantizer: of this weight.
        weight: of the quantizer's shape.

    Returns:
        In short floating point the values, in that dtype.
    """
    values, scale = quantizer.on_grid(weight)
    if quantizer.fmt.dtype is not None:
        return values.to(quantizer.fmt.dtype)
    rows, bits = quantizer.channel_groups, quantizer.fmt.bits
    if scale is None:
        levels, codes = torch.unique(values.float(), return_inverse=True)
        bits = max(1, (len(levels) - 1).bit_length())
        return WeightSpec(codes, None, bits, rows.axis, levels=levels, quant_min=0, quant_max=len(levels) - 1)
    codes = (rows.split(values.float()) / scale).round().to(torch.int32)
    zero_point = None if quantizer.symmetric else rows.scale(quantizer.zero_point)
    codes = rows.join(codes if quantizer.symmetric else codes + quantizer.zero_point)
    return WeightSpec(
        codes, rows.scale(scale.float()), bits, rows.axis, max(rows.group, 0), zero_point=zero_point,
        quant_min=quantizer.quant_min, quant_max=quantizer.quant_max,
    )  # fmt: skip


@torch.no_grad()
def describe_activation(
    quantizer: ActivationFakeQuantize, site: ActivationSite, consumers: tuple[str, ...]
) -> ActivationSpec:
    """The grid of the activations at a place, with the ends that the quantizer's function says it has."""
    function = quantizer.function
    _, scale, zero_point = quantizer.on_grid(quantizer.scale.new_zeros(1))
    lowest, highest = getattr(function, "code_range", _all_codes)(quantizer.quant_min, quantizer.quant_max)
    return ActivationSpec(
        site, quantizer.fmt.bits, None if scale is None else scale.reshape(()),
        0 if zero_point is None else int(zero_point), lowest, highest, bool(getattr(function, "two_level", False)),
        quantizer.fmt.dtype, str(getattr(function, "__name__", function)), consumers,
    )  # fmt: skip


def _all_codes(quant_min: int, quant_max: int) -> tuple[int, int]:
    return quant_min, quant_max
