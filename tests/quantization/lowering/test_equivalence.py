"""What is deployed is what the model computed with its quantizers, whatever these do; else it is refused by place."""

import copy
import warnings

import numpy
import pytest
import torch
from torch import nn

from lightning_compress import QuantizationAwareTraining, export, quantize
from lightning_compress.quantization.lookup import quantized_of
from lightning_compress.quantization.lowering.equivalence import check_equivalence
from lightning_compress.quantization.lowering.lower import lower
from lightning_compress.quantization.lowering.modules import FixedFakeQuantize

SETTINGS = {
    "W8A8": {},
    "W4A4": {"weights": 4, "activations": 4},
    "W3A2": {"weights": 3, "activations": 2, "first": "same", "last": "same"},
    "ternary": {"weights": "ternary", "activations": "ternary"},
    "binary": {"weights": "binary", "activations": "binary"},
    "binary everywhere": {"weights": "binary", "activations": "binary", "first": "same", "last": "same"},
    "bnn": {"weights": "binary", "activations": "binary", "method": "bnn"},
    "pact": {"activations": 4, "method": {"activations": "pact"}},
    "dorefa": {"weights": 4, "activations": 3, "method": "dorefa"},
    "wage": {"weights": 4, "activations": 4, "method": "wage", "first": "same", "last": "same"},
    "stochastic": {"weights": 4, "activations": 4, "method": "stochastic"},
    "ttq": {"weights": "ternary", "method": "ttq"},
}


def network(signed):
    """With a ReLU before each layer, or with BatchNorm alone, behind which both signs come."""
    torch.manual_seed(0)
    between = (lambda: nn.Identity()) if signed else nn.ReLU
    model = nn.Sequential(
        nn.Conv2d(2, 24, 3, padding=1), nn.BatchNorm2d(24), between(), nn.Conv2d(24, 24, 3, padding=1, bias=False),
        nn.BatchNorm2d(24), between(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(384, 48), between(), nn.Linear(48, 10),
    )  # fmt: skip
    for place in (0, 3, 8, 10):
        model[place].weight.data *= 3
    for norm in (model[1], model[4]):
        norm.running_mean.normal_(0, 0.2), norm.running_var.uniform_(0.2, 0.6)
        nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.normal_(norm.bias, 0, 0.3)
    return model.eval()


def images(count, seed=1):
    return torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("signed", [False, True], ids=["relu", "signed"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_file_computes_what_the_quantized_model_computes(settings, signed, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = quantize(network(signed), [images(16)], progress=False, **settings)
    assert export(model, tmp_path / "model.onnx", images(4)).integer_kernels["QLinearConv"] >= 1
    with torch.no_grad():
        wanted = model(images(100, seed=2)).numpy()
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: images(100, seed=2).numpy()})
    # Sums in another order take a number over an edge here and there, of some hundreds in each image.
    assert numpy.abs(found - wanted).mean() < 0.2 * numpy.abs(wanted - wanted.mean(0)).mean()


def shared_activation():
    act = nn.LeakyReLU()
    return nn.Sequential(nn.Conv2d(2, 24, 3), act, nn.Conv2d(24, 24, 3), act, nn.Flatten(), nn.Linear(384, 10))


class Names(nn.Module):
    """Two names that are one if a dot is no dot, and one that we would like to have."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(128, 64)
        self.block, self.block_0 = nn.ModuleList([nn.Linear(64, 64)]), nn.Linear(64, 64)
        self.quantizers = nn.ModuleList([nn.Linear(64, 10)])

    def forward(self, images):
        hidden = self.stem(images.flatten(1)).relu()
        hidden = self.block_0(10 * self.block[0](hidden).relu()).tanh()
        return self.quantizers[0](hidden)


def normed_weights():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would like parametrizations
        normed = nn.utils.weight_norm(nn.Conv2d(2, 24, 3))
    return nn.Sequential(normed, nn.ReLU(), nn.Conv2d(24, 24, 3), nn.ReLU(), nn.Flatten(), nn.Linear(384, 10))


def mobile():
    """Depthwise and pointwise convolutions with ReLU6."""
    return nn.Sequential(
        nn.Conv2d(2, 24, 3), nn.BatchNorm2d(24), nn.ReLU6(), nn.Conv2d(24, 24, 3, groups=24, bias=False),
        nn.BatchNorm2d(24), nn.ReLU6(), nn.Conv2d(24, 48, 1), nn.Flatten(), nn.Linear(768, 10),
    )  # fmt: skip


def compiled():
    inner = nn.Sequential(nn.Conv2d(2, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3), nn.ReLU())
    return nn.Sequential(torch.compile(inner, backend="eager"), nn.Flatten(), nn.Linear(384, 10))


class Named(nn.Module):
    """Its attention is called by names, in another order than it has them."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(64, 32), nn.Linear(32, 10)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, images):
        hidden = self.stem(images.flatten(2))
        near, far = hidden.tanh(), 5 * hidden[:, :1].relu()
        return self.head(self.attention(value=near, key=hidden, query=far, need_weights=False)[0].flatten(1))


ODD = {one.__name__: one for one in (shared_activation, Names, normed_weights, mobile, compiled, Named)}


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_modules_that_are_written_in_odd_ways_are_computed_as_they_are(make, kind, tmp_path):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = quantize(make().eval(), [images(16)], progress=False)
    export(model, path := tmp_path / f"model.{kind}", images(4))
    with torch.no_grad():
        wanted = model(images(100, seed=2))
        found = torch.export.load(path).module()(images(100, seed=2)) if kind == "pt2" else computed(path)
    assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()


def computed(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: images(100, seed=2).numpy()})
    return torch.from_numpy(found)


def test_signs_are_kept_by_steps_of_next_to_nothing():
    numbers = torch.tensor([-3.0, -1e-6, 0.0, 1e-6, 0.4, 7.0])
    assert FixedFakeQuantize(torch.tensor(1.0), 1, 0, 2, signs=True)(numbers).tolist() == [
        -1.0,
        -1.0,
        0.0,
        1.0,
        1.0,
        1.0,
    ]
    assert FixedFakeQuantize(torch.tensor(0.5), 0, 0, 1, signs=True)(numbers.relu()).tolist() == [
        0.0,
        0.0,
        0.0,
        0.5,
        0.5,
        0.5,
    ]


def of_four_bits():
    return quantize(network(signed=False), [images(16)], progress=False, weights=4, activations=4)


def test_a_quantizer_that_does_something_else_is_refused_by_its_place():
    model = of_four_bits()
    made = lower(model)
    check_equivalence(model, made, images(4))
    made.quantizers["7_output"].highest -= 1
    with pytest.raises(
        ValueError, match=r"something else than the quantized model, first at '7 output'.*ignore=\['8'\]"
    ):
        check_equivalence(model, made, images(4))


def test_a_layer_that_does_something_else_is_refused_by_the_place_behind_it():
    model = of_four_bits()
    made = lower(model)
    made.module[3].bias.data[7] += 0.05
    with pytest.raises(ValueError, match="first at '7 output'"):
        check_equivalence(model, made, images(4))


def test_the_last_layer_is_compared_by_the_output():
    model = of_four_bits()
    made = lower(model)
    made.module[10].bias.data[3] += 0.05
    with pytest.raises(ValueError, match="behind its last quantizer"):
        check_equivalence(model, made, images(4))


def test_an_input_of_another_shape_is_refused_in_words():
    with pytest.raises(ValueError, match=r"Sequential cannot be called with this example_input, tensor\(4, 3, 8, 8\)"):
        export(of_four_bits(), "never.pt2", torch.zeros(4, 3, 8, 8))


def test_a_trained_module_is_compared_and_left_as_it_was(make_module, make_trainer, loader):
    module = make_module()
    make_trainer([QuantizationAwareTraining(begin=2, weights=4)], max_epochs=2).fit(module, loader)
    numbers, made = torch.randn(5, 8, generator=torch.Generator().manual_seed(3)), lower(module)
    before = copy.deepcopy(module.state_dict())
    check_equivalence(module, made, numbers)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not any("forward" in vars(one) for one in quantized_of(module).quantizers())


def test_code_that_writes_into_its_activations_is_compared_with_what_it_computed(tmp_path):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.inner = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.act, self.head = nn.Hardswish(inplace=True), nn.Linear(8, 4)

        def forward(self, values):
            values = self.stem(values)
            inner = self.act(self.inner(values))
            inner += values
            return self.head(nn.functional.relu_(inner).mean((2, 3)))

    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = quantize(InPlace().eval(), [images(16)], progress=False)
    with torch.no_grad():
        wanted = model(images(4))
    assert export(model, tmp_path / "model.onnx", images(4)).integer_kernels["QLinearConv"] == 2
    from lightning_compress.export.onnx.qdq.runtime import make_session, run_session

    (found,) = run_session(make_session(tmp_path / "model.onnx"), images(4)).values()
    assert numpy.abs(found - wanted.numpy()).max() <= 0.05 * wanted.abs().max()
