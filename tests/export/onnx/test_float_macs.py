"""What stays in floating point is named with its share of the multiply-accumulates, counted by hand."""

import pytest
import torch
from torch import nn

from lightning_compress import export, quantize

pytest.importorskip("onnxruntime")


def test_layers_without_an_integer_kernel_have_their_share_of_the_work(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 16, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1)
    )
    images = torch.randn(2, 3, 8, 8)
    # By sample: 6 x 6 pixels with 27 inputs each; 2 x 2 products of 16 x 16 for each of them; 12 x 12 with 144 inputs.
    work = {"0": 36 * 27 * 16, "2": 36 * 16 * 16 * 4, "4": 144 * 144 * 32}
    found = export(quantize(net, [images], progress=False), tmp_path / "model.onnx", images)
    assert list(found.float_macs) == ["4", "2"]
    assert found.float_macs == pytest.approx({name: work[name] / sum(work.values()) for name in ("2", "4")})
    quantized = quantize(net, [images], quantize_output=True, progress=False)
    found = export(quantized, tmp_path / "model.onnx", images)
    assert list(found.float_macs) == ["2"]
    assert found.integer_kernels["QLinearConv"] == 2


def test_products_of_activations_stand_under_the_module_that_computes_them(tmp_path):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.inputs, self.output = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, tokens):
            query, key, value = self.inputs(tokens).chunk(3, -1)
            return self.output((query @ key.transpose(1, 2)).softmax(-1) @ value)

    torch.manual_seed(0)
    tokens = torch.randn(2, 5, 16)
    net = nn.Sequential(Attention(), nn.Linear(16, 64))
    found = export(quantize(net, [tokens], progress=False), tmp_path / "model.onnx", tokens)
    scores, layers = 2 * 5 * 5 * 16, 5 * 16 * (48 + 16 + 64)
    assert found.float_macs == pytest.approx({"0": scores / (scores + layers)})
