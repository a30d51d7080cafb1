"""One function writes every kind of file of a model that was quantized in training, and says what it refuses."""

import pytest
import torch
from torch import nn

from lightning_compress import QuantizationAwareTraining, export, load_compressed
from lightning_compress.export.packed import load_packed


class Wide(nn.Module):
    """Of enough weights that integers pay."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(8, 128), nn.Linear(128, 3)

    def forward(self, numbers):
        return self.head(self.hidden(numbers).relu())


@pytest.fixture
def trained(make_module, make_trainer, loader, tmp_path):
    module = make_module(net=Wide)
    trainer = make_trainer([QuantizationAwareTraining(begin=2)], max_epochs=3)
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    return module.eval()


def test_every_kind_of_file_comes_out_of_a_trained_module(trained, make_module, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    numbers = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    reloaded = load_compressed(type(trained), tmp_path / "last.ckpt", net=Wide).eval()
    with torch.no_grad():
        wanted = reloaded(numbers)
    told = export(trained, tmp_path / "model.onnx", numbers)
    assert told.size_bytes == (tmp_path / "model.onnx").stat().st_size
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: numbers.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0.02, atol=0.02)
    export(trained, tmp_path / "model.pt2", numbers)
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(program(numbers), wanted, rtol=0.02, atol=0.02)
    export(trained, tmp_path / "model.safetensors")
    again = load_packed(make_module(net=Wide), tmp_path / "model.safetensors")
    assert list(again.state_dict()) == list(trained.state_dict())


@pytest.mark.parametrize(
    ("name", "example", "words"),
    [
        ("model.onn", torch.zeros(1, 8), r"should end in one of .*Did you mean '.onnx'"),
        ("model.onnx", None, r"\.onnx needs an example_input"),
        ("model.pt2", None, r"\.pt2 needs an example_input"),
    ],
)
def test_what_cannot_be_written_is_refused_and_nothing_is_there(trained, tmp_path, name, example, words):
    with pytest.raises(ValueError, match=words):
        export(trained, tmp_path / name, example)
    assert not (tmp_path / name).exists()


def test_a_float_module_is_refused(make_module, tmp_path):
    with pytest.raises(ValueError, match="was never quantized"):
        export(make_module(), tmp_path / "model.safetensors")
