"""Methods by name: which quantizers act on weights, activations and what flows back, and how ranges are found."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from lightning_compress.core.registry import check_signature, find, near_miss
from lightning_compress.quantization.functional import gradients, quantizers
from lightning_compress.quantization.functional.formats import NumberFormat
from lightning_compress.quantization.functional.ranges import RangeEstimator, min_max, mse, percentile
from lightning_compress.quantization.functional.rounding import Quantized

Quantizer: TypeAlias = Callable[..., Quantized]
MethodLike: TypeAlias = str | Quantizer | Mapping[str, str | Quantizer | None] | None
SIDES = ("weights", "activations")
RUNNING, LATEST = RangeEstimator(min_max), RangeEstimator(min_max, None)


@dataclass(frozen=True)
class ResolvedMethod:
    """What acts where.

    Attributes:
        weights, activations: quantizers, None where nothing is quantized.
        range: how the ranges of activations are found and joined, where a quantizer asks for a scale.
        weight_range: the same of weights.
        gradients: of `gradients`: what the optimizer gets of a weight's gradient; None: float.
        errors: of `gradients`: what flows back from a layer to those before it; None: float.
    """

    weights: Quantizer | None = None
    activations: Quantizer | None = None
    range: RangeEstimator = RUNNING
    weight_range: RangeEstimator = LATEST
    gradients: Callable[..., Any] | None = None
    errors: Callable[..., Any] | None = None


@dataclass(frozen=True)
class MethodSpec:
    """What a named method has to offer: for each side its quantizers, of which the first that fits a format is taken.

    A side without any is left to what suits its format: the method is not about it.
    """

    weights: tuple[Quantizer, ...] = ()
    activations: tuple[Quantizer, ...] = ()
    range: RangeEstimator = RUNNING
    weight_range: RangeEstimator = LATEST
    gradients: Callable[..., Any] | None = None
    errors: Callable[..., Any] | None = None

    def for_format(self, side: str) -> tuple[Quantizer, ...]:
        """The quantizers of weights or activations."""
        return self.weights if side == "weights" else self.activations


def _by_range(estimator: Callable[..., Any], momentum: float | None = 0.01) -> MethodSpec:
    uniform = (quantizers.uniform,)
    return MethodSpec(uniform, uniform, RangeEstimator(estimator, momentum), RangeEstimator(estimator, None))


METHODS: Mapping[str, MethodSpec] = {
    "min_max": _by_range(min_max, momentum=None),
    "moving_average": _by_range(min_max),
    "percentile": _by_range(percentile),
    "mse": _by_range(mse),
    "lsq": MethodSpec((quantizers.lsq,), (quantizers.lsq,)),
    "pact": MethodSpec(activations=(quantizers.pact,)),
    # At one bit the paper's weights are those of XNOR-Net.
    "dorefa": MethodSpec(
        (quantizers.dorefa_weights, quantizers.xnor), (quantizers.dorefa_activations,), errors=gradients.dorefa,
    ),
    "twn": MethodSpec((quantizers.twn,)),
    "ttq": MethodSpec((quantizers.ttq,)),
    "binary_connect": MethodSpec((quantizers.binary_connect,)),
    "bnn": MethodSpec((quantizers.binary_connect,), (quantizers.bnn,)),
    "xnor": MethodSpec((quantizers.xnor,), (quantizers.xnor_activations,)),
    "wage": MethodSpec(
        (quantizers.wage_weights,), (quantizers.wage_activations,),
        gradients=gradients.wage_gradients, errors=gradients.wage_errors,
    ),
    "stochastic": MethodSpec((quantizers.stochastic, quantizers.stochastic_binary), (quantizers.stochastic,)),
    "floating": MethodSpec((quantizers.floating,), (quantizers.floating,)),
}  # fmt: skip


def resolve_method(
    method: MethodLike, weights: NumberFormat | None, activations: NumberFormat | None
) -> ResolvedMethod:
    """The quantizers for these formats.

    Args:
        method: a name in `METHODS`; your own quantizer, or a dotted path to it; {"weights": ..., "activations": ...}
            with any of these; or None, here or there: LSQ at 2 to 4 bits and for ternary activations, ranges as moving
            averages above, TWN for ternary and XNOR-Net for binary weights, BNN for binary activations.
        weights, activations: None where nothing is quantized.

    Raises:
        ValueError: if there is no such method, or it is not for these formats.
    """
    wanted = _by_side(method)
    forms = {"weights": weights, "activations": activations}
    named = {side: _named(wanted[side]) for side in SIDES}
    _refuse_unused(method, named, forms)
    taken = {side: _taken(method, named[side], forms, side) for side in SIDES}
    return ResolvedMethod(
        _first_fitting(taken["weights"].weights, weights),
        _first_fitting(taken["activations"].activations, activations),
        taken["activations"].range,
        taken["weights"].weight_range,
        taken["weights"].gradients,
        taken["activations"].errors,
    )


def fitting_methods(form: NumberFormat, side: str) -> list[str]:
    """The names of the methods that put this side on grids of this format."""
    return [name for name, offer in METHODS.items() if _first_fitting(offer.for_format(side), form)]


def default_name(form: NumberFormat, side: str) -> str:
    """The method that suits a format."""
    if form.kind == "float":
        return "floating"
    if form.kind == "binary":
        return "xnor" if side == "weights" else "bnn"
    if form.kind == "ternary":
        return "twn" if side == "weights" else "lsq"
    return "lsq" if form.bits <= 4 else "moving_average"


def _by_side(method: MethodLike) -> dict[str, Any]:
    if not isinstance(method, Mapping):
        return dict.fromkeys(SIDES, method)
    for key in method:
        if key not in SIDES:
            raise ValueError(
                f"method has no side {key!r}.{near_miss(key, SIDES)} Write {{'weights': ..., 'activations': ...}}, or "
                f"one of them."
            )
    return {side: method.get(side) for side in SIDES}


def _named(method: Any) -> MethodSpec:
    if method is None:
        return MethodSpec()
    if isinstance(method, str) and "." not in method:
        if method not in METHODS:
            raise ValueError(
                f"There is no method '{method}'.{near_miss(method, METHODS)} Choose one of {', '.join(METHODS)}, or "
                f"give a dotted path to your own quantizer."
            )
        return METHODS[method]
    own = find(method, quantizers)
    learned: Mapping[str, Any] = getattr(own, "learned", {})
    check_signature(own, (*quantizers.OFFERED, *learned))
    return MethodSpec((own,), (own,))


def _refuse_unused(
    method: MethodLike, named: Mapping[str, MethodSpec], forms: Mapping[str, NumberFormat | None]
) -> None:
    """Refuse a method that is about nothing that is quantized."""
    asked = [side for side in SIDES if not isinstance(method, Mapping) or method.get(side) is not None]
    quantized = [side for side in SIDES if forms[side] is not None]
    about = [side for side in asked if named[side].for_format(side)]
    if method is not None and about and quantized and not set(about) & set(quantized):
        raise ValueError(
            f"method={method!r} is about {' and '.join(about)}, but only {' and '.join(quantized)} are quantized. Give "
            f"{' and '.join(about)} bits too, or write method=None."
        )


def _taken(method: MethodLike, named: MethodSpec, forms: Mapping[str, NumberFormat | None], side: str) -> MethodSpec:
    """The offer whose quantizer acts on this side: the named one's, or that which suits the format."""
    form, wanted = forms[side], _by_side(method)[side]
    if form is None or _first_fitting(named.for_format(side), form):
        return named
    if wanted is None or not (named.for_format(side) or isinstance(method, Mapping)):
        return METHODS[default_name(form, side)]
    (other,) = (one for one in SIDES if one != side)
    keeps = not isinstance(method, Mapping) and _first_fitting(named.for_format(other), forms[other])
    raise ValueError(
        f"method {_shown(wanted)} is not for {side}={_written(form)}{_kinds(named.for_format(side))}. Write None for "
        f"{default_name(form, side)!r}, which suits them, or one of "
        f"{', '.join(map(repr, fitting_methods(form, side)))}."
        + (f" For the {other} alone: method={{{other!r}: {_shown(wanted)}}}." if keeps else "")
    )


def _first_fitting(offered: tuple[Quantizer, ...], form: NumberFormat | None) -> Quantizer | None:
    # A user's own quantizer does not say for which formats it is, and is taken at its word.
    fits = (one for one in offered if form is not None and form.kind in getattr(one, "kinds", (form.kind,)))
    return next(fits, None)


def _kinds(offered: tuple[Quantizer, ...]) -> str:
    kinds = [kind for one in offered for kind in getattr(one, "kinds", ())]
    return f", but for {' or '.join(kinds)} formats" if kinds else ""


def _shown(method: Any) -> str:
    return repr(method) if isinstance(method, str) else str(getattr(method, "__name__", method))


def _written(form: NumberFormat) -> str:
    return form.name if form.kind == "integer" else repr(form.name)
