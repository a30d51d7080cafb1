"""CompressionReport: measure the model before and after a run, and write the comparison to files and loggers."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any
from weakref import ref

from torch import nn
from torch.optim import Optimizer

from lightning_compress._lightning import (
    LightningModule,
    Trainer,
    is_redirected_forward,
    logs_models,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_compress.core.conflicts import ExclusiveClaim
from lightning_compress.core.phases import Run
from lightning_compress.export.api import check_suffix
from lightning_compress.nn.input_recorder import InputRecorder, RecordedInput
from lightning_compress.nn.isolation import on_cpu
from lightning_compress.reporting import Report, report
from lightning_compress.reporting.export_at_end import check_export, write_export
from lightning_compress.reporting.loggers import send_checkpoint, send_report
from lightning_compress.reporting.measure_model import MeasureOptions, measure_model
from lightning_compress.reporting.phase_history import PhaseHistory, active_phases
from lightning_compress.reporting.wandb_resume import new_run_warning
from lightning_compress.training.callback import CompressionCallback, compression_callbacks
from lightning_compress.training.clock import step_before
from lightning_compress.training.loggers import is_logged, log_immediately, loggers_of_kind, wandb_runs

BEFORE_AND_AFTER = "compression_report"
BOUNDARY_SECONDS = 0.25  # of timing where a phase begins or ends: training waits for it


class CompressionReport(CompressionCallback):
    """Report parameters, nonzeros, MACs, bytes, latency and metrics of the model, before and after the run.

    Prints a table, writes `compression_report.json` and `.html`, and logs to the Trainer's loggers: to all of them the
    totals, which callbacks are active, the learning rate, and size and latency where a phase begins or ends; to W&B
    also tables, a summary and artifacts; to TensorBoard the tables as text; to MLflow the files. The result is the
    attribute `report`; a later `trainer.test` adds its metrics to it.

    Args:
        example_input: a batch that the module takes, for MACs and latency. None: `module.example_input_array`, or the
            inputs of the module's first training step.
        baseline: the report "before": the `report` of another run's callback, or the path of a saved `.json`. None:
            the module at the beginning of this run.
        dirpath: folder for the files; None: the logger's, or the Trainer's `default_root_dir`.
        latency: whether to time the module on the CPU.
        boundaries: whether to measure also where the phase of another callback begins or ends within the run.
        runs, seconds: at most so many calls are timed for each batch size, and for at most so many seconds.
        print_table: whether to print the table at the end.
        export: path of a file that `lightning_compress.export` writes when the fit ends: "model.onnx", or for quantized
            models "model.pt2" or "model.safetensors". A relative path is relative to the report's folder. The report
            has the size of the file, and W&B's artifact the file itself.
        name: key of the state in checkpoints.

    Raises:
        ValueError: if the file `baseline` holds no report, or `export` has another suffix; before training, if the
            export cannot be written. ModuleNotFoundError: if a package that the export needs is not installed.

    >>> from tempfile import TemporaryDirectory
    >>> from pytorch_lightning import Trainer
    >>> from pytorch_lightning.demos.boring_classes import BoringModel
    >>> with TemporaryDirectory() as folder:
    ...     compression = CompressionReport(dirpath=folder, latency=False, print_table=False)
    ...     Trainer(barebones=True, accelerator="cpu", max_steps=1, callbacks=compression).fit(BoringModel())
    ...     [path.name for path in compression.files]
    ['compression_report.json', 'compression_report.html']
    >>> compression.report.parameters, compression.report.macs  # a linear layer of 32 inputs and 2 outputs
    (66, 64)
    """

    state_format = 2
    has_phase = False

    def __init__(
        self,
        example_input: Any = None,
        *,
        baseline: Report | str | None = None,
        dirpath: str | None = None,
        latency: bool = True,
        boundaries: bool = True,
        runs: int = 50,
        seconds: float = 1.0,
        print_table: bool = True,
        export: str | Path | None = None,
        name: str = "report",
    ) -> None:
        super().__init__(name)
        self.example_input, self.baseline, self.dirpath = example_input, baseline, dirpath
        self.latency, self.boundaries = latency, boundaries
        self.runs, self.seconds, self.print_table = runs, seconds, print_table
        self.export = None if export is None else str(export)
        if export is not None:
            check_suffix(Path(export))
        self.report: Report | None = None
        self.files: tuple[Path, ...] = ()
        self._before: Report | None = Report.load(baseline) if isinstance(baseline, str) else baseline
        self._seen: InputRecorder | None = None
        self._call: RecordedInput | None = None
        self._module: Callable[[], nn.Module | None] = lambda: None
        self._folder, self._exported = Path(), tuple[Path, ...]()
        self._course, self._acting, self._rate = PhaseHistory(), dict[str, tuple[str, bool]](), 0.0
        self._wandb: list[str] = []

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Every rank has to ask here: the Trainer broadcasts its `log_dir`.
        self._folder = Path(self.dirpath or trainer.log_dir or trainer.default_root_dir)
        if self.export is not None and trainer.is_global_zero:
            check_export(self._folder / self.export, pl_module, _quantizes(trainer))

    def attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.report, self._call, self._seen, self._module = None, None, None, ref(pl_module)
        if self.saved is not None and self.saved["before"] is not None:
            self._before = Report.from_dict(self.saved["before"])
        elif self.baseline is None:
            self._before = None
        self._course = PhaseHistory() if self.saved is None else PhaseHistory.from_state_dict(self.saved["course"])
        self._wandb = [str(run.id) for run in wandb_runs(trainer)]
        if self.saved is not None and (words := new_run_warning(self.saved["wandb"], self._wandb)):
            rank_zero_warn(f"'{self.name}': {words}")
        given = self.example_input if self.example_input is not None else pl_module.example_input_array
        if given is not None:
            self._call = RecordedInput("", given)
        elif trainer.is_global_zero:
            self._seen = InputRecorder(pl_module, is_redirected_forward)
            self.undo.callback(self._seen.close)

    def claims(self, trainer: Trainer, pl_module: LightningModule) -> list[ExclusiveClaim]:
        folder = "the run's own folder" if self.dirpath is None else str(self.dirpath)
        return [
            ExclusiveClaim(f"write {BEFORE_AND_AFTER} into", frozenset({folder}), "Give one another folder by dirpath.")
        ]

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._before is None and trainer.is_global_zero:
            self._before = self._measure(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # What all callbacks have done to the step before is done by now, in whatever order they are.
        step, self._acting = int(trainer.global_step), self._active(trainer)
        words = self._course.crossed(step, self._acting)
        if words and step > 0 and self.boundaries and trainer.is_global_zero and not trainer.fast_dev_run:
            what = ", ".join(words)
            if (found := self._measured_now(pl_module, what)) is not None:
                self.log_metrics(trainer, self._course.add(step, what, found))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if optimizer is trainer.optimizers[0]:  # later in this step the scheduler has moved it
            self._rate = float(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if is_logged(trainer):
            self._log_step(trainer)
        if self._seen is None:
            return
        self._seen.close()
        self._call, self._seen = self._seen.call, None
        if self._call is not None and self.baseline is None and not self.resumed and self._before is not None:
            # What is counted and timed has the structure of the dense model still: cuts come in later steps only.
            timed = self._measure(trainer, pl_module)
            self._before = _with_costs_of(self._before, timed, self._call.part)
        if self.resumed and self._call is not None and self._course.lacks_costs:  # it goes on at a boundary
            found = self._measured_now(pl_module, self._course.boundaries[-1].what)
            self.log_metrics(trainer, {} if found is None else self._course.add_costs(found))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in `on_train_end`, when averages of the weights may still be on their way into the module, and not on the
        # accelerator: the Trainer has moved the module to the CPU by now.
        if not trainer.is_global_zero:
            return
        after = self._measure(trainer, pl_module, metrics=trainer.callback_metrics)
        measured = replace(
            after,
            history=_history(trainer, self),
            phases=tuple(self._course.phases.values()),
            boundaries=tuple(self._course.boundaries),
        )
        self.report = _compared(measured, self._before)
        self._export(trainer, pl_module)
        self._publish(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.report is None or self._module() is not pl_module:
            return
        # A test may have put other weights into the module, those of the best checkpoint say: count them again.
        tested = self._measure(trainer, pl_module, timed=False, metrics=trainer.callback_metrics)
        self.report = replace(
            self.report,
            layers=tested.layers,
            size_bytes=tested.size_bytes,
            size_bytes_sparse=tested.size_bytes_sparse,
            size_bytes_gzip=tested.size_bytes_gzip,
            size_bytes_sparse_gzip=tested.size_bytes_sparse_gzip,
            size_bytes_quantized=tested.size_bytes_quantized,
            metrics=self.report.metrics | tested.metrics,
        )
        self._publish(trainer, again=True)

    def checkpoint_state(self) -> dict[str, Any]:
        before = None if self._before is None else self._before.to_dict()
        return {"before": before, "course": self._course.state_dict(), "wandb": self._wandb}

    def timeline(self, run: Run) -> list[tuple[int, str]]:
        (begin, _), *end = super().timeline(run)
        before = [(begin, "measures before")] if self.baseline is None else []
        return [*before, *((time, "measures after") for time, _ in end)]

    def _active(self, trainer: Trainer) -> dict[str, tuple[str, bool]]:
        return active_phases(
            (one for one in compression_callbacks(trainer) if one.has_phase), lambda unit: step_before(trainer, unit)
        )

    def _log_step(self, trainer: Trainer) -> None:
        """Who is in its phase, and the learning rate: the bands and the line of a plot over all of the run."""
        set_by = [rate for one in compression_callbacks(trainer) if (rate := one.current_learning_rate()) is not None]
        rate = set_by[0] if set_by else self._rate
        self.history.append((int(trainer.global_step), rate))
        acting = {f"compress/{name}/active": float(acts) for name, (_, acts) in self._acting.items()}
        log_immediately(trainer, {**acting, f"compress/{self.name}/learning_rate": rate})

    def _measured_now(self, pl_module: LightningModule, what: str) -> Report | None:
        """A quick look in the middle of the run; None if it fails, which is no reason to lose the run."""
        part, example = self._called(pl_module)
        seconds = min(self.seconds, BOUNDARY_SECONDS)
        protocol = MeasureOptions(latency=self.latency, runs=self.runs, seconds=seconds, gzip=False, batches=(1,))
        try:
            with on_cpu(pl_module):
                try:
                    return measure_model(part, example, protocol)
                except (ValueError, TypeError):  # the example is not what the module takes: the end says so
                    return measure_model(part, None, protocol)
        except Exception as error:
            rank_zero_warn(f"'{self.name}' could not measure where {what}: {error}")
            return None

    def _called(self, pl_module: LightningModule) -> tuple[nn.Module, Any]:
        """The part of the module that is measured, and what it is called with, if that is known."""
        if self._call is None:
            return pl_module, None
        return pl_module.get_submodule(self._call.part), self._call.example

    def _measure(
        self, trainer: Trainer, pl_module: LightningModule, metrics: Mapping[str, Any] | None = None, timed: bool = True
    ) -> Report:
        part, example = self._called(pl_module)
        timed = timed and self.latency and not trainer.fast_dev_run
        arguments: dict[str, Any] = {
            "metrics": _numbers(metrics or {}),
            "name": type(pl_module).__name__,
            "runs": self.runs,
            "seconds": self.seconds,
        }
        try:
            return report(part, example, latency=timed, **arguments)
        except (ValueError, TypeError) as error:
            if example is None:
                raise
            bare = report(part, None, latency=False, **arguments)
            return replace(bare, notes=(*bare.notes, f"MACs and latency were not measured: {error}"))

    def _export(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._exported = ()
        if self.export is None or self.report is None or trainer.fast_dev_run:
            return
        path = self._folder / self.export
        try:
            size = write_export(path, pl_module, self._call)
        except Exception as error:  # whatever it is, it is no reason to lose the trained run
            words = f"{path.name} was not exported: {error}"
            rank_zero_warn(words)
            self.report = replace(self.report, notes=(*self.report.notes, words))
            return
        self.report = replace(self.report, size_bytes_exported={path.name: size})
        self._exported = (path,)

    def _publish(self, trainer: Trainer, again: bool = False) -> None:
        if self.report is None or trainer.fast_dev_run:
            return
        written = [self.report.save(self._folder / f"{BEFORE_AND_AFTER}.{kind}") for kind in ("json", "html")]
        self.files = (*written, *self._exported)
        send_report(trainer, self.report, self.files)
        if again:
            return
        senders = [logger for logger in loggers_of_kind(trainer, "WandbLogger") if logs_models(logger)]
        send_checkpoint(senders, getattr(trainer.checkpoint_callback, "best_model_path", ""))
        if self.print_table:
            self.report.print()
        rank_zero_info(f"'{self.name}' wrote {', '.join(map(str, self.files))}.")


def _quantizes(trainer: Trainer) -> bool:
    kinds = {cls.__name__ for one in trainer.callbacks for cls in type(one).__mro__}
    return "QuantizationAwareTraining" in kinds


def _with_costs_of(bare: Report, timed: Report, part: str) -> Report:
    """The counts of `bare`, measured over the whole module, with the costs of `timed`, measured over its `part`."""
    costs = {layer.name: layer.macs for layer in timed.layers}
    layers = []
    for layer in bare.layers:
        name = layer.name.removeprefix(f"{part}.") if part else layer.name
        macs = costs.get(name)
        nonzero = None if macs is None else round(macs * (1 - layer.weight_sparsity))
        layers.append(replace(layer, name=name, macs=macs, macs_nonzero=nonzero))
    return replace(
        bare,
        layers=tuple(layers),
        macs_batch=timed.macs_batch,
        latency_batch_1=timed.latency_batch_1,
        latency_batch_64=timed.latency_batch_64,
        notes=timed.notes,
    )


def _compared(after: Report, before: Report | None) -> Report:
    """`after` beside `before`; timed once if both run the same kernels, for two timings would compare two moments."""
    if before is None or _structure(before) != _structure(after) or after.latency_batch_1 is None:
        return replace(after, before=before)
    once = replace(before, latency_batch_1=after.latency_batch_1, latency_batch_64=after.latency_batch_64)
    note = "Latency was timed once: both models run the same dense kernels, which do not skip zeros."
    return replace(after, before=once, notes=(*after.notes, note))


def _structure(report: Report) -> list[tuple[Any, ...]]:
    return [(layer.type, layer.shape, layer.macs) for layer in report.layers]


def _history(trainer: Trainer, own: CompressionCallback) -> dict[str, tuple[tuple[int, float], ...]]:
    """What the other compression callbacks have shown over time, and the learning rate."""
    curves = {
        f"{one.name}/{one.progress_metric}": one.history for one in compression_callbacks(trainer) if one is not own
    }
    curves["learning rate"] = own.history
    finite = {name: tuple(pair for pair in points if isfinite(pair[1])) for name, points in curves.items()}
    return {name: points for name, points in finite.items() if points}


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The user's own metrics: ours are in the report already."""
    return {key: float(value) for key, value in metrics.items() if not key.startswith("compress/")}
