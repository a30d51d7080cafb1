"""What torch's layers become when a cut leaves them no channel: torch itself refuses to run them so."""

from typing import Any

from torch import Tensor, nn


class _EmptyConvolution:
    """Gives the shape, and the bias if there is any to give; nothing is multiplied."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, given: Tensor) -> Tensor:
        module: Any = self
        kernel = self.weight.shape[2:]
        before, sizes = given.shape[: given.ndim - len(kernel) - 1], given.shape[given.ndim - len(kernel) :]
        spatial = [_length(module, dim, kernel[dim], sizes[dim]) for dim in range(len(kernel))]
        result = given.new_zeros((*before, module.out_channels, *spatial))
        if self.bias is not None:
            result = result + self.bias.to(given.dtype).reshape(-1, *[1] * len(kernel))
        # Sums of nothing: parameters that get no gradient would worry DDP.
        empty = [self.weight] if module.in_channels else [self.weight, given]
        return result + sum(one.sum().to(given.dtype) for one in empty)


class EmptyConv1d(_EmptyConvolution, nn.Conv1d):
    """A `Conv1d` without channels to take or to give."""


class EmptyConv2d(_EmptyConvolution, nn.Conv2d):
    """A `Conv2d` without channels to take or to give."""


class EmptyConv3d(_EmptyConvolution, nn.Conv3d):
    """A `Conv3d` without channels to take or to give."""


class _EmptyNorm:
    """A normalisation of no channel."""

    weight: Any
    bias: Any

    def forward(self, given: Tensor) -> Tensor:
        for one in (self.weight, self.bias):
            given = given if one is None else given + one.sum().to(given.dtype)
        return given


class EmptyBatchNorm1d(_EmptyNorm, nn.BatchNorm1d):
    """A `BatchNorm1d` of no channels."""


class EmptyBatchNorm2d(_EmptyNorm, nn.BatchNorm2d):
    """A `BatchNorm2d` of no channels."""


class EmptyBatchNorm3d(_EmptyNorm, nn.BatchNorm3d):
    """A `BatchNorm3d` of no channels."""


EMPTY: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: EmptyConv1d,
    nn.Conv2d: EmptyConv2d,
    nn.Conv3d: EmptyConv3d,
    nn.BatchNorm1d: EmptyBatchNorm1d,
    nn.BatchNorm2d: EmptyBatchNorm2d,
    nn.BatchNorm3d: EmptyBatchNorm3d,
}
FULL = {empty: full for full, empty in EMPTY.items()}


def is_empty(module: nn.Module) -> bool:
    """Whether a layer has lost all channels that it took or gave."""
    return type(module) in FULL


def layer_class_for_size(module: nn.Module) -> type[nn.Module]:
    """The class that a layer needs for as many channels as it has now."""
    full = FULL.get(type(module), type(module))
    if full not in EMPTY:
        return full
    per_channel = module.running_mean if isinstance(module, nn.modules.batchnorm._BatchNorm) else module.weight
    per_channel = module.weight if per_channel is None else per_channel
    return EMPTY[full] if isinstance(per_channel, Tensor) and per_channel.numel() == 0 else full


def _length(module: Any, dim: int, kernel: int, size: int) -> int:
    if module.padding == "same":
        return size
    padding = 0 if module.padding == "valid" else module.padding[dim]
    reach = module.dilation[dim] * (kernel - 1) + 1
    return (size + 2 * padding - reach) // module.stride[dim] + 1  # type: ignore[no-any-return]
