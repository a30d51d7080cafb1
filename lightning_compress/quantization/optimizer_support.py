"""Optimizers that cannot train what quantizers learn: numbers and columns, in a group of their own."""

from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer

from lightning_compress.quantization.config import LayerPlan, QuantizationConfig
from lightning_compress.quantization.layers import Layer


def check_optimizers_supported(
    optimizers: Iterable[Optimizer], layers: list[Layer], request: QuantizationConfig
) -> None:
    """Refuse an optimizer that is to train along what is learned for the layers whose weights it has.

    Raises:
        ValueError: if it cannot; the first such layer is named.
    """
    plans = request.plan_layers(layers)
    learning = {
        weight_ref.parameter: (layer.name, names)
        for layer in layers
        if (names := _learned(layer, plans[layer.name]))
        for weight_ref in layer.weights
    }
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            found = next((learning[one] for one in group["params"] if one in learning), None)
            if found is not None and (why := _obstacle(optimizer, group)):
                layer, names = found
                raise ValueError(
                    f"A {' and a '.join(names)} would be learned beside the weights of '{layer}', but "
                    f"{type(optimizer).__name__}, which trains these, {why}. Take a method that learns nothing, such "
                    f"as method='mse', or another optimizer."
                )


def _learned(layer: Layer, plan: LayerPlan) -> list[str]:
    quantizers = (plan.method.weights, plan.method.activations if layer.computes else None)
    return sorted({name for one in quantizers for name in getattr(one, "learned", {})})


def _obstacle(optimizer: Optimizer, group: dict[str, Any]) -> str | None:
    kinds = [kind.__name__ for kind in type(optimizer).__mro__]
    if "LBFGS" in kinds:
        return "takes no group of parameters beside the one that it was made with"
    # Some have groups for Adam beside theirs, and say so there.
    if group.get("use_muon", any("Muon" in kind for kind in kinds)):
        return "makes the updates of matrices orthogonal, which a single number or a column is none of"
    if "SparseAdam" in kinds:
        return "takes sparse gradients alone"
    return None
