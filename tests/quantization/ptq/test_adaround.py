"""Layers whose weights are rounded for the sake of their outputs: on their grids, and better than to the nearest."""

from itertools import product

import pytest
import torch
from torch import nn

from lightning_compress import quantize as quantize_aloud
from lightning_compress.quantization.lookup import quantized_of
from lightning_compress.quantization.ptq import adaround


def quantize(model, batches, **arguments):
    plain = {"activations": None, "first": "same", "last": "same", "progress": False}
    return quantize_aloud(model, batches, **{**plain, **arguments})


def images(count, seed):
    """Ten blurred patterns under noise, and which they are."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(10, 1, 10, 10, generator=torch.Generator().manual_seed(7))
    labels = torch.randint(0, 10, (count,), generator=generator)
    blurred = 2 * nn.functional.avg_pool2d(patterns, 3, 1, 1)
    return blurred[labels] + 0.6 * torch.randn(count, 1, 10, 10, generator=generator), labels


@pytest.fixture(scope="module")
def trained():
    """A small network that tells the patterns apart."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(72, 24), nn.ReLU(), nn.Linear(24, 10))
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        inputs, labels = images(1024, seed=1)
        for start in list(range(0, 1024, 64)) * 3:
            chosen = slice(start, start + 64)
            nn.functional.cross_entropy(model(inputs[chosen]), labels[chosen]).backward()
            optimizer.step(), optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("bits", [3, 4])
def test_outputs_for_new_images_suffer_far_less_than_at_the_nearest(trained, bits):
    given, new = [images(64, seed)[0] for seed in (2, 3, 4)], images(512, seed=5)[0]
    errors = []
    for steps in (0, 150):
        found = quantize(trained, given, weights=bits, adaround=steps)
        with torch.no_grad():
            errors.append(float((found(new) - trained(new)).square().mean()))
    assert errors[1] < 0.4 * errors[0]


def test_weights_lie_on_their_grids_at_one_of_two_neighbours_and_zeros_stay(trained):
    model = nn.Sequential(*trained)
    pruned = quantize(model, None)  # a copy to prune
    with torch.no_grad():
        pruned[3].weight.mul_(torch.arange(pruned[3].weight.numel()).reshape(pruned[3].weight.shape) % 3 != 0)
    found = quantize(pruned, [images(64, 2)[0]], weights=3, adaround=60)
    up = 0
    for name, held in quantized_of(found).quantized_weights().items():
        quantizer, before = quantized_of(found).weights[name], pruned.get_parameter(name)
        assert torch.equal(quantizer(held.parameter), held.parameter)
        steps = (held.parameter - before) / quantizer.channel_groups.scale(quantizer.scale)
        inside = before.abs() <= 3 * quantizer.channel_groups.scale(quantizer.scale)
        assert (steps[inside].abs() < 1).all()
        assert not held.parameter[before == 0].any()
        up += int((steps[inside].abs() > 0.5).sum())
    assert (pruned[3].weight == 0).sum() >= 144
    assert up > 20  # which the nearest would never do


def test_grids_are_those_of_the_weights_as_they_were(trained):
    given = [images(64, 2)[0]]
    plain, rounded = (quantized_of(quantize(trained, given, weights=3, adaround=steps)) for steps in (0, 5))
    for name, quantizer in plain.weights.items():
        assert torch.equal(quantizer.scale, rounded.weights[name].scale)


@pytest.mark.parametrize("seed", [9, 11])
def test_a_single_layer_comes_to_the_best_of_all_roundings(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 1)).eval()
    inputs = torch.randn(64, 1) + 0.3 * torch.randn(64, 6)
    found = quantize(model, [inputs], weights=3, adaround=400, method="min_max")
    scale = model[0].weight.detach().abs().max() / 3
    below = (model[0].weight.detach() / scale).floor().clamp(-3, 3)
    tried = [(below + torch.tensor([ups])).clamp(-3, 3) * scale for ups in product((0.0, 1.0), repeat=6)]
    with torch.no_grad():
        errors = [float(((weight - model[0].weight) @ inputs.T).square().mean()) for weight in tried]
        reached = float((found(inputs) - model(inputs)).square().mean())
        nearest = float((quantize(model, None, weights=3, method="min_max")(inputs) - model(inputs)).square().mean())
    assert nearest > 1.5 * min(errors)
    assert reached == pytest.approx(min(errors), rel=1e-3)


def test_the_seed_decides_and_nothing_else(trained, monkeypatch):
    monkeypatch.setattr(adaround, "PRODUCTS", 10**5)  # few samples at a step
    given = [images(64, 2)[0]]

    def weights(seed):
        torch.manual_seed(seed + 100)
        found = quantize(trained, given, weights=3, adaround=20, seed=seed)
        return torch.cat([value.flatten() for value in found.state_dict().values()])

    first = weights(0)
    torch.rand(5)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))


@pytest.mark.parametrize(
    "arguments",
    [
        {"granularity": "tensor"},
        {"granularity": "group 2"},
        {"symmetric": False, "method": "min_max"},
        {"method": "lsq"},
        {"weights": 8},
        {"activations": 4},
    ],
    ids=str,
)
def test_every_cut_and_grid_of_fixed_steps(arguments):
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.ReLU(inplace=True)]
    model = nn.Sequential(*layers, nn.ConvTranspose2d(6, 4, 2), nn.Flatten(), nn.Linear(100, 2)).eval()
    inputs = torch.randn(32, 4, 5, 5)
    arguments = {"weights": 3, **arguments}
    errors = []
    for steps in (0, 60):
        found = quantize(model, [inputs[:20], inputs[20:]], adaround=steps, **arguments)
        with torch.no_grad():
            errors.append(float((found(inputs) - model(inputs)).square().mean()))
    assert errors[1] < errors[0]
    for name, held in quantized_of(found).quantized_weights().items():
        assert torch.allclose(quantized_of(found).weights[name](held.parameter), held.parameter, atol=1e-6)


CUTS = {
    "linear": (nn.Linear(6, 4), (5, 6)),
    "a sequence": (nn.Linear(6, 4), (2, 5, 6)),
    "convolution": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "one image": (nn.Conv2d(4, 6, 3), (4, 5, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 2), (2, 4, 5, 5)),
    "transposed, groups": (nn.ConvTranspose2d(4, 6, 2, groups=2), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group 2"])
@pytest.mark.parametrize("kind", CUTS)
def test_each_error_is_about_a_share_of_the_rows_alone(kind, granularity):
    if (kind, granularity) == ("one image", "group 2"):
        granularity = "group 4"
    layer, shape = CUTS[kind]
    model, inputs = nn.Sequential(layer), torch.randn(shape)
    quantized = quantized_of(quantize(model, None, granularity=granularity))
    (held,), quantizer = quantized.layers["0"].weights, quantized.weights["0.weight"]
    examples = adaround.LayerExamples(quantized.layers["0"], held, quantizer, seed=0)
    examples.see_input((inputs,), {}, None), examples.see_output((inputs,), {}, layer(inputs))
    matrix = quantizer.channel_groups.split(layer.weight.detach())
    errors = examples.error_of(matrix, None)
    assert torch.allclose(errors, torch.zeros(len(errors)), atol=1e-10)
    for share in range(len(errors)):
        moved = matrix.clone()
        moved.view(len(errors), -1)[share] += 1.0
        assert (examples.error_of(moved, None) > 1e-3).tolist() == [one == share for one in range(len(errors))]
    assert len(errors) == (
        1 if kind.startswith("transposed") and (granularity == "tensor" or "groups" in kind) else len(layer.bias)
    )


@pytest.mark.parametrize("extra", [{"adaround": 2}, {"bias_correction": True}], ids=str)
def test_no_pass_goes_further_than_the_layer_that_it_is_for(extra):
    calls = []
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh())
    model[3].register_forward_hook(lambda *_: calls.append(1))
    quantize(model, [torch.randn(8, 4)] * 3, **extra)
    assert len(calls) == 1 + 3  # once to find the way, once each to see the ranges


class Many(nn.Module):
    """Layers of all kinds; what follows writes into what the repeated one gives."""

    def __init__(self):
        super().__init__()
        self.embedding, self.attention = nn.Embedding(6, 4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.repeated, self.recurrent = nn.Linear(4, 4), nn.GRU(4, 4, batch_first=True)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words):
        tokens = self.embedding(words)
        tokens = tokens + self.attention(tokens, tokens, tokens)[0]
        tokens = self.repeated(input=self.repeated(tokens).relu_()).mul_(2)
        return self.head(self.recurrent(tokens)[0])


def test_what_cannot_be_rounded_so_stays_at_the_nearest_and_is_named(caplog):
    torch.manual_seed(0)
    model, words = Many().eval(), torch.randint(0, 6, (8, 5))
    found = quantize(model, [words], weights=3, adaround=40)
    nearest = quantize(model, [words], weights=3).state_dict()
    changed = [name for name, value in nearest.items() if not torch.equal(value, found.state_dict()[name])]
    assert changed == ["repeated.weight"]
    for name, why in {
        "attention": "MultiheadAttention uses its weights in the middle",
        "recurrent": "GRU uses its weights in the middle",
        "head": "its weight is shared by embedding, head",
    }.items():
        assert f"adaround leaves '{name}' as it is: {why}" in caplog.text


def test_a_layer_that_is_called_twice_is_rounded_for_both_calls():
    torch.manual_seed(0)
    model, words = Many().eval(), torch.randint(0, 6, (32, 5))
    seen = []
    model.repeated.register_forward_hook(
        lambda _module, args, kwargs, output: seen.append(output.clone()), with_kwargs=True
    )
    errors = []
    for steps in (0, 100):
        found = quantize(model, [words], weights=3, adaround=steps, targets="repeated.*")
        seen.clear(), model(words), found(words)
        errors.append(sum(float((one - other).square().mean()) for one, other in zip(seen[:2], seen[2:], strict=True)))
    assert errors[1] < 0.85 * errors[0]


def test_grids_that_move_with_the_weight_are_left_alone(caplog):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    found = quantize(model, [torch.randn(8, 4)], weights="ternary", adaround=10)
    assert "adaround leaves '0' as it is: the grid of twn moves with the weight" in caplog.text
    assert torch.equal(found[0].weight, quantize(model, None, weights="ternary", activations=None)[0].weight)


class Chain(nn.Module):
    """What the first layer makes of a number, and the number itself, to the second."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)

    def forward(self, number):
        return self.second(torch.cat([self.first(torch.cat([number, number], 1)), number], 1))


def test_a_layer_makes_good_for_the_roundings_before_it():
    model = Chain()
    with torch.no_grad():
        model.first.weight.copy_(torch.tensor([[1.0, 0.16]])), model.second.weight.copy_(torch.tensor([[3.0, 0.4]]))
    found = quantize(model, [torch.randn(64, 1)], weights=3, method="min_max", adaround=200)
    # In steps of 1 / 3 the first becomes 1.0 in all, not 1.16. In steps of 1 the second has to give 3 * 1.16 + 0.4:
    # 3 * 1.0 + 1 comes nearer than 3 * 1.0 + 0, though 0.4 is nearer to 0.
    assert torch.allclose(found.first.weight, torch.tensor([[1.0, 0.0]]))
    assert torch.allclose(found.second.weight, torch.tensor([[3.0, 1.0]]))
    nearest = quantize(model, [torch.randn(64, 1)], weights=3, method="min_max")
    assert torch.allclose(nearest.second.weight, torch.tensor([[3.0, 0.0]]))
