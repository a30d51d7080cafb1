"""What `write_onnx` refuses, in words and without touching the file that is there."""

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_compress.export.onnx.write import write_onnx
from tests.export import handmade
from tests.export.handmade import Quantizer, deployable


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def refused(tmp_path, made, example, match, **kwargs):
    (tmp_path / "model.onnx").write_bytes(b"an older file")
    with pytest.raises(ValueError, match=match):
        write_onnx(made, tmp_path / "model.onnx", example, **kwargs)
    assert [one.name for one in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_bytes() == b"an older file"
    assert not any("forward" in vars(quantizer) for quantizer in made.quantizers.values())


class Softmax(handmade.Perceptron):
    """With a softmax between two quantizers."""

    def __init__(self):
        super().__init__(width=16)
        self.quantizers["two"], self.quantizers["soft"] = Quantizer(-2.0, 2.0), Quantizer(0.0, 1.0)
        del self.quantizers["three"]

    def forward(self, values):
        scores = self.quantizers["two"](self.one(self.quantizers["one"](values)))
        return self.three(self.quantizers["soft"](scores.softmax(1)))


def test_a_kernel_that_cuts_off_instead_of_rounding_is_told_and_refused_by_a_tighter_tolerance(tmp_path):
    made = deployable(Softmax())
    report = write_onnx(made, tmp_path / "model.onnx", torch.randn(64, 32) * 2)
    assert report.integer_kernels["QLinearSoftmax"] == 1
    farthest = report.largest_difference["soft"]
    assert 0.05 < farthest <= 0.5 + 1e-3
    match = r"first at 'soft'.*where 0.04 are allowed"
    refused(tmp_path, made, torch.randn(64, 32) * 2, match, tolerance=0.04)


def test_quantized_activations_without_one_integer_kernel_are_refused(tmp_path):
    made = deployable(handmade.Perceptron(), group=16, bits=4)
    refused(
        tmp_path, made, torch.randn(8, 32), r"no layer with integers; in floating point stay one.weight, two.weight, th"
    )


def test_a_quantizer_that_is_never_called_is_named(tmp_path):
    made = deployable(handmade.Perceptron())
    made.module.quantizers["lost"] = Quantizer(0.0, 1.0)
    refused(tmp_path, made, torch.randn(8, 32), "never calls lost")


def test_a_file_that_would_not_be_smaller_is_refused(tmp_path):
    made = deployable(nn.Sequential(nn.Linear(2, 3)))
    refused(tmp_path, made, torch.randn(8, 2), r"would have \d+ bytes, and \d+ in float32")


def test_a_weight_that_is_computed_with_before_use_is_named_and_one_that_is_unused_is_not(tmp_path):
    class Scaled(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.layer, self.unused, self.factor = nn.Linear(32, 32), nn.Linear(32, 32), factor

        def forward(self, values):
            weight = self.layer.weight if self.factor == 1.0 else self.layer.weight * self.factor
            return functional.linear(values, weight)

    write_onnx(deployable(Scaled(1.0)), tmp_path / "model.onnx", torch.randn(2, 32))
    match = r"computed something with layer.weight, so .*ignore=\['layer'\]"
    refused(tmp_path, deployable(Scaled(1.7)), torch.randn(2, 32), match)


class Bessel(nn.Linear):
    def forward(self, values):
        return torch.special.bessel_j0(super().forward(values))


class Choosing(nn.Linear):
    def forward(self, values):
        return super().forward(values if values.sum() > 0 else -values)


class Silent(nn.Linear):
    def forward(self, values):
        if torch.compiler.is_exporting():
            raise RuntimeError("this layer has no export") from AssertionError()
        return super().forward(values)


def test_a_cause_without_words_does_not_hide_the_one_that_has_some(tmp_path):
    refused(tmp_path, deployable(Silent(32, 32)), torch.randn(2, 32), "this layer has no export A forward must")


def test_what_cannot_be_exported_is_named(tmp_path):
    example = torch.randn(2, 32)
    refused(tmp_path, deployable(Bessel(32, 32)), example, r"bessel_j0.*ONNX has no operator for.*export to .pt2")
    refused(
        tmp_path, deployable(Choosing(32, 32)), example, r"Choosing cannot be exported for the input tensor\(2, 32\)"
    )
    made = deployable(nn.Linear(32, 32).double())
    refused(tmp_path, made, example, "'weight' is torch.float64: make the module float32")


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"weight_type": "int4"}, "weight_type is 'auto', 'int8' or 'uint8', but is 'int4'"),
        ({"tolerance": 0.0}, "tolerance is above 0"),
        ({"opset": 18}, "opset is 21 or newer"),
    ],
)
def test_arguments_are_checked_at_the_door(kwargs, match, tmp_path):
    refused(tmp_path, deployable(nn.Linear(32, 32)), torch.randn(2, 32), match, **kwargs)
    with pytest.raises(FileNotFoundError, match="no folder"):
        write_onnx(deployable(nn.Linear(32, 32)), tmp_path / "nowhere" / "model.onnx", torch.randn(2, 32))


def test_a_missing_package_is_named_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs onnxruntime.*pip install 'lightning-compress\[export\]'"):
        write_onnx(deployable(nn.Linear(32, 32)), tmp_path / "model.onnx", torch.randn(2, 32))
