"""The loss in the output of `training_step`: read it, mix it with the distillation loss, put the result back."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def loss_of(output: Any) -> Tensor | None:
    """The loss in the output of `training_step`: the tensor itself, or a mapping's "loss"; None if there is none.

    Raises:
        ValueError: if the output is of another kind.

    >>> loss_of({"loss": torch.tensor(2.0), "logits": torch.zeros(3)})
    tensor(2.)
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if loss is None or isinstance(loss, Tensor):
        return loss
    raise ValueError(
        f"training_step returned {type(output).__name__}{_keys(output)}, which has no loss to add to. Return the "
        f"loss, a dict with 'loss', or None."
    )


def mix_losses(task: Tensor, distillation: Tensor, alpha: float) -> Tensor:
    """`(1 - alpha) * task + alpha * distillation`, with `alpha` in [0, 1].

    >>> mix_losses(torch.tensor(1.0), torch.tensor(5.0), alpha=0.75)
    tensor(4.)
    """
    return (1 - alpha) * task + alpha * distillation


def replace_loss(output: Any, loss: Tensor) -> Any:
    """The output of `training_step` with `loss` in place of its own loss; a mapping is copied.

    >>> output = {"loss": torch.tensor(1.0), "accuracy": 0.5}
    >>> replace_loss(output, torch.tensor(3.0)), output["loss"]
    ({'loss': tensor(3.), 'accuracy': 0.5}, tensor(1.))
    """
    if not isinstance(output, Mapping):
        return loss
    changed: Any = copy.copy(output)
    changed["loss"] = loss
    return changed


def gradient_cosine(task: Tensor, distilled: Tensor, parameters: Iterable[nn.Parameter]) -> float:
    """Cosine of the angle between the gradients of two losses, in [-1, 1]; 0 if one of them is zero.

    Below 0 the losses are in conflict. Both graphs are kept for the backward pass.

    >>> weight = nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> round(gradient_cosine(weight[0], weight.sum(), [weight]), 4)  # (1, 0) and (1, 1)
    0.7071
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
