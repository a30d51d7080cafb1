"""How often an ONNX file chooses the class that its module chooses."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from lightning_compress.core.optional_dependencies import need
from lightning_compress.nn.example_inputs import call_model, copy_example
from lightning_compress.nn.isolation import isolated_eval
from lightning_compress.quantization.lowering.deployed_model import DeployedModel


def output_agreement(path: str | Path, deployable: DeployedModel | nn.Module, batches: Iterable[Any]) -> float:
    """The share of equal top-1 choices of ONNX Runtime and torch, in [0, 1].

    Args:
        path: of the ONNX file.
        deployable: what was written into it, or the quantized model; run in eval mode, and left as it was.
        batches: inputs, each what the module is called with: a tensor, a tuple of arguments, or a dict of keywords. The
            first output holds scores, shape `(..., classes)`.

    Raises:
        ModuleNotFoundError: if a package is missing.
        ValueError: if there is no batch, or the module does not return scores.
    """
    need("onnx", "onnxruntime")
    from lightning_compress.export.onnx.qdq.runtime import as_arrays, make_session, run_session

    module = deployable.module if isinstance(deployable, DeployedModel) else deployable
    running = make_session(path)
    equal = total = 0
    with isolated_eval(module):
        for batch in batches:
            expected = as_arrays(call_model(module, copy_example(batch)))
            found = list(run_session(running, batch).values())
            if not expected or expected[0].ndim < 2:
                raise ValueError("The module's first output is no tensor of scores (..., classes), so none is the top.")
            same = expected[0].argmax(-1) == found[0].argmax(-1)
            equal, total = equal + int(same.sum()), total + same.size
    if not total:
        raise ValueError("There is no batch to compare: was the iterator used up before?")
    return equal / total
