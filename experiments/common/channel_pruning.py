"""Runs whose model loses channels on the way, beside the dense one and the thin one trained from scratch."""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from .runs import RESULT_MARK, ROOT, Keyed, read_runs, run_all, spread, trained, write_runs

DENSE, SCRATCH = "dense", "thin from scratch"


@dataclass(frozen=True)
class Settings(Keyed):
    """One run, in all that its result depends on."""

    arm: str
    seed: int
    epochs: int
    batch_size: int
    learning_rate: float
    macs: float
    begin: str = "10%"
    end: str = "50%"
    batches: int | None = None
    data: str = "full"

    @property
    def label(self) -> str:
        return self.arm


@dataclass(frozen=True)
class Experiment:
    """What is trained, on what, and how it loses channels.

    Attributes:
        script: file that runs it; results are written to docs/results/ under its name.
        title: of the table.
        model: the LightningModule of a run, which logs `val_error` and `test_error` as fractions.
        data: the data module of a run.
        example: one input.
        arms: arguments of `ChannelPruning` by name, beside the budget and the window.
        defaults: settings of every run.
        quick: settings that `--quick` changes.
        needed: what is missing to run it in full, if anything.
        words: below the table.
        trainer: more arguments of the Trainer.
        seeds: of the runs.
    """

    script: str
    title: str
    model: Callable[[Settings], Any]
    data: Callable[[Settings], Any]
    example: Callable[[], Any]
    arms: Mapping[str, Mapping[str, Any]]
    defaults: Mapping[str, Any]
    quick: Mapping[str, Any]
    needed: Callable[[], str | None]
    words: str = ""
    trainer: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def name(self) -> str:
        return Path(self.script).stem


# One run, in a process of its own ----------------------------------------------------------------------------------


def train(experiment: Experiment, settings: Settings) -> dict[str, Any]:
    """Train, choose the epoch by validation error (of a shrinking run, among those after the last cut), and test it."""
    from lightning_compress import ChannelPruning
    from lightning_compress.measure.macs import count_macs

    callbacks = []
    if settings.arm in experiment.arms:
        window = {"begin": settings.begin, "end": settings.end, "every": "5%", "macs": settings.macs}
        callbacks = [ChannelPruning(**window, **experiment.arms[settings.arm])]
    data = experiment.data(settings)
    with tempfile.TemporaryDirectory() as folder:
        builds = partial(thin, experiment) if settings.arm == SCRATCH else experiment.model
        more = experiment.trainer
        run, trainer, path = trained(settings, lambda: builds(settings), data, callbacks, "val_error", folder, **more)
        tested = trainer.test(ckpt_path=path, datamodule=data, verbose=False)[0]
    model = trainer.lightning_module
    macs = count_macs(model, experiment.example())
    parameters = sum(one.numel() for one in model.parameters())
    found = {"macs": sum(one.dense for one in macs.values()), "parameters": parameters}
    return run | found | {"test_error": tested["test_error"]}


def thin(experiment: Experiment, settings: Settings) -> Any:
    """The module as wide as the shrinking runs end, with weights of its own from the start."""
    from lightning_compress import ChannelPruning
    from lightning_compress._lightning import Trainer

    model = experiment.model(settings)
    with tempfile.TemporaryDirectory() as folder:
        # All that goes has gone after two steps.
        cut = ChannelPruning(macs=settings.macs, begin=1, end=2, every=1)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(
            max_steps=2, accelerator="cpu", callbacks=[cut], default_root_dir=folder, limit_val_batches=0, **quiet
        )
        trainer.fit(model, datamodule=experiment.data(settings))
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


# What is said ------------------------------------------------------------------------------------------------------


def report(experiment: Experiment, runs: list[dict[str, Any]], path: Path) -> None:
    """Write the table."""
    first = runs[0]["settings"]
    lines = [
        f"# {experiment.title}",
        "",
        f"`python experiments/{experiment.name}.py`: {first['epochs']} epochs each; cuts every 5 % of the run from "
        f"{first['begin']} to {first['end']}, to {100 * first['macs']:g} % of the MACs. Test error in percent, mean ± "
        f"standard deviation over the seeds, and the mean difference to the dense run of the same seed.",
        "",
        "| | seeds | test error | difference | MACs | parameters | time of the run |",
        "|---|---|---|---|---|---|---|",
    ]
    dense = [run for run in runs if run["settings"]["arm"] == DENSE]
    for arm in (DENSE, *experiment.arms, SCRATCH):
        several = [run for run in runs if run["settings"]["arm"] == arm]
        if several:
            lines.append(_row(arm, several, dense))
    path.write_text("\n".join([*lines, "", _said(experiment, runs), ""]), encoding="utf-8")


def _row(arm: str, several: list[dict[str, Any]], dense: list[dict[str, Any]]) -> str:
    beside = {run["settings"]["seed"]: run for run in dense}
    pairs = [(run, beside[run["settings"]["seed"]]) for run in several if run["settings"]["seed"] in beside]
    errors = spread([100 * run["test_error"] for run in several], digits=2)
    differences = spread([100 * (run["test_error"] - its["test_error"]) for run, its in pairs], "+", 2)

    def share(key: str) -> str:
        return f"{100 * statistics.mean(run[key] / its[key] for run, its in pairs):.1f} %" if pairs else ""

    cells = [arm, str(len(several)), errors, "" if arm == DENSE or not pairs else differences]
    if arm == DENSE:
        cells += [f"{round(several[0]['macs']):,}", f"{several[0]['parameters']:,}", "100 %"]
    else:
        cells += [share("macs"), share("parameters"), share("seconds")]
    return f"| {' | '.join(cells)} |"


def _said(experiment: Experiment, runs: list[dict[str, Any]]) -> str:
    numbers = ", ".join(f"{name} {number}" for name, number in runs[0]["versions"].items())
    minutes = sum(run["seconds"] for run in runs) / 60
    return (
        f"'{SCRATCH}' has the widths that the others end with, and its own initial weights; it trains for as many "
        f"epochs, so with less arithmetic. Times were taken while other work was running. {experiment.words} Each run "
        f"on {runs[0]['device']}, {minutes:.0f} minutes in all; {numbers}."
    )


def main(experiment: Experiment) -> None:
    parser = argparse.ArgumentParser(description=experiment.title)
    parser.add_argument("--quick", action="store_true", help="a few batches, to see that it works; proves nothing")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    parser.add_argument("--report", action="store_true", help="only write the table of the runs that are there")
    parser.add_argument("--output", type=Path, help="JSON file to write; the table goes beside it")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    read = parser.parse_args()
    if read.run:
        print(RESULT_MARK + json.dumps(train(experiment, Settings(**json.loads(read.run)))))
        return
    missing = None if read.quick else experiment.needed()
    if missing is not None:
        sys.exit(missing)
    folder = Path(tempfile.mkdtemp()) if read.quick else ROOT / "docs" / "results"
    path = read.output or folder / f"{experiment.name}.json"
    defaults = {**experiment.defaults, **(experiment.quick if read.quick else {})}
    seeds = experiment.seeds[:1] if read.quick else experiment.seeds
    arms = [DENSE, next(iter(experiment.arms)), SCRATCH] if read.quick else [DENSE, *experiment.arms, SCRATCH]
    todo = [Settings(arm, seed, **defaults) for seed in seeds for arm in arms]
    kept, console = read_runs(path, Settings), Console()
    if not read.report:
        here = partial(train, experiment) if read.quick else None
        run_all(experiment.script, todo, kept, path, read.workers, console, here=here)
    done = [kept[settings.key] for settings in todo if settings.key in kept]
    write_runs(path, kept)
    report(experiment, done, path.with_suffix(".md"))
    console.print(path.with_suffix(".md").read_text(encoding="utf-8"), f"Written to {path}.", highlight=False)
