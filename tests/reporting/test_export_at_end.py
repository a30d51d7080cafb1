"""The file that a run ends with: it computes what was trained, its bytes are told, and mistakes are found before."""

import sys

import pytest
import torch
from torch import nn

from lightning_compress import CompressionReport, Pruning, QuantizationAwareTraining, Report, load_packed
from lightning_compress.reporting.compare import compare

ONE_NAME = pytest.mark.parametrize("pl", ["pytorch_lightning"], indirect=True)
QUIET = {"latency": False, "print_table": False}


@ONE_NAME
def test_a_float_run_ends_with_what_was_trained_in_onnx_and_its_bytes_in_the_report(
    pl, make_module, make_trainer, loader, tmp_path
):
    onnxruntime = pytest.importorskip("onnxruntime")
    callback, module = CompressionReport(export="new/model.onnx", dirpath=str(tmp_path), **QUIET), make_module()
    make_trainer([Pruning(0.75, begin=1, end=10), callback], max_epochs=2).fit(module, loader)
    path = tmp_path / "new" / "model.onnx"
    session = onnxruntime.InferenceSession(path)
    batch = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    (found,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), module(batch).detach(), rtol=1e-4, atol=1e-5)
    size_bytes = path.stat().st_size
    assert callback.report.size_bytes_exported == {"model.onnx": size_bytes}
    assert callback.files[2] == path
    again = Report.load(tmp_path / "compression_report.json")
    assert again == callback.report
    assert "model.onnx" in compare({"run": again}).headings
    assert "model.onnx" in (tmp_path / "compression_report.html").read_text()


@ONE_NAME
def test_a_quantized_run_ends_with_its_packed_weights(pl, make_module, make_trainer, loader, tmp_path):
    callback, module = CompressionReport(export="model.safetensors", **QUIET), make_module()
    make_trainer([QuantizationAwareTraining(weights=4, begin=2), callback], max_epochs=1).fit(module, loader)
    packed = load_packed(make_module(), tmp_path / "model.safetensors").state_dict()
    for name in ("net.0.weight", "net.2.weight"):
        assert max(len(row.unique()) for row in packed[name]) <= 16
        assert torch.equal(packed[name], module.state_dict()[name])
    assert callback.report.size_bytes_exported == {"model.safetensors": callback.files[2].stat().st_size}


class ByValue(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, numbers):
        return self.layer(numbers) if numbers.sum() > 0 else -self.layer(numbers)


@ONE_NAME
def test_what_cannot_be_exported_is_told_and_the_run_is_kept(pl, make_module, make_trainer, loader, tmp_path):
    callback = CompressionReport(export="model.onnx", **QUIET)
    with pytest.warns(UserWarning, match="was not exported: "):
        make_trainer([callback], max_epochs=1).fit(make_module(net=ByValue), loader)
    (note,) = [one for one in callback.report.notes if "was not exported" in one]
    assert "must not choose its way by the values" in note
    assert {path.name for path in tmp_path.iterdir()} == {"compression_report.json", "compression_report.html"}


def test_another_ending_is_refused_at_construction():
    with pytest.raises(ValueError, match=r"'model\.onx' should end in one of .*Did you mean '\.onnx'"):
        CompressionReport(export="model.onx")


@ONE_NAME
@pytest.mark.parametrize(
    ("export", "words"),
    [
        ("file/model.onnx", "file is no folder"),
        ("folder.onnx", "is a folder. Name a file"),
        ("model.pt2", "nothing quantizes this one. Add QuantizationAwareTraining, or write 'model.onnx'"),
        ("missing.onnx", r"onnxscript.*lightning-compress\[export\]"),
    ],
)
def test_what_could_not_be_written_is_refused_before_training(
    pl, make_module, make_trainer, loader, tmp_path, monkeypatch, export, words
):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.onnx").mkdir()
    if export == "missing.onnx":
        monkeypatch.setitem(sys.modules, "onnxscript", None)
    trainer = make_trainer([CompressionReport(export=export, **QUIET)], max_epochs=1)
    with pytest.raises((ValueError, ModuleNotFoundError), match=words):
        trainer.fit(make_module(), loader)
    assert trainer.global_step == 0
