"""What stays makes up for what goes: exactly where it can, else as numpy's least squares."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress.channel_pruning.compensation import compensate
from lightning_compress.channel_pruning.constant_folding import fold_constants
from lightning_compress.channel_pruning.cut_plan import plan_cut
from lightning_compress.channel_pruning.dependency.graph import build_dependency_graph
from lightning_compress.channel_pruning.statistics import ChannelStatistics
from lightning_compress.nn.surgery import cut_model


def seen(model, example):
    gathered = ChannelStatistics(model, ["patches"])
    handles = gathered.hooks()
    gathered.listening = True
    model(example)
    gathered.listening = False
    for handle in handles:
        handle.remove()
    return gathered


def test_a_refitted_linear_layer_is_that_of_numpy():
    torch.manual_seed(0)
    model, example = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)), torch.randn(200, 5)
    hidden, before = model[:2](example).detach(), model(example).detach()
    gone = {"0": (1, 4)}
    compensate(seen(model, example), build_dependency_graph(model, example), gone)
    wanted = (before - model[2].bias).detach().numpy()
    stay = hidden[:, [0, 2, 3, 5]].numpy()
    expected = np.linalg.lstsq(stay, wanted, rcond=None)[0].T
    np.testing.assert_allclose(model[2].weight[:, [0, 2, 3, 5]].detach(), expected, rtol=1e-3, atol=1e-4)


def test_a_channel_that_another_one_repeats_is_made_up_for_exactly():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 3, 3, padding=1))
    with torch.no_grad():
        model[0].weight[4], model[0].bias[4] = 2 * model[0].weight[1], 2 * model[0].bias[1]
    example = torch.randn(8, 2, 9, 9)
    groups, before = build_dependency_graph(model, example), model(example).detach()
    compensate(seen(model, example), groups, {"0": (4,)})
    cut_model(model, plan_cut(groups, {"0": (4,)}))
    torch.testing.assert_close(model(example), before, rtol=1e-3, atol=1e-4)


def test_units_that_are_flattened_into_several_columns_are_refitted_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 2))
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = model[0].weight[0], model[0].bias[0]
    example = torch.randn(300, 1, 5, 5)
    groups, before = build_dependency_graph(model, example), model(example).detach()
    compensate(seen(model, example), groups, {"0": (2,)})
    cut_model(model, plan_cut(groups, {"0": (2,)}))
    torch.testing.assert_close(model(example), before, rtol=1e-3, atol=1e-4)


def flat_channels(padding):
    """The scale of the normalisation is 0 for two channels: they always are what their shift makes of them."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 3, padding=padding), nn.Flatten(),
        nn.LazyLinear(4),
    )  # fmt: skip
    example = torch.randn(5, 1, 9, 9)
    model(example)
    with torch.no_grad():
        model[1].weight[[1, 3]] = 0.0
        model[1].bias[[1, 3]] = torch.tensor([0.7, -0.4])
    return model.eval(), example


def test_constants_go_into_the_bias_where_that_is_exact():
    model, example = flat_channels(padding=0)
    groups, before = build_dependency_graph(model, example), model(example).detach()
    assert fold_constants(model, example, groups, {"0": (1, 3)}) == 1  # the other one is 0 behind the ReLU
    cut_model(model, plan_cut(groups, {"0": (1, 3)}))
    torch.testing.assert_close(model(example), before, rtol=1e-5, atol=1e-6)


def test_zero_padding_makes_a_constant_channel_one_that_is_not():
    model, example = flat_channels(padding=1)
    bias = model[3].bias.detach().clone()
    assert fold_constants(model, example, build_dependency_graph(model, example), {"0": (1, 3)}) == 0
    assert torch.equal(model[3].bias, bias)


@pytest.mark.parametrize("kind", ["images", "tokens"])
def test_an_example_of_equal_samples_makes_nothing_constant(kind):
    model, _ = flat_channels(padding=0)
    example, gone = torch.ones(2, 1, 9, 9), {"0": (0, 2)}
    if kind == "tokens":
        model, example = (
            nn.Sequential(nn.Embedding(9, 6), nn.ReLU(), nn.Linear(6, 3)),
            torch.zeros(2, 5, dtype=torch.long),
        )
    groups = build_dependency_graph(model, example)
    biases = [one.bias.detach().clone() for one in model if getattr(one, "bias", None) is not None]
    assert fold_constants(model, example, groups, gone) == 0
    now = [one.bias for one in model if getattr(one, "bias", None) is not None]
    assert all(torch.equal(old, new) for old, new in zip(biases, now, strict=True))


def test_a_module_that_takes_no_noise_has_nothing_folded():
    """Noise names no category, and the example alone tells too little."""

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.known, self.net = nn.Embedding(3, 2), nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))

        def forward(self, rows):
            return self.net(self.known(rows.long()[:, 0]))

    model, example = Table().eval(), torch.tensor([[0.0], [2.0], [1.0], [2.0]])
    groups = build_dependency_graph(model, example)
    assert fold_constants(model, example, groups, {"net.0": (1, 3)}) == 0
    assert not model.net[0]._forward_pre_hooks
    assert not model.net[2]._forward_pre_hooks
