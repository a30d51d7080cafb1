"""Measure all that a `Report` tells, and note in words what could not be had."""

import platform
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from lightning_compress.measure.file_size import GZIP_LIMIT_BYTES, FileSize, file_size
from lightning_compress.measure.latency import Latency, measure_latency
from lightning_compress.measure.macs import Macs, count_macs, parametrized_names
from lightning_compress.measure.sparse_encoding import as_float32
from lightning_compress.measure.stored_tensors import StoredTensor, count_nonzero, layers_by_module, stored_tensors
from lightning_compress.nn.example_inputs import batch_size, copy_example, describe_shapes, resize_batch
from lightning_compress.reporting.quantized import packed_size_bytes, quantization_notes, quantizers_off
from lightning_compress.reporting.report import Report
from lightning_compress.reporting.values import LayerReport


@dataclass(frozen=True)
class MeasureOptions:
    """How to run the model; see `report`.

    Raises:
        ValueError: if a number is out of its range.
    """

    batch_dim: int | None = 0
    latency: bool = True
    threads: int = 1
    runs: int = 200
    seconds: float = 5.0
    gzip: bool = True
    batches: tuple[int, ...] = (1, 64)

    def __post_init__(self) -> None:
        if self.batch_dim is not None and self.batch_dim < 0:
            raise ValueError(f"batch_dim counts from 0, but is {self.batch_dim}. None means: no batch dimension.")
        for name in ("threads", "runs", "seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(
                    f"{name} is above 0, but is {getattr(self, name)}. To time nothing, set latency=False."
                )


def measure_model(model: nn.Module, example_input: Any, protocol: MeasureOptions) -> Report:
    """A report of `model` alone. See `report` for what it takes and raises."""
    inner = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
    with quantizers_off(inner, "observer_enabled"):
        return _measured(model, inner, example_input, protocol)


def _measured(model: nn.Module, inner: nn.Module, example_input: Any, protocol: MeasureOptions) -> Report:
    notes: list[str] = []
    found = stored_tensors(inner)
    tensors = {one.name: one.tensor for one in found}
    dense = file_size(as_float32(tensors), sparse=False, gzip=protocol.gzip)
    sparse = file_size(tensors, sparse=True, gzip=protocol.gzip)
    macs, macs_batch = _macs(inner, example_input, protocol, notes)
    layers = _layers(inner, found, dense, sparse, macs)
    with quantizers_off(inner, "enabled"):
        latencies = {batch: _latency(model, example_input, batch, protocol, notes) for batch in protocol.batches}
    notes += _remarks(inner, layers, dense, sparse, protocol) + quantization_notes(inner)
    return Report(
        name=type(inner).__name__,
        layers=tuple(layers),
        size_bytes=dense.size_bytes,
        size_bytes_sparse=sparse.size_bytes,
        size_bytes_gzip=dense.gzip_bytes,
        size_bytes_sparse_gzip=sparse.gzip_bytes,
        size_bytes_quantized=packed_size_bytes(inner),
        macs_batch=macs_batch,
        latency_batch_1=latencies.get(1),
        latency_batch_64=latencies.get(64),
        notes=tuple(dict.fromkeys(notes)),
        environment=_environment(),
    )


def _layers(
    model: nn.Module, found: list[StoredTensor], dense: FileSize, sparse: FileSize, macs: dict[str, Macs] | None
) -> list[LayerReport]:
    """In the order of the model's modules; only those that store or multiply something."""
    types: dict[str, str] = {}
    for module, name in layers_by_module(model).items():
        types.setdefault(name, type_before_parametrizations(getattr(module, "_orig_mod", module)).__name__)
    by_layer: dict[str, list[StoredTensor]] = {name: [] for name in types}
    for one in found:
        by_layer[one.layer].append(one)
    layers = []
    for name, own in by_layer.items():
        if own or name in (macs or {}):
            size_bytes = sum(dense.record_bytes[one.name] for one in own)
            size_bytes_sparse = sum(sparse.record_bytes[one.name] for one in own)
            counted = None if macs is None else macs.get(name, Macs())
            layers.append(_layer(name, types[name], own, size_bytes, size_bytes_sparse, counted))
    return layers


def _layer(
    name: str, kind: str, own: list[StoredTensor], size_bytes: int, size_bytes_sparse: int, macs: Macs | None
) -> LayerReport:
    shapes = [one.tensor.shape for one in own if one.is_parameter]
    parameters = [one.tensor for one in own if one.is_parameter and not one.tied]
    weights = [tensor for tensor in parameters if tensor.ndim >= 2]
    return LayerReport(
        name=name,
        type=kind,
        shape=tuple(max(shapes, key=prod)) if shapes else (),
        parameters=sum(tensor.numel() for tensor in parameters),
        nonzero=sum(map(count_nonzero, parameters)),
        weights=sum(tensor.numel() for tensor in weights),
        weights_nonzero=sum(map(count_nonzero, weights)),
        size_bytes=size_bytes,
        size_bytes_sparse=size_bytes_sparse,
        macs=None if macs is None else macs.dense,
        macs_nonzero=None if macs is None else macs.nonzero,
    )


def _macs(
    model: nn.Module, example: Any, protocol: MeasureOptions, notes: list[str]
) -> tuple[dict[str, Macs] | None, int | None]:
    """MACs at batch 1 if the model takes that, else of the example as it is; and the batch that they are of."""
    if example is None:
        notes.append("MACs and latency were not measured: there was no input. Call report(model, example_input).")
        return None, None
    example = copy_example(example, _device(model))
    if protocol.batch_dim is None:
        return _macs_as_given(model, example), 1
    try:
        return count_macs(model, resize_batch(example, 1, protocol.batch_dim)), 1
    except Exception as error:
        counted = _macs_as_given(model, example)
        batch = batch_size(example, protocol.batch_dim) or 1
        notes.append(f"MACs are of the example input as it is: at batch 1 the model raised {_error_text(error)}")
        return counted, batch


def _macs_as_given(model: nn.Module, example: Any) -> dict[str, Macs]:
    try:
        return count_macs(model, copy_example(example))
    except Exception as error:
        raise ValueError(
            f"The model does not take example_input, {describe_shapes(example)}: {_error_text(error)} Give what you "
            f"would call the model with: a tensor, a tuple of positional arguments or a dict of keyword arguments."
        ) from error


def _latency(model: nn.Module, example: Any, batch: int, protocol: MeasureOptions, notes: list[str]) -> Latency | None:
    if example is None or not protocol.latency:
        return None
    if (device := _device(model)).type != "cpu":
        notes.append(f"Latency is timed on the CPU, but the model is on {device}. Call report(model.cpu(), ...).")
        return None
    if protocol.batch_dim is None and batch > 1:
        notes.append(f"Latency at batch {batch} was not timed: batch_dim=None says that the input has no batch.")
        return None
    try:
        inputs = (
            copy_example(example) if protocol.batch_dim is None else resize_batch(example, batch, protocol.batch_dim)
        )
        return measure_latency(
            model, inputs, batch, threads=protocol.threads, runs=protocol.runs, seconds=protocol.seconds
        )
    except Exception as error:
        notes.append(f"Latency at batch {batch} could not be timed: the model raised {_error_text(error)}")
        return None


def _remarks(
    model: nn.Module, layers: list[LayerReport], dense: FileSize, sparse: FileSize, protocol: MeasureOptions
) -> list[str]:
    """What a reader of the numbers should know about this model."""
    remarks = []
    if protocol.gzip and None in (dense.gzip_bytes, sparse.gzip_bytes):
        remarks.append(f"gzip was left out: the tensors are larger than {GZIP_LIMIT_BYTES // 10**6} MB.")
    unused = [one.name for one in layers if one.macs == 0 and one.weights and "Embedding" not in one.type]
    if unused:
        remarks.append(
            f"No MACs were counted for {_listed(unused)}: the model did not use them for this input, or used an "
            f"operation that the counter does not know."
        )
    named = [(name, module) for name, module in model.named_modules() if parametrized_names(module)]
    if named:
        remarks.append(
            f"{_listed([name for name, _ in named])}: the weight is computed from other parameters (a parametrization, "
            f"weight norm or prune). Parameters, zeros and bytes are of what is stored, not of the weight."
        )
    extra = [name for name, one in model.named_modules() if type(one).get_extra_state is not nn.Module.get_extra_state]
    if extra:
        remarks.append(f"{_listed(extra)}: extra state, which is not a tensor, is not in the bytes.")
    return remarks


def _environment() -> dict[str, str]:
    return {
        "cpu": _cpu_name(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_name() -> str:
    """The model of the processor, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _device(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))


def _error_text(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}".rstrip(".") + "."


def _listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name or "(the model itself)" for name in names[:most]) + more
