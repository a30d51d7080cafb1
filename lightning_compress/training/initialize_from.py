"""Begin a run with the weights of an earlier one."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lightning_compress._lightning import LightningModule, Trainer, kept_averages, rank_zero_info
from lightning_compress.core.patching import wrapped_method
from lightning_compress.core.phases import Run
from lightning_compress.nn.channel_cut import Cut
from lightning_compress.nn.load_weights import load_weights, reshape_to_checkpoint
from lightning_compress.nn.weight_averages import averaged_copies
from lightning_compress.training.callback import CompressionCallback


class StartFrom(CompressionCallback):
    """Give the module the weights of a checkpoint before the first step; all else of the run begins anew.

    It is what a recipe's `start_from:` puts before its callbacks. A run that is resumed (`fit(ckpt_path=...)`), or one
    Trainer that goes on, keeps its own weights, and does not look for the file.

    Args:
        path: a Lightning checkpoint of this module, or its `state_dict`; also one whose channels were cut.
        name: of its part of a checkpoint.

    Raises:
        FileNotFoundError, ValueError: before training, if the file is not there or not of this module.
    """

    has_phase = False

    def __init__(self, path: str | Path, *, name: str = "start_from") -> None:
        super().__init__(name, every=None)
        self.path = path
        self.cut = Cut()

    def timeline(self, run: Run) -> list[tuple[int, str]]:
        return [(0, f"takes the weights of {self.path}")]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # A checkpoint of this run has the channels of the one it started from; the module is built with all of them.
        rebuild = partial(self._rebuild, trainer, pl_module)
        self.undo.enter_context(wrapped_method(pl_module, "on_load_checkpoint", rebuild))

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.restored or trainer.global_step:
            return
        self.cut = load_weights(pl_module, self.path, averaged_copies(pl_module, kept_averages(trainer)))
        _refuse_further_cuts(self, trainer)
        rank_zero_info(f"'{self.name}': the module has the weights of {self.path}.")

    def checkpoint_state(self) -> dict[str, Any]:
        return {"cut": self.cut.state_dict()}

    def _rebuild(
        self, trainer: Trainer, pl_module: LightningModule, original: Callable[..., Any], checkpoint: dict[str, Any]
    ) -> Any:
        """Give the module the shapes of the checkpoint before its weights are loaded."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is not None:
            self.refuse_damaged(state)
        cut = Cut() if state is None else Cut.from_state_dict(state["cut"])
        for model, prefix in [(pl_module, ""), *averaged_copies(pl_module, kept_averages(trainer))]:
            weights, now = checkpoint["state_dict"], self.cut.restricted_to(prefix)
            reshape_to_checkpoint(model, weights, cut.restricted_to(prefix), now, "The checkpoint")
        self.cut = cut
        return original(checkpoint)


def _refuse_further_cuts(start: StartFrom, trainer: Trainer) -> None:
    cutting = [one for one in trainer.callbacks if one is not start and isinstance(getattr(one, "cut", None), Cut)]
    if start.cut.kept and cutting:
        raise ValueError(
            f"{start.path} is of a module whose channels were cut, and '{cutting[0].name}' would cut more of them. A "
            f"checkpoint of this run could not tell one cut from the other. Start from a module that has all of its "
            f"channels, or leave {type(cutting[0]).__name__} out."
        )
