"""What a model is really called with: seen during the user's own forward pass."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


@dataclass(frozen=True)
class RecordedInput:
    """A part of a model that holds all its parameters, and what it was called with: a tuple, or a dict of keywords."""

    part: str
    example: Any


class InputRecorder:
    """Record the first call of a model, or of the one submodule that holds all of its parameters.

    Args:
        model: is hooked until `close`.
        skip: whether a module is called for another reason just now, such as Lightning's way into a training step.
    """

    def __init__(self, model: nn.Module, skip: Callable[[nn.Module], bool] = lambda _: False) -> None:
        self.skip = skip
        self.call: RecordedInput | None = None
        parts = {"": model, **dict(model.named_children())}
        all_parameters = {id(parameter) for parameter in model.parameters()}
        full = {name: part for name, part in parts.items() if {id(one) for one in part.parameters()} == all_parameters}
        self.handles = [
            part.register_forward_pre_hook(self._listener(name), with_kwargs=True) for name, part in full.items()
        ]

    def close(self) -> None:
        """Listen no more."""
        for handle in self.handles:
            handle.remove()

    def _listener(self, name: str) -> Callable[..., None]:
        def listen(part: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            # Positional and keyword arguments at once are no example that `report` takes.
            if self.call is None and not (arguments and keywords) and not self.skip(part):
                self.call = RecordedInput(name, tree_map(_apart, keywords or arguments))

        return listen


@torch.no_grad()
def _apart(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
