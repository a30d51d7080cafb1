"""The clock of a Trainer's run: its steps, batches and epochs, before and after the step that is being taken."""

import math
from collections.abc import Callable
from typing import Any

from lightning_compress._lightning import LightningModule, Trainer
from lightning_compress.core.phases import Run


def step_after(trainer: Trainer, unit: str) -> int:
    """How many steps, batches or epochs of the run are done when the step that is being taken is."""
    return _COUNTERS[unit](trainer)


def step_before(trainer: Trainer, unit: str) -> int:
    """How many steps, batches or epochs of the run were done before the step that is being taken."""
    return step_after(trainer, unit) - (unit != "epochs")


def describe_run(trainer: Trainer, pl_module: LightningModule) -> Run:
    """What the Trainer knows of the length of its run."""
    batches = trainer.num_training_batches
    changing = any(hasattr(callback, "scheduling") for callback in trainer.callbacks)
    return Run(
        epochs=None if trainer.max_epochs in (None, -1) else trainer.max_epochs,
        max_steps=None if trainer.max_steps == -1 else trainer.max_steps,
        batches_per_epoch=None if math.isinf(batches) else int(batches),
        accumulate=trainer.accumulate_grad_batches,
        automatic=pl_module.automatic_optimization and not changing,
        max_time=has_timer(trainer),
        dry_run=bool(trainer.fast_dev_run),
    )


def has_timer(trainer: Trainer) -> bool:
    """Whether the run may end before its last step, because its time is up."""
    return any(type(callback).__name__ == "Timer" for callback in trainer.callbacks)


_COUNTERS: dict[str, Callable[[Any], int]] = {
    "steps": lambda trainer: trainer.global_step + 1,
    "batches": lambda trainer: trainer.fit_loop.epoch_loop.batch_progress.total.ready,
    "epochs": lambda trainer: trainer.current_epoch,
}
