"""From a quantized model to the plain module that is deployed: weights on their grids, BatchNorm folded in."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import Tensor, nn

from lightning_compress.nn.copying import copy_without_hooks, unwrap_compiled
from lightning_compress.nn.forward_capture import display_name, ordered_arguments
from lightning_compress.quantization.description import ActivationSpec, QuantizationDescription, WeightSpec
from lightning_compress.quantization.forward_hooks import quantizer_hooks
from lightning_compress.quantization.lookup import REMOVED, quantized_of, unquantized_reason
from lightning_compress.quantization.lowering.deployed_model import DeployedModel
from lightning_compress.quantization.lowering.modules import (
    Chain,
    FakeQuantizeSteps,
    FixedFakeQuantize,
    Gated,
    RoundToDtype,
    without_norm,
)
from lightning_compress.quantization.placement.gates import GATE
from lightning_compress.quantization.quantized_model import QuantizedModel


def lower(model: nn.Module) -> DeployedModel:
    """The module that is deployed, of a model that was quantized by training, `quantize` or `load_compressed`.

    Raises:
        ValueError: if the model was not quantized, or its grids are of a kind that nothing deployed computes with.
    """
    description = require_quantized(model).describe()
    copy = unwrap_compiled(copy_without_hooks(model)).eval().requires_grad_(False)
    modules = {display_name(name): module for name, module in copy.named_modules(remove_duplicate=False)}
    grids = dict(description.weights)
    with torch.no_grad():
        for layer, bias in description.biases.items():
            modules[layer].bias = nn.Parameter(bias.float(), requires_grad=False)
        for layer, norm in description.norms.items():
            _fold(copy, modules, description, grids, layer, norm)
        parameters = {display_name(name): one for name, one in copy.named_parameters(remove_duplicate=False)}
        for name, values in replace(description, weights=grids).values().items():
            parameters[name].copy_(values)
    keys = site_keys(description)
    container = _add_sites(copy, modules, description, keys)
    copy.eval()  # what was added is in training mode
    inputs = {layer: keys[site] for layer, site in description.inputs.items()}
    return DeployedModel(copy, grids, inputs, description.casts, container)


@dataclass(frozen=True, eq=False)
class QuantizedTensors:
    """A model's own state dict with its quantized weights on their grids, nothing folded, under the names of its class.

    Attributes:
        state: name to tensor.
        weights: grids by name.
        casts: shorter dtypes that hold a weight without loss, by name.
    """

    state: Mapping[str, Tensor]
    weights: Mapping[str, WeightSpec]
    casts: Mapping[str, torch.dtype]


def quantized_tensors(model: nn.Module) -> QuantizedTensors:
    """The state dict of a quantized model, as a file of packed weights holds it.

    Raises:
        ValueError: if the model was not quantized.
    """
    description = require_quantized(model).describe()
    state = {display_name(name): value.detach() for name, value in model.state_dict().items()}
    own = dict(state)
    parameters = {display_name(name): one for name, one in model.named_parameters(remove_duplicate=False)}
    for name, values in description.values().items():
        weight = parameters[name]
        # A tied weight stands there under each of its names.
        tied = [one for one, value in own.items() if value.data_ptr() == weight.data_ptr()]
        state.update(dict.fromkeys(tied, values.to(weight.dtype)))
    return QuantizedTensors(state, description.weights, description.casts)


def site_keys(description: QuantizationDescription) -> dict[str, str]:
    """The name of the submodule that quantizes the activations of a site, by the site's name."""
    keys: dict[str, str] = {}
    for site in description.activations:
        keys[site] = _free(re.sub(r"\W", "_", site), keys.values())
    return keys


def _free(name: str, taken: Collection[str]) -> str:
    """The name, or with the first number behind it that is not taken.

    >>> _free("block_0", ["block", "block_0", "block_0_2"])
    'block_0_3'
    """
    return next(one for number in count(1) if (one := name if number == 1 else f"{name}_{number}") not in taken)


def is_float(model: nn.Module) -> bool:
    """Whether nothing in the model computes on grids, or was to, as far as can be seen."""
    return next(quantizer_hooks(model), None) is None and unquantized_reason(model) is None


def require_quantized(model: nn.Module) -> QuantizedModel:
    """The quantizers of a model that is ready to be deployed.

    Raises:
        ValueError: if it was not quantized, its quantized phase was not reached, its quantizers were taken off, or a
            place has seen nothing.
    """
    quantized = quantized_of(model)
    if quantized is None and unquantized_reason(model) == REMOVED:
        raise ValueError(
            f"The quantizers of this {type(model).__name__} were taken off by remove_quantizers. Take the model from a "
            f"checkpoint by load_compressed; in floating point export a copy, copy.deepcopy(model), to .onnx."
        )
    if (quantized is None and unquantized_reason(model)) or (quantized is not None and not quantized.state.enabled):
        raise ValueError(
            f"The quantized phase of this {type(model).__name__} was not reached. Train longer, or let "
            f"QuantizationAwareTraining begin earlier; in floating point export a copy, copy.deepcopy(model), to .onnx."
        )
    if quantized is None:
        raise ValueError(
            f"This {type(model).__name__} was never quantized. Export the module that was trained with "
            f"QuantizationAwareTraining, what quantize(...) returned, what load_compressed(...) made of a checkpoint, "
            f"or a copy of these; in floating point it goes to .onnx."
        )
    for quantizer in quantized.quantizers():
        quantizer.to(next(model.parameters()).device)  # the Trainer moves the module alone when a fit ends
    if missing := quantized.uncalibrated():
        raise ValueError(f"No number has come to {', '.join(missing)} yet, so there is no grid. Train for a step.")
    return quantized


def _fold(
    copy: nn.Module,
    modules: dict[str, nn.Module],
    description: QuantizationDescription,
    grids: dict[str, WeightSpec],
    layer: str,
    norm: str,
) -> None:
    """Let a layer do what the BatchNorm behind it did: its integers stay, their steps take the factor."""
    module, batch_norm = modules[layer], modules[norm]
    names = description.layers[layer]
    grid = grids.get(names[0]) if len(names) == 1 else None
    if grid is None or batch_norm.running_var is None:
        return
    factor, offset = _as_line(batch_norm)
    grids[names[0]] = _scaled(grid, factor)
    bias = torch.zeros_like(offset) if module.bias is None else module.bias
    module.bias = nn.Parameter(bias * factor + offset, requires_grad=False)  # type: ignore[operator]
    _replace(modules, norm, without_norm(batch_norm))


def _replace(modules: dict[str, nn.Module], name: str, module: nn.Module) -> None:
    """Put a module in the place of one of the copy."""
    parent, _, leaf = name.rpartition(".")
    modules[name] = module
    setattr(modules[parent], leaf, module)


def _as_line(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """What BatchNorm does in eval mode: `factor * x + offset` for each channel."""
    variance: Tensor = norm.running_var  # type: ignore[assignment]
    factor = (variance.double() + norm.eps).rsqrt()  # type: ignore[operator]
    offset = -norm.running_mean.double() * factor  # type: ignore[operator]
    if norm.weight is not None:
        factor, offset = factor * norm.weight, offset * norm.weight  # type: ignore[operator]
    offset = offset if norm.bias is None else offset + norm.bias  # type: ignore[operator]
    return factor.float(), offset.float()


def _scaled(grid: WeightSpec, factor: Tensor) -> WeightSpec:
    """The grid with each channel's values times its factor; a negative one changes the sign of the integers."""
    along = [-1 if place == grid.axis else 1 for place in range(grid.codes.ndim)]
    if grid.scale is None:
        levels, codes = torch.unique(grid.values() * factor.reshape(along), return_inverse=True)
        return WeightSpec(codes, None, max(1, (len(levels) - 1).bit_length()), grid.axis, levels=levels)
    sign = factor.sign().to(grid.codes.dtype).reshape(along)
    size = torch.where(factor == 0, 1.0, factor.abs())
    shape = (-1, 1) if grid.group else along
    scale = grid.scale * size.reshape(shape)
    zero_point = None if grid.zero_point is None else grid.zero_point * sign.reshape(shape)
    return WeightSpec(grid.codes * sign, scale, grid.bits, grid.axis, grid.group, zero_point=zero_point)


def _add_sites(
    copy: nn.Module, modules: dict[str, nn.Module], description: QuantizationDescription, keys: Mapping[str, str]
) -> str:
    """Let the copy call the quantizers; the name under which it holds them."""
    if type(copy).forward is nn.Sequential.forward:
        copy.__class__ = Chain
    steps = FakeQuantizeSteps({keys[name]: _fixed_quantizer(spec) for name, spec in description.activations.items()})
    container = _free("quantizers", dir(copy))
    copy.add_module(container, steps)
    for name, spec in description.activations.items():
        if spec.site.port == GATE:
            _replace(modules, spec.site.module, Gated(modules[spec.site.module], steps[keys[name]]))
    for name, spec in description.activations.items():
        step, site = steps[keys[name]], spec.site
        if site.port == "output":
            modules[site.module].register_forward_hook(lambda _module, _args, output, step=step: step(output))
        elif site.port != GATE:
            hook = _at_door(step, int(site.port.split()[1]))
            modules[site.module].register_forward_pre_hook(hook, with_kwargs=True)
    return container


def _fixed_quantizer(spec: ActivationSpec) -> nn.Module:
    """What puts activations on the grid of a specification, with codes from 0 on."""
    if spec.dtype is not None:
        return RoundToDtype(spec.dtype)
    if spec.quant_max - spec.quant_min > 255:
        raise ValueError(
            f"'{spec.site.name}' has {spec.bits} bits, but what is written to .onnx or .pt2 has activations of at "
            f"most 8. Take those, or None for the activations; .safetensors holds weights of any bits."
        )
    if spec.scale is None:
        raise ValueError(
            f"'{spec.site.name}' is quantized by {spec.method}, whose values lie on no grid that a runtime knows. Take "
            f"another method for the activations, or leave it out: ignore={list(spec.consumers)}."
        )
    shift = 2 ** (spec.bits - 1) if spec.quant_min < 0 else 0
    codes = (spec.zero_point + shift, spec.quant_min + shift, spec.quant_max + shift)
    return FixedFakeQuantize(spec.scale, *codes, signs=spec.two_level)


def _at_door(step: nn.Module, position: int):  # type: ignore[no-untyped-def]
    def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        values = [one for one in ordered_arguments(module, args, kwargs) if isinstance(one, Tensor)]
        on_grid = step(values[position])
        new_args = tuple(on_grid if one is values[position] else one for one in args)
        return new_args, {name: on_grid if one is values[position] else one for name, one in kwargs.items()}

    return hook
