"""One W&B run for a run that was stopped and goes on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_compress.reporting.checkpoint_report import load


def another_run(before: Sequence[str], now: Sequence[str]) -> str:
    """What to write to go on in the W&B run of before; empty if that is so, or there was none."""
    if not before or not now or set(before) & set(now):
        return ""
    return (
        f"this run goes on from a checkpoint of the W&B run '{before[0]}', but is logged as a new one, '{now[0]}'. To "
        f"go on in the same: WandbLogger(id='{before[0]}', resume='allow')."
    )


def ids_of(checkpoint: str | Path) -> list[str]:
    """The W&B runs that a run was logged to when it wrote a checkpoint with a `CompressionReport`.

    Raises:
        FileNotFoundError, ValueError: if there is no such file, or it is no checkpoint that can be read safely.
    """
    read = load(checkpoint)
    entries = read.get("callbacks", {}) if isinstance(read, dict) else {}
    own = [entry for key, entry in entries.items() if str(key).startswith("lightning_compress/")]
    return [str(run) for entry in own for run in entry.get("wandb", ())]


def go_on(loggers: Sequence[Any], before: Sequence[str]) -> None:
    """Let W&B loggers that have begun no run, and were given no id, go on in these runs."""
    waiting = [one for one in loggers if hasattr(one, "_wandb_init") and one._experiment is None]
    for logger, run in zip(waiting, before, strict=False):
        if logger._wandb_init.get("id") is None:
            logger._wandb_init.update(id=run, resume="allow")
            logger._id = run
