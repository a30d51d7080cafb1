"""What is deployed computes what was quantized, with BatchNorm folded into the integers' steps."""

import pytest
import torch
from torch import nn

from lightning_compress import QuantizationAwareTraining, export, quantize
from lightning_compress.quantization.lookup import quantized_of
from lightning_compress.quantization.lowering.lower import lower, quantized_tensors
from lightning_compress.quantization.lowering.modules import FixedFakeQuantize


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(12, 5),
    )  # fmt: skip
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.5, -1.5, 0.0, 2.0]))  # one channel turned, one switched off
        model[1].bias.copy_(torch.tensor([0.1, 0.2, 0.3, -0.4]))
        model[1].running_mean.copy_(torch.tensor([0.2, -0.1, 0.4, 0.0]))
        model[1].running_var.copy_(torch.tensor([0.5, 2.0, 1.0, 0.25]))
    return model.eval()


def images(count=8):
    return torch.rand(count, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def test_the_folded_weight_is_the_quantized_one_times_the_factor_of_the_norm():
    model = network()
    made = lower(quantize(model, [images()], reduce_range=False, progress=False))
    factor = model[1].weight / (model[1].running_var + model[1].eps).sqrt()
    weight = model[0].weight.detach()
    step = weight.abs().amax((1, 2, 3), keepdim=True) / 127
    codes = (weight / step).round()
    assert torch.equal(made.weights["0.weight"].codes, (codes * factor.sign().reshape(-1, 1, 1, 1)).int())
    torch.testing.assert_close(made.module[0].weight, codes * step * factor.reshape(-1, 1, 1, 1))
    torch.testing.assert_close(made.module[0].bias, model[1].bias - model[1].running_mean * factor)
    assert isinstance(made.module[1], nn.Identity)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weights": 4, "activations": 4, "first": "same", "last": "same"},
        {"weights": "ternary", "granularity": "tensor"},
        {"weights": "ternary", "method": "ttq", "first": "same", "last": "same"},
        {"weights": "binary", "activations": 8, "first": "same", "last": "same"},
        {"weights": "fp8", "activations": "bf16"},
        {"weights": 3, "activations": None, "granularity": "group 3", "ignore": ["0"]},
        {"weights": 8, "activations": 5, "method": "min_max", "symmetric": False},
    ],
)
def test_what_is_deployed_computes_what_was_quantized(settings):
    quantized = quantize(network(), [images()], progress=False, **settings)
    with torch.no_grad():
        wanted = quantized(images())
        found = lower(quantized).module(images())
    # A number on the edge between two steps may fall to either side when sums are ordered otherwise.
    assert ((found - wanted).abs() <= 1e-5 * wanted.abs().max()).float().mean() > 0.8
    assert (found - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_the_quantized_model_and_its_hooks_stay_as_they_are():
    quantized = quantize(network(), [images()], progress=False)
    before = quantized(images())
    state = {name: value.clone() for name, value in quantized.state_dict().items()}
    lower(quantized)
    assert torch.equal(quantized(images()), before)
    assert all(torch.equal(value, state[name]) for name, value in quantized.state_dict().items())


def test_the_state_dict_on_grids_is_what_the_forward_uses():
    quantized = quantize(network(), [images()], progress=False, weights=4)
    found, known = quantized_tensors(quantized), quantized_of(quantized)
    assert list(found.state) == list(quantized.state_dict())
    for name, held in known.quantized_weights().items():
        assert torch.equal(found.state[name], known.weights[name](held.parameter))
        assert torch.equal(found.weights[name].values(), found.state[name])


def test_fewer_bits_are_clipped_before_the_grid_of_8():
    step = FixedFakeQuantize(torch.tensor(0.5), 2, lowest=0, highest=7)
    numbers = torch.tensor([-9.0, -1.0, -0.2, 0.3, 2.4, 9.0])
    assert step(numbers).tolist() == [-1.0, -1.0, 0.0, 0.5, 2.5, 2.5]


def test_a_model_that_was_never_quantized_is_refused():
    with pytest.raises(ValueError, match="Sequential was never quantized"):
        lower(network())


def test_activations_of_16_bits_are_refused_by_place():
    quantized = quantize(network(), [images()], progress=False, activations=16)
    with pytest.raises(ValueError, match=r"has 16 bits, but what is written to .* has activations of at most 8"):
        lower(quantized)


def test_a_training_that_did_not_reach_its_quantized_phase_is_refused(make_module, make_trainer, loader):
    module = make_module()
    stopping = make_trainer([QuantizationAwareTraining(begin=4)], max_steps=24)
    stop = module.training_step

    def stop_after_the_watched_step(batch, batch_idx):
        stopping.should_stop = stopping.global_step + 1 >= 4
        return stop(batch, batch_idx)

    module.training_step = stop_after_the_watched_step
    stopping.fit(module, loader)
    with pytest.raises(ValueError, match="quantized phase of this Classifier was not reached"):
        lower(module)


class NormAndAct(nn.BatchNorm2d):
    """A norm with a forward of its own, as several packages have it."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, values):
        return self.act(
            nn.functional.batch_norm(
                values, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
            )
        )


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_norm_with_more_in_its_forward_is_folded_and_the_rest_of_it_stays(suffix, tmp_path):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    pairs = [nn.Sequential(nn.Conv2d(2, 32, 3), norm) for norm in (NormAndAct(32), nn.BatchNorm2d(32))]
    pairs[1].append(nn.SiLU())
    for norm in (pairs[0][1], pairs[1][1]):
        norm.running_mean.fill_(0.2), norm.running_var.fill_(0.4), nn.init.constant_(norm.weight, 1.5)
    pairs[1][0].load_state_dict(pairs[0][0].state_dict())
    head = nn.Conv2d(32, 32, 1)
    given = torch.randn(4, 2, 8, 8)
    found = [quantize(nn.Sequential(pair, head).eval(), [given], progress=False) for pair in pairs]
    assert torch.equal(found[0](given), found[1](given))
    made = [lower(one) for one in found]
    assert [dict(one.module.named_modules())["0.1"].state_dict().get("weight") for one in made] == [None, None]
    assert torch.equal(made[0].module(given), made[1].module(given))
    reports = [export(one, tmp_path / f"{place}{suffix}", given) for place, one in enumerate(found)]
    assert getattr(reports[0], "integer_kernels", None) == getattr(reports[1], "integer_kernels", None)
    assert reports[0].size_bytes <= 1.05 * reports[1].size_bytes
