"""Mutual learning: a second student is trained at the same time, and both learn from each other."""

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
from lightning_compress.distillation.step_output import mix_losses
from lightning_compress.distillation.student_discovery import StudentDiscovery
from lightning_compress.distillation.teachers.base import Teacher, TeacherStep
from lightning_compress.distillation.teachers.network import check_not_shared, copy_network
from lightning_compress.nn.forward_capture import ForwardCall, ForwardCapture
from lightning_compress.nn.isolation import preserved_random_state


class PeerTeacher(Teacher):
    """A second student, trained on the same batches; each student is the other's teacher.

    The peer's `training_step` computes its task loss. An optimizer like the student's trains it, at the same steps and
    learning rates. The peer is not part of the student: the callback holds it, and saves it in the callback's part of
    the checkpoint. Its logged values are dropped. Its dropout has a random stream of its own. Each fit trains a copy
    of `module`; afterwards this copy is the attribute `peer`.

    Args:
        module: a LightningModule whose `training_step` takes the same batches and returns a loss.
        seed: of its random stream.

    Reference: Zhang et al., 2018, section 3, https://arxiv.org/abs/1706.00384

    >>> from pytorch_lightning import Trainer
    >>> from pytorch_lightning.demos.boring_classes import BoringModel
    >>> from lightning_compress import Distillation
    >>> given = BoringModel()
    >>> teacher = PeerTeacher(given)
    >>> distillation = Distillation(teacher, losses="logit_mse")
    >>> Trainer(barebones=True, accelerator="cpu", max_steps=1, callbacks=distillation).fit(BoringModel())
    >>> bool((teacher.peer.layer.weight == given.layer.weight).all())  # the peer was trained too
    False
    """

    learns = True

    def __init__(self, module: Any, seed: int = 0) -> None:
        if not callable(getattr(module, "training_step", None)):
            raise ValueError(
                f"A peer is trained with its own training_step, which {type(module).__name__} does not have. Give a "
                f"LightningModule; if the network is not to be trained, pass it as it is: teacher=module."
            )
        self.given, self.peer, self.seed = module, module, seed
        self.optimizer: AuxiliaryOptimizer | None = None
        self._own: tuple[Tensor, dict[str, Any]] | None = None
        self._discovery: StudentDiscovery | None = None

    def attach(self, model: Any, layers: Iterable[str], undo: ExitStack) -> None:
        check_not_shared(self.given, model)
        self.peer = copy_network(self.given).to(next(model.parameters()).device)
        self.optimizer, self._own = None, None
        self._capture = ForwardCapture(self.peer, (name for name in layers if name != OUTPUT))
        self._discovery = StudentDiscovery(self.peer)
        undo.callback(self._capture.remove)
        undo.callback(self._discovery.remove)
        for name in ("log", "log_dict"):
            undo.enter_context(wrapped_method(self.peer, name, lambda *_, **__: None))

    def start(self, followed: Optimizer) -> None:
        self.optimizer = AuxiliaryOptimizer(self.peer, followed)

    def teach(self, call: ForwardCall, step: TeacherStep) -> dict[str, Any]:
        self.peer.train(not step.dry_run)
        with preserved_random_state():
            torch.manual_seed((self.seed << 32) + step.number)
            loss, seen = self._forward(step)
        self._own = loss, {OUTPUT: seen.output, **seen.layers}
        return {name: detach_tensors(value) for name, value in self._own[1].items()}

    def learn(self, distillation_loss: Callable[[dict[str, Any]], Tensor], alpha: float, share: float) -> None:
        """Backward pass of the peer's own loss."""
        if self._own is not None:
            (loss, outputs), self._own = self._own, None
            (share * mix_losses(loss, distillation_loss(outputs), alpha)).backward()  # type: ignore[no-untyped-call]

    def after_step(self) -> None:
        if self.optimizer is not None:
            self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.optimizer is None else self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.optimizer is not None and state:
            self.optimizer.load_state_dict(state)

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
        raise ValueError(
            f"The peer's training_step returned {type(loss).__name__}, which is no loss. Return a scalar tensor, or a "
            f"dict with 'loss'."
        )
    return loss
