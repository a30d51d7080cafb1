"""Add a teacher's lessons to a training step that knows nothing of them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from weakref import ref

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress._lightning import LightningModule, Trainer, before_batch_transfer, rank_zero_warn
from lightning_compress.core.arguments import as_schedule
from lightning_compress.core.interpolation import interpolate
from lightning_compress.core.patching import wrapped_method
from lightning_compress.core.phases import Duration, PhaseWindow, Run
from lightning_compress.distillation.arguments import (
    as_teacher_class,
    as_weighted_teachers,
    check_precision,
    check_several,
    check_share,
    check_temperature,
)
from lightning_compress.distillation.batch_fields import Key
from lightning_compress.distillation.cache.format import parse_cache_format
from lightning_compress.distillation.distiller import Distiller
from lightning_compress.distillation.loss_terms import OUTPUT, LossSpec, parse_losses
from lightning_compress.distillation.metrics import TeacherMetrics, use_teacher
from lightning_compress.distillation.nan_guard import NanGuard
from lightning_compress.distillation.objective import DistillationObjective
from lightning_compress.distillation.snapshots import SelfTeachers
from lightning_compress.distillation.step_output import gradient_cosine as cosine_of
from lightning_compress.distillation.step_output import loss_of, mix_losses, replace_loss
from lightning_compress.distillation.teachers.base import Teacher, TeacherStep
from lightning_compress.distillation.teachers.cached import CachedTeacher
from lightning_compress.distillation.teachers.network import BranchTeacher
from lightning_compress.nn.channel_cut import Cut
from lightning_compress.nn.forward_capture import ForwardCall, get_submodule
from lightning_compress.training.callback import CompressionCallback
from lightning_compress.training.clock import describe_run, step_before
from lightning_compress.training.loggers import is_logged
from lightning_compress.training.structural_callback import structural_callbacks

Teachers = str | Path | nn.Module | Teacher | Callable[..., Any] | Sequence[Any]


class Distillation(CompressionCallback):
    """Let a student learn from a teacher: `loss = (1 - alpha) * task + alpha * sum of the distillation losses`.

    The user's `training_step` stays as it is: its loss is replaced on the way to the backward pass, and the student's
    outputs are seen in its own forward pass. The teacher is given what the student is given, in eval mode and without
    gradients; it is kept outside the module, so that no checkpoint, optimizer or process group knows it.

    Args:
        teacher: a module, a LightningModule, the path of a checkpoint (with `teacher_class`), a function of what the
            student is given, an `AveragedTeacher`, `BranchTeacher` or `PeerTeacher`; "self@10%" (any duration): the
            module itself as it stands at that moment of the run, before which nothing is taught, whatever `begin`
            says; or a list of several.
        temperature: by which logits are divided before they become probabilities, above 0.
        alpha: share of the distillation losses, in [0, 1].
        losses: a loss for the outputs, or a mapping of places to losses: "output", a layer's name, or a pair
            `(student's, teacher's)`, to a name in `distillation.losses`, a dotted path, a function, or
            `{"loss": ..., "weight": 1.0, **options}`; see `distillation.loss_terms.parse_losses`.
        student: name of the submodule that is given the batch; None: the one that is seen to work in the first step.
        teacher_class: class, or its dotted path, that loads the checkpoint.
        cache: folder for the teacher's outputs, computed once over the training data and read afterwards.
        cache_form: "full", "float16", or "top-20" for the 20 most probable classes of each sample.
        final_alpha, final_temperature: what they become at `end`; None: they stay.
        schedule: how they get there, as in `Pruning`.
        teacher_weights: how much each of several teachers counts; they are divided by their sum.
        teacher_classes: the classes that each of several teachers knows, in the order of its outputs; a teacher is
            asked about the samples of its own classes only.
        teacher_precision: "32", "bf16" or "16"; None: that of the run.
        teacher_device: where the teacher computes; None: where the student does.
        output, target, mask: which part of an output holds the logits, and which part of a batch the labels and the
            tokens that count: a name, a place or a function. None looks for `logits`, `batch[1]`, `labels` and so on.
        backward: under manual optimization, which of a step's calls of `manual_backward` carries the loss, from 0.
        gradient_cosine: also log the cosine between the gradients of the task and of distillation, at the price of two
            more backward passes at each step that is logged.
        begin, end, every: when: "20%", "3 epochs", "500 steps", an int (optimizer steps) or a float (fraction of the
            run). Outside, and between every `every`th step, the user's loss is as it was.
        seed: of modules that losses bring along; the user's random stream is never touched.
        name: part of the logged keys and of the checkpoint's; two callbacks need two names.

    Raises:
        ValueError: at construction, or in the first training step at the latest, for whatever cannot be done.

    Reference: Hinton et al., 2015, https://arxiv.org/abs/1503.02531

    >>> from copy import deepcopy
    >>> from pytorch_lightning import Trainer
    >>> from pytorch_lightning.demos.boring_classes import BoringModel
    >>> student = BoringModel()
    >>> teacher = deepcopy(student)
    >>> distillation = Distillation(teacher, losses="logit_mse", alpha=1.0)
    >>> Trainer(barebones=True, accelerator="cpu", max_steps=2, callbacks=distillation).fit(student)
    >>> bool((student.layer.weight == teacher.layer.weight).all())  # only the teacher counts, and it agrees already
    True
    """

    progress_metric = "loss/distillation"

    def __init__(
        self,
        teacher: Teachers,
        *,
        temperature: float = 4.0,
        alpha: float = 0.9,
        losses: LossSpec = "kl_divergence",
        student: str | None = None,
        teacher_class: str | type | None = None,
        cache: str | Path | None = None,
        cache_form: str = "full",
        final_alpha: float | None = None,
        final_temperature: float | None = None,
        schedule: str | Callable[[float], float] = "linear",
        teacher_weights: Sequence[float] | None = None,
        teacher_classes: Sequence[Sequence[int]] | None = None,
        teacher_precision: str | None = None,
        teacher_device: str | None = None,
        output: Key | None = None,
        target: Key | None = None,
        mask: Key | None = None,
        backward: int | None = None,
        gradient_cosine: bool = False,
        begin: Duration = "0%",
        end: Duration = "100%",
        every: Duration = "1 steps",
        seed: int = 0,
        name: str = "distillation",
    ) -> None:
        super().__init__(name, begin, end, every)
        self.temperature = check_temperature("temperature", temperature) or 1.0
        self.final_temperature = check_temperature("final_temperature", final_temperature)
        self.alpha = check_share("alpha", alpha) or 0.0
        self.final_alpha = check_share("final_alpha", final_alpha)
        self.schedule = as_schedule(schedule)
        self.losses, self.terms = losses, parse_losses(losses)
        check_several(teacher, teacher_weights, teacher_classes)
        check_precision(teacher_precision)
        parse_cache_format(cache_form)
        self.self_teachers = SelfTeachers(teacher, end)
        self.teacher, self.teacher_class, self.student = teacher, as_teacher_class(teacher_class), student
        self.teacher_weights, self.teacher_classes = teacher_weights, teacher_classes
        self.teacher_precision, self.teacher_device = teacher_precision, teacher_device
        self.cache, self.cache_form = cache, cache_form
        self.output, self.target, self.mask = output, target, mask
        self.backward, self.gradient_cosine, self.seed = backward, gradient_cosine, seed
        self.distiller: Distiller | None = None
        self.finite, self.tracker = NanGuard(), TeacherMetrics()
        self._batch, self._backwards, self._answered = 0, 0, False
        self._module: Callable[[], nn.Module | None] = lambda: None

    def scheduled_window(self, run: Run) -> PhaseWindow:
        return self.self_teachers.window_when_ready(self.end, super().scheduled_window(run), run)

    def timeline(self, run: Run) -> list[tuple[int, str]]:
        times = self.self_teachers.resolve_times(self.end, self.scheduled_window(run), run)
        remembered = [(one, "the module as it is becomes a teacher") for one in times if one is not None]
        return [*remembered, *super().timeline(run)]

    # Before training --------------------------------------------------------------------------------------------

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        objective = DistillationObjective(self.terms, as_weighted_teachers(self), self.output, self.seed)
        self.distiller = Distiller(objective, self.student, self.target, self.mask)
        _refuse_peers(self, trainer)
        _refuse_replaced_copies(self, trainer, pl_module)

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        distiller = self._distiller
        distiller.attach(pl_module, self.undo)
        if self.saved is not None:
            distiller.load_state_dict(self.saved["distiller"])
        elif self._module() is pl_module and trainer.global_step and not self.restored:
            self.self_teachers.carry(distiller.objective.tutors)
        self._module = ref(pl_module)
        self.finite, self.tracker = NanGuard(), TeacherMetrics()
        self.undo.enter_context(wrapped_method(pl_module, "training_step", partial(self._step, trainer, pl_module)))
        if not pl_module.automatic_optimization:
            heard = partial(self._on_backward, trainer, pl_module)
            backward = lambda original, loss, *args, **kwargs: original(heard(loss), *args, **kwargs)
            self.undo.enter_context(wrapped_method(pl_module, "manual_backward", backward))

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _refuse_unnamed_backward(self, trainer, pl_module)
        tutors, window = self._distiller.objective.tutors, self._window
        times = self.self_teachers.resolve_times(self.end, window, describe_run(trainer, pl_module))
        self.self_teachers.start(tutors, times, self._now(trainer), window.begin)
        for optimizer in trainer.optimizers:
            after = lambda stepped, *_: self._distiller.after_step(stepped, _scale(trainer))
            self.undo.callback(optimizer.register_step_post_hook(after).remove)
        use_teacher(trainer, self.name, tutors, self._files)

    def protected_modules(self, pl_module: LightningModule) -> list[str]:
        teachers = self.teacher if isinstance(self.teacher, list | tuple) else [self.teacher]
        branches = [one.layer for one in teachers if isinstance(one, BranchTeacher)]
        names = [*branches, *(name for term in self.terms for name in term.student if name != OUTPUT)]
        for name in names:
            if not list(get_submodule(pl_module, name).parameters()):
                raise ValueError(
                    f"'{self.name}' compares '{name}', which has no weights, so it cannot be told whose channels must "
                    f"stay. Compare the layer before it that has weights."
                )
        return names

    def on_channels_pruned(self, cut: Cut) -> None:
        for tutor in self._distiller.objective.tutors:
            tutor.teacher.on_channels_pruned(cut)

    # At each step -----------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for tutor in self._distiller.objective.tutors:
            teacher = tutor.teacher
            if teacher.module is not None and any(one.training for one in teacher.module.modules()):
                teacher.module.eval()
                rank_zero_warn(f"'{self.name}': somebody put the teacher into training mode; it is in eval mode again.")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch = batch_idx

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._distiller.forget_gradients(optimizer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.finite.check()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.finite.check()
        if not trainer.optimizers:
            self._distiller.after_step(None)
        if self.tracker.metrics:
            metrics, self.tracker.metrics = self.tracker.metrics, {}
            self.log_metrics(trainer, metrics)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if metrics := self.tracker.epoch():
            self.log_metrics(trainer, metrics)

    def checkpoint_state(self) -> dict[str, Any]:
        return {"distiller": self._distiller.state_dict()}

    def alpha_at(self, progress: float) -> float:
        """The share of the distillation losses when the phase has come this far."""
        return _scheduled(self.alpha, self.final_alpha, self.schedule(progress))

    def temperature_at(self, progress: float) -> float:
        """The temperature when the phase has come this far."""
        return _scheduled(self.temperature, self.final_temperature, self.schedule(progress))

    def _step(
        self, trainer: Trainer, pl_module: LightningModule, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        self.self_teachers.snapshot_if_due(self._now(trainer), self._window.begin)
        if self._distiller.ready and not self._is_due(trainer):
            return original(*args, **kwargs)
        self._backwards, self._answered = 0, False
        self._arguments = TeacherStep(args, kwargs, pl_module.device, trainer.global_step)
        with self._distiller.listening():
            output = original(*args, **kwargs)
            if not pl_module.automatic_optimization:
                _refuse_unheard(self)
                return output
            loss = loss_of(output)
            return output if loss is None else replace_loss(output, self._combined(trainer, pl_module, loss))

    def _on_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> Tensor:
        mine = self.backward is None or self.backward == self._backwards
        self._backwards += 1
        if not self._distiller.capture.listening:
            return loss
        if not mine:
            self._distiller.backward_passes()
            return loss
        return self._combined(trainer, pl_module, loss)

    def _combined(self, trainer: Trainer, pl_module: LightningModule, task: Tensor) -> Tensor:
        """The user's loss and the teachers', as `alpha` says."""
        distiller, step, self._answered = self._distiller, self._arguments, True
        calls = distiller.calls()
        if not calls:
            raise ValueError(
                f"'{self.name}': the student was not called in this training_step, so there is nothing to compare. "
                f"Name the module that is given the batch: student='net'. What is called by .forward(...) is not seen."
            )
        if not distiller.ready:
            distiller.prepare(calls[0], step, trainer.optimizers, lambda *of: self._fill(trainer, *of))
        if not self._is_due(trainer):
            distiller.check_shapes(calls, step, self.temperature)
            return task
        progress = self._window.progress(self._now(trainer))
        alpha = self.alpha_at(progress)
        taught = distiller.teach(calls, step, self.temperature_at(progress))
        self.finite.record(taught.loss, taught.answers, self._batch)
        distiller.teach_peers(taught, alpha, 1.0 / trainer.accumulate_grad_batches)
        if is_logged(trainer):
            self.tracker.see(taught, distiller.objective, float(task.detach()), alpha)
            if self.gradient_cosine:
                self.tracker.metrics["gradient_cosine"] = cosine_of(task, taught.loss, pl_module.parameters())
        return mix_losses(task, taught.loss, alpha)

    def _fill(self, trainer: Trainer, teacher: CachedTeacher, call: ForwardCall) -> None:
        """Compute a cache on the first rank, unless it is there, and open it on all."""
        loader = trainer.train_dataloader
        if trainer.is_global_zero:
            with _progress(f"{self.name}: what the teacher says, into {teacher.path}") as tell:
                teacher.fill(call, self._arguments, loader, lambda batch: _on_device(trainer, batch), tell)
        trainer.strategy.barrier()
        teacher.open(loader)

    # When -------------------------------------------------------------------------------------------------------

    def _now(self, trainer: Trainer) -> int:
        """The time before this step, in the unit of the window."""
        return step_before(trainer, self._window.unit)

    def _is_due(self, trainer: Trainer) -> bool:
        window, done = self._window, self._now(trainer)
        return window.begin <= done < window.end and (done - window.begin) % window.every == 0

    @property
    def _distiller(self) -> Distiller:
        if self.distiller is None:
            raise RuntimeError(f"'{self.name}' has not seen a model yet: its teachers are there once fit has begun.")
        return self.distiller

    @property
    def _files(self) -> list[str]:
        several = self.teacher if isinstance(self.teacher, list | tuple) else [self.teacher]
        pairs = zip(several, self.self_teachers.written, strict=True)
        return [str(one) for one, time in pairs if isinstance(one, str | Path) and time is None]


def _scheduled(initial: float, final: float | None, share: float) -> float:
    return initial if final is None else interpolate(initial, final, share)


def _scale(trainer: Trainer) -> float:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def _on_device(trainer: Trainer, batch: Any) -> Any:
    """A batch as the Trainer hands it to training_step."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = before_batch_transfer(trainer.lightning_module, batch)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


@contextmanager
def _progress(words: str) -> Iterator[Callable[[int, int], object]]:
    with RichProgress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), transient=True) as bar:
        task = bar.add_task(words, total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)


def _refuse_peers(distillation: Distillation, trainer: Trainer) -> None:
    """Refuse what a teacher that learns cannot do."""
    if not any(tutor.teacher.learns for tutor in distillation._distiller.objective.tutors):
        return
    if getattr(trainer.precision_plugin, "scaler", None):
        raise ValueError(
            "A PeerTeacher cannot follow a gradient scaler, which would skip the steps of one student and not of the "
            "other. Use precision='bf16-mixed' or '32-true'."
        )
    if learned := [term.label for term in distillation.terms if term.learns]:
        raise ValueError(
            f"{', '.join(learned)} is made for one direction, from teacher to student, but a PeerTeacher learns too. "
            f"Take losses without parameters of their own, such as 'kl_divergence' or 'attention_transfer'."
        )


def _refuse_unnamed_backward(distillation: Distillation, trainer: Trainer, pl_module: LightningModule) -> None:
    if pl_module.automatic_optimization and distillation.backward is not None:
        raise ValueError(
            f"backward={distillation.backward} names one of several manual_backward calls, but this module is under "
            f"automatic optimization, with one loss. Leave it out."
        )
    if not pl_module.automatic_optimization and len(trainer.optimizers) > 1 and distillation.backward is None:
        raise ValueError(
            f"There are {len(trainer.optimizers)} optimizers, and '{distillation.name}' cannot know which loss to add "
            f"to. Name the manual_backward call of a step that carries it, counted from 0: backward=0."
        )


def _refuse_unheard(distillation: Distillation) -> None:
    if not distillation._answered:
        which = "" if distillation.backward is None else f" number {distillation.backward} (backward=)"
        raise ValueError(
            f"'{distillation.name}': this training_step under manual optimization made no call of "
            f"self.manual_backward{which}, which is where the loss is added. Call self.manual_backward(loss) instead "
            f"of loss.backward()."
        )


def _refuse_replaced_copies(distillation: Distillation, trainer: Trainer, pl_module: LightningModule) -> None:
    """A copy of the student as it was has modules that the student has no more, and cannot follow its weights."""
    copies = [tutor.teacher for tutor in distillation._distiller.objective.tutors if tutor.teacher.copies_student]
    replacing = [one.name for one in structural_callbacks(trainer) if one.replaced_modules(pl_module)]
    if copies and replacing:
        raise ValueError(
            f"'{distillation.name}' is taught by {type(copies[0]).__name__}, a copy of the module, but "
            f"'{replacing[0]}' replaces modules of it, which the copy would not follow. Take a teacher of its own, or "
            f"distil in a run after the replacement."
        )
