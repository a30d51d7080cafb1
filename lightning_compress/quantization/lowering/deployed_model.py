"""What the writers of files are given: a plain module in eval mode, and the grids that its weights lie on."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class WeightSpec:
    """The whole numbers of one weight, and what they stand for.

    Attributes:
        codes: whole numbers of the weight's shape; within int8 for up to 8 bits.
        scale: step of the grid: 0-d for the whole tensor, or one per channel, shaped to broadcast to the weight, or
            `(channels, groups)` if `group` is given.
        bits: of a code, as it may be packed.
        axis: along which the channels lie; 1 for transposed convolutions, else 0.
        group: how many inputs of a channel share a scale, counted over its flattened inputs; 0 for all of them.
        levels: floats that the codes are indices of, if the grid is not affine; then there is no scale.
        zero_point: codes that stand for 0, whole numbers in the scale's shape; None: 0 does.

    Raises:
        ValueError: if these do not fit together.
    """

    codes: Tensor
    scale: Tensor | None
    bits: int
    axis: int = 0
    group: int = 0
    levels: Tensor | None = None
    zero_point: Tensor | None = None

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
class DeployedModel:
    """A model as it is deployed, with what is known of its numbers.

    Attributes:
        module: a plain module in eval mode. Its quantized weights lie on their grids with BatchNorm folded in; the
            quantizers of its activations are called in its forward.
        weights: grid of each quantized weight, by the parameter's name.
        inputs: name of the quantizer of its input, by the name of the layer.
        casts: shorter dtypes that hold a weight without loss, by the parameter's name.
        quantizers: the quantizers of activations, by name: each computes `torch.fake_quantize_per_tensor_affine` from
            its buffers `scale` and `zero_point`.
        quantizers_name: under which name the module holds them.
    """

    module: nn.Module
    weights: Mapping[str, WeightSpec]
    inputs: Mapping[str, str] = field(default_factory=dict)
    casts: Mapping[str, torch.dtype] = field(default_factory=dict)
    quantizers_name: str = "quantizers"

    def __post_init__(self) -> None:
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        for name in (*self.weights, *self.casts):
            if name not in parameters:
                raise ValueError(f"The module has no parameter '{name}'; it has {', '.join(list(parameters)[:8])}.")
        for name, grid in self.weights.items():
            weight = parameters[name].detach()
            if torch.equal(weight.float(), grid.values().float()):
                continue
            if weight.dtype in (torch.float16, torch.bfloat16):
                raise ValueError(f"'{name}' is {weight.dtype}, too short for its grid: .float() the module first.")
            raise ValueError(f"'{name}' does not lie on its grid: fold and quantize it before the export.")
        for name, dtype in self.casts.items():
            weight = parameters[name].detach()
            if name in self.weights or not torch.equal(weight.to(dtype).to(weight.dtype), weight):
                raise ValueError(f"'{name}' has a grid, or values that {dtype} does not hold: leave it out of casts.")

    @property
    def quantizers(self) -> dict[str, nn.Module]:
        """The quantizers of activations, by their name."""
        container = getattr(self.module, self.quantizers_name, None)
        return dict(container.named_children()) if isinstance(container, nn.Module) else {}
