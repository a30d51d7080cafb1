"""The values of a report, and their way into a JSON file and back."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from math import inf, isfinite, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lightning_compress.measure.latency import Latency
from lightning_compress.reporting.run_history import Boundary, Phase

if TYPE_CHECKING:
    from rich.console import Console

FORMAT = 1


@dataclass(frozen=True)
class Layer:
    """One module that stores or multiplies something itself, without its submodules.

    `weights` are the parameters of two or more dimensions; `shape` is that of the largest. A tied parameter counts in
    the layer that comes first. `macs` is None where nothing was run.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    parameters: int
    nonzero: int
    weights: int
    weights_nonzero: int
    size_bytes: int
    size_bytes_sparse: int
    macs: int | None = None
    macs_nonzero: int | None = None

    @property
    def sparsity(self) -> float:
        """Fraction of all parameters that are exactly zero."""
        return 1.0 - self.nonzero / self.parameters if self.parameters else 0.0

    @property
    def weight_sparsity(self) -> float:
        """Fraction of the weights that are exactly zero, without biases and normalisation."""
        return 1.0 - self.weights_nonzero / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class Report:
    """A measured model, made by `lightning_compress.report`.

    Sizes are the lengths of whole files, see `measure.sparse_code`: every float written as fp32 (`size_bytes`), each
    tensor in its shortest lossless code (`size_bytes_sparse`), gzip of both, the packed integers of a quantized model
    with all scales and zero points (`size_bytes_quantized`), and files that were exported, by name
    (`size_bytes_exported`). MACs are of one call with `macs_batch` samples. Of a run there are its `phases`, and what
    the model was at their `boundaries`. What is None could not be had, and `notes` says why.
    """

    name: str
    layers: tuple[Layer, ...]
    size_bytes: int
    size_bytes_sparse: int
    size_bytes_gzip: int | None = None
    size_bytes_sparse_gzip: int | None = None
    size_bytes_quantized: int | None = None
    size_bytes_exported: dict[str, int] = field(default_factory=dict)
    macs_batch: int | None = None
    latency_batch_1: Latency | None = None
    latency_batch_64: Latency | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    history: dict[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    phases: tuple[Phase, ...] = ()
    boundaries: tuple[Boundary, ...] = ()
    notes: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    before: "Report | None" = None

    TOTALS: ClassVar = (
        "parameters", "nonzero", "sparsity", "weights", "weights_nonzero", "weight_sparsity", "macs", "macs_nonzero",
        "compression_ratio",
    )  # fmt: skip

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def nonzero(self) -> int:
        return sum(layer.nonzero for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of all parameters that are exactly zero."""
        return 1.0 - self.nonzero / self.parameters if self.parameters else 0.0

    @property
    def weights(self) -> int:
        return sum(layer.weights for layer in self.layers)

    @property
    def weights_nonzero(self) -> int:
        return sum(layer.weights_nonzero for layer in self.layers)

    @property
    def weight_sparsity(self) -> float:
        """Fraction of the weights that are exactly zero, without biases and normalisation."""
        return 1.0 - self.weights_nonzero / self.weights if self.weights else 0.0

    @property
    def macs(self) -> int | None:
        return None if self.macs_batch is None else sum(layer.macs or 0 for layer in self.layers)

    @property
    def macs_nonzero(self) -> int | None:
        """MACs whose weight is not zero: saved only by a kernel that skips zeros, which torch's dense ones do not."""
        return None if self.macs_batch is None else sum(layer.macs_nonzero or 0 for layer in self.layers)

    @property
    def size_bytes_smallest(self) -> int:
        """Bytes of the smallest lossless file: coded or packed."""
        return int(min(self.size_bytes_sparse, self.size_bytes_quantized or inf))

    @property
    def compression_ratio(self) -> float:
        """Bytes of the dense fp32 file of `before`, or of this model, over those of this coded or packed file."""
        return (self.before or self).size_bytes / self.size_bytes_smallest

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; totals and sparsities are for readers, `from_dict` computes them anew."""
        values: dict[str, Any] = {"format": FORMAT} | {one.name: getattr(self, one.name) for one in fields(self)}
        for key in ("latency_batch_1", "latency_batch_64"):
            values[key] = vars(values[key]) if values[key] else None
        sparsities = ("sparsity", "weight_sparsity")
        values["layers"] = [
            vars(layer) | {"shape": list(layer.shape)} | {key: getattr(layer, key) for key in sparsities}
            for layer in self.layers
        ]
        values["totals"] = {key: getattr(self, key) for key in self.TOTALS}
        values["metrics"] = {key: value if isfinite(value) else None for key, value in self.metrics.items()}
        values["history"] = {name: [list(point) for point in points] for name, points in self.history.items()}
        values["phases"], values["boundaries"] = ([*map(vars, one)] for one in (self.phases, self.boundaries))
        values["size_bytes_exported"] = dict(self.size_bytes_exported)
        values["notes"], values["environment"] = list(self.notes), dict(self.environment)
        values["before"] = self.before.to_dict() if self.before else None
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Report":
        """The report that `to_dict` made these of; a metric that was not finite comes back as NaN.

        Raises:
            ValueError: if they were not made by it.
        """
        if values.get("format") != FORMAT:
            raise ValueError(
                f"Not a report of this version: its 'format' is {values.get('format')!r}, not {FORMAT}. Read what "
                f"Report.save('....json') has written, or measure anew."
            )
        try:
            known = {one.name: values[one.name] for one in fields(cls) if one.name in values}
            known["layers"] = tuple(_layer(layer) for layer in known["layers"])
            for key in ("latency_batch_1", "latency_batch_64"):
                known[key] = Latency(**known[key]) if known[key] else None
            known["metrics"] = {key: nan if value is None else value for key, value in known["metrics"].items()}
            known["history"] = {name: tuple((x, y) for x, y in points) for name, points in known["history"].items()}
            known["phases"] = tuple(Phase(**one) for one in known.get("phases", ()))
            known["boundaries"] = tuple(Boundary(**one) for one in known.get("boundaries", ()))
            known["notes"], known["environment"] = tuple(known["notes"]), dict(known["environment"])
            known["before"] = cls.from_dict(known["before"]) if known["before"] else None
            return cls(**known)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"The report is damaged: {type(error).__name__} {error}. Measure anew.") from error

    @classmethod
    def load(cls, path: str | Path) -> "Report":
        """Read what `save` has written to a `.json` file.

        Raises:
            ValueError: if it holds no report.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, AttributeError, RecursionError) as error:  # what JSON and UTF-8 raise is a ValueError
            words = str(error).rstrip(".")
            raise ValueError(f"{path} holds no report: {words}. Give a .json file written by Report.save.") from error

    def save(self, path: str | Path) -> Path:
        """Write a `.json` file, or one `.html` file that needs nothing else; missing folders are made.

        Raises:
            ValueError: if the name ends in neither.
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
        from lightning_compress.reporting.render.html import html_page

        return html_page(self)

    def print(self, console: "Console | None" = None) -> None:
        """Print the totals before and after, the layers and the notes."""
        from lightning_compress.reporting.render.terminal import print_report

        print_report(self, console)


def _layer(values: Mapping[str, Any]) -> Layer:
    known = {one.name: values[one.name] for one in fields(Layer)}
    return Layer(**(known | {"shape": tuple(known["shape"])}))
