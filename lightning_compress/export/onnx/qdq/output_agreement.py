"""Compare the outputs of a graph with those of its module in figures that a user understands."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray


@dataclass(frozen=True)
class OutputAgreement:
    """Outputs in ONNX Runtime beside those in torch, both computed from the same inputs.

    Attributes:
        samples: number of samples of the inputs.
        range_difference: largest difference, as a fraction of the range (largest minus smallest value) of its output.
        equal_top1: samples with the same arg-max; None if the first output is no matrix `(samples, classes)`.

    >>> str(OutputAgreement(samples=32, range_difference=0.004, equal_top1=31))
    'over the 32 samples of the example input: outputs differ by at most 0.4 % of their range, 31 of 32 top-1 are equal'
    """

    samples: int
    range_difference: float
    equal_top1: int | None = None

    def __str__(self) -> str:
        where = "1 sample" if self.samples == 1 else f"{self.samples} samples"
        top = "" if self.equal_top1 is None else f", {self.equal_top1} of {self.samples} top-1 are equal"
        return (
            f"over the {where} of the example input: outputs differ by at most "
            f"{100 * self.range_difference:.3g} % of their range{top}"
        )


def compare_outputs(
    found: Sequence[NDArray[Any]], expected: Sequence[NDArray[Any]], samples: int | None
) -> OutputAgreement:
    """Compare outputs of the same shapes, in the same order.

    Args:
        samples: batch size of the inputs; None if they have none, which counts as one sample.
    """
    samples = samples or 1
    largest = max((_range_difference(*pair) for pair in zip(found, expected, strict=True)), default=0.0)
    first = expected[0] if expected else numpy.empty(0)
    has_classes = first.ndim == 2 and first.shape[0] == samples and first.shape[1] > 1 and first.dtype.kind == "f"
    equal = int((found[0].argmax(-1) == first.argmax(-1)).sum()) if has_classes else None
    return OutputAgreement(samples, largest, equal)


def _range_difference(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """The largest difference by the range of `expected`; by its largest size if all its values are equal."""
    both = numpy.isfinite(found) & numpy.isfinite(expected)
    finite = expected[both].astype(numpy.float64)
    if not finite.size:
        return 0.0
    size = numpy.ptp(finite) or numpy.abs(finite).max() or 1.0
    return float(numpy.abs(found[both] - finite).max() / size)
