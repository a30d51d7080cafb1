"""The file that was made for ONNX Runtime runs with integer kernels in OpenVINO too, where that is installed."""

from collections import Counter

import numpy
import pytest
import torch
from torch import nn

from lightning_compress import export, quantize

openvino = pytest.importorskip("openvino")
pytest.importorskip("onnxruntime")


class Residual(nn.Module):
    """A sum, squeeze-and-excitation and a mean over pixels."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.inner, self.act, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Linear(16, 10)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.Sigmoid())

    def forward(self, images):
        images = self.act(self.norm(self.stem(images)))
        inner = self.inner(images)
        return self.head((images + inner * self.gate(inner)).mean((2, 3)))


class Perceptrons(nn.Module):
    """Linear layers on tokens, as transformers have them."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.act, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, tokens):
        return self.head((tokens + self.down(self.act(self.up(self.norm(tokens))))).mean(1))


NETWORKS = {
    "residual": (Residual, lambda: torch.randn(8, 3, 16, 16), {"Convolution": 3, "FullyConnected": 1}),
    "tokens": (Perceptrons, lambda: torch.randn(8, 6, 32), {"FullyConnected": 3}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_computes_with_integers_in_openvino(name, tmp_path):
    make, make_example, layers = NETWORKS[name]
    torch.manual_seed(0)
    example = make_example()
    quantized = quantize(make().eval(), [example], progress=False)
    with torch.no_grad():
        wanted = quantized(example).numpy()
    report = export(quantized, tmp_path / "model.onnx", example)
    assert not report.float_layers
    core = openvino.Core()
    precise = {"INFERENCE_PRECISION_HINT": "f32"}  # what is left in floating point would take bfloat16
    compiled = core.compile_model(core.read_model(tmp_path / "model.onnx"), "CPU", precise)
    (found,) = compiled([example.numpy()]).values()
    # Roundings of values that lie in the middle of two codes differ, and go on from layer to layer.
    assert numpy.abs(found - wanted).max() <= 0.05 * numpy.abs(wanted).max()
    kinds = Counter()
    for operation in compiled.get_runtime_model().get_ops():
        known = operation.get_rt_info()
        if (kind := str(known["layerType"].astype(str))) in layers:
            kinds[kind] += known["runtimePrecision"].astype(str) in ("u8", "i8")
    assert kinds == layers
