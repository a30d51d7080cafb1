"""What the writers of files are given: a plain module in eval mode, and the grids that its weights lie on."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from lightning_compress.quantization.description import WeightSpec


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
