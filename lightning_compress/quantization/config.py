"""What the user asks for, and what follows for each layer: formats, quantizers, granularity."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_compress.core.registry import near_miss, registered
from lightning_compress.nn.selection import Candidate, as_patterns, pattern_matches
from lightning_compress.quantization.functional import quantizers
from lightning_compress.quantization.functional.formats import Bits, NumberFormat, parse_format
from lightning_compress.quantization.functional.granularity import check_granularity
from lightning_compress.quantization.layers import Layer
from lightning_compress.quantization.methods import MethodLike, ResolvedMethod, resolve_method

SETTINGS = ("weights", "activations", "granularity", "method")
EDGE_BITS = 8
# Two products of these with 8 bits fit in the 16 bits in which x86 kernels without VNNI add them.
SATURATION_FREE_BITS = 7


@dataclass(frozen=True)
class QuantizationConfig:
    """How weights and activations are to be quantized, in the words of the user.

    Args:
        weights, activations: bits (2 to 16), "ternary", "binary", "fp16", "bf16", "fp8", "fp8_e5m2", or None: float.
        method: a name in `methods`, {"weights": ..., "activations": ...}, or None: what suits the bits.
        granularity: which weights share a scale: "tensor", "channel" or "group 32".
        symmetric: whether the weights' grids are.
        first, last: bits of the first and the last layer; None: 8, or those of the others if they have more.
        overrides: for single layers by pattern: {"*.head": {"weights": 4, "activations": 8}}; a value that is no dict
            means the weights. The first match counts.
        reduce_range: whether weights of 8 bits beside activations of 8 bits take the codes -63 to 63 alone, on which no
            integer kernel of any CPU saturates; False: -127 to 127, which may be slower to run.
        weight_grad_bits, activation_grad_bits: bits of the gradients of weights and of activations; None: float.
        quantize_output: whether a convolution whose output leaves the network gets a grid of 8 bits there. Integer
            kernels of convolutions need one; those of linear layers do not.

    Raises:
        ValueError: if any of these cannot be.
    """

    weights: Bits = 8
    activations: Bits = 8
    method: MethodLike = None
    granularity: str = "channel"
    symmetric: bool = True
    first: Bits | str = None
    last: Bits | str = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    reduce_range: bool = True
    weight_grad_bits: int | None = None
    activation_grad_bits: int | None = None
    quantize_output: bool = False

    def __post_init__(self) -> None:
        if self.weights is None and self.activations is None:
            raise ValueError("weights=None and activations=None leave nothing to quantize. Give one of them bits.")
        for pattern, settings in self.overrides.items():
            as_patterns(pattern)
            for key in settings if isinstance(settings, Mapping) else ():
                if key not in SETTINGS:
                    raise ValueError(
                        f"overrides[{pattern!r}] has no setting '{key}'.{near_miss(key, SETTINGS)} Settings are "
                        f"{', '.join(SETTINGS)}."
                    )
        for one in [{}, *map(_as_settings, self.overrides.values())]:
            self._planned({**self._settings(), **one})
        for edge in (self.first, self.last):
            parse_format(8 if edge == "same" else edge)
        self._check_backward()

    def _check_backward(self) -> None:
        method = self._planned(self._settings()).method
        bits = {"weight_grad_bits": self.weight_grad_bits, "activation_grad_bits": self.activation_grad_bits}
        for name, one in bits.items():
            if one is not None and (isinstance(one, bool) or not isinstance(one, int) or not 2 <= one <= 16):
                raise ValueError(f"{name} is a number of bits from 2 to 16, or None, but is {one!r}.")
        if self.weight_grad_bits is not None and method.gradients is None and method.errors is None:
            raise ValueError(
                f"weight_grad_bits={self.weight_grad_bits} needs a method that quantizes them: 'dorefa' or 'wage'."
            )
        if self.activation_grad_bits is not None and method.errors is None:
            raise ValueError(
                f"activation_grad_bits={self.activation_grad_bits} needs a method that quantizes them: 'wage' or "
                "'dorefa'."
            )

    def plan_layers(self, layers: list[Layer], order: Iterable[str] | None = None) -> "dict[str, LayerPlan]":
        """What follows for each layer.

        Args:
            layers: in the order of the model.
            order: names in the order of their calls, if known; the first and last layer are those that compute.

        Raises:
            ValueError: if an override matches no layer.
        """
        computing = [layer.name for layer in layers if layer.computes]
        called = [name for name in order if name in computing] if order is not None else computing
        edges = dict(zip(called[:1] + called[-1:], (self.first, self.last), strict=False))
        overridden = self._overridden(layers)
        return {
            layer.name: self._planned(
                {**self._settings(), **self._at_edge(edges, layer.name), **overridden.get(layer.name, {})}
            )
            for layer in layers
        }

    def gradient_bits(self, method: ResolvedMethod) -> int | None:
        """Bits of what flows back from layers; DoReFa's gradients are just that."""
        return (
            self.weight_grad_bits
            if self.activation_grad_bits is None and method.gradients is None
            else self.activation_grad_bits
        )

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in SETTINGS}

    def _at_edge(self, edges: Mapping[str, Any], name: str) -> dict[str, Any]:
        if name not in edges or edges[name] == "same":
            return {}
        bits = edges[name]
        sides = {side: getattr(self, side) for side in ("weights", "activations") if getattr(self, side) is not None}
        if bits is not None:
            return {"method": None, **dict.fromkeys(sides, bits)}
        quant_min = [
            side for side, own in sides.items() if (form := parse_format(own)) is not None and form.bits < EDGE_BITS
        ]
        return {"method": None, **dict.fromkeys(quant_min, EDGE_BITS)} if quant_min else {}

    def _overridden(self, layers: list[Layer]) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for pattern, settings in self.overrides.items():
            (checked,) = as_patterns(pattern)
            named = [
                layer.name for layer in layers if any(pattern_matches(checked, one) for one in _as_candidates(layer))
            ]
            if not named:
                known = [layer.name for layer in layers]
                raise ValueError(
                    f"overrides: '{pattern}' matches no quantized layer.{near_miss(pattern, known)} There are "
                    f"{', '.join(known)}."
                )
            for name in named:
                found.setdefault(name, _as_settings(settings))
        return found

    def _planned(self, settings: Mapping[str, Any]) -> "LayerPlan":
        weights, activations = parse_format(settings["weights"]), parse_format(settings["activations"], "activations")
        if self.reduce_range and all(one is not None and one.name == "8" for one in (weights, activations)):
            weights = parse_format(SATURATION_FREE_BITS)
        check_granularity(settings["granularity"])
        method = resolve_method(settings["method"], weights, activations)
        return LayerPlan(weights, activations, method, settings["granularity"], self.symmetric)


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is quantized."""

    weights: NumberFormat | None
    activations: NumberFormat | None
    method: ResolvedMethod
    granularity: str
    symmetric: bool

    def settings(self) -> dict[str, Any]:
        """Plain values, from which `override_from_settings` makes the plan again."""
        return {
            "weights": None if self.weights is None else self.weights.name,
            "activations": None if self.activations is None else self.activations.name,
            "quantizers": {side: _path(getattr(self.method, side)) for side in ("weights", "activations")},
            "granularity": self.granularity,
            "symmetric": self.symmetric,
        }


def override_from_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `LayerPlan.settings` gave, as one of the `overrides` of a `QuantizationConfig`.

    Raises:
        ValueError: if a quantizer is not one of ours: a checkpoint must not say which code runs.
    """
    found: dict[str, Any] = {}
    for side, path in settings["quantizers"].items():
        if path is not None and path not in registered(quantizers):
            raise ValueError(
                f"The checkpoint's {side} were quantized by '{path}', which is not of this package. Import it "
                f"yourself, and train or evaluate with QuantizationAwareTraining(method=...), which takes the function."
            )
        found[side] = None if path is None else registered(quantizers)[path]
    bits = {side: _bits(settings[side]) for side in ("weights", "activations")}
    return {**bits, "method": found, "granularity": settings["granularity"]}


def check_same_plans(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuse to go on in another way than before; both are the settings of plans by layer.

    Raises:
        ValueError: if a layer's differ; it is named.
    """
    for name in dict.fromkeys([*asked, *saved]):
        before, now = (dict(one.get(name, {})) for one in (saved, asked))
        if before != now:
            different = [key for key in {**before, **now} if before.get(key) != now.get(key)]
            raise ValueError(
                f"'{name}' was quantized with {_words(before, different)} when this was saved, but now "
                f"{_words(now, different)} is asked for.{_range_hint(before, now)} Give QuantizationAwareTraining the "
                f"arguments of that training, or begin anew from its weights alone, by load_from_checkpoint."
            )


def _range_hint(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    reduced = str(SATURATION_FREE_BITS)
    if reduced not in {before.get("weights"), now.get("weights")}:
        return ""
    return f" Weights of 8 bits are {reduced} with reduce_range=True, the default, and 8 with reduce_range=False."


def _words(settings: Mapping[str, Any], keys: list[str]) -> str:
    return ", ".join(f"{key}={settings[key]!r}" for key in keys if key in settings) or "nothing"


def _path(function: Any) -> str | None:
    if function is None:
        return None
    known = {member: name for name, member in registered(quantizers).items()}
    return known.get(function) or f"{function.__module__}.{function.__qualname__}"


def _bits(name: str | None) -> Bits:
    return int(name) if name is not None and name.isdecimal() else name


def _as_settings(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {"weights": value}


def _as_candidates(layer: Layer) -> list[Candidate]:
    return [
        Candidate((weight_ref.name, f"{layer.name}.{weight_ref.leaf}"), weight_ref.parameter, layer.module)
        for weight_ref in layer.weights
    ]
