"""Begin a run with the weights of an earlier one."""

from pathlib import Path

from lightning_compress._lightning import LightningModule, Trainer, kept_averages, rank_zero_info, rewrap_ddp
from lightning_compress.core.phases import Run
from lightning_compress.nn.load_weights import load_weights
from lightning_compress.nn.weight_averages import averaged_copies
from lightning_compress.training.structural_callback import StructuralCallback, structural_callbacks


class StartFrom(StructuralCallback):
    """Give the module the weights of a checkpoint before the first step; all else of the run begins anew.

    It is what a recipe's `start_from:` puts before its callbacks. A run that is resumed (`fit(ckpt_path=...)`), or one
    Trainer that goes on, keeps its own weights, and does not look for the file.

    Args:
        path: a Lightning checkpoint of this module, or its `state_dict`; also one whose channels were cut, or whose
            modules were replaced.
        name: of its part of a checkpoint.

    Raises:
        FileNotFoundError, ValueError: before training, if the file is not there or not of this module.

    >>> import tempfile
    >>> import torch
    >>> from pytorch_lightning import Trainer
    >>> from pytorch_lightning.demos.boring_classes import BoringModel
    >>> earlier, model = BoringModel(), BoringModel()
    >>> model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.0)  # they stay as they begin
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save(earlier.state_dict(), f"{folder}/earlier.ckpt")
    ...     start = StartFrom(f"{folder}/earlier.ckpt")
    ...     Trainer(barebones=True, accelerator="cpu", max_steps=1, callbacks=start).fit(model)
    >>> torch.equal(model.layer.weight, earlier.layer.weight)
    True
    """

    has_phase = False
    undone = None

    def __init__(self, path: str | Path, *, name: str = "start_from") -> None:
        super().__init__(name, every=None)
        self.path = path

    def timeline(self, run: Run) -> list[tuple[int, str]]:
        return [(0, f"takes the weights of {self.path}")]

    def changes_shapes(self) -> bool:
        return False  # before training begins, not in it

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.restored or trainer.global_step:
            return
        copies = list(averaged_copies(pl_module, kept_averages(trainer)))
        structure, self.replaced = load_weights(pl_module, self.path, copies, trainer.optimizers)
        self.cut = structure.cut
        rewrap_ddp(trainer)
        _refuse_further_cuts(self, trainer)
        rank_zero_info(f"'{self.name}': the module has the weights of {self.path}.")


def _refuse_further_cuts(start: StartFrom, trainer: Trainer) -> None:
    cutting = [one for one in structural_callbacks(trainer) if one.cuts_channels]
    if start.cut.kept and cutting:
        raise ValueError(
            f"{start.path} is of a module whose channels were cut, and '{cutting[0].name}' would cut more of them. A "
            f"checkpoint of this run could not tell one cut from the other. Start from a module that has all of its "
            f"channels, or leave {type(cutting[0]).__name__} out."
        )
