"""ONNX Runtime takes nodes together where that is right and fast, by what its own optimized graph has."""

import pytest

pytest.importorskip("onnxruntime")

import onnx
import torch
from torch import nn

from lightning_compress import export, quantize
from lightning_compress.export.onnx.qdq.runtime import optimized_graph


def test_a_silu_between_two_grids_is_one_kernel(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.SiLU(), nn.Conv2d(16, 16, 3), nn.SiLU(), nn.Conv2d(16, 8, 1))
    images = torch.randn(4, 3, 8, 8)
    export(quantize(net, [images], progress=False), tmp_path / "model.onnx", images)
    operators = [node.op_type for node in optimized_graph(onnx.load(tmp_path / "model.onnx")).graph.node]
    assert operators.count("QuickGelu") == 2
    assert not {"Sigmoid", "Mul"} & set(operators)
    assert operators.count("DequantizeLinear") == 2 + 1  # before each SiLU, and of the last layer, which stays in float
