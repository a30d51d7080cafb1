"""Where the activations of a model are quantized, as its layers and what is asked of them have it."""

from torch import nn

from lightning_compress.nn.dataflow import Dataflow
from lightning_compress.nn.forward_capture import display_name
from lightning_compress.quantization.config import QuantizationConfig
from lightning_compress.quantization.layers import Layer
from lightning_compress.quantization.placement.shared_weight_check import check_weight_reads
from lightning_compress.quantization.placement.sites import ActivationPlacement, place_fake_quantizers


def place_activations(
    flow: Dataflow, model: nn.Module, layers: list[Layer], request: QuantizationConfig
) -> ActivationPlacement:
    """Where the activations of these layers are quantized, by the flow of one step."""
    check_weight_reads(flow, layers)
    plans = request.plan_layers(layers, [name for name in flow.inputs if name in {layer.name for layer in layers}])
    kinds = {
        layer.name: (form.bits, form.name, plans[layer.name].method.activations, plans[layer.name].method.range)
        for layer in layers
        if layer.computes and (form := plans[layer.name].activations) is not None
    }
    modules = {display_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    # Below 8 bits papers, and no integer kernel gains, leave what is added up in floating point.
    joins = min((kind[0] for kind in kinds.values()), default=8) >= 8
    names = [layer.name for layer in layers]
    return place_fake_quantizers(flow, names, kinds, modules, joins, request.quantize_output)
