"""What does not go together: arguments of the callback, and it with other callbacks."""

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_compress.core.conflicts import ExclusiveClaim
from lightning_compress.core.phases import Duration, PhaseWindow, Run, parse_duration, resolve_window
from lightning_compress.quantization.config import QuantizationConfig
from lightning_compress.quantization.layers import Layer


def check_training(calibrate_only: bool, damping: float, times: Mapping[str, Duration | None], **changes: Any) -> None:
    """Refuse a training that cannot be.

    Args:
        calibrate_only: whether the training is to be left as it is.
        damping: a number of 0 or more.
        times: after the beginning of the run, by name; None for never.
        changes: what else would change the training if it is asked for, by name.

    Raises:
        ValueError: if one of them is wrong, or `calibrate_only` is asked for together with a change.
    """
    if isinstance(damping, bool) or not isinstance(damping, int | float) or not damping >= 0:
        raise ValueError(f"damping is a strength of 0 or more, but is {damping!r}. 0.001 is a place to begin.")
    for name, time in times.items():
        if time is not None and parse_duration(time).value == 0:
            raise ValueError(f"{name}={time!r} is the beginning of the run: write at least 1 step, or None for never.")
    asked = [f"{name}={value!r}" for name, value in {"damping": damping, **changes}.items() if value]
    if calibrate_only and asked:
        raise ValueError(
            f"calibrate_only=True leaves the training as it is, but {', '.join(asked)} would change it. Leave out one "
            f"or the other."
        )


def freeze_times(run: Run, times: Mapping[str, Duration | None]) -> dict[str, PhaseWindow]:
    """On which hand of the run's clock each moment lies, as the end of a window; without those that are None.

    Raises:
        ValueError: if the run's length does not tell; the moment is named.
    """
    found = {}
    for name, time in times.items():
        try:
            if time is not None:
                found[name] = resolve_window(0, time, time, run)
        except ValueError as error:
            raise ValueError(f"{name}={time!r} cannot be found in this run. Write steps, or None. {error}") from error
    return found


def check_no_sparse_gradients(layers: Iterable[Layer]) -> None:
    """Refuse to train layers on grids whose weights get sparse gradients: each gradient is changed on its way.

    Raises:
        ValueError: if there is one; it is named.
    """
    for layer in layers:
        if getattr(layer.module, "sparse", False) and any(
            weight_ref.parameter.requires_grad for weight_ref in layer.weights
        ):
            raise ValueError(
                f"'{layer.name}' is an {type(layer.module).__name__}(sparse=True), whose gradients cannot come through "
                f"a grid. Write ignore=['{layer.name}'], or sparse=False."
            )


def quantization_claims(layers: list[Layer], request: QuantizationConfig) -> list[ExclusiveClaim]:
    """What only one callback can do: a model is exported with one set of grids, and binary weights have no zero."""
    plans = request.plan_layers(layers)
    forms = {weight_ref.name: plans[layer.name].weights for layer in layers for weight_ref in layer.weights}
    binary = {one for one, form in forms.items() if form is not None and form.name == "binary"}
    return [
        ExclusiveClaim(
            "quantize",
            frozenset({"the model"}),
            "It is measured, exported and loaded with the grids of one. Put both into one QuantizationAwareTraining: "
            "other bits or methods of some layers go into overrides, layers that stay in floating point into ignore.",
        ),
        ExclusiveClaim(
            "make binary",
            frozenset(binary),
            "But binary weights have no zero: pruned ones would come back as +1. Write weights='ternary', or ignore "
            "these in one of the two callbacks.",
            conflicts_with=frozenset({"prune"}),
        ),
    ]


def learned_names(layers: list[Layer], request: QuantizationConfig) -> list[str]:
    """Names of what the quantizers of these layers learn, such as "step"."""
    methods = [plan.method for plan in request.plan_layers(layers).values()]
    quantizers = [one for method in methods for one in (method.weights, method.activations)]
    return sorted({name for one in quantizers for name in getattr(one, "learned", {})})
