"""A report as one HTML page that needs no network: what it shows is made here, how it looks is in the template."""

from dataclasses import dataclass
from pathlib import Path

from lightning_compress.measure.latency import Latency
from lightning_compress.reporting.render.plot import Bands, Plot, band_plot, curve_plot
from lightning_compress.reporting.render.summary import SummaryLine, layer_cells, summary_lines
from lightning_compress.reporting.render.text import (
    bytes_text,
    count_text,
    metric_text,
    milliseconds_text,
    percent_text,
    ratio_text,
    short_count_text,
)
from lightning_compress.reporting.run_history import Boundary
from lightning_compress.reporting.values import ReportValues

TEMPLATES = Path(__file__).parent / "templates"
MOST_METRIC_CARDS = 2


@dataclass(frozen=True)
class Card:
    """A headline number; `before` is empty where there is nothing to compare with."""

    label: str
    before: str
    after: str
    remark: str = ""


@dataclass(frozen=True)
class Bar:
    """A layer's two bars, widths in percent of the full width.

    `share_percent` is relative to the largest layer, `left_percent` its part that is not zero.
    """

    name: str
    sparsity: str
    sparsity_percent: float
    share: str
    share_percent: float
    left_percent: float


def html_page(report: ReportValues) -> str:
    """The whole page; every name in it is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    jinja = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    bands, plots = render_plots(report)
    lines: list[SummaryLine] = summary_lines(report)
    return jinja.get_template("report.html").render(
        report=report,
        cards=summary_cards(report),
        bands=bands,
        plots=plots,
        boundaries=[_boundary_cells(one) for one in report.boundaries],
        lines=lines,
        bars=layer_bars(report),
        rows=[layer_cells(layer) for layer in report.layers],
        protocol=measurement_text(report),
    )


def render_plots(report: ReportValues) -> tuple[Bands | None, list[Plot]]:
    """The phases, if there are any, and the values over steps, over the same steps then."""
    curves = {name: points for name, points in report.history.items() if points}
    if not report.phases:
        return None, [curve_plot(name, points) for name, points in curves.items()]
    steps = [step for points in curves.values() for step, _ in points]
    steps += [one.step for one in report.boundaries] + [one.end or one.begin for one in report.phases]
    over = (0, max(steps))
    plots = [curve_plot(name, points, over, report.boundaries) for name, points in curves.items()]
    return band_plot(report.phases, report.boundaries, over[1]), plots


def _boundary_cells(one: Boundary) -> list[str]:
    """Step, what happens, nonzero parameters, bytes, MACs, latency."""
    return [
        count_text(one.step),
        one.what,
        short_count_text(one.nonzero),
        bytes_text(one.size_bytes),
        "" if one.macs is None else short_count_text(one.macs),
        "" if one.latency_ms_batch_1 is None else milliseconds_text(one.latency_ms_batch_1),
    ]


def summary_cards(report: ReportValues) -> list[Card]:
    """Size, nonzero parameters, sparsity, latency and the first metrics."""
    return [
        _size_card(report),
        _nonzero_card(report),
        Card(
            "Sparsity of weights",
            percent_text(report.before.weight_sparsity) if report.before else "",
            percent_text(report.weight_sparsity),
            f"{short_count_text(report.weights_nonzero)} of {short_count_text(report.weights)} weights left",
        ),
        *_latency_card(report),
        *_metric_cards(report),
    ]


def _size_card(report: ReportValues) -> Card:
    dense, coded, kind = (report.before or report).size_bytes, report.size_bytes_sparse, "sparse-coded"
    if report.size_bytes_quantized is not None and report.size_bytes_quantized < coded:
        coded, kind = report.size_bytes_quantized, "packed integers"
    before = bytes_text(dense) if report.before else ""
    return Card("Size on disk", before, bytes_text(coded), f"{ratio_text(dense, coded)}, dense fp32 to {kind}")


def _nonzero_card(report: ReportValues) -> Card:
    before = report.before.nonzero if report.before else None
    change = f"of {short_count_text(report.parameters)} parameters"
    if before is not None:
        change = ratio_text(before, report.nonzero)
    shown = "" if before is None else short_count_text(before)
    return Card("Nonzero", shown, short_count_text(report.nonzero), change)


def _latency_card(report: ReportValues) -> list[Card]:
    after = report.latency_batch_1
    if after is None:
        return []
    before = report.before.latency_batch_1 if report.before else None
    shown = milliseconds_text(before.median_ms) if before else ""
    threads = f"{after.threads} thread{'s' * (after.threads > 1)}"
    return [
        Card("Latency, batch 1", shown, milliseconds_text(after.median_ms), f"median of {after.runs} runs, {threads}")
    ]


def _metric_cards(report: ReportValues) -> list[Card]:
    before = report.before.metrics if report.before else {}
    return [
        Card(name, metric_text(before[name]) if name in before else "", metric_text(value))
        for name, value in list(report.metrics.items())[:MOST_METRIC_CARDS]
    ]


def layer_bars(report: ReportValues) -> list[Bar]:
    """Layers that have weights, in order."""
    layers = [layer for layer in report.layers if layer.weights]
    largest = max((layer.parameters for layer in layers), default=1)
    return [
        Bar(
            name=layer.name or "(the model itself)",
            sparsity=percent_text(layer.weight_sparsity),
            sparsity_percent=100 * layer.weight_sparsity,
            share=percent_text(layer.parameters / report.parameters),
            share_percent=100 * layer.parameters / largest,
            left_percent=100 * layer.nonzero / largest,
        )
        for layer in layers
    ]


def measurement_text(report: ReportValues) -> list[tuple[str, str]]:
    """How each kind of number was measured."""
    latencies = [one for one in (report.latency_batch_1, report.latency_batch_64) if one]
    return [
        ("Sparsity", "Fraction that is exactly zero; of weights: of parameters with two or more dimensions."),
        *_boundary_protocol(report),
        ("Parameters", "Tied ones count once, in the layer that comes first. Buffers are in the bytes only."),
        ("Dense fp32", "A file with names, shapes, and every parameter and buffer; a float takes 4 bytes."),
        ("Sparse-coded", "A lossless file: of dense, bitmap and values, gaps and values, each tensor's shortest code."),
        ("gzip", "Of either file as a whole, level 6."),
        ("MACs", f"Multiply-accumulates at batch {report.macs_batch or 1}: matrix products, convolutions, attention."),
        ("MACs, nonzero weight", "What is left where a kernel skips zeros; the dense kernels of torch do not."),
        *[(f"Latency, batch {one.batch}", latency_method_text(one)) for one in latencies],
        *report.environment.items(),
    ]


def latency_method_text(latency: Latency) -> str:
    return (
        f"Median {milliseconds_text(latency.median_ms)}, interquartile range {milliseconds_text(latency.iqr_ms)}, "
        f"{latency.runs} runs after {latency.warmup_runs} to warm up, threads: {latency.threads}, eval mode."
    )


def _boundary_protocol(report: ReportValues) -> list[tuple[str, str]]:
    if not report.boundaries:
        return []
    words = "Measured in the run, before the next step; latency for a moment only. Size: the smallest lossless file."
    return [("Phases", words)]
