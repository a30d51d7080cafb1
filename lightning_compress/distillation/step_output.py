"""What a training step returns, with another loss in it; and how two losses pull."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def loss_of(output: Any) -> Tensor | None:
    """The loss in what a training step returned: a tensor, or a mapping's "loss"; None if it returned nothing.

    Raises:
        ValueError: if it is of another kind.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if loss is None or isinstance(loss, Tensor):
        return loss
    raise ValueError(
        f"training_step returned {type(output).__name__}{_keys(output)}, which has no loss to add to. Return the "
        f"loss, a dict with 'loss', or None."
    )


def replace_loss(output: Any, loss: Tensor) -> Any:
    """What a training step returned, with `loss` in the place of its own; a mapping is copied."""
    if not isinstance(output, Mapping):
        return loss
    changed: Any = copy.copy(output)
    changed["loss"] = loss
    return changed


def gradient_cosine(task: Tensor, distilled: Tensor, parameters: Iterable[nn.Parameter]) -> float:
    """Cosine of the angle between the gradients of two losses, in [-1, 1]; 0 if one of them is zero.

    Below 0 the two pull apart. Both graphs are kept.
    """
    trained = [one for one in parameters if one.requires_grad]
    sums = torch.zeros(3, device=task.device, dtype=torch.float32)
    pairs = zip(_gradients(task, trained), _gradients(distilled, trained), strict=True)
    for one, other in pairs:
        if one is not None and other is not None:
            sums[0] += (one.float() * other.float()).sum()
        sums[1] += 0 if one is None else one.float().square().sum()
        sums[2] += 0 if other is None else other.float().square().sum()
    length = (sums[1] * sums[2]).sqrt()
    return float(sums[0] / length) if length > 0 else 0.0


def _gradients(loss: Tensor, parameters: list[nn.Parameter]) -> tuple[Tensor | None, ...]:
    if not loss.requires_grad:
        return (None,) * len(parameters)
    return torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)


def _keys(output: Any) -> str:
    return f" with keys {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
