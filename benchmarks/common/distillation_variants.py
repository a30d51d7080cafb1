"""Variants for the distillation benchmark: a student alone, with a teacher by hand, and with `Distillation`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import Distillation
from lightning_compress.recipes.mnist import LeNet5

from .interleaved_timing import TURN_STEPS
from .models import ResNet8, ResNet20

PLAIN, BY_HAND = "plain, no teacher", "teacher by hand"
LIVE, LOGGED, CACHED = (
    "Distillation(teacher)",
    "Distillation(teacher), a logged step",
    "Distillation(teacher, cache=...)",
)
BASES = {BY_HAND: PLAIN, LIVE: BY_HAND, LOGGED: BY_HAND, CACHED: PLAIN}
TEMPERATURE, ALPHA = 4.0, 0.9


@dataclass(frozen=True)
class Task:
    """A student, its teacher, and the shape of an image."""

    student: type[pl.LightningModule]
    teacher: type[pl.LightningModule]
    shape: tuple[int, int, int]

    def make_teacher(self) -> pl.LightningModule:
        torch.manual_seed(1)
        return self.teacher()


TASKS = {
    "LeNet-5": Task(LeNet5, LeNet5, (1, 28, 28)),
    "ResNet-8": Task(ResNet8, ResNet20, (3, 32, 32)),
}


@dataclass(frozen=True)
class VariantSpec:
    """A module, what is added to its run, and how often that logs."""

    make: Callable[[], pl.LightningModule]
    added: Callable[[pl.LightningModule], pl.Callback] | None = None
    log_every_n_steps: int = 50


def plain(task: Task, _folder: str) -> VariantSpec:
    return VariantSpec(task.student)


def by_hand(task: Task, _folder: str) -> VariantSpec:
    """The student's own training_step, with a teacher in it."""
    teacher = task.make_teacher().eval()

    class Taught(task.student):  # type: ignore[name-defined, misc]
        def on_fit_start(self) -> None:
            teacher.to(self.device)

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            images, labels = batch
            logits = self(images)
            with torch.no_grad():
                answers = teacher(images)
            loss = functional.cross_entropy(logits, labels)
            self.log("train_loss", loss)
            ours, theirs = (functional.log_softmax(one / TEMPERATURE, dim=1) for one in (logits, answers))
            divergence = functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
            return (1 - ALPHA) * loss + ALPHA * TEMPERATURE**2 * divergence

    return VariantSpec(Taught)


def live(task: Task, _folder: str, **options: Any) -> VariantSpec:
    def added(_student: pl.LightningModule) -> Distillation:
        return Distillation(task.make_teacher(), temperature=TEMPERATURE, alpha=ALPHA, **options)

    return VariantSpec(task.student, added)


def logged(task: Task, _folder: str) -> VariantSpec:
    return replace(live(task, _folder), log_every_n_steps=1)


def cached(task: Task, folder: str) -> VariantSpec:
    return live(task, folder, cache=folder)


VARIANTS: dict[str, Callable[[Task, str], VariantSpec]] = {
    PLAIN: plain,
    BY_HAND: by_hand,
    LIVE: live,
    LOGGED: logged,
    CACHED: cached,
}


class Batches(TensorDataset):
    """Fetches a whole batch at once, as recipes/mnist.py does."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        rows = torch.tensor(indices)
        return tuple(tensor[rows] for tensor in self.tensors)


def make_data(task: Task, batch: int, epoch_turns: int) -> Batches:
    """Random images for an epoch of a whole number of turns."""
    generator, count = torch.Generator().manual_seed(0), epoch_turns * TURN_STEPS * batch
    images = torch.randn(count, *task.shape, generator=generator)
    return Batches(images, torch.randint(0, 10, (count,), generator=generator))


def loader(data: Batches, batch: int) -> "DataLoader[Any]":
    """In order, so that all variants see the same batches."""
    return DataLoader(data, batch, collate_fn=lambda fetched: fetched)
