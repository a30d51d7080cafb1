"""Runs in float32 and with `QuantizationAwareTraining`, several seeds each, and the table of what came out."""

import argparse
import json
import re
import shutil
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

FLOAT = "float32"


@dataclass(frozen=True)
class Settings(Keyed):
    """One run, in all that its result depends on."""

    scheme: str
    seed: int
    epochs: int
    batch_size: int
    learning_rate: float
    begin: str = "33%"
    batches: int | None = None
    data: str = "full"

    @property
    def label(self) -> str:
        return self.scheme


@dataclass(frozen=True)
class Experiment:
    """What is trained, on what, and how it is quantized.

    Attributes:
        script: file that runs it; results are written to docs/results/ under its name.
        title: of the table.
        model: the LightningModule of a run.
        data: the data module of a run.
        example: an input of a few samples.
        metric: what is logged as `val_...` and `test_...`; the lower the better.
        factor, unit: by which it is multiplied to be shown, and in what it is then.
        digits: that are shown.
        schemes: arguments of `QuantizationAwareTraining` by name; none for float32.
        papers: what papers report, by scheme, and what differs.
        words: below the table.
        defaults: settings of every run.
        quick: settings that `--quick` changes.
        needed: what is missing to run it in full, if anything.
        prepared: makes what the model takes of what the loader gives.
        seeds: of the runs.
    """

    script: str
    title: str
    model: Callable[[Settings], Any]
    data: Callable[[Settings], Any]
    example: Callable[[], Any]
    schemes: Mapping[str, Mapping[str, Any]]
    defaults: Mapping[str, Any]
    quick: Mapping[str, Any]
    needed: Callable[[], str | None]
    papers: Mapping[str, str] = field(default_factory=dict)
    words: str = ""
    prepared: Callable[[Any], Any] = lambda images: images
    seeds: tuple[int, ...] = (0, 1, 2)
    metric: str = "error"
    factor: float = 100.0
    unit: str = "percent"
    digits: int = 2

    @property
    def name(self) -> str:
        return Path(self.script).stem


# One run, in a process of its own ----------------------------------------------------------------------------------


def train(experiment: Experiment, settings: Settings) -> dict[str, Any]:
    """Train, choose the epoch by validation error, test it, and keep its checkpoint."""
    data, monitored, callbacks = experiment.data(settings), f"val_{experiment.metric}", _added(experiment, settings)
    with tempfile.TemporaryDirectory() as folder:
        run, _, path = trained(settings, lambda: experiment.model(settings), data, callbacks, monitored, folder)
        run["checkpoint"] = _kept(experiment, settings, path)
    return run | {"test_error": tested(experiment, run)}


def tested(experiment: Experiment, run: dict[str, Any]) -> float:
    """The test error of a run's checkpoint."""
    from lightning_compress._lightning import Trainer

    settings = Settings(**run["settings"])
    trainer = Trainer(
        accelerator="cpu",
        callbacks=_added(experiment, settings),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        limit_test_batches=settings.batches,
    )
    model, path = experiment.model(settings), str(ROOT / run["checkpoint"])
    (found,) = trainer.test(model, ckpt_path=path, datamodule=experiment.data(settings), verbose=False)
    return float(found[f"test_{experiment.metric}"])


def _added(experiment: Experiment, settings: Settings) -> list[Any]:
    """The one callback by which a quantized run differs."""
    from lightning_compress import QuantizationAwareTraining

    scheme = experiment.schemes[settings.scheme]
    # BatchNorm may be frozen here: one-cycle's learning rate has come down by then.
    return [QuantizationAwareTraining(begin=settings.begin, **{"freeze_bn": "90%", **scheme})] if scheme else []


def _kept(experiment: Experiment, settings: Settings, checkpoint: str) -> str:
    """Copy a checkpoint to where the files are made from; the path from the project's root."""
    name = re.sub(r"\W+", "-", f"{settings.scheme}-{settings.seed}-{settings.epochs}-{settings.data}")
    kept = Path("outputs") / experiment.name / f"{name}.ckpt"
    (ROOT / kept).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(checkpoint, ROOT / kept)
    return str(kept)


# The files of a run ------------------------------------------------------------------------------------------------


def add_files(experiment: Experiment, run: dict[str, Any], folder: Path, onnx: bool = True) -> None:
    """Bytes of the packed file and the ONNX file, and how often ONNX Runtime reads a test image as torch does."""
    from lightning_compress import export, load_compressed
    from lightning_compress.export.onnx.agreement import output_agreement

    settings = Settings(**run["settings"])
    model = load_compressed(type(experiment.model(settings)), ROOT / run["checkpoint"])
    run["float_bytes"] = sum(value.nbytes for name, value in model.state_dict().items() if "accuracy" not in name)
    if not experiment.schemes[settings.scheme]:
        return
    data = experiment.data(settings)
    data.setup("test")
    run["packed_bytes"] = export(model, folder / "model.safetensors").size_bytes
    if not onnx:
        return
    try:
        run["onnx_bytes"] = export(model, folder / "model.onnx", experiment.example()).size_bytes
    except ValueError as refused:  # a file that disagrees is not written; the table says so
        run["onnx_refused"] = str(refused)
        return
    run["agreement"] = output_agreement(
        folder / "model.onnx", model, (experiment.prepared(batch[0]) for batch in data.test_dataloader())
    )


# What is said ------------------------------------------------------------------------------------------------------


def report(experiment: Experiment, runs: list[dict[str, Any]], path: Path) -> None:
    """Write the table."""
    by_scheme = {name: [run for run in runs if run["settings"]["scheme"] == name] for name in experiment.schemes}
    floats = {run["settings"]["seed"]: run["test_error"] for run in by_scheme[FLOAT]}
    first = runs[0]["settings"]
    lines = [
        f"# {experiment.title}",
        "",
        f"`python experiments/{experiment.name}.py`: {first['epochs']} epochs each, quantized after {first['begin']} "
        f"of them; test {experiment.metric} in {experiment.unit}, mean ± standard deviation over the seeds; difference "
        f"to the float32 run of the same seed. Files are given in bytes, all of them.",
        "",
        f"| | seeds | test {experiment.metric} | difference | packed file | ONNX file | ONNX Runtime agrees | papers |",
        "|---|---|---|---|---|---|---|---|",
        *(_row(experiment, name, several, floats) for name, several in by_scheme.items() if several),
        "",
        _said(experiment, runs),
        "",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")


def _row(experiment: Experiment, name: str, several: list[dict[str, Any]], floats: Mapping[int, float]) -> str:
    errors = [experiment.factor * run["test_error"] for run in several]
    pairs = [(run["test_error"], floats.get(run["settings"]["seed"])) for run in several]
    differences = [experiment.factor * (error - beside) for error, beside in pairs if beside is not None]
    difference = "" if name == FLOAT else _spread(differences, "+", experiment.digits)
    cells = [name, str(len(several)), _spread(errors, "", experiment.digits), difference]
    if name == FLOAT:
        cells += [f"{_bytes(several, 'float_bytes')} of float32", "", ""]
    else:
        cells.append(_bytes(several, "packed_bytes"))
        agreed = [run["agreement"] for run in several if "agreement" in run]
        refused = sum("onnx_refused" in run for run in several)
        note = f" ({refused} of {len(several)} refused)" if refused else ""
        cells += [_bytes(several, "onnx_bytes"), f"{100 * min(agreed):.2f} % at least{note}"] if agreed else ["", note]
    return f"| {' | '.join([*cells, experiment.papers.get(name, '')])} |"


def _spread(values: list[float], sign: str, digits: int) -> str:
    """One value as it is: it has no spread."""
    return spread(values, sign, digits) if len(values) > 1 else f"{values[0]:{sign}.{digits}f}"


def _bytes(several: list[dict[str, Any]], key: str) -> str:
    return f"{round(statistics.mean(run[key] for run in several if key in run)):,}"


def _said(experiment: Experiment, runs: list[dict[str, Any]]) -> str:
    numbers = ", ".join(f"{name} {number}" for name, number in runs[0]["versions"].items())
    minutes = sum(run["seconds"] for run in runs) / 60
    return f"{experiment.words} Each run on {runs[0]['device']}, {minutes:.0f} minutes in all; {numbers}."


def main(experiment: Experiment) -> None:
    parser = argparse.ArgumentParser(description=experiment.title)
    parser.add_argument("--quick", action="store_true", help="a few batches, to see that it works; proves nothing")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    parser.add_argument(
        "--report", action="store_true", help="only measure what finished runs lack, and write the table"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write; the table goes beside it")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    read = parser.parse_args()
    if read.run:
        print(RESULT_MARK + json.dumps(train(experiment, Settings(**json.loads(read.run)))))
        return
    console = Console()
    missing = None if read.quick else experiment.needed()
    if missing is not None:
        sys.exit(missing)
    folder = Path(tempfile.mkdtemp()) if read.quick else ROOT / "docs" / "results"
    path = read.output or folder / f"{experiment.name}.json"
    kept = read_runs(path, Settings)
    defaults = {**experiment.defaults, **(experiment.quick if read.quick else {})}
    seeds = experiment.seeds[:1] if read.quick else experiment.seeds
    # A quick look shows that it works: in floating point, and in the one way that is farthest from it.
    schemes = [FLOAT, list(experiment.schemes)[-1]] if read.quick else list(experiment.schemes)
    todo = [Settings(scheme, seed, **defaults) for seed in seeds for scheme in schemes]
    if not read.report:
        shown = f"{{:.{experiment.digits}f}} {experiment.unit}".format
        here = partial(train, experiment) if read.quick else None
        error = lambda value: shown(experiment.factor * value)
        run_all(experiment.script, todo, kept, path, read.workers, console, error, here)
    done = [kept[settings.key] for settings in todo if settings.key in kept]
    for run in done:
        if "test_error" not in run:
            run["test_error"] = tested(experiment, run)
        if "float_bytes" not in run:
            with tempfile.TemporaryDirectory() as files:
                add_files(experiment, run, Path(files), onnx=not read.quick)
            write_runs(path, kept)
    report(experiment, done, path.with_suffix(".md"))
    console.print(path.with_suffix(".md").read_text(encoding="utf-8"), f"Written to {path}.", highlight=False)
