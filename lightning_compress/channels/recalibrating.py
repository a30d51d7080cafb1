"""BatchNorm statistics that are found anew in the training batches that come after a cut."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class Recalibration:
    """Running statistics as plain means over a number of training batches, instead of exponential averages.

    No batch is run for it: every BatchNorm computes a batch's statistics in training anyway. Until the first batch the
    old statistics of the channels that stayed are used.
    """

    def __init__(self, model: nn.Module, batches: int) -> None:
        self.batches, self.left = batches, 0
        self.modules = [one for one in model.modules() if isinstance(one, _BatchNorm) and one.track_running_stats]
        self.momenta: list[float | None] | None = None

    def begin(self, left: int | None = None) -> None:
        """Start, or go on with `left` batches to come."""
        self.left = self.batches if left is None else left
        if not self.left:
            return
        if left is None:
            for module in self.modules:
                if module.training and module.num_batches_tracked is not None:
                    module.num_batches_tracked.zero_()
        self.momenta = self.momenta or [module.momentum for module in self.modules]
        for module in self.modules:
            module.momentum = None

    def batch_done(self) -> None:
        """One training batch went through."""
        if self.left:
            self.left -= 1
            if not self.left:
                self.end()

    def end(self) -> None:
        """Put the momenta back."""
        for module, momentum in zip(self.modules, self.momenta or (), strict=False):
            module.momentum = momentum
        self.momenta = None
