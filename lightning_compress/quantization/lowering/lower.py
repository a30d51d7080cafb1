"""From a quantized model to the plain module that is deployed: weights on their grids, BatchNorm folded in."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor, nn

from lightning_compress.nn.copying import copy_without_hooks, unwrap_compiled
from lightning_compress.nn.forward_capture import display_name, ordered_arguments
from lightning_compress.quantization.fake_quantizers import ActivationFakeQuantize
from lightning_compress.quantization.forward_hooks import has_quantizer_hooks
from lightning_compress.quantization.lowering.deployed_model import DeployedModel, WeightSpec
from lightning_compress.quantization.lowering.modules import Chain, FakeQuantizeSteps, FixedFakeQuantize, RoundToDtype
from lightning_compress.quantization.placement.sites import ActivationSite
from lightning_compress.quantization.quantized_model import QuantizedModel, is_quantization_pending, quantized_of


def lower(model: nn.Module) -> DeployedModel:
    """The module that is deployed, of a model that was quantized by training, `quantize` or `load_compressed`.

    Raises:
        ValueError: if the model was not quantized, or its grids are of a kind that nothing deployed computes with.
    """
    quantized = require_quantized(model)
    copy = unwrap_compiled(copy_without_hooks(model)).eval().requires_grad_(False)
    modules = {display_name(name): module for name, module in copy.named_modules(remove_duplicate=False)}
    with torch.no_grad():
        grids = {name: _grid(quantized, name) for name in quantized.quantized_weights()}
        for layer, bias in quantized.integer_biases().items():
            modules[layer].bias = nn.Parameter(bias.float(), requires_grad=False)
        for layer, norm in quantized.placement.norms.items():
            _fold(copy, modules, quantized, grids, layer, norm)
        parameters = {display_name(name): one for name, one in copy.named_parameters(remove_duplicate=False)}
        for name in quantized.quantized_weights():
            grid = grids[name]
            parameters[name].copy_(_values(quantized, name) if grid is None else grid.values())
    keys = keys_of_places(quantized)
    container = _add_sites(copy, modules, quantized, keys)
    copy.eval()  # what was added is in training mode
    inputs = {layer: keys[site] for layer, site in quantized.placement.inputs.items()}
    known_grids = {name: grid for name, grid in grids.items() if grid is not None}
    return DeployedModel(copy, known_grids, inputs, _casts(quantized), container)


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
    quantized = require_quantized(model)
    state = {display_name(name): value.detach() for name, value in model.state_dict().items()}
    own = dict(state)
    with torch.no_grad():
        grids = {name: _grid(quantized, name) for name in quantized.quantized_weights()}
        for name, grid in grids.items():
            values = _values(quantized, name) if grid is None else grid.values()
            weight = quantized.quantized_weights()[name].parameter
            # A tied weight stands there under each of its names.
            tied = [one for one, value in own.items() if value.data_ptr() == weight.data_ptr()]
            state.update(dict.fromkeys(tied, values.to(weight.dtype)))
    return QuantizedTensors(state, {name: grid for name, grid in grids.items() if grid is not None}, _casts(quantized))


def keys_of_places(quantized: QuantizedModel) -> dict[str, str]:
    """The names of submodules that stand for places, each for one."""
    keys: dict[str, str] = {}
    for site in quantized.placement.sites:
        keys[site.name] = _free(re.sub(r"\W", "_", site.name), keys.values())
    return keys


def _free(name: str, taken: Collection[str]) -> str:
    """The name, or with the first number behind it that is not taken.

    >>> _free("block_0", ["block", "block_0", "block_0_2"])
    'block_0_3'
    """
    return next(one for number in count(1) if (one := name if number == 1 else f"{name}_{number}") not in taken)


def is_float(model: nn.Module) -> bool:
    """Whether nothing in the model computes on grids, or was to, as far as can be seen."""
    # Copies of what `quantize` made have hooks and are not known.
    return quantized_of(model) is None and not is_quantization_pending(model) and not has_quantizer_hooks(model)


def require_quantized(model: nn.Module) -> QuantizedModel:
    """The quantizers of a model that is ready to be deployed.

    Raises:
        ValueError: if it was not quantized, its quantized phase was not reached, or a place has seen nothing.
    """
    quantized = quantized_of(model)
    if is_quantization_pending(model) or (quantized is not None and not quantized.state.enabled):
        raise ValueError(
            f"The quantized phase of this {type(model).__name__} was not reached. Train longer, or let "
            f"QuantizationAwareTraining begin earlier; in floating point export a copy, copy.deepcopy(model), to .onnx."
        )
    if quantized is None:
        raise ValueError(
            f"This {type(model).__name__} was never quantized: a copy does not know its original's grids. Export the "
            f"module that was trained with QuantizationAwareTraining, what quantize(...) returned, or what "
            f"load_compressed(...) made of a checkpoint; in floating point it goes to .onnx."
        )
    for quantizer in quantized.quantizers():
        quantizer.to(next(model.parameters()).device)  # the Trainer moves the module alone when a fit ends
    if missing := quantized.uncalibrated():
        raise ValueError(f"No number has come to {', '.join(missing)} yet, so there is no grid. Train for a step.")
    return quantized


def _casts(quantized: QuantizedModel) -> dict[str, torch.dtype]:
    return {name: one.fmt.dtype for name, one in quantized.weights.items() if one.fmt.dtype is not None}


def _values(quantized: QuantizedModel, name: str) -> Tensor:
    values: Tensor = quantized.weights[name](quantized.quantized_weights()[name].parameter.detach())
    return values


def _grid(quantized: QuantizedModel, name: str) -> WeightSpec | None:
    """The whole numbers of a weight and their steps; a table where there is no one step; None for floating point."""
    quantizer, weight = quantized.weights[name], quantized.quantized_weights()[name].parameter.detach()
    values, scale = quantizer.on_grid(weight)
    if quantizer.fmt.dtype is not None:
        return None
    rows, bits = quantizer.channel_groups, quantizer.fmt.bits
    if scale is None:
        levels, codes = torch.unique(values.float(), return_inverse=True)
        return WeightSpec(codes, None, max(1, (len(levels) - 1).bit_length()), rows.axis, levels=levels)
    codes = (rows.split(values.float()) / scale).round().to(torch.int32)
    zero_point = None if quantizer.symmetric else rows.scale(quantizer.zero_point)
    codes = rows.join(codes if quantizer.symmetric else codes + quantizer.zero_point)
    return WeightSpec(codes, rows.scale(scale.float()), bits, rows.axis, max(rows.group, 0), zero_point=zero_point)


def _fold(
    copy: nn.Module,
    modules: dict[str, nn.Module],
    quantized: QuantizedModel,
    grids: dict[str, WeightSpec | None],
    layer: str,
    norm: str,
) -> None:
    """Let a layer do what the BatchNorm behind it did: its integers stay, their steps take the factor."""
    module, batch_norm = modules[layer], modules[norm]
    names = [weight.name for weight in quantized.layers[layer].weights]
    grid = grids.get(names[0]) if len(names) == 1 else None
    if grid is None or batch_norm.running_var is None:
        return
    factor, offset = _as_line(batch_norm)
    grids[names[0]] = _scaled(grid, factor)
    bias = torch.zeros_like(offset) if module.bias is None else module.bias
    module.bias = nn.Parameter(bias * factor + offset, requires_grad=False)  # type: ignore[operator]
    parent, _, leaf = norm.rpartition(".")
    modules[norm] = nn.Identity()
    setattr(modules[parent], leaf, modules[norm])


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
    copy: nn.Module, modules: dict[str, nn.Module], quantized: QuantizedModel, keys: Mapping[str, str]
) -> str:
    """Let the copy call the quantizers; the name under which it holds them."""
    if type(copy).forward is nn.Sequential.forward:
        copy.__class__ = Chain
    steps = FakeQuantizeSteps(
        {
            keys[site.name]: _deployed(quantized.activations[site.name], site, quantized.consumers(site.name))
            for site in quantized.placement.sites
        }
    )
    container = _free("quantizers", dir(copy))
    copy.add_module(container, steps)
    for site in quantized.placement.sites:
        step = steps[keys[site.name]]
        if site.port == "output":
            modules[site.module].register_forward_hook(lambda _module, _args, output, step=step: step(output))
        else:
            hook = _at_door(step, int(site.port.split()[1]))
            modules[site.module].register_forward_pre_hook(hook, with_kwargs=True)
    return container


def _deployed(quantizer: ActivationFakeQuantize, site: ActivationSite, takers: list[str]) -> nn.Module:
    if quantizer.fmt.dtype is not None:
        return RoundToDtype(quantizer.fmt.dtype)
    if quantizer.quant_max - quantizer.quant_min > 255:
        raise ValueError(
            f"'{site.name}' has {quantizer.fmt.bits} bits, but what is written to .onnx or .pt2 has activations of at "
            f"most 8. Take those, or None for the activations; .safetensors holds weights of any bits."
        )
    zeros = torch.zeros(1, device=quantizer.scale.device)
    _, scale, zero_point = quantizer.on_grid(zeros)
    if scale is None or zero_point is None:
        name = getattr(quantizer.function, "__name__", quantizer.function)
        raise ValueError(
            f"'{site.name}' is quantized by {name}, whose values lie on no grid that a runtime knows. Take another "
            f"method for the activations, or leave it out: ignore={takers}."
        )
    # Far beyond the ends, and so near to zero that rounding would take it there.
    far = quantizer.quant_max - quantizer.quant_min + 1.0
    probed = quantizer.on_grid(scale * scale.new_tensor([-far, -0.25, 0.25, far])).values / scale
    offset = int(zero_point) - quantizer.quant_min
    lowest, below, above, highest = (int(one) for one in probed.round() + offset)
    signs = below == lowest and above == highest
    return FixedFakeQuantize(scale.reshape(()), offset, lowest, highest, signs)


def _at_door(step: nn.Module, position: int):  # type: ignore[no-untyped-def]
    def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        values = [one for one in ordered_arguments(module, args, kwargs) if isinstance(one, Tensor)]
        on_grid = step(values[position])
        new_args = tuple(on_grid if one is values[position] else one for one in args)
        return new_args, {name: on_grid if one is values[position] else one for name, one in kwargs.items()}

    return hook
