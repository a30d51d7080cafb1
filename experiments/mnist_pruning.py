"""LeNet-5 on all of MNIST: dense, and the same run with `Pruning` at 95 % and 98 %, several seeds each.

First come the trials: every combination of a few settings, judged by validation error alone, on seeds of their own.
Then the settings that did best are run and tested. Each run is a process of one thread. Finished runs are kept in
`mnist_pruning_trials.json` and `mnist_pruning.json`, so that the script may be stopped and started again; the
tables are in `mnist_pruning.md`.

    python experiments/mnist_pruning.py          all of MNIST, from LIGHTNING_COMPRESS_DATA or ../shared/data
    python experiments/mnist_pruning.py --quick  a few batches of the shipped sample, to see that it works

The test images are read once per run, with the epoch that has the smallest error on 5,000 training images held back;
of a pruned run only epochs after the end of pruning count (`gate_best`, the default of `Pruning`).
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

from common.runs import (
    DATA_VARIABLE,
    RESULT_MARK,
    ROOT,
    Keyed,
    data_folder,
    device_name,
    read_runs,
    run_all,
    spread,
    told,
    versions,
)

SPARSITIES, SEEDS, TRIAL_SEEDS = (0.0, 0.95, 0.98), (0, 1, 2, 3, 4), (100, 101)
LEARNING_RATES, DISTRIBUTIONS, ENDS = (0.002, 0.004), ("global", "lamp"), ("60%", "80%")
LARGEST_DIFFERENCE_POINTS = 0.10
QUICK_EPOCHS = 3
WINDOW = ("distribution", "begin", "end", "every")


@dataclass(frozen=True)
class Settings(Keyed):
    """One run, in all that its result depends on; `sparsity` 0 is the dense run."""

    sparsity: float
    seed: int
    epochs: int = 20
    batch_size: int = 128
    learning_rate: float = 0.002
    distribution: str = "global"
    begin: str = "10%"
    end: str = "60%"
    every: str = "1%"
    batches: int | None = None
    data: str = "mnist"
    accelerator: str = "cpu"

    @property
    def label(self) -> str:
        if not self.sparsity:
            return f"dense, lr {self.learning_rate}"
        return f"{self.sparsity:.0%} {self.distribution} to {self.end}, lr {self.learning_rate}"


# One run, in a process of its own ----------------------------------------------------------------------------------


def train(settings: Settings, test: bool = True) -> dict[str, Any]:
    """Train, choose the epoch by validation error, test it, and measure the checkpoint it was kept in."""
    import torch

    from lightning_compress._lightning import Trainer
    from lightning_compress.recipes.mnist import MNIST, LeNet5

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    data = MNIST(data_folder() if settings.data == "mnist" else None, settings.batch_size)
    callbacks = import_module(Trainer.__module__.partition(".trainer")[0] + ".callbacks")
    with tempfile.TemporaryDirectory() as folder:
        best, errors = callbacks.ModelCheckpoint(folder, monitor="val_error", mode="min"), told(callbacks.Callback)
        trainer = _trainer(settings, folder, [best, errors, *_pruning(settings)])
        begin = time.perf_counter()
        trainer.fit(LeNet5(settings.learning_rate), datamodule=data)
        seconds = time.perf_counter() - begin
        path = best.best_model_path
        chosen = torch.load(path, weights_only=True)["epoch"]
        tested = trainer.test(ckpt_path=path, datamodule=data, verbose=False)[0] if test else {}
        return {
            "settings": asdict(settings),
            "val_errors": errors.errors,
            "chosen_epoch": chosen + 1,
            "val_error": float(best.best_model_score),
            "test_error": tested.get("test_error"),
            **_sizes(path),
            "seconds": round(seconds, 1),
            "device": device_name(settings.accelerator),
            "versions": versions(),
        }


def _pruning(settings: Settings) -> list[Any]:
    from lightning_compress import Pruning

    if not settings.sparsity:
        return []
    window = {"begin": settings.begin, "end": settings.end, "every": settings.every}
    return [Pruning(settings.sparsity, distribution=settings.distribution, **window)]


def _trainer(settings: Settings, folder: str, callbacks: list[Any]) -> Any:
    from lightning_compress._lightning import Trainer

    return Trainer(
        max_epochs=settings.epochs,
        accelerator=settings.accelerator,
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


def _sizes(path: str) -> dict[str, Any]:
    """What the kept checkpoint holds, measured on the network that plain Lightning loads from it."""
    from lightning_compress.recipes.mnist import LeNet5
    from lightning_compress.reporting import report

    measured = report(LeNet5.load_from_checkpoint(path, map_location="cpu"), latency=False)
    return {name: getattr(measured, name) for name in ("weights", "weight_sparsity", "parameters", "nonzero", *SIZES)}


# Trials: which settings ----------------------------------------------------------------------------------------------


def trials(base: Settings) -> list[Settings]:
    """All that is tried, seed by seed, so that what is stopped half-way can still be compared."""
    found = []
    for seed, rate in product(TRIAL_SEEDS, LEARNING_RATES):
        one = replace(base, seed=seed, learning_rate=rate)
        found.append(replace(one, sparsity=0.0))
        for sparsity, distribution, end in product(SPARSITIES[1:], DISTRIBUTIONS, ENDS):
            found.append(replace(one, sparsity=sparsity, distribution=distribution, end=end))
    return found


def chosen(kept: Iterable[dict[str, Any]]) -> dict[float, dict[str, Any]]:
    """The settings of each sparsity with the smallest mean validation error.

    The learning rate is the one that is best for the *dense* network, so that nothing is measured against a dense run
    that was tuned less; the rest is what is best for that sparsity at that rate.
    """
    runs = [run for run in kept if run["settings"]["seed"] in TRIAL_SEEDS]
    rate = _best(runs, ("learning_rate",), lambda one: not one["sparsity"])
    found = {0.0: rate}
    for sparsity in SPARSITIES[1:]:
        best = _best(
            runs,
            ("distribution", "end"),
            lambda one, at=sparsity: one["sparsity"] == at and rate.items() <= one.items(),
        )
        found[sparsity] = {**rate, **best}
    return found


def _best(runs: Sequence[dict[str, Any]], names: tuple[str, ...], counts: Any) -> dict[str, Any]:
    groups: dict[tuple[Any, ...], list[float]] = {}
    for run in runs:
        if counts(run["settings"]):
            groups.setdefault(tuple(run["settings"][name] for name in names), []).append(run["val_error"])
    return dict(zip(names, min(groups, key=lambda group: statistics.mean(groups[group])), strict=True))


def trials_table(kept: Iterable[dict[str, Any]]) -> str:
    """Mean validation error of all that was tried."""
    groups: dict[tuple[Any, ...], dict[float, list[float]]] = {}
    for run in kept:
        one = run["settings"]
        name = (one["learning_rate"], one["distribution"], one["end"]) if one["sparsity"] else (one["learning_rate"],)
        groups.setdefault(name, {}).setdefault(one["sparsity"], []).append(100 * run["val_error"])
    lines = ["| learning rate | distribution | end | dense | 95 % | 98 % |", "|---|---|---|---|---|---|"]
    for name, errors in sorted(groups.items(), key=str):
        cells = [*map(str, name), *[""] * (3 - len(name))]
        cells += [f"{statistics.mean(errors[one]):.2f}" if one in errors else "" for one in SPARSITIES]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# The tables --------------------------------------------------------------------------------------------------------

PAPERS = """\
| from | pruned | test error | its dense error | what differs from the runs above |
|---|---|---|---|---|
| SNIP, Lee et al., 2019 | 98 % | 0.8 % | 0.9 % | pruned once, before training; its own number of epochs and split |
| SNIP, Lee et al., 2019 | 99 % | 1.1 % | 0.9 % | as above, and twice as sparse as the last row above |
| Han et al., 2015, the first step of Deep Compression | 12x fewer weights | 0.77 % | 0.80 % | a trained network, \
pruned and retrained; less sparse |

These figures are quoted, not reproduced. One standard deviation of the sampling noise of 10,000 test images is about
0.1 points at 1 % error, beside the spread over seeds above.
"""
SIZES = ("weights_nonzero", "size_bytes", "size_bytes_gzip", "size_bytes_sparse", "size_bytes_sparse_gzip")


def markdown(runs: Sequence[dict[str, Any]], tried: str, earlier: Sequence[Sequence[dict[str, Any]]]) -> str:
    """The tables of all that was run: the experiment, what was tried before it, and earlier experiments."""
    text = ["# LeNet-5 on MNIST, dense and pruned", "", *experiment(runs), "## How the settings were chosen", "", tried]
    if earlier:
        text += ["", "## Earlier attempts", "", "Kept on record, since their test errors were seen.", ""]
        text += [line for group in earlier for line in experiment(group)]
    return "\n".join([*text, "", "## Beside papers", "", PAPERS])


def experiment(runs: Sequence[dict[str, Any]]) -> list[str]:
    """One experiment: its settings, its table, and how far each sparsity is from the dense runs of the same seeds."""
    groups = {sparsity: _of(runs, sparsity) for sparsity in sorted({run["settings"]["sparsity"] for run in runs})}
    dense = {run["settings"]["seed"]: run["test_error"] for run in groups[0.0]}
    lines = [
        *_heading(runs),
        "| LeNet-5 (431,080 parameters) | test error, % | minus its own dense run, points | val error, % | weights not "
        "zero | fp32 file, B | its gzip, B | sparse-coded file, B | its gzip, B |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for sparsity, group in groups.items():
        gaps = [100 * (run["test_error"] - dense[run["settings"]["seed"]]) for run in group]
        cells = [
            _callback(group[0]["settings"]) if sparsity else "dense",
            spread([100 * run["test_error"] for run in group]),
            "" if not sparsity else spread(gaps, sign="+"),
            spread([100 * run["val_error"] for run in group]),
            *(f"{statistics.mean(run[key] for run in group):,.0f}" for key in SIZES),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", *_verdicts(groups, dense), ""]


def _heading(runs: Sequence[dict[str, Any]]) -> list[str]:
    settings, seeds = runs[0]["settings"], sorted({run["settings"]["seed"] for run in runs})
    whole = settings["data"] == "mnist" and settings["batches"] is None
    data = "All of MNIST: 55,000 images to train on, 5,000 to choose the epoch by, 10,000 to test once"
    return [
        f"{data if whole else 'A quick look at a few batches, worth nothing as a result'}. Mean ± standard deviation "
        f"of {len(seeds)} seeds; {settings['epochs']} epochs of Adam with a one-cycle learning rate up to "
        f"{settings['learning_rate']}, batch {settings['batch_size']}, no augmentation; on "
        f"{runs[0].get('device', 'one CPU thread')}. Pruned runs add one callback and change nothing else.",
        "",
        "Versions: " + ", ".join(f"{name} {number}" for name, number in runs[0]["versions"].items()) + ".",
        "",
    ]


def _callback(settings: dict[str, Any]) -> str:
    window = ", ".join(f'{name}="{settings[name]}"' for name in WINDOW)
    return f"`Pruning({settings['sparsity']}, {window})`"


def _verdicts(groups: dict[float, list[dict[str, Any]]], dense: dict[int, float]) -> Iterable[str]:
    for sparsity, group in groups.items():
        if sparsity:
            gap = statistics.mean(100 * (run["test_error"] - dense[run["settings"]["seed"]]) for run in group)
            word = "within" if gap <= LARGEST_DIFFERENCE_POINTS else "NOT within"
            yield f"- {sparsity:.0%}: {gap:+.3f} points, {word} {LARGEST_DIFFERENCE_POINTS:.2f} of the dense runs."


def _of(runs: Sequence[dict[str, Any]], sparsity: float) -> list[dict[str, Any]]:
    return [run for run in runs if run["settings"]["sparsity"] == sparsity]


def _experiments(kept: Iterable[dict[str, Any]], now: set[str]) -> list[list[dict[str, Any]]]:
    """Pruned runs that are not among those of `now`, by settings, each group with the dense runs it belongs to."""
    groups: dict[str, list[dict[str, Any]]] = {}
    dense: dict[str, list[dict[str, Any]]] = {}
    for run in kept:
        one = replace(Settings(**run["settings"]), sparsity=0.0, seed=0)
        if run["settings"]["sparsity"]:
            groups.setdefault(one.key, []).append(run)
        else:
            dense.setdefault(_training(one), []).append(run)
    return [
        dense[_training(Settings(**json.loads(key)))] + group
        for key, group in groups.items()
        if any(Settings(**run["settings"]).key not in now for run in group)
    ]


def _training(settings: Settings) -> str:
    """What a dense run depends on."""
    return replace(settings, sparsity=0.0, seed=0, **{name: getattr(Settings, name) for name in WINDOW}).key


# The command -------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.run:
        settings = Settings(**json.loads(arguments.run))
        print(RESULT_MARK + json.dumps(train(settings, test=settings.seed not in TRIAL_SEEDS)), flush=True)
        return 0
    console = Console()
    if not arguments.quick and data_folder() is None:
        console.print(
            f"These results are of all of MNIST, and there is none here. Name the folder of its four IDX files in "
            f"{DATA_VARIABLE}, or see that the script works on a shipped sample: --quick.",
            style="red",
        )
        return 1
    output = arguments.output or _output(arguments.quick)
    if arguments.quick:
        base = Settings(
            0.0, 0, epochs=arguments.epochs or QUICK_EPOCHS, batches=2, data="sample", accelerator=arguments.accelerator
        )
        tuned: dict[float, dict[str, Any]] = {sparsity: {} for sparsity in SPARSITIES[:2]}
        text = _measure(base, tuned, (0,), "", output, arguments.workers, console)
    else:
        base = Settings(0.0, 0, epochs=arguments.epochs or Settings.epochs, accelerator=arguments.accelerator)
        tuned, tried = _tune(base, output.with_name("mnist_pruning_trials.json"), arguments.workers, console)
        text = _measure(base, tuned, SEEDS, tried, output, arguments.workers, console)
    output.with_suffix(".md").write_text(text, encoding="utf-8")
    console.print(text, soft_wrap=True, highlight=False, markup=False)
    return 0


def _tune(base: Settings, path: Path, workers: int, console: Console) -> tuple[dict[float, dict[str, Any]], str]:
    todo, kept = trials(base), read_runs(path, Settings)
    run_all(__file__, todo, kept, path, workers, console)
    runs = [kept[one.key] for one in todo]
    text = (
        f"Validation error, %, mean of seeds {TRIAL_SEEDS}, which are not among those above; {base.epochs} epochs as "
        f"above; the test images were not read. The learning rate is the best one for the dense network; distribution "
        f"and end are the best ones for each sparsity at that rate.\n\n{trials_table(runs)}"
    )
    return chosen(runs), text


def _measure(
    base: Settings,
    tuned: dict[float, dict[str, Any]],
    seeds: Sequence[int],
    tried: str,
    path: Path,
    workers: int,
    console: Any,
) -> str:
    # Dense and pruned runs of one seed lie side by side, so that what is stopped half-way can still be compared.
    todo = [replace(base, sparsity=one, seed=seed, **own) for seed in seeds for one, own in tuned.items()]
    kept = read_runs(path, Settings)
    run_all(__file__, todo, kept, path, workers, console, here=train if base.data == "sample" else None)
    earlier = _experiments(kept.values(), {one.key for one in todo})
    return markdown([kept[one.key] for one in todo], tried, earlier)


def _output(quick: bool) -> Path:
    return (Path(tempfile.mkdtemp()) if quick else ROOT / "docs" / "results") / "mnist_pruning.json"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few batches of the shipped sample; proves nothing")
    parser.add_argument("--output", type=Path, help="JSON file; the table goes beside it (default: beside this script)")
    parser.add_argument("--epochs", type=int, help=f"default: {Settings.epochs}, quick: {QUICK_EPOCHS}")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    parser.add_argument("--accelerator", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
