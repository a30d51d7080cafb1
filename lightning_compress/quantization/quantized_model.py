"""A model whose weights and activations lie on grids while it runs, although nothing in it was replaced."""

import math
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from lightning_compress.nn.copying import drop_forward_hooks
from lightning_compress.nn.forward_capture import display_name, is_partly_compiled
from lightning_compress.quantization.config import LayerPlan, QuantizationConfig, check_same_plans
from lightning_compress.quantization.describe import describe_activation, describe_weight
from lightning_compress.quantization.description import QuantizationDescription, WeightSpec
from lightning_compress.quantization.fake_quantizers import (
    ActivationFakeQuantize,
    GateFakeQuantize,
    QuantState,
    WeightFakeQuantize,
)
from lightning_compress.quantization.forward_hooks import (
    GateSwap,
    GradientQuantizer,
    PostForwardHook,
    PreForwardHook,
    WeightSwap,
)
from lightning_compress.quantization.functional.formats import NumberFormat, parse_format
from lightning_compress.quantization.functional.granularity import split_channels
from lightning_compress.quantization.integer_bias import IntegerBias, integer_bias
from lightning_compress.quantization.layers import Layer, WeightRef
from lightning_compress.quantization.methods import ResolvedMethod, resolve_method
from lightning_compress.quantization.placement.gates import GATE, GATES
from lightning_compress.quantization.placement.sites import ActivationPlacement, ActivationSite

# What a copy of the quantizers finds anew in the copy of the model.
_OF_THE_MODEL = frozenset({"_model", "modules", "layers", "latents"})


class QuantizedModel:
    """Quantizers beside a model, and the hooks by which they act in its forward.

    The model keeps its classes, parameters and `state_dict`. The hooks know this object, so that a copy of the model,
    deep or pickled, computes on copies of its quantizers: `quantized_of(copy)` finds them.

    Args:
        model: whose layers they are.
        layers: with the weights to quantize.
        config: formats, methods and granularity of each layer.
        placement: where activations are quantized, in which order layers are called.

    Attributes:
        trained: whether optimizers train what is learned at the moment.
        attached: learned parameters by name: the weight whose settings they take, and the index of their group.
        unused: layers that were to be quantized and are not, because they have no part in the training.
        latents: what weights were before `convert` put them on their grids, by name; copies have none.
    """

    modules: dict[str, nn.Module]
    layers: dict[str, Layer]
    latents: dict[str, Tensor]
    _model: Callable[[], nn.Module | None]

    def __init__(
        self,
        model: nn.Module,
        layers: list[Layer],
        config: QuantizationConfig,
        placement: ActivationPlacement,
        seed: int = 0,
    ) -> None:
        self.config, self.placement, self.state, self.seed = config, placement, QuantState(), seed
        self.trained, self.latents = False, {}
        self.attached: dict[str, tuple[str, int]] = {}
        self.unused: list[str] = []
        self.plans = config.plan_layers(layers, placement.order)
        self._places = {layer.name: tuple(_place_of(one, layer.module) for one in layer.weights) for layer in layers}
        modules = self._bind(model)
        self.weights: dict[str, WeightFakeQuantize] = {}
        self.activations: dict[str, ActivationFakeQuantize] = {}
        for layer in layers:
            self._make_weights(layer)
        for site in placement.sites:
            self._make_site(site)
        self.biases = {layer.name: one for layer in layers if (one := self._integer_bias(layer, modules)) is not None}

    def _bind(self, model: nn.Module) -> dict[str, nn.Module]:
        """Find the layers and modules in a model that has them under their names; returns all its modules."""
        modules = {display_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
        hooked = dict.fromkeys([*self._places, *(site.module for site in self.placement.sites)])
        if missing := [name for name in hooked if name not in modules]:
            raise ValueError(
                f"'{missing[0]}' is quantized too, but it lies outside of this {type(model).__name__}: take the whole "
                f"model."
            )
        self._model = ref(model)
        self.layers = {
            name: Layer(name, modules[name], tuple(place.find(modules[name]) for place in places))
            for name, places in self._places.items()
        }
        self.modules = {name: modules[name] for name in hooked}
        return modules

    def __getstate__(self) -> dict[str, Any]:
        """Without the model: whoever copies a part of it would copy all of it."""
        return {name: value for name, value in vars(self).items() if name not in _OF_THE_MODEL}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._model, self.modules, self.layers, self.latents = _no_model, {}, {}, {}

    def seen_from(self, model: nn.Module, rename: Callable[[str], str]) -> "QuantizedModel":
        """These quantizers under the names that layers have in `model`: one that holds this one, a part, or a copy.

        Raises:
            ValueError: if something is quantized outside of it.
        """
        found = copy(self)
        found.latents = {}
        found.placement = self.placement.renamed(rename)
        found._places = {
            rename(name): tuple(replace(place, name=rename(place.name)) for place in places)
            for name, places in self._places.items()
        }
        sites = {old.name: new.name for old, new in zip(self.placement.sites, found.placement.sites, strict=True)}
        found.activations = {sites[name]: one for name, one in self.activations.items()}
        found.weights = {rename(name): one for name, one in self.weights.items()}
        found.plans = {rename(name): one for name, one in self.plans.items()}
        found.biases = {rename(name): one for name, one in self.biases.items()}
        found._bind(model)
        return found

    # What acts --------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Hook the quantizers into the model; they act while `state.enabled`."""
        for name, module in self.modules.items():
            doors = {site.port: self.activations[site.name] for site in self.placement.sites if site.module == name}
            end, gate = doors.pop("output", None), doors.pop(GATE, None)
            gating = None if gate is None else GateSwap(GATES[type(module)], gate)
            swap = self._swap(name) if name in self.layers else None
            by_position = {int(port.split()[1]): quantizer for port, quantizer in doors.items()}
            entering = PreForwardHook(self.state, by_position, swap, gating, self, name)
            leaving = PostForwardHook(self.state, end, swap, self._errors(name), gating, self)
            module.register_forward_pre_hook(entering, with_kwargs=True)
            module.register_forward_hook(leaving, with_kwargs=True, always_call=True)
        self._forget_compiled()

    def remove(self, model: nn.Module | None = None) -> None:
        """Leave nothing of the quantizers in the model, or in a part or copy of it.

        Weights that `convert` has put on their grids stay there.
        """
        for module in self.modules.values() if model is None else [model]:
            drop_forward_hooks(module, lambda hook: getattr(hook, "owner", None) is self)
        for name in self.layers:
            # A forward that was interrupted by a key press has left without its hooks.
            self._swap(name).take(self.modules[name])
        self._forget_compiled()

    @torch.no_grad()
    def convert(self) -> None:
        """Put the weights themselves on their grids, so that they are what the model computes with."""
        for name, weight_ref in self.quantized_weights().items():
            if self.weights[name].converted is None:
                self.latents[name] = weight_ref.parameter.detach().clone()
                self.weights[name].convert(weight_ref.parameter)
        self._forget_compiled()

    @torch.no_grad()
    def restore_latents(self, unless_loaded: bool = True) -> None:
        """Let weights be put on their grids at each call again, beginning with the values that training goes on with.

        Args:
            unless_loaded: whether the weights are still those of `convert`; what was loaded since stays as it is.
        """
        for name, weight_ref in self.quantized_weights().items():
            quantizer, latent = self.weights[name], self.latents.pop(name, None)
            converted, quantizer.converted = quantizer.converted, None
            if unless_loaded and latent is not None and converted and converted.holds(weight_ref.parameter):
                weight_ref.parameter.copy_(latent)

    def _swap(self, name: str) -> WeightSwap:
        return WeightSwap(self.layers[name], self.weights, self.biases.get(name))

    def begin(self) -> None:
        """Let the quantized phase begin: what is learned of weights begins with the weights as they are now."""
        if not self.state.enabled:
            for name, weight_ref in self.quantized_weights().items():
                self.weights[name].begin(weight_ref.parameter)
            self.state.enabled = True
            self._forget_compiled()

    def begin_batch(self, number: int, quantizing: bool = True) -> None:
        """Let ranges follow what comes until `end_batch`, and put it on grids, or not."""
        self.begin()
        self.state.observer_enabled, self.state.fake_quant_enabled = True, quantizing
        self.set_step(number)

    def end_batch(self) -> None:
        """Let ranges stay as they are, and all lie on grids."""
        self.state.observer_enabled, self.state.fake_quant_enabled = False, True

    def _forget_compiled(self) -> None:
        """Let compilers trace the model anew: they do not see that hooks or an instance's attributes have changed."""
        model = self._model()
        if model is not None and is_partly_compiled(model):
            torch.compiler.reset()

    def set_step(self, step: int) -> None:
        """Let what quantizers draw depend on this number and the seed alone."""
        self.state.step = step

    # What it knows ----------------------------------------------------------------------------------------------

    def quantizers(self) -> Iterable[WeightFakeQuantize | ActivationFakeQuantize]:
        """All of them, in a fixed order."""
        yield from self.weights.values()
        yield from self.activations.values()

    def learned(self) -> dict[str, nn.Parameter]:
        """What the quantizers learn: steps and clips, by name."""
        weights = ((f"weights/{name}", one) for name, one in self.weights.items())
        activations = ((f"activations/{name}", one) for name, one in self.activations.items())
        return {
            f"{name}/{leaf}": parameter
            for name, quantizer in (*weights, *activations)
            for leaf, parameter in quantizer.named_parameters()
        }

    @torch.no_grad()
    def on_grid(self, name: str, weight: Tensor) -> Tensor:
        """Other values of a quantized weight, such as its average, on the grid that suits them; nothing is kept."""
        quantizer = self.weights[name]
        kept = {key: value.clone() for key, value in quantizer.state_dict().items()}
        values: Tensor = quantizer(weight).detach().clone()
        quantizer.load_state_dict(kept)
        return values

    def state_dict_keys(self) -> dict[str, str]:
        """The names of quantized weights by their keys in the model's `state_dict`; tied ones have several."""
        model, names = self._model(), {id(one.parameter): name for name, one in self.quantized_weights().items()}
        named = () if model is None else model.named_parameters(remove_duplicate=False)
        return {key: names[id(parameter)] for key, parameter in named if id(parameter) in names}

    def is_of(self, model: nn.Module) -> bool:
        """Whether these are the quantizers of this very module."""
        return self._model() is model

    def uncalibrated(self) -> list[str]:
        """Places of activations that have seen nothing yet."""
        return [name for name, one in self.activations.items() if not (one.calibrated or one.zeros)]

    @torch.no_grad()
    def describe(self) -> QuantizationDescription:
        """What the model computes with, as plain data.

        >>> from lightning_compress import quantize
        >>> from lightning_compress.quantization.lookup import quantized_of
        >>> model = quantize(nn.Sequential(nn.Linear(4, 2)), [torch.randn(8, 4)])
        >>> description = quantized_of(model).describe()
        >>> spec = description.weights["0.weight"]
        >>> spec.bits, spec.quant_min, spec.quant_max, tuple(spec.codes.shape), description.inputs
        (7, -63, 63, (2, 4), {'0': '0 input 0'})
        """
        found = {
            name: describe_weight(self.weights[name], weight_ref.parameter.detach())
            for name, weight_ref in self.quantized_weights().items()
        }
        sites = self.placement.sites
        return QuantizationDescription(
            {name: one for name, one in found.items() if isinstance(one, WeightSpec)},
            {name: one for name, one in found.items() if isinstance(one, Tensor)},
            {s.name: describe_activation(self.activations[s.name], s, tuple(self.consumers(s.name))) for s in sites},
            {name: tuple(weight.name for weight in layer.weights) for name, layer in self.layers.items()},
            dict(self.placement.inputs),
            dict(self.placement.norms),
            self.integer_biases(),
            dict(self.placement.floating),
        )

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only."""
        return {
            "layout": self.placement.state_dict(),
            "frozen": self.state.observers_frozen,
            "active": self.state.enabled,
            "step": self.state.step,
            "trained": self.trained,
            "joined": {name: list(place) for name, place in self.attached.items()},
            "apart": list(self.unused),
            "plans": {name: plan.settings() for name, plan in self.plans.items()},
            "weights": {name: one.quantizer_state() for name, one in self.weights.items()},
            "activations": {name: one.quantizer_state() for name, one in self.activations.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state` gave.

        Raises:
            ValueError: if it is of a model that was quantized in another way.
        """
        check_same_plans(state["plans"], {name: plan.settings() for name, plan in self.plans.items()})
        self.state.observers_frozen, self.state.enabled = bool(state["frozen"]), bool(state["active"])
        self.state.fake_quant_enabled, self.state.step = self.state.enabled, int(state["step"])
        self.attached = {name: (str(like), int(place)) for name, (like, place) in state.get("joined", {}).items()}
        self.unused = list(state.get("apart", ()))
        for name, weight in self.weights.items():
            weight.load_quantizer_state(state["weights"][name])
        for name, activation in self.activations.items():
            activation.load_quantizer_state(state["activations"][name])

    @property
    def bits(self) -> float:
        """Bits of a weight, on average over the quantized ones."""
        counts = {name: one.scale.numel() and _count(one) for name, one in self.weights.items()}
        total = sum(counts.values())
        return sum(one.fmt.bits * counts[name] for name, one in self.weights.items()) / total if total else 32.0

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """The bits, and of each weight how far above the quantization's error it stands, in decibels."""
        found = {"bits": self.bits}
        for name, weight_ref in self.quantized_weights().items():
            weight = weight_ref.parameter.detach().float()
            error = (self.weights[name](weight) - weight).square().sum()
            ratio = weight.square().sum().clamp(min=1e-30) / error.clamp(min=1e-30)
            found[f"sqnr_db/{name}"] = float(10 * ratio.log10())
        return found

    def quantized_weights(self) -> dict[str, WeightRef]:
        """The quantized weights by name, each once."""
        return {
            weight_ref.name: weight_ref
            for layer in self.layers.values()
            for weight_ref in layer.weights
            if weight_ref.name in self.weights
        }

    def integer_biases(self) -> dict[str, Tensor]:
        """By layer, the bias that it adds where it is deployed; none for layers that have nothing to round."""
        found = {}
        for name, bias in self.biases.items():
            (weight_ref,) = self.layers[name].weights
            scale = bias.weights.on_grid(weight_ref.parameter.detach())[1]
            if (rounded := bias(self.modules[name]._parameters["bias"], scale)) is not None:
                found[name] = rounded
        return found

    # What it changes --------------------------------------------------------------------------------------------

    def freeze_observers(self) -> None:
        """From now on no range changes any more; those of the weights fit to the weights as they are."""
        if not self.state.observers_frozen:
            for name, weight_ref in self.quantized_weights().items():
                self.weights[name].observe(self.weights[name].channel_groups.split(weight_ref.parameter))
        self.state.observers_frozen = True

    def check_ranges(self, early: bool = False) -> None:
        """Refuse what no grid can be fitted to.

        Args:
            early: whether there have been few batches, after which zeros may still become something else.

        Raises:
            ValueError: if a weight or the range of a place is not finite, or a place has seen nothing but zero; it is
                named.
        """
        for name, weight in self.weights.items():
            if why := weight.invalid_reason():
                raise ValueError(
                    f"The numbers of '{name}' {why}, so there is no grid for them. Look for overflow or division by "
                    f"zero in the loss: a lower learning rate or float32 may help."
                )
        for name, quantizer in self.activations.items():
            if why := quantizer.invalid_reason(zeros=not early):
                raise ValueError(
                    f"The activations at {self._in_words(name)} {why}, so there is no grid for them. Look at the "
                    f"batches and the layers before it, or leave it out: ignore={self.consumers(name)}."
                )

    # Making -----------------------------------------------------------------------------------------------------

    def _make_weights(self, layer: Layer) -> None:
        for weight_ref in layer.weights:
            plan = self._plan_of(weight_ref)
            if plan.weights is None or plan.method.weights is None or weight_ref.name in self.weights:
                continue
            rows = split_channels(weight_ref.name, tuple(weight_ref.parameter.shape), plan.granularity, weight_ref.axis)
            self.weights[weight_ref.name] = WeightFakeQuantize(
                weight_ref.parameter, rows, plan.method.weights, plan.weights, self.state, plan.method.weight_range,
                plan.symmetric, seed=self.seed + len(self.weights),
            )  # fmt: skip

    def _integer_bias(self, layer: Layer, modules: Mapping[str, nn.Module]) -> IntegerBias | None:
        door = self.activations.get(self.placement.inputs.get(layer.name, ""))
        return integer_bias(layer, self.weights, door, modules.get(self.placement.norms.get(layer.name, "")))

    def _plan_of(self, weight_ref: WeightRef) -> LayerPlan:
        """That of its layer; of several that share the weight, that with the most bits."""
        holders = [layer for layer in self.layers.values() if any(one.name == weight_ref.name for one in layer.weights)]
        plans = [self.plans[layer.name] for layer in holders]
        return max(plans, key=lambda plan: 32 if plan.weights is None else plan.weights.bits)

    def _make_site(self, site: ActivationSite) -> None:
        device = next(iter(self.layers.values())).weights[0].parameter.device
        if site.port == GATE:
            self.activations[site.name] = GateFakeQuantize(self.state, device)
            return
        plans = [self.plans[layer] for layer, name in self.placement.inputs.items() if name == site.name]
        takers = [(plan.activations, plan.method) for plan in plans if plan.activations is not None]
        # What only is added or pooled is no layer's input: 8 bits lose nothing there, and cost nothing.
        form, method = max(takers, key=lambda taker: taker[0].bits, default=_plain())
        if method.activations is None:
            raise ValueError(f"No quantizer is given for the activations at '{site.name}'.")
        self.activations[site.name] = ActivationFakeQuantize(
            method.activations, form, self.state, method.range, site.non_negative,
            seed=self.seed + 10_000 + len(self.activations), device=device,
        )  # fmt: skip
        self.activations[site.name].place = self._in_words(site.name)

    def _in_words(self, site: str) -> str:
        return f"'{site}' (input of {', '.join(self.consumers(site)) or 'no layer'})"

    def consumers(self, site: str) -> list[str]:
        return [layer for layer, name in self.placement.inputs.items() if name == site]

    def _errors(self, name: str) -> GradientQuantizer | None:
        layer, plan = self.layers.get(name), self.plans.get(name)
        bits = None if plan is None else self.config.gradient_bits(plan.method)
        if layer is None or plan is None or not layer.computes or plan.method.errors is None or bits is None:
            return None
        return GradientQuantizer(
            plan.method.errors, bits, self.state, seed=self.seed + 20_000 + list(self.layers).index(name)
        )


@dataclass(frozen=True)
class _WeightPlace:
    """Where in its layer a weight is: plain data, so that a copy of the model can be looked through for it."""

    name: str
    path: str
    leaf: str
    axis: int

    def find(self, layer: nn.Module) -> WeightRef:
        owner = layer.get_submodule(self.path)
        return WeightRef(self.name, owner._parameters[self.leaf], owner, self.leaf, self.axis)  # type: ignore[arg-type]


def _place_of(weight_ref: WeightRef, layer: nn.Module) -> _WeightPlace:
    path = next(name for name, module in layer.named_modules() if module is weight_ref.owner)
    return _WeightPlace(weight_ref.name, path, weight_ref.leaf, weight_ref.axis)


def _no_model() -> None:
    """The model of quantizers that were copied, until somebody asks for them with the copy at hand."""


def _count(quantizer: WeightFakeQuantize) -> int:
    return math.prod(quantizer.channel_groups.shape)


def _plain() -> tuple[NumberFormat, ResolvedMethod]:
    form = parse_format(8, "activations")
    assert form is not None
    return form, resolve_method(None, None, form)
