"""Statistics of BatchNorms estimated anew, as the plain average over the batches of a while."""

from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

# What the user has set, and how many averages are under way: that of one phase may begin before that of another ends.
_momenta: "WeakKeyDictionary[_BatchNorm, tuple[float | None, int]]" = WeakKeyDictionary()


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
