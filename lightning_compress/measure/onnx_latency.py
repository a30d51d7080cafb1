"""Time a model in ONNX Runtime, in floating point as it is."""

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_compress.measure.latency import Latency, time_calls
from lightning_compress.nn.example_inputs import copy_example
from lightning_compress.nn.isolation import isolated_eval


def measure_onnx_latency(
    model: nn.Module, example: Any, batch: int, *, threads: int = 1, runs: int = 200, seconds: float = 5.0
) -> Latency:
    """Write `model` to a temporary file, and time what ONNX Runtime needs for `example` on the CPU.

    Args:
        model: on the CPU, in any mode; left as it was.
        example: the input, of `batch` samples.
        batch: what to call that batch.
        threads: of ONNX Runtime within an operator.
        runs: at most so many are timed, after a tenth as many to warm up.
        seconds: stop timing after so long, but not before 5 runs.

    Raises:
        ModuleNotFoundError: if onnx, onnxscript or onnxruntime is missing.
        Exception: whatever torch says if it cannot export the model.

    >>> latency = measure_onnx_latency(nn.Linear(3, 2), torch.zeros(4, 3), batch=4, runs=10)
    >>> latency.runs, latency.median_ms > 0
    (10, True)
    """
    import onnxruntime

    arguments, keywords = ((), example) if isinstance(example, dict) else (_as_tuple(example), {})
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        with isolated_eval(model), _quiet():
            torch.onnx.export(
                model,
                copy_example(arguments),
                str(path),
                kwargs=copy_example(keywords),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = [one.numpy() for one in tree_leaves((arguments, keywords)) if isinstance(one, Tensor)]
    fed = {one.name: value for one, value in zip(session.get_inputs(), given, strict=True)}
    return time_calls(lambda: session.run(None, fed), batch, threads=threads, runs=runs, seconds=seconds)


def _as_tuple(example: Any) -> tuple[Any, ...]:
    return example if isinstance(example, tuple) and not hasattr(example, "_fields") else (example,)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that are not there."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
