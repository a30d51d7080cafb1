"""A model whose weights and activations lie on grids while it runs, although nothing in it was replaced."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_compress.nn.forward_capture import display_name, is_partly_compiled
from lightning_compress.quantization.config import LayerPlan, Request, refuse_other_plans
from lightning_compress.quantization.fake_quantizers import ActivationQuantizer, Mode, WeightQuantizer
from lightning_compress.quantization.forward_hooks import Entering, Errors, Leaving, Swap
from lightning_compress.quantization.functional.formats import Format, parse
from lightning_compress.quantization.functional.granularity import cut
from lightning_compress.quantization.integer_bias import IntegerBias, integer_bias
from lightning_compress.quantization.layers import Held, Layer
from lightning_compress.quantization.methods import Method, method_for
from lightning_compress.quantization.placement.sites import Layout, Site

_quantized: "WeakKeyDictionary[nn.Module, QuantizedModel]" = WeakKeyDictionary()
_awaited: "WeakSet[nn.Module]" = WeakSet()


class QuantizedModel:
    """Quantizers beside a model, and the hooks by which they act in its forward.

    The model keeps its classes, parameters and `state_dict`.

    Args:
        model: whose layers they are.
        layers: with the weights to quantize.
        request: how.
        layout: where activations are quantized, in which order layers are called.

    Attributes:
        trained: whether optimizers train what is learned at the moment.
        joined: what is learned, by name: like which weight, and in which of its optimizer's groups, it is trained.
        apart: layers that were to be quantized and are not, because they have no part in the training.
    """

    def __init__(self, model: nn.Module, layers: list[Layer], request: Request, layout: Layout, seed: int = 0) -> None:
        self.layers = {layer.name: layer for layer in layers}
        self.request, self.layout, self.mode, self.seed = request, layout, Mode(), seed
        self._model, self.trained = ref(model), False
        self.joined: dict[str, tuple[str, int]] = {}
        self.apart: list[str] = []
        self.plans = request.plan(layers, layout.order)
        modules = {display_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
        self.weights: dict[str, WeightQuantizer] = {}
        self.activations: dict[str, ActivationQuantizer] = {}
        for layer in layers:
            self._make_weights(layer)
        for site in layout.sites:
            self._make_site(site)
        self.biases = {layer.name: one for layer in layers if (one := self._integer_bias(layer, modules)) is not None}
        self.modules = {
            name: modules[name] for name in dict.fromkeys([*self.layers, *(site.module for site in layout.sites)])
        }
        _quantized[model] = self

    # What acts --------------------------------------------------------------------------------------------------

    def install(self) -> list[RemovableHandle]:
        """Hook the quantizers into the model; they act while `mode.active`."""
        return [handle for name in self.modules for handle in self._install(name)]

    def _install(self, name: str) -> list[RemovableHandle]:
        module = self.modules[name]
        doors = {site.port: self.activations[site.name] for site in self.layout.sites if site.module == name}
        end = doors.pop("output", None)
        swap = self._swap(name) if name in self.layers else None
        by_position = {int(port.split()[1]): quantizer for port, quantizer in doors.items()}
        entering, leaving = Entering(self.mode, by_position, swap), Leaving(self.mode, end, swap, self._errors(name))
        return [
            module.register_forward_pre_hook(entering, with_kwargs=True),
            module.register_forward_hook(leaving, with_kwargs=True, always_call=True),
        ]

    def _swap(self, name: str) -> Swap:
        return Swap(self.layers[name], self.weights, self.biases.get(name))

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within the context the quantizers are hooked into the model; afterwards nothing of them is left in it."""
        handles = self.install()
        self._forget_compiled()
        try:
            yield
        finally:
            self._forget_compiled()
            for handle in handles:
                handle.remove()
            for name in self.layers:
                # A forward that was interrupted by a key press has left without its hooks.
                self._swap(name).take(self.modules[name])

    def begin(self) -> None:
        """Let the quantized phase begin: what is learned of weights begins with the weights as they are now."""
        if not self.mode.active:
            for name, held in self.held().items():
                self.weights[name].begin(held.parameter)
            self.mode.active = True
            self._forget_compiled()

    def begin_batch(self, number: int, quantizing: bool = True) -> None:
        """Let ranges follow what comes until `end_batch`, and put it on grids, or not."""
        self.begin()
        self.mode.observing, self.mode.quantizing = True, quantizing
        self.draw_anew(number)

    def end_batch(self) -> None:
        """Let ranges stay as they are, and all lie on grids."""
        self.mode.observing, self.mode.quantizing = False, True

    def _forget_compiled(self) -> None:
        """Let compilers trace the model anew: they do not see that hooks or an instance's attributes have changed."""
        model = self._model()
        if model is not None and is_partly_compiled(model):
            torch.compiler.reset()

    def draw_anew(self, step: int) -> None:
        """Let what quantizers draw depend on this number and the seed alone."""
        self.mode.step = step

    # What it knows ----------------------------------------------------------------------------------------------

    def quantizers(self) -> Iterable[WeightQuantizer | ActivationQuantizer]:
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

    def is_of(self, model: nn.Module) -> bool:
        """Whether these are the quantizers of this very module."""
        return self._model() is model

    def unstarted(self) -> list[str]:
        """Places of activations that have seen nothing yet."""
        return [name for name, one in self.activations.items() if not (one.started or one.zeros)]

    def state(self) -> dict[str, Any]:
        """Tensors and plain values only."""
        return {
            "layout": self.layout.state(),
            "frozen": self.mode.frozen,
            "active": self.mode.active,
            "step": self.mode.step,
            "trained": self.trained,
            "joined": {name: list(place) for name, place in self.joined.items()},
            "apart": list(self.apart),
            "plans": {name: plan.settings() for name, plan in self.plans.items()},
            "weights": {name: one.state() for name, one in self.weights.items()},
            "activations": {name: one.state() for name, one in self.activations.items()},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take what `state` gave.

        Raises:
            ValueError: if it is of a model that was quantized in another way.
        """
        refuse_other_plans(state["plans"], {name: plan.settings() for name, plan in self.plans.items()})
        self.mode.frozen, self.mode.active = bool(state["frozen"]), bool(state["active"])
        self.mode.quantizing, self.mode.step = self.mode.active, int(state["step"])
        self.joined = {name: (str(like), int(place)) for name, (like, place) in state.get("joined", {}).items()}
        self.apart = list(state.get("apart", ()))
        for name, weight in self.weights.items():
            weight.load(state["weights"][name])
        for name, activation in self.activations.items():
            activation.load(state["activations"][name])

    @property
    def bits(self) -> float:
        """Bits of a weight, on average over the quantized ones."""
        counts = {name: one.scale.numel() and _count(one) for name, one in self.weights.items()}
        whole = sum(counts.values())
        return sum(one.form.bits * counts[name] for name, one in self.weights.items()) / whole if whole else 32.0

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """The bits, and of each weight how far above the quantization's error it stands, in decibels."""
        found = {"bits": self.bits}
        for name, held in self.held().items():
            weight = held.parameter.detach().float()
            error = (self.weights[name](weight) - weight).square().sum()
            ratio = weight.square().sum().clamp(min=1e-30) / error.clamp(min=1e-30)
            found[f"sqnr_db/{name}"] = float(10 * ratio.log10())
        return found

    def held(self) -> dict[str, Held]:
        """The quantized weights by name, each once."""
        return {
            held.name: held for layer in self.layers.values() for held in layer.weights if held.name in self.weights
        }

    def integer_biases(self) -> dict[str, Tensor]:
        """By layer, the bias that it adds where it is deployed; none for layers that have nothing to round."""
        found = {}
        for name, bias in self.biases.items():
            (held,) = self.layers[name].weights
            scale = bias.weights.on_grid(held.parameter.detach())[1]
            if (rounded := bias(self.modules[name]._parameters["bias"], scale)) is not None:
                found[name] = rounded
        return found

    # What it changes --------------------------------------------------------------------------------------------

    def freeze(self) -> None:
        """From now on no range changes any more; those of the weights fit to the weights as they are."""
        if not self.mode.frozen:
            for name, held in self.held().items():
                self.weights[name].watch(self.weights[name].rows.split(held.parameter))
        self.mode.frozen = True

    def refuse_senseless_ranges(self, early: bool = False) -> None:
        """Refuse what no grid can be fitted to.

        Args:
            early: whether there have been few batches, after which zeros may still become something else.

        Raises:
            ValueError: if a weight or the range of a place is not finite, or a place has seen nothing but zero; it is
                named.
        """
        for name, weight in self.weights.items():
            if why := weight.obstacle():
                raise ValueError(
                    f"The numbers of '{name}' {why}, so there is no grid for them. Look for overflow or division by "
                    f"zero in the loss: a lower learning rate or float32 may help."
                )
        for name, quantizer in self.activations.items():
            if why := quantizer.obstacle(zeros=not early):
                raise ValueError(
                    f"The activations at {self._in_words(name)} {why}, so there is no grid for them. Look at the "
                    f"batches and the layers before it, or leave it out: ignore={self.takers(name)}."
                )

    # Making -----------------------------------------------------------------------------------------------------

    def _make_weights(self, layer: Layer) -> None:
        for held in layer.weights:
            plan = self._plan_of(held)
            if plan.weights is None or plan.method.weights is None or held.name in self.weights:
                continue
            rows = cut(held.name, tuple(held.parameter.shape), plan.granularity, held.axis)
            self.weights[held.name] = WeightQuantizer(
                held.parameter, rows, plan.method.weights, plan.weights, self.mode, plan.method.weight_range,
                plan.symmetric, seed=self.seed + len(self.weights),
            )  # fmt: skip

    def _integer_bias(self, layer: Layer, modules: Mapping[str, nn.Module]) -> IntegerBias | None:
        door = self.activations.get(self.layout.inputs.get(layer.name, ""))
        return integer_bias(layer, self.weights, door, modules.get(self.layout.norms.get(layer.name, "")))

    def _plan_of(self, held: Held) -> LayerPlan:
        """That of its layer; of several that share the weight, that with the most bits."""
        holders = [layer for layer in self.layers.values() if any(one.name == held.name for one in layer.weights)]
        plans = [self.plans[layer.name] for layer in holders]
        return max(plans, key=lambda plan: 32 if plan.weights is None else plan.weights.bits)

    def _make_site(self, site: Site) -> None:
        plans = [self.plans[layer] for layer, name in self.layout.inputs.items() if name == site.name]
        takers = [(plan.activations, plan.method) for plan in plans if plan.activations is not None]
        # What only is added or pooled is no layer's input: 8 bits lose nothing there, and cost nothing.
        form, method = max(takers, key=lambda taker: taker[0].bits, default=_plain())
        device = next(iter(self.layers.values())).weights[0].parameter.device
        if method.activations is None:
            raise ValueError(f"No quantizer is given for the activations at '{site.name}'.")
        self.activations[site.name] = ActivationQuantizer(
            method.activations, form, self.mode, method.range, site.non_negative,
            seed=self.seed + 10_000 + len(self.activations), device=device,
        )  # fmt: skip
        self.activations[site.name].place = self._in_words(site.name)

    def _in_words(self, site: str) -> str:
        return f"'{site}' (input of {', '.join(self.takers(site)) or 'no layer'})"

    def takers(self, site: str) -> list[str]:
        return [layer for layer, name in self.layout.inputs.items() if name == site]

    def _errors(self, name: str) -> Errors | None:
        layer, plan = self.layers.get(name), self.plans.get(name)
        bits = None if plan is None else self.request.error_bits(plan.method)
        if layer is None or plan is None or not layer.computes or plan.method.errors is None or bits is None:
            return None
        return Errors(plan.method.errors, bits, self.mode, seed=self.seed + 20_000 + list(self.layers).index(name))


def _count(quantizer: WeightQuantizer) -> int:
    return math.prod(quantizer.rows.shape)


def quantized_of(model: nn.Module) -> QuantizedModel | None:
    """The quantizers that were made for this very module, if any."""
    return _quantized.get(model)


def await_quantized(model: nn.Module) -> None:
    """From now on this model is one that is to be quantized, and is not yet."""
    _awaited.add(model)


def is_awaited(model: nn.Module) -> bool:
    """Whether a model was to be quantized, and its quantized phase was not reached."""
    return model in _awaited and quantized_of(model) is None


def owner_of(part: nn.Module) -> tuple[nn.Module, str] | None:
    """The model that is quantized, or was to be, of which a module is a part, and its name there with a dot behind."""
    for model in [*_quantized, *_awaited]:
        for name, module in model.named_modules() if model is not part else ():
            if module is part:
                return model, f"{display_name(name)}."
    return None


def _plain() -> tuple[Format, Method]:
    form = parse(8, "activations")
    assert form is not None
    return form, method_for(None, None, form)
