"""A report on a checkpoint file alone, without its model's code: a line for each tensor of its `state_dict`."""

from pathlib import Path

import torch
from torch import Tensor

from lightning_compress.core.checkpoint import load_checkpoint, state_dict_of
from lightning_compress.measure.file_size import FileSize, file_size
from lightning_compress.measure.sparse_encoding import as_float32
from lightning_compress.measure.stored_tensors import count_nonzero, identity
from lightning_compress.reporting.report import Report
from lightning_compress.reporting.values import LayerReport

# What normalisation layers count, not learn: PyTorch's names, for a file does not tell buffers from parameters.
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
NOTE = (
    "A checkpoint does not tell parameters from buffers: all floating-point tensors count as parameters, but for "
    f"{', '.join(BUFFERS)}. MACs and latency need the model: lightning_compress.report(model, example_input)."
)


def report_checkpoint(path: str | Path) -> Report:
    """Measure what a checkpoint holds; nothing in the file is run.

    Args:
        path: a Lightning checkpoint, or a `state_dict` as `torch.save` writes it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read as tensors and plain values, or holds no `state_dict`.
    """
    tensors = state_dict_of(load_checkpoint(path), path)
    try:
        dense, sparse = file_size(as_float32(tensors), sparse=False), file_size(tensors, sparse=True)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path} cannot be measured: {error}") from error
    return Report(
        name=Path(path).name,
        layers=tuple(_lines(tensors, dense, sparse)),
        size_bytes=dense.size_bytes,
        size_bytes_sparse=sparse.size_bytes,
        size_bytes_gzip=dense.gzip_bytes,
        size_bytes_sparse_gzip=sparse.gzip_bytes,
        notes=(NOTE,),
        environment={"torch": str(torch.__version__)},
    )


def _lines(tensors: dict[str, Tensor], dense: FileSize, sparse: FileSize) -> list[LayerReport]:
    lines, seen = [], set[object]()
    for name, tensor in tensors.items():
        key = identity(tensor)
        counts = tensor.is_floating_point() and name.rpartition(".")[2] not in BUFFERS and key not in seen
        seen.add(key)
        elements, nonzero = (tensor.numel(), count_nonzero(tensor)) if counts else (0, 0)
        is_weight = tensor.ndim >= 2
        lines.append(
            LayerReport(
                name=name,
                type=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                parameters=elements,
                nonzero=nonzero,
                weights=elements if is_weight else 0,
                weights_nonzero=nonzero if is_weight else 0,
                size_bytes=dense.record_bytes[name],
                size_bytes_sparse=sparse.record_bytes[name],
            )
        )
    return lines
