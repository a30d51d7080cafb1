"""Weights as they stood at an earlier moment, and back to them: the lottery ticket.

Reference: Frankle et al., 2020, https://arxiv.org/abs/1912.05671
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from lightning_compress.nn.channel_cut import Cut
from lightning_compress.nn.selection import canonical_name
from lightning_compress.nn.surgery import slice_tensor


class Rewinding:
    """Remembers weights at one moment, and puts them back at another, once.

    Args:
        keeps_moments: whether the optimizers' momentum goes on from what it was before.
    """

    def __init__(self, keeps_moments: bool) -> None:
        self.keeps_moments, self.weights, self.done = keeps_moments, dict[str, Tensor](), False
        self.remembered_at: int | None = None

    def update(
        self,
        now: int,
        time: int,
        begin: int,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        others: Iterable["Rewinding"] = (),
    ) -> bool:
        """Do what is due; True if weights have been put back.

        Args:
            now, time, begin: the present time, when weights are stored, and when they are restored, in one unit.
            others: of the same model; what one of them remembers of the same moment is not copied once more.
        """
        if self.done or now < min(time, begin):
            return False
        if not self.weights:
            alike = [one.weights for one in others if one.weights and one.remembered_at == now]
            self.weights = alike[0] if alike else snapshot_weights(model, optimizers)
            self.remembered_at = now
        if now < begin:
            return False
        parameters = restore_weights_(model, optimizers, self.weights)
        if not self.keeps_moments:
            reset_moments(optimizers, parameters)
        self.weights, self.done = {}, True
        return True

    def on_channels_pruned(self, cut: Cut) -> None:
        """The model has been cut: what is remembered of it too."""
        self.weights = {name: slice_tensor(value, cut.kept.get(name, {})) for name, value in self.weights.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "done": self.done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weights, self.done = dict(state["weights"]), state["done"]


def snapshot_weights(model: nn.Module, optimizers: Iterable[Optimizer]) -> dict[str, Tensor]:
    """Copies of the weights that the optimizers train, and of the statistics of BatchNorms, by name."""
    return {name: value.detach().clone() for name, value in _kept(model, optimizers)}


@torch.no_grad()
def restore_weights_(
    model: nn.Module, optimizers: Iterable[Optimizer], weights: Mapping[str, Tensor]
) -> list[nn.Parameter]:
    """Set a model to remembered weights.

    Returns:
        The parameters among what was set.

    Raises:
        ValueError: if a weight has another shape or is gone; nothing is changed then.
    """
    now = dict(_kept(model, optimizers))
    for name, value in weights.items():
        if name not in now or now[name].shape != value.shape:
            found = f"has shape {tuple(now[name].shape)}" if name in now else "is not there"
            raise ValueError(
                f"'{name}' had shape {tuple(value.shape)} when it was remembered and {found} now, so it cannot be "
                f"rewound. Let nothing cut the model between the remembered moment and begin."
            )
    for name, value in weights.items():
        now[name].copy_(value)
    return [now[name] for name in weights if isinstance(now[name], nn.Parameter)]  # type: ignore[misc]


def reset_moments(optimizers: Iterable[Optimizer], parameters: Iterable[nn.Parameter]) -> None:
    """Let the optimizers know nothing of these parameters' past."""
    several = list(parameters)
    for optimizer in optimizers:
        for parameter in several:
            optimizer.state.pop(parameter, None)


def _kept(model: nn.Module, optimizers: Iterable[Optimizer]) -> Iterator[tuple[str, Tensor]]:
    trained = {id(one) for optimizer in optimizers for group in optimizer.param_groups for one in group["params"]}
    for name, parameter in model.named_parameters():
        if id(parameter) in trained:
            yield canonical_name(name), parameter
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            for own, buffer in module.named_buffers(recurse=False):
                yield canonical_name(f"{name}.{own}"), buffer
