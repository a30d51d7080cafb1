import warnings

import numpy
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

from lightning_compress.export.onnx.qdq.cpu import may_saturate
from lightning_compress.export.onnx.write import write_onnx
from lightning_compress.quantization.lowering.deployed_model import DeployedModel
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
    "residual": (
        handmade.Residual,
        {},
        lambda: images(3, 16),
        {"QLinearConv": 3, "QLinearAdd": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1},
        0.95,
    ),
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
    made = DeployedModel(net, {name: handmade.with_levels(net, name, table) for name, table in levels.items()})
    report = write_onnx(made, tmp_path / "model.onnx", tokens())
    assert report.size_bytes < 0.3 * report.float_size_bytes
    more = tokens(batch=5)
    found = in_onnxruntime(tmp_path / "model.onnx", more)[0]
    torch.testing.assert_close(torch.from_numpy(found), net(more), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["keywords", "positions"])
def test_inputs_come_by_position_or_by_keyword_in_any_order(kind, tmp_path):
    made = deployable(handmade.Keywords())
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


class Between(nn.Module):
    """Two layers, and something with quantizers between them."""

    def __init__(self, *steps):
        super().__init__()
        self.one, self.two = nn.Linear(32, 64), nn.Linear(64, 8)
        self.quantizers = nn.Sequential(Quantizer(-3.0, 3.0), *steps)

    def forward(self, values):
        first, *steps = self.quantizers
        values = self.one(first(values))
        for step in steps:
            values = step(values)
        return self.two(values)


@pytest.mark.parametrize(
    "steps",
    [
        # The first layer ends on a fine grid, the second begins on a coarse one.
        lambda: (Quantizer(-1.0, 1.0), Quantizer(-20.0, 20.0)),
        lambda: (nn.ReLU(), nn.LayerNorm(64), Quantizer(-3.0, 3.0)),
    ],
)
def test_two_grids_in_a_row_stay_two_and_a_norm_behind_a_relu_costs_no_kernel(steps, tmp_path):
    made = deployable(Between(*steps()), only=("one.weight", "two.weight"))
    report = write_onnx(made, tmp_path / "model.onnx", torch.randn(8, 32))
    assert report.integer_kernels == {"QGemm": 2}
    more = torch.randn(64, 32)
    assert_near(in_onnxruntime(tmp_path / "model.onnx", more)[0], made.module(more), share=0.02)


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


def test_newer_operators_are_written_if_asked_for(tmp_path):
    report = write_onnx(deployable(handmade.Perceptron()), tmp_path / "model.onnx", torch.randn(8, 32), opset=23)
    assert report.opset == 23
    assert onnx.load(tmp_path / "model.onnx").opset_import[0].version == 23


class Positions(nn.Module):
    """Words and the first nine of sixteen places, looked up and added."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(50, 32), nn.Embedding(16, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, words):
        places = self.places(torch.arange(words.shape[1], device=words.device))
        return self.head((self.words(words) + places).mean(1))


def test_of_a_table_of_positions_the_file_holds_the_rows_that_are_used_as_integers(tmp_path):
    made = deployable(Positions())
    write_onnx(made, tmp_path / "model.onnx", tokens())
    stored = {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert numpy.array_equal(stored["places.weight.codes"], made.weights["places.weight"].codes[:9].numpy())
    more = tokens(batch=5)
    found = in_onnxruntime(tmp_path / "model.onnx", more)[0]
    torch.testing.assert_close(torch.from_numpy(found), made.module(more), rtol=1e-4, atol=1e-5)


class Batch(nn.Module):
    """Takes a dict as its one argument, as many a training step does."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(32, 64), nn.Linear(32, 64)

    def forward(self, batch):
        return self.left(batch["x"]) - 2 * self.right(batch["a"])


def test_a_dict_may_be_an_argument_by_position(tmp_path):
    made = deployable(Batch())
    batch = {"x": torch.randn(4, 32), "a": torch.randn(4, 32)}
    write_onnx(made, tmp_path / "model.onnx", (batch,))
    more = {"x": torch.randn(7, 32), "a": torch.randn(7, 32)}
    found = in_onnxruntime(tmp_path / "model.onnx", more["x"], more["a"])[0]
    torch.testing.assert_close(torch.from_numpy(found), made.module(more), rtol=1e-4, atol=1e-5)
