"""What is known of torch's own layers: where their channels are, and which of them mix channels."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lightning_compress.channel_pruning.functional.groups import ChannelAxis, ModuleAttribute, TensorSlice
from lightning_compress.nn.empty_layers import is_empty

OPAQUE = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Bilinear, nn.EmbeddingBag)


@dataclass(frozen=True)
class DenseLayer:
    """A layer each of whose outputs depends on all of its inputs (of its group)."""

    reads: ChannelAxis | None
    makes: ChannelAxis
    groups: int = 1


@dataclass(frozen=True)
class ChannelwiseLayer:
    """A layer that keeps its channels apart: normalisation, depth-wise convolution, PReLU.

    `tied` is the number of sections of equal length whose channels may only leave together, place by place.
    """

    channels: ChannelAxis
    tied: int = 1


@dataclass(frozen=True)
class UnsupportedLayer:
    """A layer that stays as it is, with everything that goes into it and comes out of it."""

    reason: str


Kind = DenseLayer | ChannelwiseLayer | UnsupportedLayer


def layer_type(name: str, module: nn.Module) -> Kind | None:
    """What is known of a module; None if nothing is, and its forward must tell."""
    if any(is_lazy(one) for one in module.parameters(recurse=False)):
        raise ValueError(f"'{name}' is lazy: run one batch through the module before trainer.fit.")
    described = f"{type(module).__name__} '{name}'"
    if isinstance(module, OPAQUE):
        return UnsupportedLayer(f"{described}, which is left whole")
    known = isinstance(module, _ConvNd | nn.Linear | nn.Embedding | _NormBase | nn.LayerNorm | nn.GroupNorm)
    if known and (is_parametrized(module) or "weight" not in module._parameters):
        return UnsupportedLayer(f"{described}, whose weight is computed from other tensors, and which is left whole")
    if isinstance(module, _ConvNd):
        return _convolution(name, module) if _has_torchs_forward(module) or is_empty(module) else None
    if isinstance(module, nn.Linear):
        return _linear(name, module) if _has_torchs_forward(module) else None
    if isinstance(module, nn.Embedding):
        return _embedding(name, module) if _has_torchs_forward(module) else None
    return _keeping_apart(name, module)


def channel_dim(module: nn.Module, tensor: Tensor, place: ChannelAxis) -> int:
    """Along which dimension of what it takes or gives a layer has its channels."""
    if isinstance(module, _ConvNd):
        return tensor.ndim - module.weight.ndim + 1
    if isinstance(module, _NormBase | nn.GroupNorm | nn.PReLU) or _is_own_norm(module):
        unlike = tensor.ndim < 2 or tensor.shape[1] != place.size
        return tensor.ndim - 1 if unlike and tensor.shape[-1] == place.size else int(not unlike)
    return tensor.ndim - 1


def propagate_shapes(module: nn.Module, given: Tensor) -> Tensor:
    """What a layer that keeps channels apart does to shapes, with positive weights whatever its own are."""
    if not isinstance(module, _ConvNd):
        return given.clone()
    weight = torch.full_like(module.weight, 1 / module.weight[0].numel(), dtype=given.dtype)
    names = {1: "conv1d", 2: "conv2d", 3: "conv3d"}
    if isinstance(module, _ConvTransposeNd):
        convolve: Any = getattr(functional, names[module.weight.ndim - 2].replace("conv", "conv_transpose"))
        return convolve(  # type: ignore[no-any-return]
            given, weight, None, module.stride, module.padding, module.output_padding, module.groups, module.dilation
        )
    if module.padding_mode != "zeros":
        given = functional.pad(given, module._reversed_padding_repeated_twice, mode=module.padding_mode)
    padding: Any = module.padding if module.padding_mode == "zeros" else 0
    convolve = getattr(functional, names[module.weight.ndim - 2])
    return convolve(given, weight, None, module.stride, padding, module.dilation, module.groups)  # type: ignore[no-any-return]


def is_norm(module: nn.Module) -> bool:
    """Whether a layer only shifts and scales its channels by their statistics."""
    kinds = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
    return isinstance(module, kinds) or _is_own_norm(module)


def _convolution(name: str, module: _ConvNd) -> Kind:
    taken, given, groups = module.in_channels, module.out_channels, module.groups
    transposed = isinstance(module, _ConvTransposeNd)
    out_dim, in_dim = (1, 0) if transposed else (0, 1)
    bias = [TensorSlice(f"{name}.bias", 0, given)] if module.bias is not None else []
    if groups == taken and groups > 1:
        repeat = given // taken
        weight = TensorSlice(f"{name}.weight", 0, *((taken, 1) if transposed else (given, repeat)))
        if transposed and repeat > 1:
            return UnsupportedLayer(f"{type(module).__name__} '{name}', a depth-wise one of several outputs a channel")
        slices = (weight, *(TensorSlice(one.tensor, 0, given, repeat) for one in bias))
        attributes = (
            ModuleAttribute(name, "in_channels"), ModuleAttribute(name, "out_channels", repeat),
            ModuleAttribute(name, "groups"),
        )  # fmt: skip
        return ChannelwiseLayer(ChannelAxis(name, "channels", taken, slices, attributes))
    reads = ChannelAxis(
        name, "in", taken, (TensorSlice(f"{name}.weight", in_dim, taken if transposed else taken // groups),),
        (ModuleAttribute(name, "in_channels"),),
    )  # fmt: skip
    makes = ChannelAxis(
        name, "out", given, (TensorSlice(f"{name}.weight", out_dim, given // groups if transposed else given), *bias),
        (ModuleAttribute(name, "out_channels"),),
    )  # fmt: skip
    return DenseLayer(reads, makes, groups)


def _linear(name: str, module: nn.Linear) -> Kind:
    bias = [TensorSlice(f"{name}.bias", 0, module.out_features)] if module.bias is not None else []
    weight, taken = f"{name}.weight", module.in_features
    return DenseLayer(
        ChannelAxis(name, "in", taken, (TensorSlice(weight, 1, taken),), (ModuleAttribute(name, "in_features"),)),
        ChannelAxis(
            name, "out", module.out_features, (TensorSlice(weight, 0, module.out_features), *bias),
            (ModuleAttribute(name, "out_features"),),
        ),
    )  # fmt: skip


def _embedding(name: str, module: nn.Embedding) -> Kind:
    size = module.embedding_dim
    return DenseLayer(
        None,
        ChannelAxis(
            name, "out", size, (TensorSlice(f"{name}.weight", 1, size),), (ModuleAttribute(name, "embedding_dim"),)
        ),
    )


def _keeping_apart(name: str, module: nn.Module) -> Kind | None:
    if isinstance(module, _NormBase):
        return ChannelwiseLayer(_vectors(name, module, module.num_features, "num_features"))
    if isinstance(module, nn.GroupNorm):
        return ChannelwiseLayer(_vectors(name, module, module.num_channels, "num_channels"), module.num_groups)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        if len(module.normalized_shape) != 1:
            return UnsupportedLayer(f"{type(module).__name__} '{name}', which normalises over several dimensions")
        place = _vectors(name, module, module.normalized_shape[0], "normalized_shape")
        as_tuple = tuple(ModuleAttribute(one.module, one.name, as_tuple=True) for one in place.attributes)
        return ChannelwiseLayer(ChannelAxis(place.module, place.side, place.size, place.slices, as_tuple))
    if isinstance(module, nn.PReLU) and module.num_parameters > 1:
        return ChannelwiseLayer(_vectors(name, module, module.num_parameters, "num_parameters"))
    if _is_own_norm(module):
        return ChannelwiseLayer(_vectors(name, module, next(iter(module.parameters(recurse=False))).numel(), None))
    return None


def _vectors(name: str, module: nn.Module, size: int, attribute: str | None) -> ChannelAxis:
    """A place with every parameter and buffer of a module that has one number for each channel."""
    tensors = {**module._parameters, **module._buffers}
    slices = tuple(
        TensorSlice(f"{name}.{leaf}", 0, size)
        for leaf, one in tensors.items()
        if one is not None and one.shape == (size,)
    )
    return ChannelAxis(name, "channels", size, slices, (ModuleAttribute(name, attribute),) if attribute else ())


def _has_torchs_forward(module: nn.Module) -> bool:
    """Whether torch's own forward is called, not one that a subclass has written over it."""
    return type(module).forward.__module__.startswith("torch.nn.")


def _is_own_norm(module: nn.Module) -> bool:
    """A normalisation that somebody wrote: by its name, and by its vectors of one length."""
    own = list(module.parameters(recurse=False))
    lengths = {tuple(one.shape) for one in own}
    is_torchs = isinstance(module, _NormBase) or type(module).__module__.startswith("torch.nn.")
    return (
        not is_torchs
        and "norm" in type(module).__name__.lower()
        and not any(True for _ in module.children())
        and len(lengths) == 1
        and len(next(iter(lengths))) == 1
    )
