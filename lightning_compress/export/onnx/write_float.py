"""Write a model without quantization as a float32 ONNX file, after a check in ONNX Runtime."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lightning_compress.core.optional_dependencies import need
from lightning_compress.export.atomic_write import replace_on_success
from lightning_compress.export.onnx.qdq.output_agreement import OutputAgreement
from lightning_compress.nn.copying import copy_without_hooks
from lightning_compress.nn.example_inputs import batch_size, resize_batch
from lightning_compress.quantization.lowering.deployed_model import DeployedModel

OPSET = 21


@dataclass(frozen=True)
class FloatReport:
    """An ONNX file in floating point.

    Attributes:
        size_bytes: of the file.
        output_difference: of the outputs in ONNX Runtime from those in torch, as a share of the largest.
        opset: version of the operators.
        agreement: of the outputs with torch over the example input: difference by their range, equal classes.
    """

    size_bytes: int
    output_difference: float
    opset: int
    agreement: OutputAgreement | None = None

    def __str__(self) -> str:
        return (
            f"{self.size_bytes} bytes in floating point, as this model was never quantized; opset {self.opset}\n"
            f"{self.agreement or 'outputs were not compared'}"
        )


def write_float_onnx(
    model: nn.Module, path: str | Path, example_input: Any, *, dynamic_batch: bool = True
) -> FloatReport:
    """Write a model in eval mode as an ONNX file, its weights in float32.

    Args:
        model: on the CPU; it stays as it is.
        path: of the file; what is there is replaced.
        example_input: what the module is called with: a tensor, a tuple of arguments, or a dict of keywords.
        dynamic_batch: whether the file takes batches of any size; else those of the example.

    Raises:
        ModuleNotFoundError: if a package is missing.
        FileNotFoundError: if the folder is not there.
        ValueError: if the module cannot be exported, or ONNX Runtime computes something else. No file is written then.
    """
    need("onnx", "onnxruntime", "onnxscript")
    from lightning_compress.export.onnx.qdq.build import stamped_model
    from lightning_compress.export.onnx.qdq.capture import capture_model
    from lightning_compress.export.onnx.qdq.graph import Graph

    with replace_on_success(path) as part:
        plain = DeployedModel(copy_without_hooks(model).eval().requires_grad_(False), {})
        exported = stamped_model(
            Graph(capture_model(plain, example_input, dynamic_batch=dynamic_batch, opset=OPSET).model)
        )
        difference, agreement = _difference(plain, exported, example_input, dynamic_batch)
        part.write_bytes(exported.SerializeToString())
    return FloatReport(Path(path).stat().st_size, difference, OPSET, agreement)


def _difference(
    plain: DeployedModel, exported: Any, example: Any, dynamic_batch: bool
) -> tuple[float, OutputAgreement | None]:
    """The largest difference over the example and another batch size; agreement over the example alone."""
    from lightning_compress.export.onnx.qdq.checking import LARGEST_OUTPUT_DIFFERENCE, measure_differences

    others = [resize_batch(example, (batch_size(example) or 0) + 1)] if dynamic_batch else []
    largest, agreement = 0.0, None
    for one in (example, *others):
        found = measure_differences(plain, exported, [], one)
        largest = max([largest, *found.outputs])
        agreement = agreement or found.agreement
    if not largest <= LARGEST_OUTPUT_DIFFERENCE:
        raise ValueError(
            f"ONNX Runtime disagrees with {type(plain.module).__name__} by {100 * largest:.3g} % of the largest "
            f"output. In eval mode a forward must not draw by chance, nor keep anything from one call to the next."
        )
    return largest, agreement
