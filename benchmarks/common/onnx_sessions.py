"""Write float networks as ONNX files, quantize those by ONNX Runtime's own tool, and call files on one thread."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

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


def openvino_session(path: Path) -> Callable[[Tensor], Callable[[], Any]] | None:
    """What makes of inputs a function that runs the file on them in OpenVINO; None if that is not installed."""
    try:
        import openvino
    except ModuleNotFoundError:
        return None
    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(core.read_model(path), "CPU", settings)

    def make(given: Tensor) -> Callable[[], Any]:
        request, array = compiled.create_infer_request(), given.numpy()
        return lambda: list(request.infer([array]).values())

    return make


def quantize_static(source: Path, path: Path, batches: Iterable[Tensor]) -> None:
    """Quantize a float file as ONNX Runtime's own tool does, after the preparation that its manual asks for."""
    import onnxruntime
    from onnxruntime.quantization import QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as quantize
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader:
        def __init__(self) -> None:
            made = onnxruntime.InferenceSession(str(source), providers=["CPUExecutionProvider"])
            self.left = iter([{made.get_inputs()[0].name: batch.numpy()} for batch in batches])

        def get_next(self) -> Any:
            return next(self.left, None)

    prepared = path.with_suffix(".prepared")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantize(
        str(prepared), str(path), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    prepared.unlink()
