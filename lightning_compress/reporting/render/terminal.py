"""A report in the terminal."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_compress.reporting.render.summary import layer_cells, summary_lines
from lightning_compress.reporting.render.text import bytes_text, percent_text, short_count_text
from lightning_compress.reporting.values import LayerReport, ReportValues

WIDE = 110  # columns of a terminal that has room for types and shapes


def print_report(report: ReportValues, console: Console | None = None) -> None:
    """Print the totals before and after, then the layers, then the notes."""
    console = console or Console()
    console.print(_totals(report))
    console.print(_layers(report, console.width))
    for note in report.notes:
        console.print(f"Note: {note}", markup=False, highlight=False)


def _totals(report: ReportValues) -> Table:
    table = Table(
        title=escape(report.name), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    headings = ["Before", "After", "Change"] if report.before else ["Value"]
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for line in summary_lines(report):
        cells = [line.before, line.after, line.change] if report.before else [line.after]
        table.add_row(escape(line.label), *cells)
    return table


def _layers(report: ReportValues, width: int) -> Table:
    table = Table(title="Layers", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    texts = ("Layer", "Type", "Shape") if width >= WIDE else ("Layer",)
    for heading in texts:
        table.add_column(heading, overflow="fold")
    for heading in ("Params", "Nonzero", "Sparsity", "Dense", "Sparse", "MACs", "Nonzero MACs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in report.layers:
        name, kind, shape, *_ = layer_cells(layer)
        described = (name, kind, shape)[: len(texts)]
        table.add_row(*map(escape, described), *_numbers(layer))
    return table


def _numbers(layer: LayerReport) -> list[str]:
    return [
        short_count_text(layer.parameters),
        short_count_text(layer.nonzero),
        percent_text(layer.weight_sparsity) if layer.weights else "",
        bytes_text(layer.size_bytes),
        bytes_text(layer.size_bytes_sparse),
        "" if layer.macs is None else short_count_text(layer.macs),
        "" if layer.macs_nonzero is None else short_count_text(layer.macs_nonzero),
    ]
