"""Whether what is deployed computes what the quantized model computes, place by place.

Each quantizer of what is deployed is given what the model's own quantizer made there, so that a difference is named
where it arises. Numbers may fall to the other side of an edge, when sums are ordered otherwise and BatchNorm is folded:
so what the model has may be whatever lies between what is made of a little less and of a little more.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_compress.core.patching import wrapped_method
from lightning_compress.nn.example_inputs import call_model, check_example, copy_example, describe_shapes
from lightning_compress.nn.isolation import isolated_eval
from lightning_compress.quantization.lowering.deployed_model import DeployedModel
from lightning_compress.quantization.lowering.lower import require_quantized, site_keys
from lightning_compress.quantization.quantized_model import QuantizedModel

# Shares of the largest number at a place, and of the largest output.
A_LITTLE, LARGEST_OUTPUT_DIFFERENCE = 1e-4, 1e-3

Made = dict[str, list[Tensor]]


def check_equivalence(model: nn.Module, deployable: DeployedModel, example: Any) -> None:
    """Run both on an input.

    Args:
        model: that was quantized; it is run in eval mode and left as it was.
        deployable: made of it.
        example: what the model is called with.

    Raises:
        ValueError: if it cannot be called so, or one makes something else than the other; the first place is named.
    """
    check_example(example)
    _check_dtypes(model, deployable)
    quantized = require_quantized(model)
    names = {key: site for site, key in site_keys(quantized.describe()).items()}
    made: Made = defaultdict(list)
    with isolated_eval(model), _noted(quantized, names, made):
        try:
            wanted = _tensors(call_model(model, copy_example(example)))
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} cannot be called with this example_input, {describe_shapes(example)}: {error}"
            ) from error
    with isolated_eval(deployable.module), _forced(quantized, deployable, names, made):
        found = _tensors(call_model(deployable.module, copy_example(example)))
    same = len(found) == len(wanted) and all(map(_near, found, wanted))
    if not same:
        raise ValueError(
            f"What would be written computes something else than this {type(model).__name__}, behind its last "
            f"quantizer. Does its forward draw random numbers in eval mode, or keep numbers from call to call?"
        )


def _check_dtypes(model: nn.Module, deployable: DeployedModel) -> None:
    """Folding, and biases on the grid of a sum, are in float32."""
    own, deployed = ({one.dtype for one in module.parameters()} for module in (model, deployable.module))
    if new := deployed - own:
        raise ValueError(
            f"{type(model).__name__} is {', '.join(map(str, own))}, but parts of what is deployed are {new.pop()}: "
            f".float() the module first."
        )


@contextmanager
def _noted(quantized: QuantizedModel, names: dict[str, str], made: Made) -> Iterator[None]:
    with ExitStack() as undo:
        for key, site in names.items():
            undo.enter_context(wrapped_method(quantized.activations[site], "forward", partial(_note, made[key])))
        yield


def _note(made: list[Tensor], original: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    found = original(values)
    made.append(found.clone())  # what follows may write into it
    return found


@contextmanager
def _forced(quantized: QuantizedModel, deployable: DeployedModel, names: dict[str, str], made: Made) -> Iterator[None]:
    with ExitStack() as undo:
        for key, site in names.items():
            words = (
                f"What would be written computes something else than the quantized model, first at '{site}'. Leave out "
                f"the layer before it, or what takes it: ignore={quantized.consumers(site)}."
            )
            force = partial(_force, iter(made[key]), words)
            undo.enter_context(wrapped_method(deployable.quantizers[key], "forward", force))
        yield


def _force(made: Iterator[Tensor], words: str, original: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    on_grid = next(made, None)
    if on_grid is None or not _between(original, values, on_grid):
        raise ValueError(words)
    return on_grid.clone()


def _between(quantizer: Callable[[Tensor], Tensor], values: Tensor, on_grid: Tensor) -> bool:
    """Whether a grid that never decreases makes this of these values, or of what is next to them."""
    if not isinstance(values, Tensor) or values.is_nested:
        return True
    if values.shape != on_grid.shape:
        return False
    if not values.is_floating_point() or not values.numel():
        return True
    little = A_LITTLE * values.abs().max()
    size = on_grid.abs().max() * A_LITTLE  # the last digits of a step times a whole number
    above, below = quantizer(values + little) + size, quantizer(values - little) - size
    return bool(((on_grid <= above) & (on_grid >= below)).all())


def _near(found: Tensor, wanted: Tensor) -> bool:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    if not wanted.is_floating_point():
        return True
    allowed = LARGEST_OUTPUT_DIFFERENCE * wanted.abs().max() if wanted.numel() else 0.0
    return torch.allclose(found, wanted, rtol=0.0, atol=float(allowed), equal_nan=True)


def _tensors(output: Any) -> list[Tensor]:
    return [one for one in tree_leaves(output) if isinstance(one, Tensor)]
