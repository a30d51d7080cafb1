"""A quantized model again, from what a checkpoint says of it."""

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_compress.quantization.config import QuantizationConfig, override_from_settings
from lightning_compress.quantization.layers import Layer, quantizable_layers
from lightning_compress.quantization.placement.sites import ActivationPlacement
from lightning_compress.quantization.quantized_model import QuantizedModel


def restore_quantization(model: nn.Module, state: Mapping[str, Any]) -> QuantizedModel:
    """Quantize a module as the state of a `QuantizedModel` says; its hooks are installed for good.

    Args:
        model: with the weights of the same checkpoint, as training goes on with them; they are put on their grids.
        state: what `QuantizedModel.state` gave.

    Raises:
        ValueError: if the module lacks a layer, or the state names code that is not of this package.
    """
    layout = ActivationPlacement.from_state_dict(state["layout"])
    overrides = {f"re:{re.escape(name)}": override_from_settings(plan) for name, plan in state["plans"].items()}
    symmetric = all(plan["symmetric"] for plan in state["plans"].values())
    request = QuantizationConfig(overrides=overrides, symmetric=symmetric, reduce_range=False)
    quantized = QuantizedModel(model, _layers(model, state), request, layout)
    quantized.load_state_dict(state)
    quantized.install()
    if quantized.state.enabled:
        quantized.freeze_observers()
        quantized.convert()
        quantized.latents.clear()
    return quantized


def restrict_state(prefix: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a state that is about the submodule whose names begin with `prefix`, by that module's own names.

    Raises:
        ValueError: if something is quantized outside of it.
    """

    def own(name: str) -> str:
        if not f"{name}.".startswith(prefix):
            raise ValueError(f"'{name}' is quantized outside of '{prefix.removesuffix('.')}': take the whole module.")
        return name[len(prefix) :]

    placement = ActivationPlacement.from_state_dict(state["layout"])
    moved = placement.renamed(own)
    sites = {old.name: new.name for old, new in zip(placement.sites, moved.sites, strict=True)}
    return {
        **state,
        "layout": moved.state_dict(),
        "plans": {own(name): plan for name, plan in state["plans"].items()},
        "weights": {own(name): weight for name, weight in state["weights"].items()},
        "activations": {sites[name]: one for name, one in state["activations"].items()},
    }


def _layers(model: nn.Module, state: Mapping[str, Any]) -> list[Layer]:
    """The layers that the state has plans for, with the weights that it has grids for."""
    found = []
    for layer in quantizable_layers(model)[1]:
        plan = state["plans"].get(layer.name)
        if plan is not None:
            weights = tuple(
                weight_ref
                for weight_ref in layer.weights
                if plan["weights"] is None or weight_ref.name in state["weights"]
            )
            found.append(Layer(layer.name, layer.module, weights))
    known = {layer.name for layer in found} | {weight_ref.name for layer in found for weight_ref in layer.weights}
    if missing := sorted((state["plans"].keys() | state["weights"].keys()) - known):
        raise ValueError(f"{type(model).__name__} has no {', '.join(missing)}, which the checkpoint has grids for.")
    return found
