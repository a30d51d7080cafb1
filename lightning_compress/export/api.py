"""One function for all files: `export(model, path, example_input)`."""

from pathlib import Path
from typing import Any, Literal

from torch import nn

from lightning_compress._version import __version__
from lightning_compress.core.registry import near_miss
from lightning_compress.export.onnx.write import OnnxReport, write_onnx
from lightning_compress.export.onnx.write_float import FloatReport, write_float_onnx
from lightning_compress.export.packed.write import PackedReport, write_packed
from lightning_compress.export.pt2.write import Pt2Report, write_pt2
from lightning_compress.quantization.lowering.equivalence import check_equivalence
from lightning_compress.quantization.lowering.lower import is_float, lower, quantized_tensors

SUFFIXES = (".onnx", ".pt2", ".safetensors")


def export(
    model: nn.Module,
    path: str | Path,
    example_input: Any = None,
    *,
    dynamic_batch: bool = True,
    weight_type: Literal["auto", "int8", "uint8"] = "auto",
) -> OnnxReport | FloatReport | Pt2Report | PackedReport:
    """Write a model into a file that runs, or is read, without this package.

    - `.onnx`: weights stored as integers, activations quantized as `QuantizeLinear` and `DequantizeLinear` say,
      BatchNorm folded in. It is run in ONNX Runtime and compared with the quantized module, place by place, before it
      is written: a file that disagrees, is not smaller than float32 or computes nothing with integers is refused.
      A model that was never quantized is written in float32, and compared by its outputs.
    - `.pt2`: the same of a quantized model as a program of `torch.export`, read by `torch.export.load`.
    - `.safetensors`: the state dict of a quantized model with weights packed in 8, 4, 2 or 1 bits, for
      `load_packed(module, path)`.

    Args:
        model: trained, or made by `quantize` or `load_compressed`, or a part of such a model that holds all of its
            quantized layers, or a copy; it stays as it is.
        path: of the file; its suffix says which kind.
        example_input: what the model is called with: a tensor, a tuple of arguments, or a dict of keywords; not needed
            for packed weights.
        dynamic_batch: whether the file takes batches of any size.
        weight_type: of a quantized model in `.onnx`: how weights stand before integer kernels. "auto": uint8 where int8
            may saturate on CPUs without VNNI, so that all compute the same; "int8" is faster on those that have it.

    Returns:
        What was written, in bytes and in what was found out about it.

    Raises:
        ValueError: if the file cannot be as it should; the message names the layer. Nothing is written then.
        ModuleNotFoundError: if a package is missing: pip install 'lightning-compress[export]'.

    >>> from tempfile import TemporaryDirectory
    >>> import torch
    >>> from lightning_compress import quantize
    >>> model = quantize(nn.Linear(64, 32), [torch.randn(16, 64)], weights=4, progress=False)
    >>> with TemporaryDirectory() as folder:
    ...     report = export(model, f"{folder}/model.safetensors")
    >>> report.size_bytes < 64 * 32 * 4
    True
    """
    path = Path(path)
    check_suffix(path)
    model = getattr(model, "_orig_mod", model)
    in_integers = path.suffix == ".onnx" and not is_float(model)
    if weight_type != "auto" and not in_integers:
        raise ValueError(
            f"weight_type={weight_type!r} is about integer kernels, which only a quantized model in .onnx has, and "
            f"'{path.name}' is none. Leave it out."
        )
    if path.suffix == ".safetensors":
        found = quantized_tensors(model)
        return write_packed(path, found.state, found.weights, {"made_by": __version__}, casts=found.casts)
    if example_input is None:
        raise ValueError(f"{path.suffix} needs an example_input, such as a batch that the model is called with.")
    if path.suffix == ".onnx" and not in_integers:
        return write_float_onnx(model, path, example_input, dynamic_batch=dynamic_batch)
    made = lower(model)
    check_equivalence(model, made, example_input)
    if path.suffix == ".pt2":
        return write_pt2(made, path, example_input, dynamic_batch=dynamic_batch)
    return write_onnx(made, path, example_input, dynamic_batch=dynamic_batch, weight_type=weight_type)


def check_suffix(path: Path) -> None:
    """Refuse a file of a kind that is not written.

    Raises:
        ValueError: with the kinds that are.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"'{path}' should end in one of {', '.join(SUFFIXES)}.{near_miss(path.suffix, SUFFIXES)}")
