"""What goes to the loggers a Trainer has, and to W&B beyond plain numbers."""

from typing import Any


def log_now(trainer: Any, metrics: dict[str, float]) -> None:
    """Send numbers to every logger at this step, whatever `log_every_n_steps` says: mask updates are rare."""
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=step)


def wandb_runs(trainer: Any) -> list[Any]:
    """The W&B run of each `WandbLogger` of this rank, if it is the first one."""
    if not trainer.is_global_zero or trainer.fast_dev_run:
        return []
    return [logger.experiment for logger in trainer.loggers if _is_wandb(logger)]


def log_config(trainer: Any, settings: dict[str, Any]) -> None:
    """Add to the config of each W&B run."""
    for run in wandb_runs(trainer):
        run.config.update(settings, allow_val_change=True)


def _is_wandb(logger: object) -> bool:
    return any(cls.__name__ == "WandbLogger" for cls in type(logger).__mro__)


def plain(value: object) -> Any:
    """A value as what a logger or a checkpoint can hold: numbers, texts, lists and mappings of these, or its name."""
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return getattr(value, "__qualname__", None) or repr(value)
