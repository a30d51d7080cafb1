"""Which BatchNorm a layer takes along: a runtime folds it into the layer's weights."""

from collections.abc import Mapping

from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_compress.nn.dataflow import Dataflow, is_plain_norm
from lightning_compress.quantization.layers import CONVOLUTIONS
from lightning_compress.quantization.placement.call_alignment import AlignedCalls


def norm_after(flow: Dataflow, layer: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The BatchNorm that alone takes the layer's output, at each of its calls, channel by channel."""
    tracks = AlignedCalls(flow)
    returned = tracks.outputs(layer)
    uses = (tracks.consumers_of(returned) if returned else None) or []
    norm = uses[0].module if len(uses) == 1 and uses[0].function is functional.batch_norm else None
    if returned is None or norm is None or len(flow.inputs[norm]) != len(returned) or norm not in modules:
        return None
    # BatchNorm's channels come second: a linear layer's too if there is nothing but samples before them.
    dimensions = {flow.dimensions[value] for value in returned}
    module = modules[layer]
    by_channel = dimensions == {2} if isinstance(module, nn.Linear) else dimensions == {_dimensions(module)}
    own = {flow.parameters.get(f"{norm}.{leaf}") for leaf in ("weight", "bias")} - {None}
    # A subclass may do more behind it, such as an activation function, if it normalizes with its own numbers.
    normalizes = isinstance(modules[norm], _BatchNorm) and own <= {value for one in uses[0].inputs for value in one}
    return norm if by_channel and (normalizes or is_plain_norm(modules[norm])) else None


def _dimensions(module: nn.Module) -> int | None:
    """Those of what a convolution gives for a batch."""
    return len(module.kernel_size) + 2 if isinstance(module, CONVOLUTIONS) else None
