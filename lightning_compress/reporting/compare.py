"""Reports of several runs beside each other: a row for each, what it costs, and that as a share of the first."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_compress.reporting.render.text import bytes_text, metric_text, milliseconds_text, short_count_text
from lightning_compress.reporting.report import Report

WIDEST = 10_000  # columns of a pipe or a file, where nothing need be folded


@dataclass(frozen=True)
class ComparisonCell:
    """A value as text, and its ratio to that of the first run; empty for the first, and where there is none."""

    value: str = ""
    ratio: str = ""


@dataclass(frozen=True)
class Comparison:
    """A table of runs.

    Attributes:
        headings: of the columns after the run's name.
        rows: cells by the name of the run.
        notes: what a reader of the ratios should know.
    """

    headings: tuple[str, ...]
    rows: Mapping[str, Sequence[ComparisonCell]]
    notes: tuple[str, ...] = ()

    def print(self, console: Console | None = None) -> None:
        """Print the table; what is no terminal gets it in its full width."""
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("Run", overflow="fold")
        for heading in self.headings:
            table.add_column(escape(heading), justify="right", overflow="fold")
        for name, cells in self.rows.items():
            table.add_row(escape(name), *("\n".join(filter(None, (cell.value, cell.ratio))) for cell in cells))
        console = console or (Console() if Console().is_terminal else Console(width=WIDEST))
        console.print(table)
        for note in self.notes:
            console.print(f"Note: {note}", markup=False, highlight=False)

    def to_markdown(self) -> str:
        """The table with a row of dashes below its headings, as GitHub shows it, and the notes below."""
        lines = [_line(["Run", *self.headings]), _line(["---", *("---:" for _ in self.headings)])]
        for name, cells in self.rows.items():
            texts = (f"{cell.value} ({cell.ratio})" if cell.ratio else cell.value for cell in cells)
            lines.append(_line([name, *texts]))
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)]) + "\n"


def compare(reports: Mapping[str, Report]) -> Comparison:
    """Put reports beside each other; what none of them has gets no column.

    Packed integers of a run are compared with the first run's, or with its dense file if it was not quantized.

    Args:
        reports: by the name of the run; the first is what the others are compared with.

    Raises:
        ValueError: if there is none.
    """
    if not reports:
        raise ValueError("There is no report to compare.")
    runs = list(reports.values())
    columns = [column for column in _columns(runs) if any(column.value(run) is not None for run in runs)]
    rows = {name: [column.cell(run, runs[0]) for column in columns] for name, run in reports.items()}
    return Comparison(tuple(column.heading for column in columns), rows, _notes(runs))


def load_reports(paths: Sequence[Path]) -> dict[str, Report]:
    """Read `.json` files of reports, by the part of their paths in which they differ.

    Raises:
        ValueError: if one holds no report.
        OSError: if one cannot be read.
    """
    return dict(zip(_distinct(paths), map(Report.load, paths), strict=True))


@dataclass(frozen=True)
class _Column:
    heading: str
    value: Callable[[Report], Any]
    text: Callable[[Any], str]
    first: Callable[[Report], Any] | None = None  # what the first run has to compare with, if not the value

    def cell(self, run: Report, first: Report) -> ComparisonCell:
        value, base = self.value(run), (self.first or self.value)(first)
        if value is None:
            return ComparisonCell()
        known = run is not first and base
        return ComparisonCell(self.text(value), f"{value / base:.3g}x" if known else "")


def _columns(runs: Sequence[Report]) -> list[_Column]:
    names = dict.fromkeys(name for run in runs for name in run.metrics)
    files = dict.fromkeys(name for run in runs for name in run.size_bytes_exported)
    return [
        _Column("Params", lambda one: one.parameters, short_count_text),
        _Column("Nonzero", lambda one: one.nonzero, short_count_text),
        _Column("MACs", lambda one: _per_sample(one, one.macs), short_count_text),
        _Column("Nonzero MACs", lambda one: _per_sample(one, one.macs_nonzero), short_count_text),
        _Column("Dense", lambda one: one.size_bytes, bytes_text),
        _Column("Sparse", lambda one: one.size_bytes_sparse, bytes_text),
        _Column("Packed", _packed, bytes_text, lambda one: _packed(one) or one.size_bytes),
        *(_Column(name, lambda one, name=name: one.size_bytes_exported.get(name), bytes_text) for name in files),  # type: ignore[misc]
        _Column("Latency, batch 1", lambda one: _median(one.latency_batch_1), milliseconds_text),
        _Column("Latency, batch 64", lambda one: _median(one.latency_batch_64), milliseconds_text),
        # Whether a metric is better at half its value is not known here: it gets no ratio.
        *(
            _Column(name, lambda one, name=name: one.metrics.get(name), metric_text, lambda one: None)  # type: ignore[misc]
            for name in names
        ),
    ]


def _packed(report: Report) -> int | None:
    return report.size_bytes_quantized


def _per_sample(report: Report, macs: int | None) -> int | None:
    return None if macs is None or not report.macs_batch else round(macs / report.macs_batch)


def _median(latency: Any) -> float | None:
    return None if latency is None else float(latency.median_ms)


def _notes(runs: Sequence[Report]) -> tuple[str, ...]:
    timed = [run for run in runs if run.latency_batch_1 is not None or run.latency_batch_64 is not None]
    places = {(run.environment.get("cpu", "unknown"), run.environment.get("torch", "unknown")) for run in timed}
    if len(places) < 2:
        return ()
    machines = "; ".join(f"{cpu} with torch {torch}" for cpu, torch in sorted(places))
    return (
        f"Latency was timed on different machines or versions, so its ratios are not about the models: {machines}.",
    )


def _distinct(paths: Sequence[Path]) -> list[str]:
    """Names without what all paths begin and end with; the paths themselves if that leaves too little.

    >>> _distinct([Path("runs/a/report.json"), Path("runs/b/report.json")]), _distinct([Path("a.json"), Path("b.json")])
    (['a', 'b'], ['a', 'b'])
    """
    parts = [list(path.with_suffix("").parts) for path in paths]
    for end in (0, -1):
        while all(parts) and len({own[end] for own in parts}) == 1:
            parts = [own[1:] if end == 0 else own[:-1] for own in parts]
    names = ["/".join(own) for own in parts]
    return names if all(names) and len(set(names)) == len(names) else [str(path) for path in paths]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
