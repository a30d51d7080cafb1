"""A quantized model as plain data: what is stored of each weight, and on which grid each activation lies.

Exported files, packed files and the report are made from this, and never from what trains the grids.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_compress.quantization.placement.sites import ActivationSite


@dataclass(frozen=True, eq=False)
class WeightSpec:
    """The integer codes of one weight, and what they stand for.

    Attributes:
        codes: whole numbers of the weight's shape; within int8 for up to 8 bits.
        scale: step of the grid: 0-d for the whole tensor, or one per channel, shaped to broadcast to the weight, or
            `(channels, groups)` if `group` is given.
        bits: of a code, as it may be packed.
        axis: along which the channels lie; 1 for transposed convolutions, else 0.
        group: how many inputs of a channel share a scale, counted over its flattened inputs; 0 for all of them.
        levels: floats that the codes are indices of, if the grid is not affine; then there is no scale.
        zero_point: codes that stand for 0, whole numbers in the scale's shape; None: 0 does.
        quant_min, quant_max: smallest and largest code that the grid has; None: what `bits` signed bits hold.

    Raises:
        ValueError: if these do not fit together.

    >>> spec = WeightSpec(torch.tensor([[1, -2], [3, 0]]), torch.tensor([[0.5], [0.25]]), 4)
    >>> spec.values()
    tensor([[ 0.5000, -1.0000],
            [ 0.7500,  0.0000]])
    """

    codes: Tensor
    scale: Tensor | None
    bits: int
    axis: int = 0
    group: int = 0
    levels: Tensor | None = None
    zero_point: Tensor | None = None
    quant_min: int | None = None
    quant_max: int | None = None

    def __post_init__(self) -> None:
        if self.codes.is_floating_point():
            raise ValueError(f"codes are whole numbers, but have dtype {self.codes.dtype}. Round and cast them.")
        if (self.scale is None) == (self.levels is None):
            raise ValueError("A grid has either a scale or a table of levels: give one of the two.")
        if self.scale is not None and tuple(self.scale.shape) not in self._fitting_shapes():
            raise ValueError(
                f"scale has shape {tuple(self.scale.shape)}, but for codes of shape {tuple(self.codes.shape)}, axis "
                f"{self.axis} and group {self.group} it is one of {self._fitting_shapes()}."
            )
        if self.zero_point is not None and (self.scale is None or self.zero_point.shape != self.scale.shape):
            raise ValueError(
                f"zero_point has shape {tuple(self.zero_point.shape)}, but it has that of the scale, "
                f"{None if self.scale is None else tuple(self.scale.shape)}; a table of levels has none."
            )
        if self.levels is not None and not bool(((self.codes >= 0) & (self.codes < len(self.levels))).all()):
            raise ValueError(
                f"codes are indices of {len(self.levels)} levels, but reach from {int(self.codes.min())} to "
                f"{int(self.codes.max())}."
            )

    @property
    def channels(self) -> int:
        """How many channels the weight has along its axis."""
        return self.codes.shape[self.axis] if self.codes.ndim else 1

    @property
    def scales(self) -> int:
        """How many scales, or levels of a table, are stored beside the codes."""
        stored = self.levels if self.scale is None else self.scale
        return 0 if stored is None else stored.numel()

    def values(self) -> Tensor:
        """The weight as floats on the grid."""
        if self.levels is not None:
            return self.levels[self.codes.long()]
        scale = self.full_scale()
        codes = self.codes if self.zero_point is None else self.codes - self._full(self.zero_point)
        return codes.to(scale.dtype) * scale

    def full_scale(self) -> Tensor:
        """The scale, shaped to broadcast to the weight also where it is by group.

        Raises:
            ValueError: if the grid has a table of levels.
        """
        if self.scale is None:
            raise ValueError("A grid with a table of levels has no scale: look its codes up in the table.")
        return self._full(self.scale)

    def _full(self, steps: Tensor) -> Tensor:
        if not self.group:
            return steps
        swapped = list(self.codes.shape)
        swapped[0], swapped[self.axis] = swapped[self.axis], swapped[0]
        return steps.repeat_interleave(self.group, dim=1).reshape(swapped).transpose(0, self.axis)

    def _fitting_shapes(self) -> list[tuple[int, ...]]:
        if self.group:
            return [(self.channels, self.codes.numel() // self.channels // self.group)]
        by_channel = [self.channels if place == self.axis else 1 for place in range(self.codes.ndim)]
        return [(), (1,) * self.codes.ndim, tuple(by_channel)]


@dataclass(frozen=True, eq=False)
class ActivationSpec:
    """The grid of the activations at one place: `value = (code - zero_point) * scale`.

    Attributes:
        site: where in the model that is.
        bits: of a code.
        scale: 0-d; None if the values lie on no one grid.
        zero_point: the code that stands for 0.
        quant_min, quant_max: smallest and largest code.
        two_level: whether every value becomes one of these two.
        dtype: in short floating point that of torch, in place of a grid.
        method: name of the function that makes the values.
        consumers: the layers whose input this is.
    """

    site: ActivationSite
    bits: int
    scale: Tensor | None
    zero_point: int
    quant_min: int
    quant_max: int
    two_level: bool = False
    dtype: torch.dtype | None = None
    method: str = "uniform"
    consumers: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class QuantizationDescription:
    """What a quantized model computes with.

    Attributes:
        weights: codes and grid by the parameter's name.
        float_weights: weights in short floating point by the parameter's name, as values of that dtype.
        activations: grids by the name of the site.
        layers: names of the quantized weights, by the layer that uses them, in the order of calls.
        inputs: name of the site on whose grid a layer's first input lies.
        norms: the BatchNorm that a layer takes in, by the layer.
        biases: by layer, the bias that its integer kernel adds.
        floating: layers whose output stays in floating point, and why.
    """

    weights: Mapping[str, WeightSpec] = field(default_factory=dict)
    float_weights: Mapping[str, Tensor] = field(default_factory=dict)
    activations: Mapping[str, ActivationSpec] = field(default_factory=dict)
    layers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    norms: Mapping[str, str] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    floating: Mapping[str, str] = field(default_factory=dict)

    def values(self) -> dict[str, Tensor]:
        """Each quantized weight as floats on its grid, by the parameter's name."""
        on_grid = {name: spec.values() for name, spec in self.weights.items()}
        return on_grid | {name: value.float() for name, value in self.float_weights.items()}

    @property
    def casts(self) -> dict[str, torch.dtype]:
        """Dtype of each weight in short floating point."""
        return {name: value.dtype for name, value in self.float_weights.items()}

    @property
    def mean_bits(self) -> float:
        """Bits of a quantized weight, on average over their numbers; 32 if none is quantized."""
        counts = [(spec.bits, spec.codes.numel()) for spec in self.weights.values()]
        counts += [(8 * value.element_size(), value.numel()) for value in self.float_weights.values()]
        total = sum(count for _, count in counts)
        return sum(bits * count for bits, count in counts) / total if total else 32.0
