"""Run a sweep here, one run after the other and offline: a program under a recipe, with the settings of each run."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_compress.recipe.builtin import find_recipe
from lightning_compress.recipe.recipe import Recipe
from lightning_compress.recipe.sections import JOINING
from lightning_compress.recipe.study import JOURNAL, SweepStudy, drawn_settings
from lightning_compress.recipe.subprocess_env import subprocess_environment
from lightning_compress.recipe.sweep import Sweep, as_yaml
from lightning_compress.reporting.compare import compare
from lightning_compress.reporting.report import Report

REPORT_FILE = "compression_report.json"
TAIL_LINES = 10
TAIL_BYTES = 8_000


@dataclass(frozen=True)
class SweepJob:
    """One run of a sweep: its settings as text, the folder of its output and report, and its environment."""

    name: str
    folder: Path
    variables: Mapping[str, str]
    reports: bool


@dataclass(frozen=True)
class SweepOutcome:
    """How a run ended: the exit code of its program, and its report if it wrote one."""

    name: str
    code: int
    report: Report | None


def make_jobs(
    sweep: Sweep,
    recipe: str | Path,
    runs: Sequence[Sequence[str]],
    folder: Path,
    *,
    first: int = 1,
    overrides: Sequence[str] = (),
    allow: Sequence[str] = (),
) -> list[SweepJob]:
    """Runs of a sweep, each checked by making its callbacks, before any of them starts.

    `CompressionReport`, if the recipe has it, writes into a folder of the run, whatever its `dirpath` says.

    Args:
        sweep: whose name the runs share as their group in W&B, which is offline unless `WANDB_MODE` says otherwise.
        recipe: a path, or the name of a ready recipe.
        runs: the settings of each.
        folder: for all of them; each gets a folder in it, by its number.
        first: number of the first of these runs.
        overrides: of every run.
        allow: dotted paths that the recipe may name, as in `Recipe.load`.

    Raises:
        FileNotFoundError: if there is no such recipe.
        ValueError: if a setting leads nowhere or is refused.
    """
    shared = {"WANDB_MODE": "offline", "WANDB_RUN_GROUP": sweep.path.stem, **os.environ}
    made = []
    for number, settings in enumerate(runs, first):
        own, full = folder / str(number), [*overrides, *settings]
        places = _reporting(Recipe.load(find_recipe(recipe), overrides=full, allow=allow, sections=JOINING))
        full += [f"{place}.dirpath={as_yaml(str(own.absolute()))}" for place in places]
        made.append(
            SweepJob(", ".join(settings), own, subprocess_environment(recipe, full, allow, shared), bool(places))
        )
    return made


def run_sweep(
    sweep: Sweep,
    recipe: str | Path,
    folder: Path,
    command: Sequence[str],
    *,
    count: int | None = None,
    seed: int = 0,
    resume: bool = False,
    overrides: Sequence[str] = (),
    allow: Sequence[str] = (),
    console: Console | None = None,
) -> list[SweepOutcome]:
    """Start the command for each run of a sweep, one after the other; what fails is told, and the next one starts.

    Args:
        sweep, recipe, folder, overrides, allow: as for `make_jobs`.
        command: the program and its arguments.
        count, seed: as for `SweepStudy`.
        resume: go on with a sweep that was stopped: runs that are over keep their reports, others begin again.

    Raises:
        FileNotFoundError: if there is no such recipe.
        ModuleNotFoundError: if Optuna is missing: pip install 'lightning-compress[search]'.
        ValueError: if there is no such command, a setting is refused, or `folder` does not fit `resume`.
    """
    console = console or Console()
    if not command or shutil.which(command[0]) is None:
        raise ValueError(f"There is no command {' '.join(command)!r} to start. Write it after --: -- python train.py.")
    _check_folder(folder, resume)
    asked: dict[str, Any] = {"overrides": overrides, "allow": allow}
    make_jobs(sweep, recipe, drawn_settings(sweep, count, seed), folder, **asked)  # refused now, or never
    study = SweepStudy(sweep, count, seed, folder)
    found: dict[Sequence[str], SweepOutcome] = {}
    for trial in study.finished():
        name = ", ".join(trial.settings)
        found[trial.settings] = SweepOutcome(name, 0, _report(folder / str(trial.number + 1)))
    bar = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bar, console=console) as progress:
        task = progress.add_task("", total=study.count, completed=len(study.finished()))
        for trial in study.remaining():
            if trial.settings not in found:
                (job,) = make_jobs(sweep, recipe, [trial.settings], folder, first=trial.number + 1, **asked)
                progress.update(task, description=job.name)
                begin = time.monotonic()
                outcome = found[trial.settings] = _run(job, command)
                seconds = time.monotonic() - begin
                title = f"Run {trial.number + 1} of {study.count}, {job.name}, {_ended(outcome, job)} ({seconds:.0f} s)"
                for line in (title, *_outcome_lines(outcome, job)):
                    progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
            report = found[trial.settings].report
            study.tell(trial, report.metrics.get(sweep.metric) if report is not None and sweep.metric else None)
            progress.advance(task)
    return list(found.values())


def _check_folder(folder: Path, resume: bool) -> None:
    has_study = (folder / JOURNAL).is_file()
    if resume and not has_study:
        raise ValueError(
            f"{folder} has no sweep to go on with. Leave --resume out, or name its folder by --output-dir."
        )
    if not resume and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        mend = " Go on with its sweep by --resume, or name" if has_study else " Name"
        raise ValueError(f"{folder} has something in it already.{mend} another folder by --output-dir.")


def print_outcomes(
    outcomes: Sequence[SweepOutcome], sweep: Sweep, folder: Path, console: Console | None = None
) -> None:
    """Print the runs that have a report beside each other, write `table.md`, and name the best by the metric."""
    console = console or Console()
    reports = {one.name: one.report for one in outcomes if one.report is not None}
    if not reports:
        console.print("No run wrote a report, so there is nothing to compare: has the recipe a CompressionReport?")
        return
    comparison = compare(reports)
    comparison.print()
    (folder / "table.md").write_text(comparison.to_markdown(), encoding="utf-8")
    if sweep.metric is not None:
        console.print(_best(reports, sweep.metric, sweep.goal), markup=False, highlight=False, soft_wrap=True)
    console.print(f"Written to {folder / 'table.md'}.", markup=False, highlight=False, soft_wrap=True)


def _reporting(recipe: Recipe) -> list[str]:
    entries = recipe.to_dict().get("callbacks", [])
    short = [entry["class_path"].rpartition(".")[2] for entry in entries]
    return [f"callbacks.{index}" for index, name in enumerate(short) if name == "CompressionReport"]


def _run(job: SweepJob, command: Sequence[str]) -> SweepOutcome:
    if job.folder.exists():  # of a run that was stopped
        shutil.rmtree(job.folder)
    job.folder.mkdir(parents=True)
    with (job.folder / "output.txt").open("wb") as output:
        done = subprocess.run(
            command, env=job.variables, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, check=False
        )
    return SweepOutcome(job.name, done.returncode, _report(job.folder))


def _report(folder: Path) -> Report | None:
    path = folder / REPORT_FILE
    return Report.load(path) if path.exists() else None


def _ended(outcome: SweepOutcome, job: SweepJob) -> str:
    if outcome.code:
        return f"failed with exit code {outcome.code}"
    return "is done, but wrote no report" if job.reports and outcome.report is None else "is done"


def _outcome_lines(outcome: SweepOutcome, job: SweepJob) -> Iterator[str]:
    """The end of what a failed run has printed."""
    if not outcome.code:
        return
    path = job.folder / "output.txt"
    with path.open("rb") as output:
        output.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = output.read().decode("utf-8", errors="replace").splitlines()
    yield from (f"  {line}" for line in [line for line in lines if line.strip()][-TAIL_LINES:])
    yield f"  (all of it: {path})"


def _best(reports: Mapping[str, Report], metric: str, goal: str) -> str:
    found = {name: report.metrics[metric] for name, report in reports.items() if metric in report.metrics}
    found = {name: value for name, value in found.items() if not isnan(value)}
    if not found:
        known = sorted({name for report in reports.values() for name in report.metrics})
        return f"No run has logged the sweep's metric '{metric}'. Logged: {', '.join(known) or 'nothing'}."
    best = (min if goal == "minimize" else max)(found, key=lambda name: found[name])
    return f"Best by {metric}: {best}."
