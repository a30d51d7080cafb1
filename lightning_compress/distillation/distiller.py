"""One fit of a student: what is seen of it, who teaches it, and the loss that comes of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.distillation.auxiliary_optimizer import AuxiliaryOptimizer, optimizer_of
from lightning_compress.distillation.batch_fields import Key, detach_tensors, select_mask, select_target, select_tensor
from lightning_compress.distillation.loss_terms import OUTPUT
from lightning_compress.distillation.objective import DistillationObjective, LossContext, recorded_outputs, weighted_sum
from lightning_compress.distillation.student_discovery import StudentDiscovery
from lightning_compress.distillation.teachers.base import TeacherStep
from lightning_compress.distillation.teachers.cached import CachedTeacher
from lightning_compress.nn.forward_capture import ForwardCall, ForwardCapture, get_submodule, is_compiled


@dataclass(frozen=True)
class DistillationOutput:
    """What came of one step: each term's value, their sum, and who said what in the last call."""

    values: dict[str, Tensor]
    loss: Tensor
    call: ForwardCall
    answers: Sequence[Mapping[str, Any]]
    context: LossContext


class Distiller:
    """Sees a student's calls, asks the teachers, and adds up the terms.

    Args:
        objective: terms and teachers.
        student: name of the module that is given the batch; None: found in the first step.
        target, mask: where a batch has them, see `values`.
    """

    def __init__(
        self, objective: DistillationObjective, student: str | None, target: Key | None, mask: Key | None
    ) -> None:
        self.objective, self.student, self.target, self.mask = objective, student, target, mask
        self.ready, self.attached = False, False
        self.followed: Optimizer | None = None
        self.companion: AuxiliaryOptimizer | None = None
        self._saved: dict[str, Any] = {}

    def attach(self, model: nn.Module, undo: ExitStack) -> None:
        """Put hooks into the model and the teachers; `undo` takes them away.

        Raises:
            ValueError: if a layer or the student is not there, or a teacher is part of the model.
        """
        if self.student is None and is_compiled(model):
            raise ValueError(
                "The whole module is compiled, so that it cannot be seen which part of it is given the batch. Name "
                "the student: student='net'."
            )
        self.model = model
        for tutor in self.objective.tutors:
            tutor.teacher.attach(model, self.objective.teacher_layers(tutor), undo)
        self.attached = True
        self.capture = ForwardCapture(model, self.objective.student_layers())
        undo.callback(self.capture.remove)
        self._discovery = StudentDiscovery(model) if self.student is None else None
        if self._discovery is not None:
            undo.callback(self._discovery.remove)
        else:
            self._follow(get_submodule(model, self.student or ""))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the context, the student's calls are noted."""
        with self.capture.recording(), ExitStack() as also:
            if self._discovery is not None:
                also.enter_context(self._discovery.recording())
            yield

    def calls(self) -> list[ForwardCall]:
        """The student's calls since the last time; those before a backward pass only if there are no later ones.

        Raises:
            ValueError: if it cannot be told which module is the student.
        """
        if self._discovery is not None:
            root, calls = self._discovery.found()
            for call in calls:
                self.capture.add(call)
            self._discovery.remove()
            self._discovery = None
            self._follow(root)
        calls = self.capture.pop_calls()
        return [call for call in calls if not call.older] or calls

    def backward_passes(self) -> None:
        """A backward pass is made of another loss, through graphs of the calls so far."""
        found = [] if self._discovery is None else [call for _, _, call in self._discovery.calls]
        for call in (*self.capture.calls, *found):
            call.older = True

    def prepare(
        self, call: ForwardCall, step: TeacherStep, optimizers: Sequence[Optimizer], fill: Callable[..., Any]
    ) -> None:
        """Get ready with the first call: caches, modules of losses that learn, and what a checkpoint held.

        Args:
            fill: called with each cached teacher, to compute and open its cache.
        """
        for tutor in self.objective.tutors:
            if isinstance(tutor.teacher, CachedTeacher):
                fill(tutor.teacher, call)
        self.followed = optimizer_of(optimizers, self._root) or optimizer_of(optimizers, self.model)
        if any(term.learns for term in self.objective.terms):
            answers = [tutor.teacher.teach(call, step.as_dry_run()) for tutor in self.objective.tutors]
            self.objective.build(call, answers, step.device)
            self.companion = AuxiliaryOptimizer(
                self.objective.learned, self._optimizer("losses with parameters of their own")
            )
        for tutor in self.objective.tutors:
            if tutor.teacher.learns:
                tutor.teacher.start(self._optimizer("a peer"))
        self._take_what_learns(self._saved)
        self.ready = True

    def teach(self, calls: Sequence[ForwardCall], step: TeacherStep, temperature: float) -> DistillationOutput:
        """The loss of these calls of the student, the mean over them.

        Raises:
            ValueError: if student and teacher do not fit.
        """
        found = [self._taught(call, step, temperature) for call in calls]
        if len(found) == 1:
            return found[0]
        last = found[-1]
        values = {name: sum(one.values[name] for one in found) / len(found) for name in last.values}
        return DistillationOutput(values, weighted_sum(values), last.call, last.answers, last.context)  # type: ignore[arg-type]

    def check_shapes(self, calls: Sequence[ForwardCall], step: TeacherStep, temperature: float) -> None:
        """Compute the loss once for nothing, so that what does not fit is known before training time is spent.

        Raises:
            ValueError: if student and teacher do not fit.
        """
        self.objective.learned.eval()  # no running statistics, no queue
        self.teach(calls, step.as_dry_run(), temperature)
        self.objective.learned.train()

    def teach_peers(self, taught: DistillationOutput, alpha: float, share: float) -> None:
        """Let the peers learn from the student's answers in turn; `share` is that of a batch in an optimizer step."""
        ours = {name: detach_tensors(value) for name, value in recorded_outputs(taught.call).items()}
        for tutor in self.objective.tutors:
            if tutor.teacher.learns:
                alone = DistillationObjective(self.objective.terms, [tutor], self.objective.output)
                tutor.teacher.learn(partial(_distance, alone, ours, taught.context), alpha, share)

    def after_step(self, optimizer: Optimizer | None, scale: float = 1.0) -> None:
        """The optimizer has stepped: what trains along follows."""
        if not self.ready or optimizer is not self.followed:
            return
        if self.companion is not None:
            self.companion.step(scale)
        for tutor in self.objective.tutors:
            tutor.teacher.after_step()

    def forget_gradients(self, optimizer: Optimizer | None) -> None:
        """The user drops the gradients of `optimizer`, perhaps without a step."""
        if self.companion is not None and optimizer is self.followed:
            self.companion.forget()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        if not self.attached:
            return self._saved
        learned = {} if self.companion is None else self.companion.state_dict()
        teachers = [tutor.teacher.state_dict() for tutor in self.objective.tutors]
        if not self.ready and self._saved:  # what learns has not taken its part yet
            several = zip(self.objective.tutors, teachers, self._saved["teachers"], strict=True)
            learned = self._saved["learned"]
            teachers = [saved if tutor.teacher.learns else now for tutor, now, saved in several]
        return {"learned": learned, "teachers": teachers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state` gave: at once, but for what learns, which is only there with the first call.

        Raises:
            ValueError: if it is of another number of teachers.
        """
        self._saved = state
        if state and len(state["teachers"]) != len(self.objective.tutors):
            raise ValueError(
                f"The checkpoint has {len(state['teachers'])} teachers, but there are {len(self.objective.tutors)} now."
            )
        self._take(state, learns=False)

    def _take_what_learns(self, state: dict[str, Any]) -> None:
        if state and state["learned"] and self.companion is not None:
            self.companion.load_state_dict(state["learned"])
        self._take(state, learns=True)

    def _take(self, state: dict[str, Any], learns: bool) -> None:
        for tutor, saved in zip(self.objective.tutors, state.get("teachers", ()), strict=bool(state)):
            if tutor.teacher.learns == learns:
                tutor.teacher.load_state_dict(saved)

    def _taught(self, call: ForwardCall, step: TeacherStep, temperature: float) -> DistillationOutput:
        target = select_target(step.args[0] if step.args else None, self.target)
        mask = select_mask(call.output, target) if self.mask is None else select_target(step.args[0], self.mask)
        lesson = LossContext(temperature, target, mask if self.objective.asks_for("mask") else None)
        answers = [tutor.teacher.teach(call, step) for tutor in self.objective.tutors]
        values = self.objective(recorded_outputs(call), answers, lesson)
        return DistillationOutput(values, weighted_sum(values), call, answers, lesson)

    def _follow(self, root: nn.Module) -> None:
        self._root = root
        self.capture.record_calls_of(root)
        for tutor in self.objective.tutors:
            tutor.teacher.on_student_changed(root)

    def _optimizer(self, who: str) -> Optimizer:
        if self.followed is None:
            raise ValueError(
                f"For {who} there must be an optimizer to follow, but none of the Trainer's holds the student's "
                f"weights. Return it from configure_optimizers."
            )
        return self.followed


def _distance(
    objective: DistillationObjective, theirs: Mapping[str, Any], lesson: LossContext, own: Mapping[str, Any]
) -> Tensor:
    return weighted_sum(objective(own, [theirs], lesson))


def select_logits(taught: DistillationOutput, objective: DistillationObjective) -> tuple[Tensor, Tensor] | None:
    """The logits of student and first teacher, if they are of one shape."""
    ours = select_tensor(taught.call.output, objective.output)
    theirs = taught.answers[0].get(OUTPUT)
    if theirs is None:
        return None
    theirs = select_tensor(theirs, objective.output)
    return (ours.detach(), theirs) if ours.shape == theirs.shape and ours.ndim > 1 else None
