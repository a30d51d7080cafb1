"""What is said of a distillation while it runs: its terms, how far the student agrees, how good the teacher is."""

from typing import Any

from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_compress.distillation.cache.sample_keys import teacher_fingerprint
from lightning_compress.distillation.distiller import DistillationOutput, select_logits
from lightning_compress.distillation.objective import DistillationObjective, WeightedTeacher
from lightning_compress.distillation.teachers.network import FunctionTeacher
from lightning_compress.measure.metrics import Agreement
from lightning_compress.training.loggers import wandb_runs


class TeacherMetrics:
    """Metrics over the steps that are logged, and over an epoch of them."""

    def __init__(self) -> None:
        self.agreement: Agreement | None = None
        self.accuracy: MulticlassAccuracy | None = None
        self.metrics: dict[str, float] = {}

    def see(self, taught: DistillationOutput, objective: DistillationObjective, task: float, alpha: float) -> None:
        """Take in one step; `metrics` then has its values."""
        found = {"loss/task": task, "loss/distillation": float(taught.loss.detach()), "alpha": alpha}
        found |= {f"loss/{name}": float(value.detach()) for name, value in taught.values.items()}
        pair = select_logits(taught, objective)
        if pair is not None:
            student, teacher = pair
            self.agreement = (self.agreement or Agreement()).to(student.device)
            found["agreement"] = float(self.agreement(student, teacher))
            target = taught.context.target
            if target is not None and target.shape == teacher.shape[:-1] and not target.is_floating_point():
                if self.accuracy is None:
                    classes = teacher.shape[-1]
                    self.accuracy = MulticlassAccuracy(classes, average="micro", ignore_index=-100)
                accuracy = self.accuracy.to(teacher.device)
                found["teacher_accuracy"] = float(accuracy(teacher.flatten(0, -2), target.flatten()))
        self.metrics = {**found, "temperature": taught.context.temperature}

    def epoch(self) -> dict[str, float]:
        """The means of an epoch's logged steps, over all ranks; they begin anew."""
        metrics = {"agreement_epoch": self.agreement, "teacher_accuracy_epoch": self.accuracy}
        found = {}
        for name, metric in metrics.items():
            if metric is not None and metric.update_called:
                found[name] = float(metric.compute())
                metric.reset()
        return found


def use_teacher(trainer: Any, name: str, tutors: list[WeightedTeacher], files: list[str]) -> None:
    """Tell each W&B run who teaches: fingerprints in its config, and the checkpoint as an artifact that it uses.

    A run that is offline cannot declare what it uses; there the config has to do.
    """
    for run in wandb_runs(trainer):
        prints = [_fingerprint(tutor) for tutor in tutors]
        run.config.update({f"compress/{name}/teachers": prints}, allow_val_change=True)
        if getattr(run, "offline", False) or run.settings.mode in ("offline", "disabled"):
            continue
        import wandb

        for place, file in enumerate(files):
            artifact = wandb.Artifact(f"{name}-teacher-{prints[place][:12]}", type="model", metadata={"path": file})
            artifact.add_file(file)
            run.use_artifact(artifact)


def _fingerprint(tutor: WeightedTeacher) -> str:
    teacher: Any = getattr(tutor.teacher, "teacher", tutor.teacher)
    if isinstance(teacher, FunctionTeacher):
        return _of_function(teacher)
    module = getattr(teacher, "module", None)
    return teacher_fingerprint(module) if isinstance(module, nn.Module) and teacher.ready else type(teacher).__name__


def _of_function(teacher: FunctionTeacher) -> str:
    try:
        return teacher_fingerprint(teacher.function)
    except ValueError:  # a partial, or an object with __call__: it has no code to be known by
        return repr(teacher.function)
