"""When everything in a recipe happens, known before anything runs."""

from collections.abc import Iterable, Mapping
from io import StringIO
from typing import TYPE_CHECKING, Any

from lightning_compress.core.conflicts import phase_windows, refuse_late_cuts, refuse_outside
from lightning_compress.core.phases import Run, resolve_window
from lightning_compress.training.callback import CompressionCallback

if TYPE_CHECKING:
    from rich.table import Table

Row = tuple[str, str, str]
UNITS = {"steps": "step", "batches": "batch", "epochs": "epoch"}
MOMENTS_SHOWN = 12
LIGHTNINGS_EPOCHS = 1000  # what a Trainer without max_epochs, max_steps and max_time trains for


def run_from_length(length: Any) -> Run:
    """What is known of a run's length without its data.

    Args:
        length: optimizer steps, a `Run`, a Trainer, or a Trainer's arguments.

    Raises:
        ValueError: if it is none of these.
    """
    if isinstance(length, Run):
        return length
    if isinstance(length, int) and not isinstance(length, bool) and length > 0:
        return Run(epochs=None, max_steps=length)
    if isinstance(length, Mapping):
        return _of_arguments(length)
    if hasattr(length, "max_epochs") and hasattr(length, "limit_train_batches"):
        return _of_trainer(length)
    raise ValueError(f"A run's length is a number of optimizer steps above 0 or a Trainer, but is {length!r}.")


def describe_run_length(run: Run) -> str:
    """A sentence about the run, and what cannot be known of it without its data."""
    if run.steps is not None:
        return f"A run of {run.steps:,} optimizer steps."
    if run.epochs is None and run.max_steps is None:
        return f"A run without a number of epochs or steps{', which ends by max_time' if run.max_time else ''}."
    limits = [f"{run.epochs} epochs" if run.epochs else "", f"at most {run.max_steps} steps" if run.max_steps else ""]
    return (
        f"A run of {', '.join(filter(None, limits))}. How many optimizer steps an epoch has cannot be known without "
        f"the data; give the number of batches (--batches, or limit_train_batches as an int) to see steps."
    )


def timeline_rows(callbacks: Iterable[Any], run: Run) -> list[Row]:
    """When, who, what; in the order of time. What cannot be resolved, or would be refused, says why, at the end."""
    timed, unresolved, callbacks = list[tuple[float, Row]](), list[Row](), list(callbacks)
    for callback in filter(_is_timed, callbacks):
        try:
            timed += _of_callback(callback, run)
        except ValueError as error:
            unresolved.append(("?", callback.name, str(error)))
    if (total := run.steps) is not None:
        if not unresolved:  # in whole epochs two moments may look like one
            unresolved = [("refused", "", why) for why in _refused(callbacks, run)]
        timed.append((1.0, (f"step {total:,}", "", "the run ends")))
    return [*(row for _, row in sorted(timed, key=lambda one: one[0])), *unresolved]


def _refused(callbacks: list[Any], run: Run) -> list[str]:
    """Why a Trainer would refuse these windows before its first step."""
    ours = [one for one in callbacks if isinstance(one, CompressionCallback)]
    try:
        windows = phase_windows(ours, run)
        for one in ours:
            refuse_outside(one.name, one.begin, windows[one.name], run)
        refuse_late_cuts(ours, windows)
    except ValueError as error:
        return [str(error)]
    return []


def _of_callback(callback: Any, run: Run) -> list[tuple[float, Row]]:
    """Each row with its share of the run, to sort by; with its number, if the share is not known."""
    unit = resolve_window(callback.begin, callback.end, callback.every, run).unit
    batches = run.epochs * run.batches_per_epoch if run.epochs and run.batches_per_epoch else None
    total = {"steps": run.steps, "epochs": run.epochs, "batches": batches}[unit] or 1
    return [(at / total, (f"{UNITS[unit]} {at:,}", callback.name, what)) for at, what in _some(callback.timeline(run))]


def format_timeline(callbacks: Iterable[Any], run: Run) -> str:
    """Print the table, and return its text."""
    from rich.console import Console

    callbacks = list(callbacks)
    rest = [type(callback).__name__ for callback in callbacks if not _is_timed(callback)]
    lines = [describe_run_length(run), *([f"Without a window of their own: {', '.join(rest)}."] if rest else [])]
    text = StringIO()
    for console in (Console(markup=False, highlight=False), Console(file=text, width=120, markup=False)):
        console.print(_table(timeline_rows(callbacks, run)), *lines, sep="\n")
    return text.getvalue()


def _table(all_rows: list[Row]) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table("when", "callback", "what", box=box.SIMPLE)
    for row in all_rows:
        table.add_row(*row)
    return table


def _is_timed(callback: Any) -> bool:
    return callable(getattr(callback, "timeline", None)) and hasattr(callback, "begin")


def _some(times: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """The first and the last moments, if there are many."""
    if len(times) <= MOMENTS_SHOWN:
        return times
    half = MOMENTS_SHOWN // 2
    at, what = times[half - 1]
    return [*times[: half - 1], (at, f"{what} (then {len(times) - 2 * half} more)"), *times[-half:]]


def _of_trainer(trainer: Any) -> Run:
    names = ("max_epochs", "max_steps", "limit_train_batches", "overfit_batches", "accumulate_grad_batches")
    timed = any(type(callback).__name__ == "Timer" for callback in trainer.callbacks)
    return _of_arguments({**{name: getattr(trainer, name) for name in names}, "max_time": timed})


def _of_arguments(trainer: Mapping[str, Any]) -> Run:
    epochs, max_steps = trainer.get("max_epochs"), trainer.get("max_steps", -1)
    if epochs is None and max_steps == -1 and not trainer.get("max_time"):
        epochs = LIGHTNINGS_EPOCHS
    counts = (trainer.get("limit_train_batches"), trainer.get("overfit_batches"))
    return Run(
        epochs=None if epochs == -1 else epochs,
        max_steps=None if max_steps == -1 else max_steps,
        batches_per_epoch=next((one for one in counts if _is_count(one)), None),
        accumulate=trainer.get("accumulate_grad_batches", 1),
        max_time=bool(trainer.get("max_time")),
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
