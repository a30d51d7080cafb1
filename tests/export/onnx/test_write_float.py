"""A model that was never quantized in ONNX Runtime, and what is not written."""

import pytest
import torch
from torch import nn

from lightning_compress import export
from lightning_compress.export.onnx.write_float import FloatReport

onnxruntime = pytest.importorskip("onnxruntime")


def batch(size, seed=3):
    return torch.randn(size, 8, generator=torch.Generator().manual_seed(seed))


def test_a_float_model_is_written_as_it_evaluates_and_tells_nothing_of_the_machine(tmp_path):
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 3))
    model(batch(32, seed=5))  # so that the statistics are not those of the beginning
    path = tmp_path / "model.onnx"
    told = export(model, path, batch(2))
    assert model.training
    assert isinstance(told, FloatReport)
    assert told.size_bytes == path.stat().st_size
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: batch(5).numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model.eval()(batch(5)).detach(), rtol=1e-4, atol=1e-5)
    content = path.read_bytes()
    assert b".py" not in content
    for suffix in (".pt2", ".safetensors"):
        with pytest.raises(ValueError, match=r"was never quantized\. Export .*it goes to \.onnx"):
            export(model, tmp_path / f"model{suffix}", batch(2))


class Chance(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, numbers):
        return self.layer(numbers) + torch.rand(3)


def test_what_does_not_compute_the_same_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="ONNX Runtime disagrees with Chance by .*must not draw by chance"):
        export(Chance(), tmp_path / "model.onnx", batch(2))
