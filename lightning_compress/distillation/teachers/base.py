"""The interface of every teacher, and the training step in which it is called."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.distillation.loss_terms import Names
from lightning_compress.nn.channel_cut import Cut
from lightning_compress.nn.forward_capture import ForwardCall


@dataclass(frozen=True)
class TeacherStep:
    """The training step in which a teacher is called.

    Args:
        args, kwargs: arguments of `training_step`.
        device: of the student.
        number: optimizer steps done before this step.
        dry_run: whether the outputs only serve to check shapes, so that nothing may be learned from them.

    >>> step = TeacherStep(args=(torch.zeros(8, 3), 0), kwargs={}, device=torch.device("cpu"), number=5)
    >>> step.dry_run, step.as_dry_run().dry_run
    (False, True)
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    device: torch.device
    number: int
    dry_run: bool = False

    def as_dry_run(self) -> "TeacherStep":
        """The same step, as a dry run."""
        return replace(self, dry_run=True)


class Teacher:
    """Base class of teachers: a kind of teacher overrides `teach`, and the hooks that it needs.

    >>> class UniformTeacher(Teacher):
    ...     def teach(self, call, step):
    ...         batch = len(call.args[0])
    ...         return {"output": torch.zeros(batch, 10, device=step.device)}
    >>> call = ForwardCall(args=(torch.zeros(8, 3),), kwargs={}, output=None)
    >>> step = TeacherStep((), {}, torch.device("cpu"), number=0)
    >>> UniformTeacher().teach(call, step)["output"].shape
    torch.Size([8, 10])
    """

    module: nn.Module | None = None
    learns = False  # whether it is trained at the same time
    copies_student = False  # whether it is a copy of the student that follows the student's weights
    ready = True  # whether it can teach; a snapshot of the student cannot before it was taken

    def start(self, followed: Optimizer) -> None:
        """Prepare to be trained as the optimizer `followed` trains the student."""

    def names_for(self, student: Names) -> Names:
        """The teacher's layers that are compared with these layers of the student, unless the user names them."""
        return student

    def student_layers(self, names: Names) -> Names:
        """The student's layers whose outputs this teacher needs to answer for the layers `names`."""
        return ()

    def attach(self, model: nn.Module, layers: Iterable[str], undo: ExitStack) -> None:
        """Prepare for a fit of `model`, which contains the student; the outputs of `layers` will be compared."""

    def on_student_changed(self, student: nn.Module) -> None:
        """Called when the student, a submodule of the model, has been found."""

    def snapshot(self) -> None:
        """Copy the student's present weights, if this teacher is a snapshot of the student."""

    def teach(self, call: ForwardCall, step: TeacherStep) -> dict[str, Any]:
        """Compute the outputs for the inputs of the student's `call`, without gradient.

        Returns:
            The model's output, under "output", and the outputs of the layers given to `attach`, by name.
        """
        raise NotImplementedError

    def learn(self, distillation_loss: Callable[[dict[str, Any]], Tensor], alpha: float, share: float) -> None:
        """Learn from the student in turn, if this teacher is trained too.

        Args:
            distillation_loss: function of the teacher's outputs: their distance from the student's.
            alpha: share of the distillation loss in the teacher's loss.
            share: of this batch in an optimizer step.
        """

    def after_step(self) -> None:
        """Called after the student's weights have changed."""

    def on_channels_pruned(self, cut: Cut) -> None:
        """Called after channels of the model were removed: remove them here too, if this teacher has its shapes."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of `state_dict`."""
