"""A report in W&B: a table of layers, a summary, and an artifact with the files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_compress.core.logs import wandb_runs
from lightning_compress.report import Report

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


def send(trainer: Any, report: Report, files: Sequence[Path]) -> None:
    """Send a report to each W&B run of the Trainer; without one nothing happens."""
    for run in wandb_runs(trainer):
        import wandb

        run.summary.update(summary(report))
        table = wandb.Table(
            columns=list(COLUMNS), data=[[getattr(layer, one) for one in COLUMNS] for layer in report.layers]
        )
        artifact = wandb.Artifact(f"compression-report-{run.id}", type="compression-report", metadata=summary(report))
        for path in files:
            artifact.add_file(str(path))
        run.log({"compress/layers": table})
        for page in (path for path in files if path.suffix == ".html"):
            run.log({"compress/report": wandb.Html(str(page))})
        run.log_artifact(artifact)


def summary(report: Report) -> dict[str, float]:
    """The totals of a report and of what was before, flat, under `compress/`."""
    values = _totals(report, "compress/")
    return values if report.before is None else values | _totals(report.before, "compress/before/")


def _totals(report: Report, prefix: str) -> dict[str, float]:
    latencies = {
        f"latency_ms_batch_{one.batch}": one.median_ms
        for one in (report.latency_batch_1, report.latency_batch_64)
        if one
    }
    totals = {key: getattr(report, key) for key in SIZES + Report.TOTALS}
    files = {f"size_bytes/{name}": size for name, size in report.size_bytes_exported.items()}
    named = {**totals, **latencies, **files, **{f"metric/{key}": value for key, value in report.metrics.items()}}
    return {prefix + key: value for key, value in named.items() if value is not None}
