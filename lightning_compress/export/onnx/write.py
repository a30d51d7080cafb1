"""Write a quantized model as an ONNX file of integers, after a check in ONNX Runtime."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_compress.core.optional_dependencies import need
from lightning_compress.export.atomic_write import replace_on_success
from lightning_compress.export.onnx.float_macs import float_macs
from lightning_compress.export.onnx.qdq.output_agreement import OutputAgreement
from lightning_compress.export.onnx.report import OnnxReport
from lightning_compress.quantization.lowering.deployed_model import DeployedModel

if TYPE_CHECKING:
    from lightning_compress.export.onnx.qdq.build import BuiltModel

__all__ = ["OnnxReport", "write_onnx"]


def write_onnx(
    deployable: DeployedModel,
    path: str | Path,
    example_input: Any,
    *,
    dynamic_batch: bool = True,
    weight_type: Literal["auto", "int8", "uint8"] = "auto",
    tolerance: float = 0.6,
    opset: int = 21,
) -> OnnxReport:
    """Write an ONNX file in which weights are integers, and quantized activations lead through integer kernels.

    Weights lie there in 8, 4, 2 or 1 bits, as many as their numbers need. Beside an input on a grid they are
    dequantized in the form that ONNX Runtime fuses into kernels for whole numbers; all others are unpacked to floats
    once, when the file is loaded, and the layer is as fast as it was.

    On CPUs without the instructions VNNI or AMX, kernels add two products of uint8 and int8 in 16 bits. Measured on an
    AVX2 CPU in ONNX Runtime 1.32, that went wrong: outputs were off by up to 4 steps for normally distributed 8-bit
    weights in 64 channels, and by up to 41, nearly all of them, for weights at both ends of their range. With weights
    of 7 bits, or as uint8, nothing differed but ties in rounding; uint8 took 1.2 to 1.4 times as long as int8.
    Depthwise convolutions have kernels that do not saturate.

    Args:
        deployable: what is written; it stays as it is.
        path: of the file; what is there is replaced.
        example_input: what the module is called with: a tensor, a tuple of arguments, or a dict of keywords.
        dynamic_batch: whether the file takes batches of any size; else those of the example.
        weight_type: in integer kernels. "auto" takes int8, but uint8 for layers whose int8 weights may saturate, so
            that the file computes the same on every CPU; with "int8" there is a warning if they may here. Weights of
            7 bits, which `reduce_range=True` makes of 8, never do.
        tolerance: how many steps of its grid, beyond rounding, a quantized value may differ from what torch computes of
            the same inputs. Measured, kernels of layers stay below 0.01, and a softmax between two quantizers, which
            is cut off rather than rounded, reaches 0.5; saturation costs whole steps.
        opset: version of the operators, 21 or newer.

    Returns:
        Sizes, kernels and differences of the file.

    Raises:
        ModuleNotFoundError: if a package is missing.
        FileNotFoundError: if the folder is not there.
        ValueError: if the module cannot be exported, a weight is not found in the graph, ONNX Runtime computes
            something else, no integer kernel is used although activations are quantized, or the file is not smaller
            than in float32. No file is written then.
    """
    need("onnx", "onnxruntime", "onnxscript")
    _check_arguments(weight_type, tolerance, opset)
    from lightning_compress.export.onnx.qdq.build import build_qdq_model
    from lightning_compress.export.onnx.qdq.capture import capture_model

    with replace_on_success(path) as part:
        exported = capture_model(deployable, example_input, dynamic_batch=dynamic_batch, opset=opset)
        made = build_qdq_model(deployable, exported, weight_type)
        _warn_of_saturation(made)
        _refuse_without_gain(made)
        largest, output, agreement = _compared(deployable, made, example_input, dynamic_batch, tolerance)
        part.write_bytes(made.model.SerializeToString())
    return OnnxReport(
        size_bytes=Path(path).stat().st_size,
        float_size_bytes=made.float_size_bytes,
        integer_kernels=made.integer_kernels,
        float_layers=made.names(made.written.floating),
        largest_difference=largest,
        output_difference=output,
        opset=opset,
        unsigned_layers=made.names(made.written.unsigned),
        bias_errors={made.located[name].title: error for name, error in made.written.bias_errors.items()},
        float_macs=float_macs(deployable, example_input, made.names(made.written.integer.values())),
        agreement=agreement,
    )


def _check_arguments(weight_type: str, tolerance: float, opset: int) -> None:
    if weight_type not in ("auto", "int8", "uint8"):
        raise ValueError(f"weight_type is 'auto', 'int8' or 'uint8', but is {weight_type!r}.")
    if not tolerance > 0:
        raise ValueError(f"tolerance is above 0, in steps of a grid, but is {tolerance}. Sums differ by their order.")
    if opset < 21:
        raise ValueError(f"opset is 21 or newer, which has integers of 4 bits, but is {opset}.")


def _warn_of_saturation(made: "BuiltModel") -> None:
    from lightning_compress.export.onnx.qdq.cpu import may_saturate

    if made.written.saturating and may_saturate():
        warnings.warn(
            f"This CPU has no VNNI instructions: sums of 8-bit products may saturate in "
            f"{', '.join(made.names(made.written.saturating))}. Train with reduce_range=True, the default, or "
            f"write weight_type='auto'.",
            stacklevel=3,
        )


def _refuse_without_gain(made: "BuiltModel") -> None:
    if not made.located:
        raise ValueError(
            "No weight lies on whole numbers, which is all that a quantized model is stored as in .onnx. Weights in "
            "fp16, bf16 or fp8 go to .pt2 or .safetensors."
        )
    if made.places and not made.layer_kernels:
        raise ValueError(
            f"Activations are quantized, but ONNX Runtime computes no layer with integers; in floating point stay "
            f"{', '.join(made.names(made.written.floating)) or 'all layers'}. Integer kernels take weights of at most "
            f"8 bits with one scale per channel or tensor; convolutions need a quantizer on their output too, and "
            f"weights that are symmetric around zero, or share one zero point."
        )
    if made.model.ByteSize() >= made.float_size_bytes:
        raise ValueError(
            f"The file would have {made.model.ByteSize()} bytes, and {made.float_size_bytes} in float32: its weights "
            f"are too few to pay for their scales. Write it in floating point."
        )


def _compared(
    deployable: DeployedModel, made: "BuiltModel", example: Any, dynamic_batch: bool, tolerance: float
) -> tuple[dict[str, float], float, OutputAgreement | None]:
    """Largest differences by quantizer and of the outputs over two batch sizes; agreement over the example alone."""
    from lightning_compress.export.onnx.qdq.checking import check_differences, measure_differences
    from lightning_compress.nn.example_inputs import batch_size, resize_batch

    hint = " Its weights may saturate on this CPU: weight_type='auto'." if made.written.saturating else ""
    largest: dict[str, float] = {}
    output, agreement = 0.0, None
    others = [resize_batch(example, (batch_size(example) or 0) + 1)] if dynamic_batch else []
    for one in (example, *others):
        found = measure_differences(deployable, made.model, made.places, one)
        check_differences(found, tolerance, hint)
        largest = {name: max(steps, largest.get(name, 0.0)) for name, steps in found.steps.items()}
        output = max([output, *found.outputs])
        agreement = agreement or found.agreement  # another batch size repeats samples of the example
    return largest, output, agreement
