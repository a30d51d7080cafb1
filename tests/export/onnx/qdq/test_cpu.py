import pytest
import torch

from lightning_compress.export.onnx.qdq import cpu as processor


@pytest.mark.parametrize(
    ("machine", "known", "expected"),
    [
        ("x86_64", {"avx2": True}, True),
        ("AMD64", {"avx2": True, "avx512_vnni": False}, True),
        ("x86_64", {"avx512_vnni": True}, False),
        ("x86_64", {"avx_vnni": True}, False),
        ("x86_64", {"amx_int8": True}, False),
        ("aarch64", {}, False),
    ],
)
def test_only_x86_without_vnni_and_amx_may_saturate(machine, known, expected, monkeypatch):
    monkeypatch.setattr(processor.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    assert processor.may_saturate() is expected
