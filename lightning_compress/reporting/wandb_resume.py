"""One W&B run for a run that was stopped and goes on."""

from collections.abc import Sequence
from pathlib import Path

from lightning_compress.core.checkpoint import load_checkpoint, saved_entries


def new_run_warning(before: Sequence[str], now: Sequence[str]) -> str:
    """What to write to go on in the W&B run of before; empty if that is so, or there was none."""
    if not before or not now or set(before) & set(now):
        return ""
    return (
        f"this run goes on from a checkpoint of the W&B run '{before[0]}', but is logged as a new one, '{now[0]}'. To "
        f"go on in the same: WandbLogger(id='{before[0]}', resume='allow')."
    )


def saved_run_ids(checkpoint: str | Path) -> list[str]:
    """The W&B runs that a run was logged to when it wrote a checkpoint with a `CompressionReport`.

    Raises:
        FileNotFoundError, ValueError: if there is no such file, or it is no checkpoint that can be read safely.
    """
    return [str(run) for entry in saved_entries(load_checkpoint(checkpoint)) for run in entry.get("wandb", ())]
