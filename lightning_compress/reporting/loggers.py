"""A report in the loggers of a Trainer: to each what it can show."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lightning_compress.reporting import Boundary, Phase, Report
from lightning_compress.reporting.checkpoint_report import report_checkpoint
from lightning_compress.reporting.render.summary import summary_lines as lines
from lightning_compress.reporting.values import ReportValues
from lightning_compress.training.loggers import log_immediately, loggers_of_kind, wandb_runs

COLUMNS = (
    "name",
    "type",
    "parameters",
    "nonzero",
    "sparsity",
    "macs",
    "macs_nonzero",
    "size_bytes",
    "size_bytes_sparse",
)

SIZES = ("size_bytes", "size_bytes_sparse", "size_bytes_quantized")


def send_report(trainer: Any, report: Report, files: Sequence[Path]) -> None:
    """Send a report to each logger of the Trainer; without one nothing happens."""
    log_immediately(trainer, report_metrics(report))
    for run in wandb_runs(trainer):
        _to_wandb(run, report, files)
    for logger in loggers_of_kind(trainer, "TensorBoardLogger"):
        logger.experiment.add_text("compress/report", report_markdown(report), trainer.global_step)
    for logger in loggers_of_kind(trainer, "MLFlowLogger"):
        for path in files:
            logger.experiment.log_artifact(logger.run_id, str(path), "compression_report")


def send_checkpoint(loggers: Sequence[Any], path: str | Path) -> None:
    """Send a checkpoint to the W&B run of each logger, with what is measured of this file; nothing if there is none.

    `WandbLogger(log_model=True)` sends it without. Bytes that W&B has already are not sent again.
    """
    if not loggers or not Path(path).is_file():
        return
    import wandb

    found = report_metrics(report_checkpoint(path)) | {"size_bytes_of_the_file": Path(path).stat().st_size}
    for run in (logger.experiment for logger in loggers):
        artifact = wandb.Artifact(f"compressed-{run.id}", type="model", metadata=found)
        artifact.add_file(str(path), name="model.ckpt")
        run.log_artifact(artifact)


def report_metrics(report: Report) -> dict[str, float]:
    """The totals of a report and of what was before, flat, under `compress/`."""
    values = _totals(report, "compress/")
    return values if report.before is None else values | _totals(report.before, "compress/before/")


def report_markdown(report: Report) -> str:
    """The totals, the phases and their boundaries as Markdown."""
    compared = report.before is not None
    heading = ("", "before", "after", "change") if compared else ("", "value")
    rows = [
        (one.label, one.before, one.after, one.change) if compared else (one.label, one.after) for one in lines(report)
    ]
    return "\n\n".join(_table(*one) for one in ((heading, rows), *_course(report)) if one[1])


def _to_wandb(run: Any, report: Report, files: Sequence[Path]) -> None:
    import wandb

    run.summary.update(report_metrics(report))
    layers = [[getattr(layer, one) for one in COLUMNS] for layer in report.layers]
    run.log({"compress/layers": wandb.Table(columns=list(COLUMNS), data=layers)})
    for name, (heading, rows) in zip(("phases", "boundaries"), _course(report), strict=True):
        if rows:
            run.log({f"compress/{name}": wandb.Table(columns=list(heading), data=[list(row) for row in rows])})
    artifact = wandb.Artifact(
        f"compression-report-{run.id}", type="compression-report", metadata=report_metrics(report)
    )
    for path in files:
        artifact.add_file(str(path))
        if path.suffix == ".html":
            run.log({"compress/report": wandb.Html(str(path))})
    run.log_artifact(artifact)


Table = tuple[Sequence[str], Sequence[Sequence[Any]]]


def _course(report: Report) -> tuple[Table, Table]:
    """Phases and boundaries."""
    phases, boundaries = (tuple(one.name for one in fields(kind)) for kind in (Phase, Boundary))
    return (phases, _rows(report.phases)), (boundaries, _rows(report.boundaries))


def _rows(several: Sequence[object]) -> list[tuple[Any, ...]]:
    return [tuple(vars(one).values()) for one in several]


def _table(heading: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join('' if one is None else str(one) for one in row)} |" for row in cells)


def _totals(report: ReportValues, prefix: str) -> dict[str, float]:
    latencies = {
        f"latency_ms_batch_{one.batch}": one.median_ms
        for one in (report.latency_batch_1, report.latency_batch_64)
        if one
    }
    totals = {key: getattr(report, key) for key in SIZES + Report.TOTALS}
    files = {f"size_bytes_exported/{name}": size for name, size in report.size_bytes_exported.items()}
    named = {**totals, **latencies, **files, **{f"metric/{key}": value for key, value in report.metrics.items()}}
    return {prefix + key: value for key, value in named.items() if value is not None}
