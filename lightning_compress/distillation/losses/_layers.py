"""The parts that losses with parameters are built of."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    3: nn.Conv1d,
    4: nn.Conv2d,
    5: nn.Conv3d,
}


def pointwise(dimensions: int, channels: int, wanted: int) -> nn.Module:
    """A linear map from `channels` to `wanted` at each place of `(batch, channels, *space)`, without bias."""
    if dimensions == 2:
        return nn.Linear(channels, wanted, bias=False)
    return CONVOLUTIONS[dimensions](channels, wanted, kernel_size=1, bias=False)


def as_parameters_of(module: nn.Module, tensor: Tensor) -> Tensor:
    """The tensor in the precision of the parameters of `module`; as it is if there are none."""
    return tensor.to(next(module.parameters(), tensor).dtype)


class Convolutions(nn.Sequential):
    """Three convolutions of 3x3, each with batch norm and leaky ReLU; `layer` makes them forward or transposed."""

    def __init__(self, channels: list[int], layer: type[nn.Conv2d] | type[nn.ConvTranspose2d] = nn.Conv2d) -> None:
        steps: list[nn.Module] = []
        for before, after in pairwise(channels):
            steps += [layer(before, after, kernel_size=3, padding=1), nn.BatchNorm2d(after), nn.LeakyReLU(0.1)]
        super().__init__(*steps)


class Fusion(nn.Module):
    """Fuses the features of a stage with what the deeper stages gave, by attention at each place."""

    def __init__(self, channels: int, width: int, wanted: int, *, deepest: bool) -> None:
        super().__init__()
        self.into = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))
        self.attend = None if deepest else nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid())
        self.out = nn.Sequential(nn.Conv2d(width, wanted, 3, padding=1, bias=False), nn.BatchNorm2d(wanted))

    def forward(self, stage: Tensor, deeper: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        """What is compared with the teacher, at its spatial size, and what goes on to the stage before."""
        fused = self.into(as_parameters_of(self, stage))
        if self.attend is not None and deeper is not None:
            deeper = _resized(deeper, fused.shape[2:])
            mine, theirs = self.attend(torch.cat([fused, deeper], dim=1)).split(1, dim=1)
            fused = fused * mine + deeper * theirs
        fused = _resized(fused, size)
        return self.out(fused), fused


def _resized(features: Tensor, size: torch.Size) -> Tensor:
    return features if features.shape[2:] == size else functional.interpolate(features, list(size), mode="nearest")
