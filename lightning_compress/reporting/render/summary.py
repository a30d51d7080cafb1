"""The totals of a report as lines of text, before and after; the terminal and the page both show these."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from lightning_compress.measure.latency import Latency
from lightning_compress.reporting.render.text import (
    bytes_text,
    count_text,
    metric_text,
    percent_text,
    ratio_text,
    shape_text,
    three_digits,
)
from lightning_compress.reporting.values import LayerReport, ReportValues

T = TypeVar("T")
NONE = "n/a"


@dataclass(frozen=True)
class SummaryLine:
    """One total; `before` is empty where there is nothing to compare with."""

    label: str
    before: str
    after: str
    change: str = ""


def summary_lines(report: ReportValues) -> list[SummaryLine]:
    """The totals, in the order in which they are shown."""
    lines = [
        _compared(report, "Parameters", lambda one: one.parameters, count_text),
        _compared(report, "Nonzero", lambda one: one.nonzero, count_text),
        _plain(report, "Sparsity, all", lambda one: one.sparsity, percent_text),
        _plain(report, "Sparsity, weights", lambda one: one.weight_sparsity, percent_text),
        _compared(report, "Dense fp32 file", lambda one: one.size_bytes, bytes_text),
        _compared(report, "Sparse-coded file", lambda one: one.size_bytes_sparse, bytes_text),
        *_quantized(report),
        *_exported(report),
        _compared(report, "gzip of dense file", lambda one: one.size_bytes_gzip, bytes_text),
        _compared(report, "gzip of sparse file", lambda one: one.size_bytes_sparse_gzip, bytes_text),
        _compared(report, _macs_label(report), lambda one: one.macs, count_text),
        _compared(report, "MACs, nonzero weight", lambda one: one.macs_nonzero, count_text),
        _latencies(report, 1, lambda one: one.latency_batch_1),
        _latencies(report, 64, lambda one: one.latency_batch_64),
    ]
    names = dict.fromkeys([*(report.before.metrics if report.before else {}), *report.metrics])
    return lines + [_metric(report, name) for name in names]


def layer_cells(layer: LayerReport) -> list[str]:
    """Name, type, shape, parameters, nonzero, sparsity of the weights, both sizes, both MACs."""
    return [
        layer.name or "(the model itself)",
        layer.type,
        shape_text(layer.shape),
        count_text(layer.parameters),
        count_text(layer.nonzero),
        percent_text(layer.weight_sparsity) if layer.weights else "",
        bytes_text(layer.size_bytes),
        bytes_text(layer.size_bytes_sparse),
        "" if layer.macs is None else count_text(layer.macs),
        "" if layer.macs_nonzero is None else count_text(layer.macs_nonzero),
    ]


def latency_text(latency: Latency) -> str:
    """Median, and interquartile range in brackets.

    >>> latency_text(Latency(batch=1, median_ms=0.498, iqr_ms=0.022, runs=200, warmup_runs=20, threads=1))
    '0.498 (0.022) ms'
    """
    return f"{three_digits(latency.median_ms)} ({three_digits(latency.iqr_ms)}) ms"


def _plain(
    report: ReportValues, label: str, value: Callable[[ReportValues], T | None], text: Callable[[T], str]
) -> SummaryLine:
    def shown(one: ReportValues) -> str:
        found = value(one)
        return NONE if found is None else text(found)

    return SummaryLine(label, shown(report.before) if report.before else "", shown(report))


def _compared(
    report: ReportValues, label: str, value: Callable[[ReportValues], int | None], text: Callable[[int], str]
) -> SummaryLine:
    line = _plain(report, label, value, text)
    before, after = value(report.before) if report.before else None, value(report)
    change = "" if before is None or after is None else ratio_text(before, after)
    return SummaryLine(label, line.before, line.after, change)


def _quantized(report: ReportValues) -> list[SummaryLine]:
    """The packed file, beside the dense one of before: a float32 network has no other to compare with."""
    if report.size_bytes_quantized is None:
        return []
    dense, packed = (report.before or report).size_bytes, report.size_bytes_quantized
    return [SummaryLine("Packed integers", "", bytes_text(packed), ratio_text(dense, packed))]


def _exported(report: ReportValues) -> list[SummaryLine]:
    """Each file beside the dense one of before, as a packed file is."""
    dense = (report.before or report).size_bytes
    sizes = report.size_bytes_exported.items()
    return [SummaryLine(name, "", bytes_text(size), ratio_text(dense, size)) for name, size in sizes]


def _latencies(report: ReportValues, batch: int, latency: Callable[[ReportValues], Latency | None]) -> SummaryLine:
    line = _plain(report, f"Latency (IQR), batch {batch}", latency, latency_text)
    before, after = latency(report.before) if report.before else None, latency(report)
    if before is None or after is None:
        return line
    change = ratio_text(before.median_ms, after.median_ms).replace("smaller", "faster").replace("larger", "slower")
    return SummaryLine(line.label, line.before, line.after, change)


def _macs_label(report: ReportValues) -> str:
    return "MACs" if report.macs_batch is None else f"MACs, batch {report.macs_batch}"


def _metric(report: ReportValues, name: str) -> SummaryLine:
    return _plain(report, name, lambda one: one.metrics.get(name), metric_text)
