"""In evaluation a layer adds the bias that its integer kernel adds: with it the sum is a whole number of steps."""

import pytest
import torch
from torch import nn

from lightning_compress import quantize
from lightning_compress.quantization.integer_bias import finer_scale

NARROW = {"reduce_range": False, "first": "same", "last": "same", "method": "min_max", "progress": False}


def raw(model, layer, values):
    """What a layer gives, before any grid."""
    found = []
    handle = layer.register_forward_hook(lambda _module, _args, output: found.append(output.detach()), prepend=True)
    model(values)
    handle.remove()
    return found[0]


def linear(bias):
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 1.0]])), layer.bias.fill_(bias)
    return layer


@pytest.mark.parametrize("highest", [*range(1, 20), 31, 32, 33, 63, 64, 127, 255])
def test_numbers_times_a_power_of_two_stay_within_7_bits(highest):
    powers = [power for power in (1, 2, 4, 8, 16, 32, 64) if highest * power <= 64]
    assert finer_scale(highest) == max(powers, default=1)


@pytest.mark.parametrize(
    ("weights", "step"),
    # 255 steps of 0.1 in the input; 127, 7, 3 and 1 steps up to 3 in the weight, of which kernels have 1/1 to 1/64.
    [(8, 0.1 * 3 / 127), (4, 0.1 * 3 / 7 / 8), (3, 0.1 / 16), (2, 0.1 * 3 / 64)],
)
def test_a_bias_is_the_nearest_number_of_steps_by_hand(weights, step):
    model, values = nn.Sequential(linear(0.1327)), torch.tensor([[0.0, 25.5], [7.0, 0.0]])
    found = quantize(model.eval(), [values], weights=weights, **NARROW)
    wanted = round(0.1327 / step) * step
    assert abs(wanted - 0.1327) > step / 20
    assert float(found(torch.zeros(1, 2)).detach()) == pytest.approx(wanted, rel=1e-6)
    assert float(found[0].bias.detach()) == pytest.approx(0.1327)


def test_in_training_and_where_a_layer_takes_floats_biases_stay_as_they_are():
    model, values = nn.Sequential(linear(0.1327)), torch.tensor([[0.0, 25.5]])
    bias = float(model[0].bias)
    found = quantize(model.eval(), [values], **NARROW)
    assert float(found.train()(torch.zeros(1, 2))) == bias != float(found.eval()(torch.zeros(1, 2)))
    for settings in ({"activations": None}, {"weights": "fp8"}, {"weights": 12}, {"activations": "bf16"}):
        assert float(quantize(model, [values], **{**NARROW, "method": None}, **settings)(torch.zeros(1, 2))) == bias


@pytest.mark.parametrize("own", [True, False])
def test_with_the_batchnorm_behind_it_a_layer_adds_a_whole_number_of_steps(own):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3, bias=own), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 2))
    norm = model[1]
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -1.5, 2.0, 1.0, 1e-20, 0.0])), norm.bias.normal_()
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2.0)
    given = torch.rand(4, 2, 6, 6)
    found = quantize(model.eval(), [given], **NARROW)
    alone = raw(found, found[0], torch.zeros(1, 2, 6, 6))[0, :, 0, 0].double()
    step = (given.max() / 255).double() * (model[0].weight.detach().abs().flatten(1).amax(1) / 127)
    added = alone - norm.running_mean + norm.bias / norm.weight * (norm.running_var + norm.eps).sqrt()
    places = (added / step)[:4]
    assert torch.allclose(places, places.round(), atol=1e-2)
    before = torch.zeros(6) if model[0].bias is None else model[0].bias.detach()
    assert ((alone - before).abs() <= step / 2 + 1e-6).all()
    # Of a channel that BatchNorm has closed no number of steps is known, nor of one where int32 has no room for it.
    assert torch.equal(alone[4:].float(), before[4:])


def test_the_gradient_is_that_of_the_layers_own_bias():
    model, values = nn.Sequential(linear(0.1327)), torch.tensor([[0.0, 25.5]])
    found = quantize(model.eval(), [values], **NARROW)
    found(values).sum().backward()
    assert found[0].bias.grad.tolist() == [1.0]
    assert "bias" not in vars(found[0])
