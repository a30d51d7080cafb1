"""Penalties reach the weights that they are about, once, and no others: against autograd of the penalty written out."""

import pytest
import torch
from torch import nn

from lightning_compress import ChannelPruning
from lightning_compress.channel_pruning.dependency.graph import build_dependency_graph
from lightning_compress.channel_pruning.penalties import add_penalty_gradients

STRENGTH = 0.3


def lasso(rows):
    return STRENGTH * rows[0].numel() ** 0.5 * rows.flatten(1).square().sum(1).sqrt().sum()


def slimming(scales):
    return STRENGTH * scales.abs().sum()


def added(model, example, penalty):
    """What a penalty adds to gradients of 0, by name; nothing else."""
    for one in model.parameters():
        one.grad = torch.zeros_like(one)
    free = [one for one in build_dependency_graph(model, example) if one.unprunable_reason is None]
    add_penalty_gradients(model, free, penalty, STRENGTH, set(model.parameters()))
    return {name: one.grad for name, one in model.named_parameters() if one.grad.any()}


def written_out(penalty, weight):
    [gradient] = torch.autograd.grad(penalty(weight), weight)
    return gradient


def test_only_what_makes_units_pays_along_its_own_dimension():
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3))
    example = torch.randn(2, 2, 5, 5)
    [(name, found)] = added(model, example, "group_lasso").items()
    assert name == "0.weight"
    torch.testing.assert_close(found, written_out(lambda weight: lasso(weight.transpose(0, 1)), model[0].weight))
    [(name, found)] = added(model, example, "slimming").items()
    assert name == "1.weight"
    torch.testing.assert_close(found, written_out(slimming, model[1].weight))


def test_channels_that_have_to_stay_pay_nothing():
    class Half(nn.Module):
        """The first four channels are returned."""

        def __init__(self):
            super().__init__()
            self.hidden, self.norm, self.head = nn.Linear(5, 12), nn.BatchNorm1d(12), nn.Linear(8, 2)

        def forward(self, x):
            x = self.norm(self.hidden(x))
            return x[:, :4], self.head(x[:, 4:])

    torch.manual_seed(0)
    model, example = Half(), torch.randn(3, 5)
    for penalty, function, name in (("group_lasso", lasso, "hidden.weight"), ("slimming", slimming, "norm.weight")):
        [(found_name, found)] = added(model, example, penalty).items()
        assert found_name == name
        torch.testing.assert_close(found, written_out(lambda it, by=function: by(it[4:]), model.get_parameter(name)))


def test_a_weight_of_two_layers_pays_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 2)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.head(self.first(x).relu() + self.second(-x).relu())

    torch.manual_seed(0)
    model = Tied()
    found = added(model, torch.randn(3, 5), "group_lasso")
    torch.testing.assert_close(found, {"first.weight": written_out(lasso, model.first.weight)})


@pytest.mark.parametrize("limits", [{"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=str)
@pytest.mark.parametrize(("penalty", "function", "name"), [("group_lasso", lasso, "0"), ("slimming", slimming, "1")])
def test_a_step_pays_once_however_many_batches_it_has_and_exactly(
    penalty, function, name, limits, make_module, make_trainer, loader
):
    def net():
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))

    def make():
        return make_module(lambda parameters: torch.optim.SGD(parameters, lr=0.1), net)

    plain, penalized = make(), make()
    make_trainer(max_steps=1, **limits).fit(plain, loader)
    expected = written_out(function, make().net.get_parameter(f"{name}.weight"))
    ours = ChannelPruning(
        sparsity=0.5,
        penalty=penalty,
        penalty_strength=STRENGTH,
        begin=0,
        end=50,
        every=50,
        example_input=torch.ones(2, 8),
    )
    with pytest.warns(match="will not reach its end"):
        make_trainer([ours], max_steps=1, **limits).fit(penalized, loader)
    difference = {key: value - penalized.state_dict()[key] for key, value in plain.state_dict().items()}
    torch.testing.assert_close(difference.pop(f"net.{name}.weight"), 0.1 * expected, rtol=1e-4, atol=1e-6)
    assert not any(value.any() for value in difference.values())
