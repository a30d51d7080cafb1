"""What goes to the loggers a Trainer has, and to W&B beyond plain numbers."""

import json
import warnings
from typing import Any

from lightning_compress._lightning import batches_that_stepped

MLFLOW_TAG_CHARACTERS = 5000

# What we log is equal on all ranks, or of the first alone: there is nothing to accumulate, as Lightning recommends.
warnings.filterwarnings("ignore", message=r"It is recommended to use `self\.log\('compress/")


def log_immediately(trainer: Any, metrics: dict[str, float]) -> None:
    """Send numbers to every logger at this step, whatever `log_every_n_steps` says: mask updates are rare."""
    step = batches_that_stepped(trainer)
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=step)


def is_logged(trainer: Any) -> bool:
    """Whether the step that is being taken is one of those that the Trainer logs."""
    every = trainer.log_every_n_steps
    return bool(every) and (batches_that_stepped(trainer) + 1) % every == 0


def loggers_of_kind(trainer: Any, kind: str) -> list[Any]:
    """The loggers of a kind, by the name of its class, of this rank if it is the first one; none in a dry run."""
    if not trainer.is_global_zero or trainer.fast_dev_run:
        return []
    return [one for one in trainer.loggers if any(cls.__name__ == kind for cls in type(one).__mro__)]


def wandb_runs(trainer: Any) -> list[Any]:
    """The W&B run of each `WandbLogger`."""
    return [logger.experiment for logger in loggers_of_kind(trainer, "WandbLogger")]


def log_config(trainer: Any, settings: dict[str, Any]) -> None:
    """Add to the config of each run in W&B, and to what comes nearest to it elsewhere.

    Args:
        settings: plain values by name.
    """
    for run in wandb_runs(trainer):
        run.config.update(settings, allow_val_change=True)
    for logger in loggers_of_kind(trainer, "CSVLogger"):
        logger.log_hyperparams(settings)
    texts = {name: json.dumps(value, indent=2, default=str) for name, value in settings.items()}
    for logger in loggers_of_kind(trainer, "TensorBoardLogger"):
        for name, text in texts.items():
            logger.experiment.add_text(f"{name}/settings", f"```json\n{text}\n```", trainer.global_step)
    for logger in loggers_of_kind(trainer, "MLFlowLogger"):
        for name, text in texts.items():
            logger.experiment.set_tag(logger.run_id, name, text[:MLFLOW_TAG_CHARACTERS])


def plain_value(value: object) -> Any:
    """A value as what a logger or a checkpoint can hold: numbers, texts, lists and mappings of these, or its name."""
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, dict):
        return {str(key): plain_value(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(entry) for entry in value]
    return getattr(value, "__qualname__", None) or repr(value)
