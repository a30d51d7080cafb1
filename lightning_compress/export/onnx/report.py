"""The report of an ONNX file: sizes, kernels and differences measured before it was written."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_compress.export.onnx.qdq.output_agreement import OutputAgreement

MOST_NAMED = 4


@dataclass(frozen=True)
class OnnxReport:
    """An ONNX file of a quantized model: its size, its kernels and how far it is from the module.

    Attributes:
        size_bytes: of the file.
        float_size_bytes: of the same graph with float32 weights.
        integer_kernels: how many nodes compute with whole numbers when ONNX Runtime has optimized the graph, by name.
        float_layers: weights whose layers compute in floating point.
        largest_difference: by quantizer, how much farther than rounding the values of ONNX Runtime are from what torch
            computes of the same inputs, in steps of its grid.
        output_difference: of the whole model from torch, as a share of the largest output.
        opset: version of the operators.
        unsigned_layers: weights stored as uint8, because int8 could saturate on CPUs without VNNI.
        float_macs: by layer, the share of the model's multiply-accumulates that are computed in floating point.
            Products of activations stand under the module that computes them, those of `nn.MultiheadAttention` under
            its projections.
        agreement: of the outputs with torch over the example input: difference by their range, equal classes.
        bias_errors: largest rounding error of an int32 bias by weight, in units of the bias.
    """

    size_bytes: int
    float_size_bytes: int
    integer_kernels: Mapping[str, int]
    float_layers: list[str]
    largest_difference: Mapping[str, float]
    output_difference: float
    opset: int
    unsigned_layers: list[str] = field(default_factory=list)
    bias_errors: Mapping[str, float] = field(default_factory=dict)
    float_macs: Mapping[str, float] = field(default_factory=dict)
    agreement: OutputAgreement | None = None

    def __str__(self) -> str:
        kernels = ", ".join(f"{count} {name}" for name, count in self.integer_kernels.items()) or "none"
        share = self.size_bytes / self.float_size_bytes
        lines = [
            f"{self.size_bytes} bytes, {100 * share:.1f} % of {self.float_size_bytes} in float32; opset {self.opset}",
            f"integer kernels: {kernels}",
            f"in floating point: {', '.join(self.float_layers) or 'no quantized layer'}{self._float_share()}",
            f"{self.agreement or 'outputs were not compared'}{self._farthest()}",
        ]
        if self.unsigned_layers:
            lines.append(f"uint8 weights, as int8 may saturate without VNNI: {', '.join(self.unsigned_layers)}")
        return "\n".join(lines)

    def _float_share(self) -> str:
        if not self.float_macs:
            return ""
        most = list(self.float_macs.items())[:MOST_NAMED]
        named = ", ".join(f"'{layer}' {100 * share:.1f} %" for layer, share in most)
        more = ", ..." if len(self.float_macs) > len(most) else ""
        return f"; {100 * sum(self.float_macs.values()):.1f} % of the multiply-accumulates: {named}{more}"

    def _farthest(self) -> str:
        if not self.largest_difference:
            return ""
        name = max(self.largest_difference, key=lambda one: self.largest_difference[one])
        return f"; farthest is '{name}' with {self.largest_difference[name]:.2g} steps beyond rounding"
