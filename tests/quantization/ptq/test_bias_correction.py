"""What quantization adds to outputs on average is taken out of biases."""

import pytest
import torch
from torch import nn

from lightning_compress import quantize

COARSE = {"weights": 3, "activations": None, "first": "same", "last": "same", "method": "min_max", "progress": False}


def mean_outputs(model, layer, batches):
    """Of each channel of a layer: the second dimension of what convolutions give, the last one of the others."""
    found = []
    handle = layer.register_forward_hook(lambda _module, _args, output: found.append(output))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    dim = 1 if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d) else -1
    rows = [(one[0] if isinstance(one, tuple) else one).movedim(dim, -1).flatten(0, -2) for one in found]
    return torch.cat(rows).mean(0)


def test_a_bias_takes_the_mean_error_by_hand():
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 1.3]])), model.bias.fill_(0.5)
    model = nn.Sequential(model).eval()
    # At 3 bits the grid has steps of 1: 1.3 becomes 1, and the output is too small by 0.3 * 2 on average.
    found = quantize(model, [torch.tensor([[0.0, 1.0], [5.0, 3.0]])], bias_correction=True, **COARSE)
    assert float(found[0].bias) == pytest.approx(0.5 + 0.6)
    assert float(model[0].bias) == 0.5


def test_every_layer_gives_its_old_mean_given_those_before():
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(100, 3))
    model = nn.Sequential(*layers).eval()
    batches = [torch.rand(size, 2, 6, 6) for size in (8, 8, 3)]  # the last one counts less
    plain = quantize(model, batches, **COARSE)
    corrected = quantize(model, batches, bias_correction=True, **COARSE)
    for place in (0, 2, 5):
        wanted = mean_outputs(model, model[place], batches)
        assert torch.allclose(mean_outputs(corrected, corrected[place], batches), wanted, atol=1e-5)
        assert not torch.allclose(mean_outputs(plain, plain[place], batches), wanted, atol=1e-3)


class Words(nn.Module):
    """A sequence through attention and through a layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, tokens):
        return self.head(self.head(self.attention(tokens, tokens, tokens)[0]).relu())


def test_attention_and_a_layer_that_is_called_twice_are_corrected():
    torch.manual_seed(0)
    model, batches = Words().eval(), [torch.rand(4, 5, 8) for _ in range(2)]
    plain = quantize(model, batches, **COARSE)
    found = quantize(model, batches, bias_correction=True, **COARSE)
    wanted = mean_outputs(model, model.attention, batches)
    assert torch.allclose(mean_outputs(found, found.attention, batches), wanted, atol=1e-5)
    # The error of the second call changes with the bias that the first one got: one step does not end it.
    errors = [
        (mean_outputs(one, one.head, batches) - mean_outputs(model, model.head, batches)) for one in (plain, found)
    ]
    assert errors[1].abs().max() < 0.5 * errors[0].abs().max()


def test_where_there_is_no_bias_the_norm_that_follows_is_shifted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    batches = [torch.rand(16, 2, 6, 6) for _ in range(2)]
    with torch.no_grad():
        for batch in batches * 10:
            model.train()(batch)
    model.eval()
    found = quantize(model, batches, bias_correction=True, **COARSE)
    plain = quantize(model, batches, **COARSE)
    assert list(found.state_dict()) == list(model.state_dict())
    changed = [name for name, value in plain.state_dict().items() if not torch.equal(value, found.state_dict()[name])]
    assert changed == ["1.running_mean", "4.bias"]
    errors = [mean_outputs(one, one[0], batches) - mean_outputs(model, model[0], batches) for one in (found, plain)]
    assert torch.allclose(found[1].running_mean, model[1].running_mean + errors[0], atol=1e-5)
    assert errors[1].abs().max() > 1e-3
    wanted = model[1](model[0](torch.cat(batches))).mean((0, 2, 3))
    assert torch.allclose(found[1](found[0](torch.cat(batches))).mean((0, 2, 3)), wanted, atol=1e-4)


def test_a_layer_with_neither_stays_and_is_named(caplog):
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 2))
    found = quantize(model, [torch.rand(4, 3)], bias_correction=True, **COARSE)
    assert "bias_correction leaves '0' as it is: it has neither a bias nor a BatchNorm" in caplog.text
    assert torch.equal(found[0].weight, quantize(model, [torch.rand(4, 3)], **COARSE)[0].weight)
    assert not torch.equal(found[2].bias, model[2].bias)


def test_activations_on_their_grids_count_too():
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), [torch.randn(64, 4)]
    arguments = {**COARSE, "weights": None, "activations": 2}
    found = quantize(model, batches, bias_correction=True, **arguments)
    plain = quantize(model, batches, **arguments)
    with torch.no_grad():
        errors = [(one(batches[0]) - model(batches[0])).mean(0).abs().max() for one in (plain, found)]
    assert errors[0] > 1e-2
    assert errors[1] < 1e-5


def test_a_grid_on_what_the_layer_gives_is_not_its_own_error():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Conv2d(4, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    given, arguments = [torch.randn(16, 1, 6, 6)], {**COARSE, "weights": 4, "activations": 8, "reduce_range": True}
    found = quantize(model.eval(), given, bias_correction=True, **arguments)
    raw = []
    found[0].register_forward_hook(lambda _module, _args, output: raw.append(output), prepend=True)
    with torch.no_grad():
        found(given[0])
        wanted = model[0](given[0]).mean((0, 2, 3))
    # A bias is a whole number of steps of the product of 8 bits by 4, of which the kernel has an eighth.
    reach = given[0].max().clamp(min=0) - given[0].min().clamp(max=0)
    step = reach / 255 * found[0].weight.abs().flatten(1).amax(1) / 7 / 8
    assert ((raw[0].mean((0, 2, 3)) - wanted).abs() < 0.5 * step + 1e-6).all()
