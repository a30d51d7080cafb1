"""Many training runs, each in a process of its own; finished ones are kept, so that a script may stop and go on."""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).resolve().parents[2]
DATA_VARIABLE = "LIGHTNING_COMPRESS_DATA"
RESULT_MARK = "RESULT "


@dataclass(frozen=True)
class Keyed:
    """Settings of a run: all that its result depends on, and by which it is found again."""

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


def run_all(
    script: str,
    todo: Sequence[Any],
    kept: dict[str, Any],
    path: Path,
    workers: int,
    console: Console,
    shown: Callable[[float], str] = "{:.2%}".format,
    here: Callable[[Any], dict[str, Any]] | None = None,
) -> None:
    """Do what is not kept yet, and keep each result as soon as it is there.

    Args:
        script: file that trains one run when it is called with `--run` and the run's settings as JSON.
        todo: settings with `key`, `label`, `seed` and `epochs`.
        kept: results by key, added to in place and written to `path`.
        shown: a result's error in words.
        here: trains one run in this process, which a quick look does: to start many takes longer than they do.
    """
    missing = [settings for settings in todo if settings.key not in kept]
    lock = Lock()
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[last]}"), console=console) as progress:

        def one(settings: Any) -> None:
            name = f"{settings.label}, seed {settings.seed}"
            task = progress.add_task(name, total=settings.epochs, last="")
            if here is not None:
                result = here(settings)
            else:
                result = _in_a_process(script, settings, lambda line: progress.update(task, advance=1, last=line))
            with lock:
                kept[settings.key] = result
                write_runs(path, kept)
            test = "" if result.get("test_error") is None else f", test {shown(result['test_error'])}"
            progress.remove_task(task)
            progress.console.print(
                f"{name}: val {shown(result['val_error'])}{test}, {result['seconds']:.0f} s", highlight=False
            )

        with ThreadPoolExecutor(workers) as pool:
            list((pool.map if here is None else map)(one, missing))


def _in_a_process(script: str, settings: Any, tell: Callable[[str], None]) -> dict[str, Any]:
    command = [sys.executable, str(Path(script).resolve()), "--run", settings.key]
    # Other processes have the other cores: with more threads they would wait for each other.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, cwd=ROOT
        ) as running:
            found = None
            for line in running.stdout or ():
                if line.startswith(RESULT_MARK):
                    found = json.loads(line.removeprefix(RESULT_MARK))
                elif line.startswith("epoch "):
                    tell(line.strip())
        if found is None:
            errors.seek(0)
            raise RuntimeError(f"The run {settings.key} ended with code {running.returncode}:\n{errors.read()[-3000:]}")
    return dict(found)


def trained(
    settings: Any,
    model: Callable[[], Any],
    data: Any,
    callbacks: Sequence[Any],
    monitored: str,
    folder: str,
    **more: Any,
) -> tuple[dict[str, Any], Any, str]:
    """One run on one thread of the CPU, and its best epoch by validation.

    Args:
        settings: with `seed`, `epochs` and `batches`, None for all.
        model: builds it, when the seed is set.
        data: of the run.
        callbacks: of the user.
        monitored: the lower the better.
        folder: for checkpoints.
        more: of the Trainer.

    Returns:
        What is known of it, the Trainer, and the path of the best epoch's checkpoint.
    """
    import torch

    from lightning_compress._lightning import Trainer

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    lightning = import_module(Trainer.__module__.partition(".trainer")[0] + ".callbacks")
    best, errors = lightning.ModelCheckpoint(folder, monitor=monitored), told(lightning.Callback, monitored)
    trainer = Trainer(
        max_epochs=settings.epochs,
        limit_train_batches=settings.batches,
        limit_val_batches=settings.batches,
        limit_test_batches=settings.batches,
        accelerator="cpu",
        callbacks=[best, errors, *callbacks],
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **more,
    )
    begin, busy = time.perf_counter(), time.process_time()
    trainer.fit(model(), datamodule=data)
    run = {
        "settings": asdict(settings),
        "seconds": round(time.perf_counter() - begin, 1),
        "processor_seconds": round(time.process_time() - busy, 1),
        "val_errors": errors.errors,
        "chosen_epoch": torch.load(best.best_model_path, weights_only=True)["epoch"] + 1,
        "val_error": float(best.best_model_score),
        "device": device_name("cpu"),
        "versions": versions(),
    }
    return run, trainer, best.best_model_path


def read_runs(path: Path, settings: Callable[..., Any]) -> dict[str, Any]:
    """Finished runs by the key of their settings."""
    if not path.exists():
        return {}
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    return {settings(**run["settings"]).key: run for run in runs}


def write_runs(path: Path, kept: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".json.part")
    half.write_text(json.dumps({"runs": list(kept.values())}, indent=1) + "\n", encoding="utf-8")
    half.replace(path)


def told(callback: type, monitor: str = "val_error") -> Any:
    """A callback that says each epoch's validation error to the process that shows the progress, and keeps them."""

    class Told(callback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.errors: list[float] = []

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            self.errors.append(float(trainer.callback_metrics[monitor]))
            print(f"epoch {len(self.errors)}: {monitor} {self.errors[-1]:.4f}", flush=True)

    return Told()


def versions() -> dict[str, str]:
    """What the figures were taken with."""
    from lightning_compress import __version__

    found = {name: version(name) for name in ("torch", "pytorch-lightning", "torchmetrics", "numpy")}
    return {"lightning_compress": __version__, "python": platform.python_version(), **found}


def device_name(accelerator: str) -> str:
    """What the runs were trained on, in words."""
    import torch

    return torch.cuda.get_device_name() if accelerator == "cuda" else "one CPU thread"


def data_folder() -> Path | None:
    """The folder of the data sets, if there is one."""
    named = os.environ.get(DATA_VARIABLE)
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    return folder if folder.is_dir() else None


def spread(values: Sequence[float], sign: str = "", digits: int = 3) -> str:
    """Mean ± standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}.{digits}f} ± {deviation:.{digits}f}"
