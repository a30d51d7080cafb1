"""A model whose weights and activations lie on grids while it runs, although nothing in it was replaced."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_compress.core.capture import shown
from lightning_compress.core.flow import Flow
from lightning_compress.core.lookup import call_with_needs
from lightning_compress.quantization.copying import ours
from lightning_compress.quantization.formats import Format, Side, parse
from lightning_compress.quantization.gradients import quantize_gradient
from lightning_compress.quantization.layers import Held, Layer
from lightning_compress.quantization.methods import Method, method_for
from lightning_compress.quantization.modules import ActivationQuantizer, Mode, WeightQuantizer
from lightning_compress.quantization.plan import Request, fallen
from lightning_compress.quantization.rows import cut
from lightning_compress.quantization.sites import Layout, Site, lay_out

_quantized: "WeakKeyDictionary[nn.Module, QuantizedModel]" = WeakKeyDictionary()


class QuantizedModel:
    """Quantizers beside a model, and the hooks by which they act in its forward.

    The model keeps its classes, parameters and `state_dict`: Python looks an attribute up among the instance's own
    before torch looks among its parameters, and there a hook puts the weight on its grid while the layer runs.

    Args:
        model: whose layers they are.
        layers: with the weights to quantize.
        request: how.
        layout: where activations are quantized, in which order layers are called; None until a step was watched.
    """

    def __init__(self, model: nn.Module, layers: list[Layer], request: Request, layout: Layout, seed: int = 0) -> None:
        self.layers = {layer.name: layer for layer in layers}
        self.request, self.layout, self.mode, self.seed = request, layout, Mode(), seed
        self._model = ref(model)
        self.plans = request.plan(layers, layout.order)
        modules = {shown(name): module for name, module in model.named_modules(remove_duplicate=False)}
        self.weights: dict[str, WeightQuantizer] = {}
        self.activations: dict[str, ActivationQuantizer] = {}
        for layer in layers:
            self._make_weights(layer)
        for site in layout.sites:
            self._make_site(site)
        self.modules = {name: modules[name] for name in {*self.layers, *(site.module for site in layout.sites)}}
        self.generator: torch.Generator | None = None
        _quantized[model] = self

    # What acts --------------------------------------------------------------------------------------------------

    def install(self) -> list[RemovableHandle]:
        """Hook the quantizers into the model; they act while `mode.quantizing`."""
        handles = []
        for name, module in self.modules.items():
            doors = {site.port: self.activations[site.name] for site in self.layout.sites if site.module == name}
            end = doors.pop("output", None)
            swap = _Swap(self.layers[name], self.weights) if name in self.layers else None
            back = self._quantizer_of_errors(name)
            by_position = {int(port.split()[1]): quantizer for port, quantizer in doors.items()}
            handles += [
                module.register_forward_pre_hook(_entering(self.mode, by_position, swap), with_kwargs=True),
                module.register_forward_hook(_leaving(self.mode, end, swap, back), with_kwargs=True, always_call=True),
            ]
        return handles

    def draw_anew(self, step: int) -> None:
        """Seed what quantizers draw by the step."""
        device = next(iter(self.layers.values())).weights[0].parameter.device
        for quantizer in self.quantizers():
            quantizer.draw_anew(step, device)
        if self.request.quantizes_backward:
            self.generator = torch.Generator(device).manual_seed((self.seed * 1_000_003 + step + 7) % 2**63)

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

    def learned_by(
        self, optimizers: Iterable[Optimizer]
    ) -> Iterator[tuple[Optimizer, dict[str, nn.Parameter], nn.Parameter]]:
        """What each optimizer is to learn, with a weight whose group shows how: that of the quantizer's own layer."""
        owners = {
            id(one): optimizer
            for optimizer in optimizers
            for group in optimizer.param_groups
            for one in group["params"]
        }
        shown = [
            held.parameter for layer in self.layers.values() for held in layer.weights if id(held.parameter) in owners
        ]
        by_name = {held.name: held.parameter for layer in self.layers.values() for held in layer.weights}
        found: dict[int, tuple[Optimizer, dict[str, nn.Parameter], nn.Parameter]] = {}
        for name, parameter in self.learned().items():
            kind, place, _ = name.split("/")
            like = by_name.get(place) if kind == "weights" else self._taker(place)
            if like is None or id(like) not in owners:
                like = shown[0] if shown else None
            if like is not None:
                optimizer = owners[id(like)]
                found.setdefault(id(optimizer), (optimizer, {}, like))[1][name] = parameter
        yield from found.values()

    def is_of(self, model: nn.Module) -> bool:
        """Whether these are the quantizers of this very module."""
        return self._model() is model

    def unstarted(self) -> list[str]:
        """Places of activations that have seen nothing yet."""
        return [name for name, quantizer in self.activations.items() if not quantizer.started]

    def state(self) -> dict[str, Any]:
        """Tensors and plain values only."""
        return {
            "layout": self.layout.state(),
            "frozen": self.mode.frozen,
            "active": self.mode.active,
            "plans": {name: plan.settings() for name, plan in self.plans.items()},
            "weights": {name: one.state() for name, one in self.weights.items()},
            "activations": {name: one.state() for name, one in self.activations.items()},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take what `state` gave."""
        self.mode.frozen, self.mode.active = bool(state["frozen"]), bool(state["active"])
        self.mode.quantizing = self.mode.active
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
    def signal_to_noise_db(self) -> dict[str, float]:
        """Of each weight, how far above the quantization's error it stands, in decibels."""
        found = {}
        for name, held in self.held().items():
            weight = held.parameter.detach().float()
            error = (self.weights[name](weight) - weight).square().sum()
            found[name] = float(10 * torch.log10(weight.square().sum().clamp(min=1e-30) / error.clamp(min=1e-30)))
        return found

    def held(self) -> dict[str, Held]:
        """The quantized weights by name, each once."""
        return {
            held.name: held for layer in self.layers.values() for held in layer.weights if held.name in self.weights
        }

    # What it changes --------------------------------------------------------------------------------------------

    def change_bits(self, initial: int, share: float) -> None:
        """Set the bits that are due when this share of the way from the initial to the final ones is behind."""
        for quantizer in self.quantizers():
            what: Side = "weights" if isinstance(quantizer, WeightQuantizer) else "activations"
            if quantizer.final.dtype is None and (form := parse(fallen(initial, quantizer.final.bits, share), what)):
                quantizer.change_format(form)

    @torch.no_grad()
    def quantize_weight_gradients(self) -> None:
        """Put what the optimizer gets of each weight on a grid, where the method has one for it."""
        for layer in self.layers.values():
            function, bits = self.plans[layer.name].method.gradients, self.request.gradients
            if function is None or bits is None:
                continue
            for held in layer.weights:
                if held.parameter.grad is not None:
                    offered = {"gradient": held.parameter.grad, "bits": bits, "generator": self.generator}
                    held.parameter.grad.copy_(call_with_needs(function, **offered))

    def _quantizer_of_errors(self, name: str) -> Callable[[Tensor], Tensor] | None:
        layer = self.layers.get(name)
        method = self.plans[name].method if layer is not None and layer.computes else None
        bits = self.request.error_bits(method) if method is not None else None
        if method is None or method.errors is None or bits is None:
            return None
        function = method.errors

        def back(error: Tensor) -> Tensor:
            offered = {"error": error, "gradient": error, "bits": bits, "generator": self.generator}
            found: Tensor = call_with_needs(function, **offered)
            return found

        return back

    @torch.no_grad()
    def add_damping(self, strength: float) -> None:
        """Add the gradient of `strength * sum of (weight - its place on the grid) ** 2`, for what is within the grid.

        Reference: Nagel et al., 2022, section 4.2, https://arxiv.org/abs/2203.11086
        """
        for name, held in self.held().items():
            if held.parameter.grad is not None:
                weight = held.parameter.detach()
                held.parameter.grad.add_(self.weights[name].off_grid(weight), alpha=2 * strength)

    def refuse_senseless_ranges(self) -> None:
        """Refuse what no grid can be fitted to.

        Raises:
            ValueError: if the range of a place is not finite, or holds nothing but zero; the place is named.
        """
        for name, quantizer in self.activations.items():
            if quantizer.started and (why := quantizer.obstacle()):
                raise ValueError(
                    f"The activations at {self._in_words(name)} {why}, so there is no grid for them. Look at the "
                    f"batches and the layers before it, or leave it out: ignore={self._takers(name)}."
                )

    # Making -----------------------------------------------------------------------------------------------------

    def _make_weights(self, layer: Layer) -> None:
        plan = self.plans[layer.name]
        for held in layer.weights:
            if plan.weights is None or plan.method.weights is None or held.name in self.weights:
                continue
            rows = cut(held.name, tuple(held.parameter.shape), plan.granularity, held.axis)
            self.weights[held.name] = WeightQuantizer(
                held.parameter, rows, plan.method.weights, plan.weights, self.mode, plan.method.weight_range,
                plan.symmetric, seed=self.seed + len(self.weights),
            )  # fmt: skip

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
        return f"'{site}' (input of {', '.join(self._takers(site)) or 'no layer'})"

    def _takers(self, site: str) -> list[str]:
        return [layer for layer, name in self.layout.inputs.items() if name == site]

    def _taker(self, site: str) -> nn.Parameter | None:
        takers = self._takers(site)
        return self.layers[takers[0]].weights[0].parameter if takers else None


def _count(quantizer: WeightQuantizer) -> int:
    return math.prod(quantizer.rows.shape)


def quantized_of(model: nn.Module) -> QuantizedModel | None:
    """The quantizers that were made for this very module, if any."""
    return _quantized.get(model)


def layout_of(flow: Flow, model: nn.Module, layers: list[Layer], request: Request) -> Layout:
    """Where the activations of these layers are quantized, by the flow of one step."""
    plans = request.plan(layers)
    computing = [layer.name for layer in layers if layer.computes and plans[layer.name].activations is not None]
    modules = {shown(name): module for name, module in model.named_modules(remove_duplicate=False)}
    bits = [form.bits for name in computing if (form := plans[name].activations) is not None]
    # Below 8 bits papers, and no integer kernel gains, leave what is added up in floating point.
    return lay_out(flow, [layer.name for layer in layers], computing, modules, joins=min(bits, default=8) >= 8)


class _Swap:
    """Puts a layer's weights on their grids for as long as its forward runs."""

    def __init__(self, layer: Layer, quantizers: dict[str, WeightQuantizer]) -> None:
        self.held = [(held, quantizers[held.name]) for held in layer.weights if held.name in quantizers]
        self.recurrent = isinstance(layer.module, nn.RNNBase)

    def put(self, module: nn.Module) -> None:
        # A copy of the module brings its hooks along, so that owners are found anew by where they are.
        for held, quantizer in self.held:
            owner = _owner(module, held)
            owner.__dict__[held.leaf] = quantizer(owner._parameters[held.leaf])
        if self.recurrent:
            names: list[str] = module._flat_weights_names  # type: ignore[assignment]
            module.__dict__["_flat_weights"] = [getattr(module, name) for name in names]

    def take(self, module: nn.Module) -> None:
        for held, _ in self.held:
            _owner(module, held).__dict__.pop(held.leaf, None)
        if self.recurrent:
            names: list[str] = module._flat_weights_names  # type: ignore[assignment]
            module.__dict__["_flat_weights"] = [getattr(module, name) for name in names]


def _owner(module: nn.Module, held: Held) -> nn.Module:
    if isinstance(module, nn.MultiheadAttention) and isinstance(held.owner, nn.Linear):
        return module.out_proj
    return module


def _entering(mode: Mode, doors: dict[int, ActivationQuantizer], swap: _Swap | None) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not mode.active:
            return None
        if swap is not None and mode.quantizing:
            swap.put(module)
        return _with_quantized(args, kwargs, doors) if doors else None

    return ours(hook)


def _leaving(
    mode: Mode, end: ActivationQuantizer | None, swap: _Swap | None, back: Callable[[Tensor], Tensor] | None
) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if swap is not None:
            swap.take(module)
        if not mode.active or not isinstance(output, Tensor):
            return None
        if back is not None and mode.quantizing and output.requires_grad:
            output = quantize_gradient(output, back)
        return output if end is None else end(output)

    return ours(hook)


def _with_quantized(args: Any, kwargs: Any, doors: dict[int, ActivationQuantizer]) -> tuple[Any, Any]:
    """The arguments with the tensors at these positions on their grids."""
    names = [*range(len(args)), *kwargs]
    places = [name for name in names if isinstance(args[name] if isinstance(name, int) else kwargs[name], Tensor)]
    given = {place: args[place] if isinstance(place, int) else kwargs[place] for place in places}
    # Attention asks whether its query, key and value are one tensor: they stay one.
    known = {id(given[places[position]]): quantizer(given[places[position]]) for position, quantizer in doors.items()}
    new_args = [known.get(id(value), value) for value in args]
    return tuple(new_args), {name: known.get(id(value), value) for name, value in kwargs.items()}


def _plain() -> tuple[Format, Method]:
    form = parse(8, "activations")
    assert form is not None
    return form, method_for(None, None, form)
