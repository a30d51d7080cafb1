"""Which layers a training step gives features to that the module's forward does not: nobody knows what they need."""

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_compress.channel_pruning.dependency.probe import install_probe, module_name
from lightning_compress.nn.example_inputs import call_model, copy_example


class CallRecorder:
    """The layers with weights that are called while `listening`."""

    def __init__(self, model: nn.Module, features_only: bool) -> None:
        self.names: set[str] = set()
        self.listening = False
        self.features_only = features_only
        self._handles = [
            module.register_forward_pre_hook(self._listener(module_name(name)), with_kwargs=True)
            for name, module in model.named_modules()
            if any(True for _ in module.parameters(recurse=False))
        ]

    def close(self) -> None:
        """Listen no more."""
        self.listening = False
        for handle in self._handles:
            handle.remove()

    def _listener(self, name: str) -> Any:
        def listen(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
            # What comes from the batch itself has no gradient: a teacher's images, say.
            if self.listening and (not self.features_only or any(one.requires_grad for one in given)):
                self.names.add(name)

        return listen


def refuse_other_calls(model: nn.Module, example: Any, seen: set[str]) -> None:
    """Refuse a training step that gives features to layers which `model(example)` does not call.

    Raises:
        ValueError: with the layers.
    """
    calls = CallRecorder(model, features_only=False)
    calls.listening = True
    try:
        with install_probe(model):
            call_model(model, copy_example(example))
    finally:
        calls.close()
    if others := sorted(seen - calls.names):
        raise ValueError(
            f"training_step gives features to {', '.join(map(repr, others))}, which the module's forward does not "
            f"call, so it cannot be told which channels they need. Let forward call them too and return what they give."
        )
