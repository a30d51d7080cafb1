"""Channels of neighbours come to one range, and the network computes what it did."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_compress import quantize
from lightning_compress.nn.dataflow import trace_dataflow
from lightning_compress.quantization.layers import quantizable_layers
from lightning_compress.quantization.placement.sites import place_fake_quantizers
from lightning_compress.quantization.ptq.cross_layer_equalization import channel_ranges, equalize, find_layer_pairs


def pairs(model, *inputs):
    model.eval()
    modules = dict(model.named_modules(remove_duplicate=False))
    _, layers = quantizable_layers(model)
    names = [layer.name for layer in layers]
    with torch.no_grad(), trace_dataflow(model) as flow:
        output = model(*inputs)
        [one.clone() for one in (output if isinstance(output, tuple) else (output,))]
    norms = place_fake_quantizers(flow, names, names, modules).norms
    return find_layer_pairs(flow, model, layers, norms, modules)


def names(model, *inputs):
    of = {module: name for name, module in model.named_modules()}
    return [(of[pair.first], of[pair.second]) for pair in pairs(model, *inputs)]


def uneven(model, ratio=100.0):
    """Let the ranges of channels differ by this factor, and BatchNorm know its channels."""
    torch.manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(), module.running_var.uniform_(0.5, 2.0)
                module.weight.normal_(), module.bias.normal_()
            elif isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                rows = torch.logspace(0, -1, len(module.weight), ratio)
                module.weight.mul_(rows.reshape(-1, *[1] * (module.weight.ndim - 1)))
    return model


def test_two_layers_share_the_geometric_mean_of_their_ranges():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[8.0, 1.0], [0.0, 0.5]]))
        model[0].bias.copy_(torch.tensor([4.0, 1.0]))
        model[2].weight.copy_(torch.tensor([[2.0, 8.0]]))
    equalize(pairs(model, torch.ones(1, 2)))
    # The factors are sqrt(8 / 2) = 2 and sqrt(0.5 / 8) = 1 / 4.
    assert model[0].weight.tolist() == [[4.0, 0.5], [0.0, 2.0]]
    assert model[0].bias.tolist() == [2.0, 4.0]
    assert model[2].weight.tolist() == [[4.0, 2.0]]


def test_batch_norm_takes_the_factor_and_its_statistics_stay():
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1, eps=0.0), nn.ReLU(), nn.Conv2d(1, 1, 1))
    with torch.no_grad():
        model[0].weight.fill_(3.0), model[1].weight.fill_(-4.0), model[1].bias.fill_(1.0)
        model[1].running_mean.fill_(0.5), model[1].running_var.fill_(9.0), model[3].weight.fill_(1.0)
    equalize(pairs(model, torch.ones(1, 1, 2, 2)))
    # With BatchNorm folded in the first weight is 3 * -4 / 3, so that the factor is sqrt(4 / 1).
    assert [one.item() for one in (model[1].weight, model[1].bias, model[3].weight)] == [-2.0, 0.5, 2.0]
    assert [float(one) for one in (model[0].weight, model[1].running_mean, model[1].running_var)] == [3.0, 0.5, 9.0]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, images):
        around = functional.relu(self.norm(self.stem(images)), inplace=True)
        inner = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(around)))))
        return functional.relu(inner + around)


NETWORKS = {
    "three linear layers": (
        lambda: nn.Sequential(nn.Linear(3, 8), nn.LeakyReLU(), nn.Dropout(), nn.Linear(8, 8), nn.Linear(8, 4)),
        (5, 3),
        [("0", "3"), ("3", "4")],
    ),
    "pooling, groups": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, groups=8),
            nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(8, 6, 1, groups=2), nn.ReLU(), nn.Conv2d(6, 2, 1),
        ),
        (2, 3, 12, 12),
        [("0", "3"), ("3", "7"), ("7", "9")],
    ),
    "transposed, groups": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.ReLU(),
            nn.ConvTranspose2d(6, 4, 2), nn.ReLU(), nn.Conv2d(4, 2, 1),
        ),
        (2, 3, 4, 4),
        [("0", "2"), ("2", "4"), ("4", "6")],
    ),
    "residual": (Residual, (2, 3, 6, 6), [("conv1", "conv2")]),
}  # fmt: skip


@pytest.mark.parametrize("kind", NETWORKS)
def test_ranges_become_equal_and_outputs_stay(kind):
    make, shape, expected = NETWORKS[kind]
    torch.manual_seed(0)
    model, images = uneven(make()).eval(), torch.randn(shape)
    assert names(model, images) == expected
    before, keys = model(images).detach(), list(model.state_dict())
    found = pairs(model, images)
    apart = max(float((first / second).log().abs().max()) for first, second in map(channel_ranges, found))
    equalize(found)
    for first, second in map(channel_ranges, found):
        assert torch.allclose(first, second, rtol=2e-3)
    assert apart > 1
    assert float((model(images) - before).detach().abs().max()) < 2e-5 * float(before.abs().max())
    assert list(model.state_dict()) == keys


class Leaving(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, values):
        features = self.first(values).relu()
        return self.second(features), features


class Twice(Leaving):
    def forward(self, values):
        return self.second(self.second(self.first(values).relu()).relu())


class Forked(Leaving):
    def forward(self, values):
        return self.second(self.first(values)) + self.first(2 * values).square()


class Reading(Leaving):
    def forward(self, values):
        return self.second(self.first(values).relu()) + self.second.weight.sum()


class Standardized(nn.Linear):
    def forward(self, values):
        return functional.linear(values, self.weight / self.weight.std(), self.bias)


class Steps(nn.Module):
    """BatchNorm over the steps of a sequence, not over features."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(1, 4), nn.BatchNorm1d(3), nn.Linear(4, 2)

    def forward(self, values):
        return self.second(self.norm(self.first(values[..., None])))


def tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    return model


APART = {
    "the value leaves too": Leaving(),
    "the second called twice": Twice(),
    "the first called twice": Forked(),
    "one weight": tied(),
    "features along pixels": nn.Sequential(nn.Conv1d(2, 3, 1), nn.Linear(3, 3)),
    "steps normalized": Steps(),
    "GELU": nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 3)),
    "ReLU6": nn.Sequential(nn.Linear(3, 3), nn.ReLU6(), nn.Linear(3, 3)),
    "a normalized weight": nn.Sequential(Standardized(3, 3), nn.ReLU(), Standardized(3, 3)),
    "pooled features": nn.Sequential(nn.Linear(3, 3), nn.MaxPool1d(3, 1, 1), nn.Linear(3, 3)),
}


@pytest.mark.parametrize("kind", APART)
def test_layers_between_which_no_factor_can_wander_are_no_pair(kind):
    assert names(APART[kind], torch.randn(2, 3)) == []


def test_pruned_and_dead_channels_stay_what_they_are():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[0], model[2].weight[:, 1] = 0.0, 0.0
    equalize(pairs(model, torch.randn(2, 3)))
    assert not model[0].weight[0].any()
    assert not model[2].weight[:, 1].any()
    assert all(one.isfinite().all() for one in model.parameters())


def test_one_scale_for_all_does_better_where_ranges_differ_a_hundredfold():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        for first, second in ((model[0], model[2]), (model[2], model[4])):
            factor = 10 ** (2 * torch.rand(16) - 1)  # the network computes what it did
            first.weight.mul_(factor[:, None]), first.bias.mul_(factor), second.weight.div_(factor)
    inputs = torch.randn(64, 8)
    errors = []
    for wanted in (False, True):
        found = quantize(model, [inputs], granularity="tensor", equalize=wanted, progress=False)
        errors.append(float((found(inputs) - model(inputs)).square().mean()))
    assert errors[1] < 0.1 * errors[0]


def test_what_leaves_the_network_too_stays():
    model, inputs = Leaving().eval(), torch.randn(4, 3)
    with torch.no_grad():
        model.first.weight.mul_(100)
    found = quantize(model, [inputs], equalize=True, weights=16, activations=None, progress=False)
    assert torch.allclose(found(inputs)[1], model(inputs)[1], rtol=1e-3)


def test_short_floats_may_lose_their_last_bits():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).bfloat16()
    found = quantize(model, [torch.randn(64, 8).bfloat16()], equalize=True, progress=False)
    assert not torch.equal(found[0].weight, model[0].weight)


def test_a_forward_that_reads_weights_is_refused_and_the_model_stays():
    model = Reading()
    with torch.no_grad():
        model.first.weight.mul_(100)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="equalize=True would change what the model computes"):
        quantize(model, [torch.randn(4, 3)], equalize=True, progress=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_nothing_to_equalize_is_told(caplog):
    quantize(nn.Sequential(nn.Linear(3, 2)), [torch.randn(4, 3)], equalize=True, progress=False)
    assert "no two quantized layers are connected" in caplog.text
