"""What a checkpoint holds, without its model's code; what is none is refused in words."""

import io
import pickle

import pytest
import torch

from lightning_compress.reporting.checkpoint_report import report_checkpoint
from lightning_compress.reporting.report import Report

STATE = {
    "fc.weight": torch.tensor([[1.0, 0.0], [0.0, 0.0], [2.0, -0.0]]),
    "fc.bias": torch.tensor([0.0, 1.0, 1.0]),
    "norm.running_mean": torch.zeros(3),
    "norm.num_batches_tracked": torch.tensor(5),
}


class Own:
    """Something that a checkpoint should not hold."""


@pytest.fixture
def saved(tmp_path):
    def save(content):
        path = tmp_path / "m.ckpt"
        torch.save(content, path)
        return path

    return save


@pytest.mark.parametrize("content", [STATE, {"state_dict": STATE, "epoch": 3}], ids=["state_dict", "lightning"])
def test_every_tensor_has_a_line_and_statistics_are_no_parameters(saved, content):
    report = report_checkpoint(saved(content))
    assert isinstance(report, Report)
    lines = {layer.name: layer for layer in report.layers}
    assert list(lines) == list(STATE)
    assert (lines["fc.weight"].parameters, lines["fc.weight"].nonzero) == (6, 2)
    assert (report.parameters, report.nonzero, report.weight_sparsity) == (9, 4, pytest.approx(4 / 6))
    assert lines["norm.running_mean"].parameters == lines["norm.num_batches_tracked"].parameters == 0
    assert lines["norm.running_mean"].size_bytes > 0


def test_tied_tensors_count_once(saved):
    weight = torch.ones(3, 2)
    assert report_checkpoint(saved({"a.weight": weight, "b.weight": weight})).parameters == 6


def bytes_of(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def damaged():
    data = bytearray(bytes_of({"a": torch.arange(1000.0)}))
    at = data.index(torch.arange(1000.0).numpy().tobytes())
    data[at + 100] ^= 1
    return bytes(data)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda: b"", "damaged, or not written by torch.save"),
        (lambda: b"hello world", "damaged, or not written by torch.save"),
        (lambda: b"\x89PNG\r\n" + bytes(100), "damaged, or not written by torch.save"),
        (lambda: bytes_of(STATE)[:300], "damaged, or not written by torch.save"),
        (damaged, "checksum of its part '.*' is wrong"),
        (lambda: bytes_of({"state_dict": STATE, "own": Own()}), "it holds objects of '.*Own', and loading"),
        (lambda: pickle.dumps({"a": 1}), "damaged, or not written by torch.save|holds no state_dict"),
        (lambda: bytes_of({"state_dict": {}}), "holds no state_dict"),
        (lambda: bytes_of([1, 2]), "holds no state_dict"),
        (lambda: bytes_of({"a": torch.ones(2, 2).to_sparse()}), "'a' is not a plain dense tensor"),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_words(tmp_path, content, words):
    path = tmp_path / "m.ckpt"
    path.write_bytes(content())
    with pytest.raises(ValueError, match=words):
        report_checkpoint(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        report_checkpoint(tmp_path / "no.ckpt")
    with pytest.raises(ValueError, match="is a folder"):
        report_checkpoint(tmp_path)
