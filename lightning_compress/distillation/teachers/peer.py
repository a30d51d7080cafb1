"""Mutual learning: a second student that is trained at the same time, and learns from the first."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_compress.core.patching import wrapped_method
from lightning_compress.distillation.auxiliary_optimizer import AuxiliaryOptimizer
from lightning_compress.distillation.batch_fields import detach_tensors
from lightning_compress.distillation.loss_terms import OUTPUT
from lightning_compress.distillation.student_discovery import StudentDiscovery
from lightning_compress.distillation.teachers.network import Teacher, TeacherStep, check_not_shared, copied
from lightning_compress.nn.forward_capture import ForwardCall, ForwardCapture
from lightning_compress.nn.isolation import preserved_random_state


class PeerTeacher(Teacher):
    """Another student that is trained at once, on the same batches; each is the other's teacher.

    Its `training_step` gives its task loss, and it takes its steps with an optimizer like the student's, at the same
    moments and learning rates. It stays outside the student: the callback keeps it, and saves it in its own part of a
    checkpoint. What it logs is dropped. Its dropout has a random stream of its own. Each fit trains a copy of what was
    given; afterwards that copy is `peer`.

    Args:
        module: a LightningModule whose `training_step` takes the same batches and returns a loss.
        seed: of its random stream.

    Reference: Zhang et al., 2018, section 3, https://arxiv.org/abs/1706.00384
    """

    learns = True

    def __init__(self, module: Any, seed: int = 0) -> None:
        if not callable(getattr(module, "training_step", None)):
            raise ValueError(
                f"A peer learns by its own training_step, which {type(module).__name__} does not have. Give a "
                f"LightningModule; a network that does not learn is handed over as it is: teacher=module."
            )
        self.given, self.peer, self.seed = module, module, seed
        self.companion: AuxiliaryOptimizer | None = None
        self._own: tuple[Tensor, dict[str, Any]] | None = None
        self._discovery: StudentDiscovery | None = None

    def attach(self, model: Any, layers: Iterable[str], undo: ExitStack) -> None:
        check_not_shared(self.given, model)
        self.peer = copied(self.given).to(next(model.parameters()).device)
        self.companion, self._own = None, None
        self._capture = ForwardCapture(self.peer, (name for name in layers if name != OUTPUT))
        self._discovery = StudentDiscovery(self.peer)
        undo.callback(self._capture.remove)
        undo.callback(self._discovery.remove)
        for name in ("log", "log_dict"):
            undo.enter_context(wrapped_method(self.peer, name, lambda *_, **__: None))

    def start(self, followed: Optimizer) -> None:
        self.companion = AuxiliaryOptimizer(self.peer, followed)

    def teach(self, call: ForwardCall, step: TeacherStep) -> dict[str, Any]:
        self.peer.train(not step.dry_run)
        with preserved_random_state():
            torch.manual_seed((self.seed << 32) + step.number)
            loss, seen = self._forward(step)
        self._own = loss, {OUTPUT: seen.output, **seen.layers}
        return {name: detach_tensors(value) for name, value in self._own[1].items()}

    def learn(self, distilled: Callable[[dict[str, Any]], Tensor], alpha: float, share: float) -> None:
        """Add the gradient of the peer's own loss."""
        if self._own is not None:
            (loss, outputs), self._own = self._own, None
            (share * ((1 - alpha) * loss + alpha * distilled(outputs))).backward()  # type: ignore[no-untyped-call]

    def after_step(self) -> None:
        if self.companion is not None:
            self.companion.step()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.companion is None else self.companion.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.companion is not None and state:
            self.companion.load_state_dict(state)

    def _forward(self, step: TeacherStep) -> tuple[Tensor, ForwardCall]:
        if self._discovery is None:
            with self._capture.recording():
                loss = _loss(self.peer.training_step(*step.args, **step.kwargs))
                seen = self._capture.pop_calls()
            return loss, seen[-1]
        with self._discovery.recording(), self._capture.recording():
            loss = _loss(self.peer.training_step(*step.args, **step.kwargs))
            root, calls = self._discovery.found()
            self._capture.add(calls[-1])
            seen = self._capture.pop_calls()
        self._discovery.remove()
        self._discovery = None
        self._capture.record_calls_of(root)
        return loss, seen[-1]


def _loss(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        raise ValueError(f"The peer's training_step returned {type(loss).__name__} instead of a loss.")
    return loss
