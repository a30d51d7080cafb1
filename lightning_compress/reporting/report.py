"""A report that can be saved as JSON or HTML, and printed in a terminal."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from lightning_compress.reporting.render.html import html_page
from lightning_compress.reporting.render.terminal import print_report
from lightning_compress.reporting.values import ReportValues


@dataclass(frozen=True)
class Report(ReportValues):
    """A measured model, made by `lightning_compress.report`.

    Sizes are the lengths of whole files, see `measure.sparse_encoding`: every float written as fp32 (`size_bytes`),
    each tensor in its shortest lossless code (`size_bytes_sparse`), gzip of both, the packed integers of a
    quantized model with all scales and zero points (`size_bytes_quantized`), and exported files by name
    (`size_bytes_exported`). MACs are those of one call with `macs_batch` samples. The report of a run has its `phases`,
    and the model's size and costs at their `boundaries`. A value is None where it could not be measured; `notes` says
    why.

    >>> from tempfile import TemporaryDirectory
    >>> from lightning_compress.reporting import LayerReport
    >>> layer = LayerReport("net", "Linear", (2, 4), 10, 4, 8, 2, size_bytes=40, size_bytes_sparse=20)
    >>> report = Report("net", (layer,), size_bytes=40, size_bytes_sparse=20)
    >>> report.sparsity, report.weight_sparsity, report.compression_ratio
    (0.6, 0.75, 2.0)
    >>> with TemporaryDirectory() as folder:
    ...     Report.load(report.save(f"{folder}/report.json")) == report
    True
    """

    def save(self, path: str | Path) -> Path:
        """Write a `.json` file, or a self-contained `.html` page; missing folders are made.

        Raises:
            ValueError: if the path has another suffix.
        """
        path = Path(path)
        writers: dict[str, Callable[[], str]] = {".json": self.to_json, ".html": self.to_html}
        if path.suffix not in writers:
            raise ValueError(f"A report is saved as '.json' or '.html', but the path is '{path}'.")
        text = writers[path.suffix]()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_html(self) -> str:
        return html_page(self)

    def print(self, console: Console | None = None) -> None:
        """Print the totals before and after, the layers and the notes."""
        print_report(self, console)
