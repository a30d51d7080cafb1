import sys
import warnings

import numpy
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.nn import functional

from lightning_compress.export.deployable import Deployable
from lightning_compress.export.onnx_file import write_onnx
from lightning_compress.export.qdq.processor import may_saturate
from tests.export import handmade
from tests.export.handmade import Quantizer, deployable


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def images(channels, size, batch=4):
    return torch.randn(batch, channels, size, size)


def tokens(batch=3):
    return torch.randint(50, (batch, 9))


def in_onnxruntime(path, *inputs):
    """Outputs in ONNX Runtime as a user starts it."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    return session.run(None, dict(zip(names, (one.numpy() for one in inputs), strict=True)))


def assert_near(found, expected, share):
    """Rounding of ties moves values by one step here and there; `share` of the largest value is a few of them."""
    expected = expected.detach().numpy()
    assert found.shape == expected.shape
    assert numpy.abs(found - expected).max() <= share * numpy.abs(expected).max()


# Kernels as ONNX Runtime 1.32 has them for layers that lie between two quantizers.
NETWORKS = {
    "lenet": (handmade.LeNet, {}, lambda: images(1, 28), {"QLinearConv": 2, "QGemm": 2}, 0.34),
    "lenet of 4 bits": (
        lambda: handmade.LeNet(4),
        {"bits": 4},
        lambda: images(1, 28),
        {"QLinearConv": 2, "QGemm": 2},
        0.22,
    ),
    "lenet of 2 bits": (handmade.LeNet, {"bits": 2}, lambda: images(1, 28), {"QLinearConv": 2, "QGemm": 2}, 0.17),
    "residual": (handmade.Residual, {}, lambda: images(3, 16), {"QLinearConv": 3, "QLinearAdd": 1, "QGemm": 1}, 0.95),
    "perceptron": (handmade.Perceptron, {}, lambda: torch.randn(8, 32), {"QGemm": 3}, 0.4),
    "one scale": (handmade.Perceptron, {"granularity": "tensor"}, lambda: torch.randn(8, 32), {"QGemm": 3}, 0.4),
    "transformer": (handmade.Transformer, {}, lambda: tokens(), {"MatMulIntegerToFloat": 4, "QGemm": 1}, 0.45),
    "padded": (handmade.Padded, {}, lambda: images(3, 16), {"QLinearConv": 2}, 0.6),
    "decoder": (handmade.Decoder, {}, lambda: images(3, 16), {"QLinearConv": 1}, 0.45),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_all_kinds_run_on_integer_kernels_for_any_batch(name, tmp_path):
    build, kinds, make_example, kernels, share = NETWORKS[name]
    example = make_example()
    made = deployable(build(), **kinds)
    before = {key: value.clone() for key, value in made.module.state_dict().items()}
    report = write_onnx(made, tmp_path / "model.onnx", example)
    assert report.integer_kernels == kernels
    assert report.float_layers == (["up.weight"] if name == "decoder" else [])
    assert report.size_bytes == (tmp_path / "model.onnx").stat().st_size < share * report.float_size_bytes
    assert set(report.largest_difference) == set(made.quantizers)
    assert max(report.largest_difference.values()) < 0.01
    more = torch.cat([example, example.flip(0), example[:1]])
    # One tie that is rounded the other way is a fifteenth of the range at 4 bits.
    assert_near(in_onnxruntime(tmp_path / "model.onnx", more)[0], made.module(more), share=0.3 if "4" in name else 0.06)
    assert all(torch.equal(value, before[key]) for key, value in made.module.state_dict().items())
    assert not any("forward" in vars(quantizer) for quantizer in made.quantizers.values())
    assert [one.name for one in tmp_path.iterdir()] == ["model.onnx"]


WEIGHTS_ONLY = {
    "attention": (handmade.Attention, {}, lambda: tokens(), 0.46),
    "attention in groups": (handmade.Attention, {"bits": 3, "group": 8}, lambda: tokens(), 0.47),
    "lstm": (handmade.Recurrent, {}, lambda: torch.randn(3, 7, 16), 0.5),
    "two ways": (lambda: handmade.Recurrent(bidirectional=True, num_layers=2), {}, lambda: torch.randn(3, 7, 16), 0.4),
    "gru": (lambda: handmade.Recurrent(nn.GRU), {"bits": 4}, lambda: torch.randn(3, 7, 16), 0.45),
}


@pytest.mark.parametrize("name", WEIGHTS_ONLY)
def test_weights_alone_are_stored_as_integers_and_computed_with_as_floats(name, tmp_path):
    build, kinds, make_example, share = WEIGHTS_ONLY[name]
    example = make_example()
    made = deployable(build(), **kinds)
    report = write_onnx(made, tmp_path / "model.onnx", example)
    assert report.size_bytes < share * report.float_size_bytes
    assert report.integer_kernels == {}
    more = torch.cat([example, example.flip(0)])
    found = in_onnxruntime(tmp_path / "model.onnx", more)[0]
    torch.testing.assert_close(torch.from_numpy(found), made.module(more), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "kinds"),
    [(lambda: handmade.LeNet(4), {"bits": 4}), (handmade.LeNet, {"bits": 2}), (handmade.Perceptron, {})],
)
def test_the_file_says_the_same_to_another_implementation_of_onnx(build, kinds, tmp_path):
    made = deployable(build(), **kinds)
    example = torch.randn(2, 32) if build is handmade.Perceptron else images(1, 28, batch=2)
    write_onnx(made, tmp_path / "model.onnx", example)
    reference = ReferenceEvaluator(str(tmp_path / "model.onnx"))
    found = reference.run(None, {reference.input_names[0]: example.numpy()})[0]
    assert_near(found, made.module(example), share=0.3 if kinds == {"bits": 4} else 0.06)


def test_what_is_in_the_file_is_small_and_tells_who_made_it_and_nothing_of_the_machine(tmp_path):
    made = deployable(handmade.LeNet(4), bits=4)
    write_onnx(made, tmp_path / "model.onnx", images(1, 28))
    model = onnx.load(tmp_path / "model.onnx")
    stored = {one.name: one for one in model.graph.initializer}
    for name, weight in made.weights.items():
        assert stored[f"{name}.codes"].data_type == onnx.TensorProto.INT4
        assert len(stored[f"{name}.codes"].raw_data) == weight.codes.numel() / 2
    assert {f"{name}.scale" for name in made.quantizers} < stored.keys()
    assert all(one.data_type != onnx.TensorProto.FLOAT or numpy.prod(one.dims) <= 256 for one in stored.values())
    assert model.metadata_props[0].value.startswith("lightning_compress ")
    content = (tmp_path / "model.onnx").read_bytes()
    assert not any(word in content for word in (b".py", b"torch.", b"stack_trace", str(tmp_path).encode()))


def test_a_table_of_levels_becomes_indices_and_a_look_up(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.conv, self.head = nn.Embedding(50, 32), nn.Conv1d(32, 32, 3), nn.Linear(32, 16)

        def forward(self, words):
            return self.head(self.conv(self.embedding(words).transpose(1, 2)).mean(2))

    net = Net().eval()
    levels = {
        "embedding.weight": [-1.3, -0.4, 0.0, 0.7, 2.0],
        "conv.weight": [-0.05, 0.0, 0.07],
        "head.weight": [-0.1, 0.1],
    }
    made = Deployable(net, {name: handmade.with_levels(net, name, table) for name, table in levels.items()})
    report = write_onnx(made, tmp_path / "model.onnx", tokens())
    assert report.size_bytes < 0.3 * report.float_size_bytes
    more = tokens(batch=5)
    found = in_onnxruntime(tmp_path / "model.onnx", more)[0]
    torch.testing.assert_close(torch.from_numpy(found), net(more), rtol=1e-4, atol=1e-5)


class Keywords(nn.Module):
    """Takes two tensors and a number, and gives two tensors by name; one quantizer is called twice."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(64, 64), nn.Linear(64, 64)
        self.quantizers = nn.ModuleDict({"both": Quantizer(-4.0, 4.0)})

    def forward(self, image, factor=1.0, mask=None):
        left, right = self.left(self.quantizers["both"](image)), self.right(self.quantizers["both"](image * mask))
        return {"sum": left + factor * right, "left": left}


@pytest.mark.parametrize("kind", ["keywords", "positions"])
def test_inputs_come_by_position_or_by_keyword_in_any_order(kind, tmp_path):
    made = deployable(Keywords())
    image, mask = torch.randn(2, 64), torch.randn(2, 64)
    example = {"mask": mask, "image": image, "factor": 2.0} if kind == "keywords" else (image, 2.0, mask)
    report = write_onnx(made, tmp_path / "model.onnx", example)
    assert set(report.largest_difference) == {"both", "both (call 2)"}
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    more = {"image": torch.randn(5, 64), "mask": torch.randn(5, 64)}
    found = session.run(None, {name: value.numpy() for name, value in more.items()})
    for one, expected in zip(found, made.module(factor=2.0, **more).values(), strict=True):
        assert_near(one, expected, share=0.02)


def test_a_batch_of_one_is_no_constant_unless_it_shall_be(tmp_path):
    write_onnx(deployable(handmade.Recurrent()), tmp_path / "any.onnx", torch.randn(1, 6, 16))
    assert in_onnxruntime(tmp_path / "any.onnx", torch.randn(7, 6, 16))[0].shape == (7, 5)
    declared = onnx.load(tmp_path / "any.onnx").graph
    assert all(one.type.tensor_type.shape.dim[0].dim_param for one in (declared.input[0], declared.output[0]))
    made = deployable(handmade.Perceptron())
    write_onnx(made, tmp_path / "one.onnx", torch.randn(1, 32), dynamic_batch=False)
    assert in_onnxruntime(tmp_path / "one.onnx", torch.randn(1, 32))[0].shape == (1, 4)
    with pytest.raises(Exception, match="invalid dimensions"):
        in_onnxruntime(tmp_path / "one.onnx", torch.randn(2, 32))


def saturating():
    """A layer whose weights are at the ends of 8 bits, and whose inputs are large."""
    net = handmade.Perceptron()
    weight = net.two.weight
    weight.data.copy_(torch.randn(weight.shape).sign() * 0.1)
    return deployable(net)


def test_weights_that_may_saturate_are_stored_unsigned_and_compute_the_same_everywhere(tmp_path):
    report = write_onnx(saturating(), tmp_path / "model.onnx", torch.randn(64, 32) * 3)
    assert "two.weight" in report.unsigned_layers
    assert max(report.largest_difference.values()) < 0.01
    assert "uint8 weights, as int8 may saturate without VNNI: one.weight, two.weight, three.weight" in str(report)


def test_signed_weights_that_saturate_on_this_cpu_are_warned_of_and_refused(tmp_path):
    if not may_saturate():
        pytest.skip("this CPU has VNNI, and its kernels are exact")
    warned = pytest.warns(UserWarning, match="no VNNI.*two.weight.*reduce_range")
    with warned, pytest.raises(ValueError, match="first at 'two'.*weight_type='auto'"):
        write_onnx(saturating(), tmp_path / "model.onnx", torch.randn(64, 32) * 3, weight_type="int8")
    assert list(tmp_path.iterdir()) == []


def test_weights_of_seven_bits_need_no_unsigned_storage_and_no_warning(tmp_path):
    made = deployable(handmade.Perceptron(), bits=7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = write_onnx(made, tmp_path / "model.onnx", torch.randn(64, 32) * 3, weight_type="int8")
    assert report.unsigned_layers == []
    assert max(report.largest_difference.values()) < 0.01


def test_a_layer_that_stays_in_floating_point_between_quantizers_is_not_rounded_by_the_runtime(tmp_path):
    net = handmade.LeNet()
    made = deployable(net, only=("conv1.weight", "conv2.weight", "fc2.weight"))
    before = net.fc1.weight.clone()
    report = write_onnx(made, tmp_path / "model.onnx", images(1, 28))
    assert report.integer_kernels == {"QLinearConv": 2, "QGemm": 1}
    assert report.largest_difference["fc1"] < 0.01
    stored = {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert numpy.array_equal(stored["fc1.weight"], before.detach().numpy())


def test_a_convolution_without_a_quantizer_behind_it_is_named(tmp_path):
    report = write_onnx(deployable(handmade.Residual(output_quantizer=False)), tmp_path / "model.onnx", images(3, 16))
    assert report.float_layers == ["point.weight"]
    assert "in floating point: point.weight" in str(report)


def test_a_channel_that_batch_normalization_has_switched_off_keeps_its_bias(tmp_path):
    net = handmade.LeNet()
    net.conv2.weight.data[3] *= 1e-22
    net.conv2.bias.data[3] = 0.5
    made = deployable(net)
    report = write_onnx(made, tmp_path / "model.onnx", images(1, 28))
    assert report.integer_kernels["QLinearConv"] == 2
    assert report.largest_difference["conv2"] < 0.01


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


def test_newer_operators_are_written_if_asked_for(tmp_path):
    report = write_onnx(deployable(handmade.Perceptron()), tmp_path / "model.onnx", torch.randn(8, 32), opset=23)
    assert report.opset == 23
    assert onnx.load(tmp_path / "model.onnx").opset_import[0].version == 23
