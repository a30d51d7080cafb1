"""Normalizations that stand still in the last part of training, while the rest of the network trains on."""

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class BatchNormFreezer:
    """The BatchNorm modules of a model.

    In eval mode they use their running statistics, which then stay as they are, and which a deployed network has.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = list(modules)
        self.modes: list[bool] | None = None

    @classmethod
    def from_model(cls, model: nn.Module) -> "BatchNormFreezer":
        """All of a model."""
        return cls(module for module in model.modules() if isinstance(module, _BatchNorm))

    def stand_still(self, whether: bool) -> None:
        """Go over to running statistics, again if `train` was called meanwhile; or back to the modes before."""
        if self.modes is None and whether:
            self.modes = [module.training for module in self.modules]
        for module, mode in zip(self.modules, self.modes or (), strict=False):
            module.training = mode and not whether
        if not whether:
            self.modes = None
