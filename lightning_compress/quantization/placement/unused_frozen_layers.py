"""Layers that are not trained: which of them have a part in what is, and which stand apart."""

from collections.abc import Iterable

from torch import nn

from lightning_compress.nn.dataflow import Dataflow
from lightning_compress.nn.forward_capture import display_name
from lightning_compress.quantization.layers import Layer
from lightning_compress.quantization.placement.call_alignment import is_submodule


def frozen_warning(layers: Iterable[Layer]) -> str:
    """A sentence about the weights that no training moves, if there are any."""
    names = dict.fromkeys(
        weight_ref.name for layer in layers for weight_ref in layer.weights if not weight_ref.parameter.requires_grad
    )
    return f" Of these {', '.join(names)} are frozen: ignore what is not to be quantized." if names else ""


def unused_frozen_layers(flow: Dataflow, model: nn.Module, layers: list[Layer]) -> list[str]:
    """Frozen layers that neither take what trained parameters have made, nor give to what they make.

    A teacher that the user's module holds stands apart, and the network of a metric; a frozen backbone does not.

    Args:
        flow: of one step.
        model: whose step it was.
        layers: of the model.

    Raises:
        ValueError: if all layers stand apart.
    """
    trained = {
        flow.parameters[display_name(name)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad
    }
    having_part = _having_part(flow, trained)
    found = [
        layer.name
        for layer in layers
        if not any(one.requires_grad for one in layer.module.parameters())
        and not any(is_submodule(module, layer.name) for module in having_part)
    ]
    if len(found) == len(layers):
        raise ValueError(
            f"All layers that are to be quantized are frozen, and have no part in what is trained: {', '.join(found)}. "
            f"Thaw some, or quantize the trained model by `quantize`."
        )
    return found


def _having_part(flow: Dataflow, trained: set[int]) -> set[str]:
    """The modules that compute with what comes of these values, or what is then put together with one of them."""
    after, before = set(trained), set[int]()
    for one in flow.operations:
        if not after.isdisjoint(one.inputs):
            after.update(one.outputs)
    # What a loss puts together with a trained network's output is not given to that network.
    for one in reversed(flow.operations):
        if not trained.isdisjoint(one.inputs) or not before.isdisjoint(one.outputs):
            before.update(one.inputs)
    return {
        one.module
        for one in flow.operations
        if one.module is not None and not (after.isdisjoint(one.inputs) and before.isdisjoint(one.outputs))
    }
