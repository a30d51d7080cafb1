"""The one place that imports Lightning, under every name that is installed.

`lightning.pytorch` and `pytorch_lightning` hold two separate sets of classes. A callback of ours derives from each
installed one's, so that Trainers and LightningCLI of both names take it for one of theirs. Modules cannot serve two
masters (each Trainer would take the other's methods for overrides): those of our recipes are of the name that was
imported first.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

from lightning_utilities.core.overrides import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

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
    "builds_its_layers_late",
    "rank_zero_info",
    "rank_zero_warn",
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
