"""The one place that imports Lightning, under every name that is installed.

`lightning.pytorch` and `pytorch_lightning` hold two separate sets of classes. A callback of ours derives from each
installed one's, so that Trainers and LightningCLI of both names take it for one of theirs. Modules cannot serve two
masters (each Trainer would take the other's methods for overrides): those of our recipes are of the name that was
imported first.
"""

import sys
from collections.abc import Iterable
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

from lightning_utilities.core.overrides import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from pytorch_lightning import LightningDataModule, LightningModule

    class Callback(pl.Callback):
        """With what the Trainer gives each callback."""

        def log(self, name: str, value: Any, **kwargs: Any) -> None: ...

    Trainer: TypeAlias = Any  # its connectors set attributes, such as `callbacks`, that it does not declare
else:

    def _installed() -> list[ModuleType]:
        found = []
        for name in sorted(("pytorch_lightning", "lightning.pytorch"), key=lambda name: name not in sys.modules):
            try:
                found.append(import_module(name))
            except ModuleNotFoundError as error:
                if error.name not in (name, name.partition(".")[0]):
                    raise
        if not found:
            raise ModuleNotFoundError("lightning_compress needs Lightning: pip install 'pytorch-lightning>=2.6.4'")
        return found

    def _of_every_name(name: str) -> type[Any]:
        classes = tuple(dict.fromkeys(getattr(package, name) for package in _PACKAGES))
        return classes[0] if len(classes) == 1 else type(name, classes, {"__module__": __name__})

    _PACKAGES = _installed()
    Callback = _of_every_name("Callback")
    LightningDataModule = _PACKAGES[0].LightningDataModule
    LightningModule = _PACKAGES[0].LightningModule
    Trainer = _PACKAGES[0].Trainer

__all__ = [
    "Callback",
    "LightningDataModule",
    "LightningModule",
    "Trainer",
    "batches_that_stepped",
    "before_batch_transfer",
    "builds_its_layers_late",
    "is_redirected_forward",
    "kept_averages",
    "logs_models",
    "rank_zero_info",
    "rank_zero_warn",
    "resume_wandb_runs",
    "rewrap_ddp",
    "skips_backward",
    "steps_schedules_itself",
]


def builds_its_layers_late(pl_module: LightningModule) -> bool:
    """Whether the module may make its layers in `setup` or `configure_model`, which run after a callback's `setup`."""
    return _overrides(pl_module, "setup", "configure_model")


def steps_schedules_itself(pl_module: LightningModule) -> bool:
    """Whether the module decides by itself what a step of a learning-rate schedule is."""
    return _overrides(pl_module, "lr_scheduler_step")


def _overrides(pl_module: LightningModule, *hooks: str) -> bool:
    base = next(cls for cls in type(pl_module).__mro__ if cls.__name__ == "LightningModule")
    return any(is_overridden(hook, pl_module, base) for hook in hooks)


# Private attributes of Lightning: all that this package touches, so that a new release is mended in one place.


def batches_that_stepped(trainer: Trainer) -> int:
    """The step by which Lightning's own `self.log` marks what it sends to loggers."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def skips_backward(trainer: Trainer) -> bool:
    """Whether this epoch trains nothing (`StochasticWeightAveraging` renews the statistics of BatchNorm in one)."""
    return bool(trainer.fit_loop._skip_backward)


def before_batch_transfer(pl_module: LightningModule, batch: Any) -> Any:
    """What the hook `on_before_batch_transfer` of the module or its DataModule makes of a batch."""
    return pl_module._on_before_batch_transfer(batch, dataloader_idx=0)


def rewrap_ddp(trainer: Trainer) -> None:
    """Let the Trainer's strategy wrap its module again: the buckets of an old wrapper have the old shapes."""
    strategy = trainer.strategy
    if isinstance(getattr(strategy, "model", None), DistributedDataParallel):
        strategy.model = strategy._setup_model(strategy.lightning_module)
        strategy._register_ddp_hooks()


def resume_wandb_runs(loggers: Iterable[Any], run_ids: Iterable[str]) -> None:
    """Let `WandbLogger`s that have started no run, and were given no id, continue these runs."""
    waiting = [logger for logger in loggers if hasattr(logger, "_wandb_init") and logger._experiment is None]
    for logger, run_id in zip(waiting, run_ids, strict=False):
        if logger._wandb_init.get("id") is None:
            logger._wandb_init.update(id=run_id, resume="allow")
            logger._id = run_id


def logs_models(logger: Any) -> bool:
    """Whether a `WandbLogger` sends checkpoints: `WandbLogger(log_model=True)`."""
    return bool(getattr(logger, "_log_model", False))


def kept_averages(trainer: Trainer) -> list[tuple[object, nn.Module]]:
    """Callbacks that keep an averaged copy of the model, such as `WeightAveraging`, each with its copy."""
    pairs = [(callback, getattr(callback, "_average_model", None)) for callback in trainer.callbacks]
    return [(callback, copy) for callback, copy in pairs if isinstance(copy, nn.Module)]


def is_redirected_forward(module: Any) -> bool:
    """Whether a strategy has put its own function in the place of `forward` for this call."""
    return getattr(module.forward, "__qualname__", "").startswith("_ForwardRedirection.")
