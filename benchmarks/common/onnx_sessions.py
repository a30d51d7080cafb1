"""Write float networks as ONNX files, and call ONNX files on one thread."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


def write_float(network: nn.Module, images: Tensor, path: Path) -> None:
    """Write the ONNX file of a network in eval mode, for any batch size."""
    dynamic = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(
        network.eval(), (images,), str(path), dynamo=True, external_data=False, verbose=False, dynamic_shapes=dynamic
    )


def session(path: Path, images: Tensor) -> Callable[[], object]:
    """A function that runs the file on these images in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    made = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    fed = {made.get_inputs()[0].name: images.numpy()}
    return lambda: made.run(None, fed)
