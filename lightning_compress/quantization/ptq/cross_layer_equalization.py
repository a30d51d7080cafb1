"""Channels of neighbouring layers brought to one range, while the network computes what it did.

Reference: Nagel et al., 2019, section 4.1, https://arxiv.org/abs/1906.04721
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_compress.nn.dataflow import Dataflow, Operation
from lightning_compress.quantization.layers import CONVOLUTIONS, TRANSPOSED, Layer
from lightning_compress.quantization.placement.operations import DROPOUTS

# f(s * x) = s * f(x) for s > 0, number by number.
HOMOGENEOUS = {
    *DROPOUTS, functional.relu, functional.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_,
    functional.leaky_relu, functional.leaky_relu_, Tensor.contiguous,
}  # fmt: skip
# The same within each channel of a convolution.
POOLS = {
    functional.max_pool1d, functional.max_pool2d, functional.max_pool3d, torch.max_pool1d, torch.max_pool2d,
    torch.max_pool3d, functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d,
    functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d, functional.adaptive_avg_pool3d,
    functional.adaptive_max_pool1d, functional.adaptive_max_pool2d, functional.adaptive_max_pool3d,
}  # fmt: skip
PRODUCTS = {
    functional.linear, functional.conv1d, functional.conv2d, functional.conv3d, functional.conv_transpose1d,
    functional.conv_transpose2d, functional.conv_transpose3d,
}  # fmt: skip
SWEEPS = 200
NEARLY_EQUAL = 1e-4


@dataclass(frozen=True, eq=False)
class LayerPair:
    """Two layers between whose channels a factor may wander, and the BatchNorm between them, if any."""

    first: nn.Module
    second: nn.Module
    norm: nn.Module | None = None


def find_layer_pairs(
    flow: Dataflow, model: nn.Module, layers: list[Layer], norms: Mapping[str, str], modules: Mapping[str, nn.Module]
) -> list[LayerPair]:
    """The pairs that are connected by BatchNorm, ReLU, dropout and pooling alone, or by nothing.

    Args:
        flow: of one step, in which what leaves the network is used outside of all modules.
        model: to which the layers belong.
        layers: whose weights may be changed.
        norms: layer to the BatchNorm that alone takes its output.
        modules: by name.
    """
    finder = _Finder(flow, {layer.name: layer.module for layer in layers}, modules, _shared(model))
    found = (finder.pair(layer.name, norms.get(layer.name)) for layer in layers)
    return [pair for pair in found if pair is not None]


@torch.no_grad()
def equalize(pairs: list[LayerPair]) -> None:
    """Scale channels between the layers of each pair until both weights have the same range in each.

    A BatchNorm between them is scaled in its `weight` and `bias`; the first layer's range is then that of its weight
    with the BatchNorm folded in.
    """
    for _ in range(SWEEPS):
        if max((_equalize_pair(pair) for pair in pairs), default=0.0) < NEARLY_EQUAL:
            return


def channel_ranges(pair: LayerPair) -> tuple[Tensor, Tensor]:
    """The largest absolute weight in each channel between them: of the first and of the second layer."""
    first = _largest(pair.first, output=True)
    if pair.norm is not None:
        first = first * (pair.norm.weight.abs() / (pair.norm.running_var + pair.norm.eps).sqrt()).float()  # type: ignore[operator]
    return first, _largest(pair.second, output=False)


def _equalize_pair(pair: LayerPair) -> float:
    """Scale once; how far the largest factor was from 1, as a logarithm."""
    first, second = channel_ranges(pair)
    alive = (first > 0) & (second > 0)
    factor = torch.where(alive, (first / second).sqrt(), torch.ones_like(first))
    before_activation = pair.first if pair.norm is None else pair.norm
    if pair.norm is None:
        _scale(pair.first, 1 / factor, output=True)
    else:
        pair.norm.weight.div_(factor)  # type: ignore[operator]
    if before_activation.bias is not None:
        before_activation.bias.div_(factor)  # type: ignore[operator]
    _scale(pair.second, factor, output=False)
    return float(factor.log().abs().max())


class _Finder:
    def __init__(
        self, flow: Dataflow, layers: Mapping[str, nn.Module], modules: Mapping[str, nn.Module], shared: set[int]
    ) -> None:
        self.flow, self.layers, self.modules, self.shared = flow, layers, modules, shared

    def pair(self, name: str, norm_name: str | None) -> LayerPair | None:
        """The pair whose first layer has that name."""
        first = self.layers[name]
        product = self.flow.producer.get(self.flow.outputs[name][0] or -1)
        if not self.is_plain(name) or product is None or not self.is_product(product, name):
            return None
        norm = self.modules[norm_name] if norm_name is not None else None
        value = product.outputs[0]
        if norm is not None:
            if not self.is_line(norm, first):
                return None
            value = self.flow.consumers_of(value)[0].outputs[0]
        second = self.next_product(value, isinstance(first, CONVOLUTIONS))
        if second is None or not _fit(first, self.layers[second]):
            return None
        return LayerPair(first, self.layers[second], norm)

    def next_product(self, value: int, has_pixels: bool) -> str | None:
        """The layer that alone computes with the value, after what a factor passes through."""
        passed = HOMOGENEOUS | POOLS if has_pixels else HOMOGENEOUS
        while len(uses := self.flow.consumers_of(value)) == 1:
            use = uses[0]
            if use.module is not None and use.module in self.layers:
                plain = self.is_plain(use.module) and self.is_product(use, use.module) and use.inputs[0] == value
                return use.module if plain else None
            if use.function not in passed or len(use.outputs) != 1:
                return None
            value = use.outputs[0]
        return None

    def is_plain(self, name: str) -> bool:
        """Whether it is called once, and has its parameters for itself."""
        own = self.layers[name].parameters(recurse=False)
        return len(self.flow.inputs[name]) == 1 and not any(id(one) in self.shared for one in own)

    def is_product(self, use: Operation, name: str) -> bool:
        """Whether it multiplies with the layer's weight as that is; some layers normalize theirs before."""
        weights = use.inputs[1:]
        return use.module == name and use.function in PRODUCTS and not any(one in self.flow.producer for one in weights)

    def is_line(self, norm: nn.Module, first: nn.Module) -> bool:
        own = list(norm.parameters(recurse=False))
        known = bool(own) and norm.running_var is not None and not any(id(one) in self.shared for one in own)
        return known and bool(norm.num_features == _channels(first, output=True))


def _fit(first: nn.Module, second: nn.Module) -> bool:
    """Whether channels of the one are channels of the other: a linear layer looks along another dimension."""
    same = isinstance(first, CONVOLUTIONS) == isinstance(second, CONVOLUTIONS)
    return same and first is not second and _channels(first, output=True) == _channels(second, output=False)


def _shared(model: nn.Module) -> set[int]:
    """Parameters that have several names."""
    names = Counter(id(one) for _, one in model.named_parameters(remove_duplicate=False))
    return {parameter for parameter, count in names.items() if count > 1}


def _channels(module: nn.Module, output: bool) -> int:
    by_channel, axis = _by_channel(module, output)
    return by_channel.shape[0] * by_channel.shape[axis]


def _by_channel(module: nn.Module, output: bool) -> tuple[Tensor, int]:
    """The weight as `(groups, one side's channels, the other's, kernel)`, and the axis of the side that is meant."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    groups: int = module.groups if isinstance(module, CONVOLUTIONS) else 1
    axis = 1 if output != isinstance(module, TRANSPOSED) else 2
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], math.prod(weight.shape[2:])), axis


def _largest(module: nn.Module, output: bool) -> Tensor:
    weight, axis = _by_channel(module, output)
    return weight.abs().float().amax(dim=(3 - axis, 3)).flatten()


def _scale(module: nn.Module, factor: Tensor, output: bool) -> None:
    by_channel, axis = _by_channel(module, output)
    along = [by_channel.shape[0], 1, 1, 1]
    along[axis] = by_channel.shape[axis]
    weight: Tensor = module.weight  # type: ignore[assignment]
    weight.copy_((by_channel * factor.reshape(along)).reshape(weight.shape))
