"""Find the student: the module that computes predictions in a training step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_compress.nn.forward_capture import ForwardCall, tensors_in


class StudentDiscovery:
    """Records which modules a training step calls, with hooks that record only inside `recording()`.

    The student is the outermost module whose output needs a gradient while its inputs need none. Modules inside
    compiled ones get no hooks: adding and removing them would recompile the module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.listening = False
        self.calls: list[tuple[str, nn.Module, ForwardCall]] = []
        self._depth = 0
        self._handles = []
        for name, module in _uncompiled(model):
            self._handles += [
                module.register_forward_pre_hook(self._enter),
                module.register_forward_hook(self._leave(name), with_kwargs=True),
            ]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, record calls; earlier recordings are discarded."""
        self.calls.clear()
        self.listening, self._depth = True, 0
        try:
            yield
        finally:
            self.listening = False

    def remove(self) -> None:
        """Remove the hooks and discard the recordings."""
        for handle in self._handles:
            handle.remove()
        self.calls.clear()

    def found(self) -> tuple[nn.Module, list[ForwardCall]]:
        """The student module, and its recorded calls.

        Raises:
            ValueError: if no module fits, or several do, one after the other.
        """
        working = [
            (name, module, call) for name, module, call in self.calls if _needs_gradient(call.output, from_dimension=1)
        ]
        first = [module for _, module, call in working if not _needs_gradient((call.args, call.kwargs))]
        later = [name for name, module, _ in working if first and module is not first[0]]
        if not first:
            seen = ", ".join(dict.fromkeys(name or "the LightningModule" for name, _, _ in self.calls)) or "none"
            raise ValueError(
                f"No module was called in training_step that turns the batch into something with a gradient (modules "
                f"called: {seen}). Name the student: student='net'. What is called by .forward(...) is not seen."
            )
        if later:
            names = list(dict.fromkeys(name for name, _, _ in working))
            raise ValueError(
                f"training_step calls several modules in turn: {', '.join(map(repr, names))}. Name the one that is "
                f"given the batch, and the layer whose output is compared, such as student={names[0]!r}, "
                f"losses={{({names[-1]!r}, 'output'): 'kl_divergence'}}."
            )
        return first[0], [call for _, module, call in working if module is first[0]]

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._depth += self.listening

    def _leave(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self.listening:
                self._depth -= 1
                if self._depth == 0:
                    self.calls.append((name, module, ForwardCall(args, kwargs, output)))

        return hook


def _needs_gradient(value: Any, from_dimension: int = 0) -> bool:
    return any(one.requires_grad and one.ndim >= from_dimension for one in tensors_in(value))


def _uncompiled(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    yield name, model
    # `_orig_mod` marks a wrapper of torch.compile, `_compiled_call_impl` a module that was compiled in place.
    if not isinstance(getattr(model, "_orig_mod", None), nn.Module) and model._compiled_call_impl is None:
        for child, module in model.named_children():
            yield from _uncompiled(module, f"{name}.{child}" if name else child)
