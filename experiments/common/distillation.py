"""A student with and without a teacher: trials of every arm alike, paired seeds, and the table of what came of it."""

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from scipy.stats import ttest_rel

from .runs import RESULT_MARK, ROOT, Keyed, device_name, read_runs, run_all, spread, told, versions

TEACHER, ALONE = "teacher", "no distillation"
TEACHER_VARIABLE = "LIGHTNING_COMPRESS_TEACHERS"
CACHE_VARIABLE = "LIGHTNING_COMPRESS_TEACHERS_OUTPUTS"


@dataclass(frozen=True)
class Settings(Keyed):
    """One run, in all that its result depends on.

    Args:
        arm: "teacher", "no distillation", or another thing that is compared.
        model: arguments of the student, or of the teacher.
        distillation: arguments of `Distillation` beside the teacher; None: there is none.
    """

    task: str
    arm: str
    seed: int
    epochs: int
    batch_size: int
    model: dict[str, Any]
    distillation: dict[str, Any] | None = None
    batches: int | None = None
    data: str = "all"
    accelerator: str = "cpu"

    @property
    def label(self) -> str:
        return f"{self.task}, {self.arm}"


@dataclass(frozen=True)
class Candidate:
    """What is tried for an arm: arguments of the student, and of `Distillation` if there is one."""

    model: dict[str, Any]
    distillation: dict[str, Any] | None = None


@dataclass(frozen=True)
class Experiment:
    """A teacher, a student, and the arms that are compared.

    Args:
        title, about: heading of the table, and what is to be known of it.
        student, teacher: dotted paths of LightningModules.
        data: makes the data module of a run.
        metric: what is logged as `val_<metric>` and `test_<metric>`, and is to be small.
        unit: of the table; `scale` brings the metric there.
        fixed: arguments of the student in every arm; the candidates come on top.
        teaching: arguments of the teacher.
        arms: what is tried for each; the first is `ALONE`, and each has as many.
        precision: of runs on a GPU.
        rival: arm that those after it are compared with, as all are with `ALONE`; empty: there is none.
        cached: the teacher's outputs for the training data are computed once for all runs, which changes no result.
    """

    task: str
    title: str
    about: str
    student: str
    teacher: str
    data: Callable[[Settings], Any]
    epochs: int
    batch_size: int
    arms: dict[str, list[Candidate]]
    seeds: tuple[int, ...]
    trial_seeds: tuple[int, ...]
    teacher_epochs: int
    metric: str = "error"
    unit: str = "%"
    scale: float = 100.0
    fixed: dict[str, Any] = field(default_factory=dict)
    teaching: dict[str, Any] = field(default_factory=dict)
    precision: str = "32-true"
    channels_last: bool = False
    rival: str = ""
    cached: bool = False

    def of(self, arm: str, candidate: Candidate, seed: int, **common: Any) -> Settings:
        model = {**self.fixed, **candidate.model}
        settings = Settings(
            self.task, arm, seed, self.epochs, self.batch_size, model, distillation=candidate.distillation
        )
        return replace(settings, **common)

    def of_teacher(self, **common: Any) -> Settings:
        settings = Settings(self.task, TEACHER, 0, self.teacher_epochs, self.batch_size, self.teaching)
        return replace(settings, **common)

    @property
    def teacher_path(self) -> Path:
        return Path(os.environ[TEACHER_VARIABLE]) / f"{self.task}_teacher.ckpt"


# One run, in a process of its own ----------------------------------------------------------------------------------


def train(experiment: Experiment, settings: Settings) -> dict[str, Any]:
    """Train, choose the epoch by validation error, and test it, unless it is a trial."""
    import torch

    from lightning_compress._lightning import Trainer

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(settings.seed)
    data, module = experiment.data(settings), _named(_class_of(experiment, settings))(**settings.model)
    if experiment.channels_last:
        module.to(memory_format=torch.channels_last)
    monitor, lightning = f"val_{experiment.metric}", Trainer.__module__.partition(".trainer")[0]
    callbacks = import_module(lightning + ".callbacks")
    with tempfile.TemporaryDirectory() as folder:
        best, errors = callbacks.ModelCheckpoint(folder, monitor=monitor, mode="min"), told(callbacks.Callback, monitor)
        trainer = _trainer(experiment, settings, folder, [best, errors, *_distillation(experiment, settings)])
        begin = time.perf_counter()
        trainer.fit(module, datamodule=data)
        seconds, path = time.perf_counter() - begin, best.best_model_path
        trial = settings.seed in experiment.trial_seeds
        tested = {} if trial else trainer.test(ckpt_path=path, datamodule=data, verbose=False)[0]
        if settings.arm == TEACHER:
            _keep(path, experiment.teacher_path)
        return {
            "settings": asdict(settings),
            "val_errors": errors.errors,
            "chosen_epoch": torch.load(path, weights_only=True, map_location="cpu")["epoch"] + 1,
            "val_error": float(best.best_model_score),
            "test_error": tested.get(f"test_{experiment.metric}"),
            "parameters": sum(parameter.numel() for parameter in module.parameters()),
            "seconds": round(seconds, 1),
            "device": device_name(settings.accelerator),
            "versions": versions(),
        }


def _class_of(experiment: Experiment, settings: Settings) -> str:
    return experiment.teacher if settings.arm == TEACHER else experiment.student


def _named(dotted: str) -> Any:
    module, _, name = dotted.rpartition(".")
    return getattr(import_module(module), name)


def _distillation(experiment: Experiment, settings: Settings) -> list[Any]:
    from lightning_compress import Distillation

    if settings.distillation is None:
        return []
    teacher_class = _named(experiment.teacher)
    # The folder lasts as long as the script; what it holds is that of the teacher's file, so no run's settings name it.
    cache = Path(os.environ[CACHE_VARIABLE]) / experiment.teacher_path.stem if experiment.cached else None
    return [Distillation(experiment.teacher_path, teacher_class=teacher_class, cache=cache, **settings.distillation)]


def _trainer(experiment: Experiment, settings: Settings, folder: str, callbacks: list[Any]) -> Any:
    from lightning_compress._lightning import Trainer

    return Trainer(
        max_epochs=settings.epochs,
        accelerator=settings.accelerator,
        precision=experiment.precision if settings.accelerator == "cuda" else "32-true",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_train_batches=settings.batches,
        limit_val_batches=settings.batches,
        limit_test_batches=settings.batches,
        callbacks=callbacks,
        default_root_dir=folder,
    )


def _keep(path: str, teacher: Path) -> None:
    teacher.parent.mkdir(parents=True, exist_ok=True)
    half = teacher.with_suffix(".part")
    shutil.copyfile(path, half)
    half.replace(teacher)


# Which settings, and what came of them -----------------------------------------------------------------------------


def trials(experiment: Experiment, arms: Iterable[str], **common: Any) -> list[Settings]:
    """All that is tried for these arms, seed by seed."""
    pairs = [(arm, candidate) for arm in arms for candidate in experiment.arms[arm]]
    return [
        experiment.of(arm, candidate, seed, **common)
        for seed, (arm, candidate) in product(experiment.trial_seeds, pairs)
    ]


def mean_errors(experiment: Experiment, kept: dict[str, Any], arm: str, **common: Any) -> list[float]:
    """Mean validation error of each candidate over the trial seeds; not a number where a run is missing."""
    found = []
    for candidate in experiment.arms[arm]:
        keys = [experiment.of(arm, candidate, seed, **common).key for seed in experiment.trial_seeds]
        found.append(statistics.mean(kept[key]["val_error"] if key in kept else math.nan for key in keys))
    return found


def chosen(experiment: Experiment, kept: dict[str, Any], **common: Any) -> dict[str, Candidate]:
    """The candidate of each arm with the smallest mean validation error; no arm of which a trial is missing."""
    found = {}
    for arm, candidates in experiment.arms.items():
        errors = mean_errors(experiment, kept, arm, **common)
        if not any(map(math.isnan, errors)):
            found[arm] = candidates[errors.index(min(errors))]
    return found


# The tables --------------------------------------------------------------------------------------------------------


def section(experiment: Experiment, kept: dict[str, Any], quick: bool, **common: Any) -> str:
    """One experiment: what was compared, the table, and how the settings were chosen."""
    best = _first(experiment) if quick else chosen(experiment, kept, **common)
    seeds = (0,) if quick else experiment.seeds
    runs = {
        arm: {seed: kept.get(experiment.of(arm, one, seed, **common).key) for seed in seeds}
        for arm, one in best.items()
    }
    # A seed counts for all arms or for none.
    whole = [seed for seed in seeds if runs and all(group[seed] for group in runs.values())]
    lines = [f"## {experiment.title}", "", experiment.about, ""]
    teacher = kept.get(experiment.of_teacher(**_teaching(experiment, common, quick)).key)
    if not whole or teacher is None or ALONE not in runs:
        return "\n".join([*lines, "Not enough runs are finished for a table.", ""])
    groups = {arm: [group[seed] for seed in whole] for arm, group in runs.items()}
    lines += [*_heading(experiment, teacher, groups, whole, quick), *_table(experiment, best, groups), ""]
    lines += _against_rival(experiment, groups)
    if missing := sorted({*experiment.arms} - {*best}):
        lines += [f"Not finished, and left out: {', '.join(missing)}.", ""]
    return "\n".join([*lines, *([] if quick else _trials_table(experiment, kept, best, common)), ""])


def _heading(
    experiment: Experiment, teacher: dict[str, Any], groups: dict[str, Any], seeds: Sequence[int], quick: bool
) -> list[str]:
    one, planned = groups[ALONE][0], len(experiment.seeds)
    short = (
        "" if quick or len(seeds) == planned else f" ({planned} were planned; the others are not finished in every arm)"
    )
    quickly = ["A quick look at a few batches, worth nothing as a result.", ""] if quick else []
    return [
        *quickly,
        f"Teacher: {teacher['parameters']:,} parameters, {teacher['settings']['epochs']} epochs, test "
        f"{experiment.scale * teacher['test_error']:.3f} {experiment.unit}. Student: {one['parameters']:,} parameters "
        f"({one['parameters'] / teacher['parameters']:.1%}), {one['settings']['epochs']} epochs in every arm, batch "
        f"{one['settings']['batch_size']}. Seeds {', '.join(map(str, seeds))}{short}, the same in every arm: "
        f"they give the initial weights and the order of the data. Validation chose the epoch, and the test part was "
        f"read once per run. On {one['device']}.",
        "",
        "Versions: " + ", ".join(f"{name} {number}" for name, number in one["versions"].items()) + ".",
        "",
    ]


def _table(experiment: Experiment, best: dict[str, Candidate], groups: dict[str, Any]) -> list[str]:
    lines = [
        f"| arm | chosen settings | test {experiment.metric}, {experiment.unit} (mean ± sd) | minus "
        f"{ALONE} (mean ± standard error) | paired t | p | val {experiment.metric} |",
        "|---|---|---|---|---|---|---|",
    ]
    alone = _scaled(experiment, groups[ALONE], "test_error")
    for arm, runs in groups.items():
        errors = _scaled(experiment, runs, "test_error")
        cells = [arm, _words(best[arm]), spread(errors), *_compared(errors, alone, arm)]
        lines.append("| " + " | ".join([*cells, spread(_scaled(experiment, runs, "val_error"))]) + " |")
    return lines


def _against_rival(experiment: Experiment, groups: dict[str, Any]) -> list[str]:
    arms = [*groups]
    if experiment.rival not in arms or len(groups[ALONE]) < 2:
        return []
    theirs, lines = _scaled(experiment, groups[experiment.rival], "test_error"), []
    for arm in arms[arms.index(experiment.rival) + 1 :]:
        ours = _scaled(experiment, groups[arm], "test_error")
        gain, t, p = _compared(ours, theirs, arm)
        lines.append(f"{arm.capitalize()} minus {experiment.rival}, paired in the same way: {gain}, {t}, p = {p}.")
    return [*lines, ""]


def _compared(errors: Sequence[float], others: Sequence[float], arm: str) -> list[str]:
    """Mean difference of runs with the same seeds, Student's t of the pairs, and its two-sided p-value."""
    if arm == ALONE or len(errors) < 2:
        return ["", "", ""]
    differences = [error - other for error, other in zip(errors, others, strict=True)]
    standard_error = statistics.stdev(differences) / math.sqrt(len(differences))
    test = ttest_rel(errors, others)
    return [
        f"{statistics.mean(differences):+.3f} ± {standard_error:.3f}",
        f"t({test.df}) = {test.statistic:.2f}",
        f"{test.pvalue:.3f}{'' if test.pvalue < 0.05 else ', within the noise'}",
    ]


def _trials_table(
    experiment: Experiment, kept: dict[str, Any], best: dict[str, Candidate], common: dict[str, Any]
) -> list[str]:
    lines = [
        f"How the settings were chosen: validation {experiment.metric}, {experiment.unit}, of trial seeds "
        f"{', '.join(map(str, experiment.trial_seeds))}, which are not among those above; the test part was not read.",
        "",
        f"| arm | settings | val {experiment.metric} | |",
        "|---|---|---|---|",
    ]
    for arm, candidates in experiment.arms.items():
        for candidate, error in zip(candidates, mean_errors(experiment, kept, arm, **common), strict=True):
            taken = "chosen" if best.get(arm) == candidate else ""
            lines.append(f"| {arm} | {_words(candidate)} | {experiment.scale * error:.3f} | {taken} |")
    return lines


def _scaled(experiment: Experiment, runs: Iterable[dict[str, Any]], name: str) -> list[float]:
    return [experiment.scale * run[name] for run in runs]


def _words(candidate: Candidate) -> str:
    model = ", ".join(f"{name} {value}" for name, value in candidate.model.items())
    options = ", ".join(f"{name}={value!r}" for name, value in (candidate.distillation or {}).items())
    return model if candidate.distillation is None else f"{model}; `Distillation(teacher, {options})`"


# The command -------------------------------------------------------------------------------------------------------


def main(
    script: str,
    words: str,
    experiments: Sequence[Experiment],
    needed: Callable[[], str | None],
    notes: str = "",
    argv: Sequence[str] | None = None,
) -> int:
    """Run what is not kept yet, and write the tables.

    Args:
        words: docstring of the script; its first line is the heading.
        needed: says what is missing for more than a quick look, or None.
        notes: below the tables.
    """
    arguments = _parser(words).parse_args(argv)
    if arguments.run:
        settings = Settings(**json.loads(arguments.run))
        (experiment,) = (one for one in experiments if one.task == settings.task)
        print(RESULT_MARK + json.dumps(train(experiment, settings)), flush=True)
        return 0
    console = Console()
    if not arguments.quick and not arguments.table and (lack := needed()):
        console.print(lack, style="red")
        return 1
    name = Path(script).stem
    output = (
        arguments.output
        or (Path(tempfile.mkdtemp()) if arguments.quick else ROOT / "docs" / "results") / f"{name}.json"
    )
    os.environ.setdefault(TEACHER_VARIABLE, str(output.parent.resolve()))
    common = _common(arguments)
    kept = read_runs(output, Settings)
    with tempfile.TemporaryDirectory() as outputs_of_teachers:
        os.environ[CACHE_VARIABLE] = outputs_of_teachers
        for experiment in experiments:
            if not arguments.table:
                _measure(script, experiment, kept, output, arguments, common, console)
            _write(words, experiments, kept, output, arguments, common, notes)
    console.print(output.with_suffix(".md").read_text(encoding="utf-8"), soft_wrap=True, highlight=False, markup=False)
    return 0


def _measure(
    script: str,
    experiment: Experiment,
    kept: dict[str, Any],
    output: Path,
    arguments: argparse.Namespace,
    common: dict[str, Any],
    console: Console,
) -> None:
    shown = lambda error: f"{experiment.scale * error:.3f} {experiment.unit}"
    here = partial(train, experiment) if arguments.quick else None
    run_some = lambda todo: run_all(script, todo, kept, output, arguments.workers, console, shown, here)

    def run(todo: Sequence[Settings]) -> None:
        if experiment.cached:
            # The first one writes the outputs that the others read.
            run_some([settings for settings in todo if settings.distillation and settings.key not in kept][:1])
        run_some(todo)

    teacher = experiment.of_teacher(**_teaching(experiment, common, arguments.quick))
    if not experiment.teacher_path.exists():
        kept.pop(teacher.key, None)
    # Those without a teacher need not wait for it.
    alone = [arm for arm, candidates in experiment.arms.items() if candidates[0].distillation is None]
    taught = [arm for arm in experiment.arms if arm not in alone]
    if arguments.quick:
        run([teacher])
        best, seeds = _first(experiment), (0,)
    else:
        run([teacher, *trials(experiment, alone, **common)])
        run(trials(experiment, taught, **common))
        best, seeds = chosen(experiment, kept, **common), experiment.seeds
    run([experiment.of(arm, best[arm], seed, **common) for seed in seeds for arm in experiment.arms])


def _write(
    words: str,
    experiments: Sequence[Experiment],
    kept: dict[str, Any],
    output: Path,
    arguments: argparse.Namespace,
    common: dict[str, Any],
    notes: str,
) -> None:
    tables = [section(experiment, kept, arguments.quick, **common) for experiment in experiments]
    text = f"# {words.partition('. ')[0].partition(chr(10))[0].rstrip('.')}\n\n" + "\n".join(tables) + f"\n{notes}"
    output.with_suffix(".md").write_text(text.rstrip() + "\n", encoding="utf-8")


def _common(arguments: argparse.Namespace) -> dict[str, Any]:
    common: dict[str, Any] = {"accelerator": arguments.accelerator}
    if arguments.quick:
        common |= {"batches": 2, "data": "quick", "epochs": 1, "batch_size": 32}
    if arguments.epochs is not None:
        common["epochs"] = arguments.epochs
    return common


def _teaching(experiment: Experiment, common: dict[str, Any], quick: bool) -> dict[str, Any]:
    """What the teacher's run has in common with the others: all but how long it is."""
    return common if quick else {**common, "epochs": experiment.teacher_epochs}


def _first(experiment: Experiment) -> dict[str, Candidate]:
    return {arm: candidates[0] for arm, candidates in experiment.arms.items()}


def _parser(words: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=words.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few batches of a small sample; proves nothing")
    parser.add_argument("--table", action="store_true", help="run nothing: write the tables of what is finished")
    parser.add_argument("--output", type=Path, help="JSON file; the table goes beside it (default: beside this script)")
    parser.add_argument("--epochs", type=int, help="of the students (default: as in the script)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    parser.add_argument("--accelerator", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    return parser


def whole_mnist() -> str | None:
    """What is missing if there is no MNIST."""
    from .runs import DATA_VARIABLE, data_folder

    if data_folder() is None:
        return (
            f"These results are of all of MNIST, and there is none here. Name the folder of its four IDX files in "
            f"{DATA_VARIABLE}, or see that the script works on a shipped sample: --quick."
        )
    return None


if __name__ == "__main__":
    sys.exit("This is what the scripts of distillation share; run one of them.")
