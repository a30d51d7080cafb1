"""The values of a report, written to JSON and read from it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import inf, isfinite, nan
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from lightning_compress.measure.latency import Latency
from lightning_compress.reporting.run_history import Boundary, Phase

FORMAT = 1
ReportT = TypeVar("ReportT", bound="ReportValues")


@dataclass(frozen=True)
class LayerReport:
    """One module with tensors or MACs of its own, without its submodules.

    `weights` counts the elements of parameters with two or more dimensions; `shape` is that of the largest. A tied
    parameter counts in the first layer that has it. `macs` is None if the model was not called.

    >>> layer = LayerReport("net.0", "Linear", shape=(2, 4), parameters=10, nonzero=4, weights=8, weights_nonzero=2,
    ...                     size_bytes=40, size_bytes_sparse=20)
    >>> layer.sparsity, layer.weight_sparsity
    (0.6, 0.75)
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
class ReportValues:
    """The plain values of a `Report`, which its renderers read."""

    name: str
    layers: tuple[LayerReport, ...]
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
    before: "ReportValues | None" = None

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
        """Bytes of the smallest lossless file: sparse-coded, or packed integers."""
        return int(min(self.size_bytes_sparse, self.size_bytes_quantized or inf))

    @property
    def compression_ratio(self) -> float:
        """Bytes of the dense fp32 file of `before` (of this model without it), divided by `size_bytes_smallest`."""
        return (self.before or self).size_bytes / self.size_bytes_smallest

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON. `from_dict` ignores the totals and sparsities, which are for human readers."""
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
    def from_dict(cls: type[ReportT], values: Mapping[str, Any]) -> ReportT:
        """Inverse of `to_dict`; metrics that were not finite become NaN.

        Raises:
            ValueError: if the values were not written by `to_dict`.
        """
        if values.get("format") != FORMAT:
            raise ValueError(
                f"Not a report of this version: its 'format' is {values.get('format')!r}, not {FORMAT}. Read a file "
                f"written by Report.save('....json'), or measure again."
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
            raise ValueError(f"The report is damaged: {type(error).__name__} {error}. Measure again.") from error

    @classmethod
    def load(cls: type[ReportT], path: str | Path) -> ReportT:
        """Read a `.json` file written by `save`.

        Raises:
            ValueError: if it holds no report.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, AttributeError, RecursionError) as error:  # errors of JSON and UTF-8 are ValueErrors
            words = str(error).rstrip(".")
            raise ValueError(f"{path} holds no report: {words}. Give a .json file written by Report.save.") from error


def _layer(values: Mapping[str, Any]) -> LayerReport:
    known = {one.name: values[one.name] for one in fields(LayerReport)}
    return LayerReport(**(known | {"shape": tuple(known["shape"])}))
