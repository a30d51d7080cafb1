"""Where the activations of a model are quantized, as its layers and what is asked of them have it."""

from torch import nn

from lightning_compress.nn.dataflow import Dataflow
from lightning_compress.nn.forward_capture import display_name
from lightning_compress.quantization.config import Request
from lightning_compress.quantization.layers import Layer
from lightning_compress.quantization.placement.shared_weight_check import refuse_reads_elsewhere
from lightning_compress.quantization.placement.sites import Layout, lay_out


def layout_of(flow: Dataflow, model: nn.Module, layers: list[Layer], request: Request) -> Layout:
    """Where the activations of these layers are quantized, by the flow of one step."""
    refuse_reads_elsewhere(flow, layers)
    plans = request.plan(layers, [name for name in flow.inputs if name in {layer.name for layer in layers}])
    kinds = {
        layer.name: (form.bits, form.name, plans[layer.name].method.activations, plans[layer.name].method.range)
        for layer in layers
        if layer.computes and (form := plans[layer.name].activations) is not None
    }
    modules = {display_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    # Below 8 bits papers, and no integer kernel gains, leave what is added up in floating point.
    joins = min((kind[0] for kind in kinds.values()), default=8) >= 8
    return lay_out(flow, [layer.name for layer in layers], kinds, modules, joins)
