"""Freeze BatchNorms at their running statistics, or estimate these statistics anew."""

from collections.abc import Iterable
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

# What the user has set, and how many averages are under way: that of one phase may begin before that of another ends.
_momenta: "WeakKeyDictionary[_BatchNorm, tuple[float | None, int]]" = WeakKeyDictionary()


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


class BatchNormRecalibration:
    """The BatchNorms of a model that are training, while their statistics are averaged without forgetting.

    After n batches each statistic is the mean of the n batches' own (`momentum=None`), not a moving average that still
    remembers the weights of long ago.
    """

    def __init__(self) -> None:
        self.norms: list[_BatchNorm] = []
        self.begun = False

    def update(self, now: int, begin: float, length: int, model: nn.Module) -> None:
        """Average from `begin` on for `length`; an average that was interrupted goes on."""
        if begin <= now < begin + length:
            if not self.norms:
                self._begin(model)
        elif self.norms:
            self.end()

    def restart(self) -> None:
        """Forget the average that is under way, if one is: the next one begins anew."""
        self.end()
        self.begun = False

    def end(self) -> None:
        """Moving averages again, as the user has them, unless another average goes on."""
        for module in self.norms:
            momentum, averages = _momenta.pop(module)
            if averages == 1:
                module.momentum = momentum
            else:
                _momenta[module] = momentum, averages - 1
        self.norms.clear()

    def _begin(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.training and module.track_running_stats:
                self.norms.append(module)
                momentum, averages = _momenta.get(module, (module.momentum, 0))
                _momenta[module] = momentum, averages + 1
                module.momentum = None
                if not self.begun:
                    module.reset_running_stats()
        self.begun = True


def has_batchnorm(model: nn.Module) -> bool:
    """Whether there is anything to estimate."""
    return any(isinstance(module, _BatchNorm) and module.track_running_stats for module in model.modules())
