"""Penalties of gradients, such as those of critics, go through every quantizer as through one left to autograd."""

import pytest
import torch
from torch import nn

from lightning_compress import QuantizationAwareTraining
from lightning_compress.quantization.functional.gradients import quantize_gradient
from lightning_compress.quantization.functional.quantizers import lsq, stochastic, uniform
from tests.quantization.by_hand import randn


def passed(values, quant_min, quant_max):
    """Rounding and its limits left to autograd; the rounding passes gradients."""
    places = torch.where(
        (values > quant_min) & (values < quant_max), values, values.detach().clamp(quant_min, quant_max)
    )
    return places + (places.round() - places).detach()


def penalty(quantize, weight, inputs, *learned):
    """The gradients of a squared gradient with regard to the inputs."""
    outputs = (quantize(inputs @ weight.T) ** 3).sum()
    (gradient,) = torch.autograd.grad(outputs, inputs, create_graph=True)
    return torch.autograd.grad((gradient**2).sum() + outputs, [weight, inputs, *learned])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["uniform", "stochastic", "lsq"])
def test_a_penalty_of_gradients_has_those_of_autograd(kind, dtype):
    weight, inputs = randn(3, 4, seed=1).to(dtype).requires_grad_(True), randn(5, 4).to(dtype).requires_grad_(True)
    step = torch.tensor(0.37, dtype=dtype, requires_grad=kind == "lsq")
    zero = torch.zeros((), dtype=torch.int32)
    learned = [step] if kind == "lsq" else []
    by_name = {
        "uniform": lambda values: uniform(values, step, zero, -4, 3),
        "stochastic": lambda values: stochastic(values, step, zero, -4, 3, None),
        "lsq": lambda values: lsq(values, -4, 3, step),
    }
    ours = penalty(lambda values: by_name[kind](values).values, weight, inputs, *learned)
    # Of a range the number on the grid decides what lies outside; of LSQ, whose step's gradient is damped, the number.
    limits = (-4, 3) if kind == "lsq" else (-4.5, 3.5)
    damped = step / (3 * 3) ** 0.5
    step = damped + (step - damped).detach() if kind == "lsq" else step
    wanted = penalty(lambda values: passed(values / step, *limits).clamp(-4, 3) * step, weight, inputs, *learned)
    for one, other in zip(ours, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def test_what_flows_back_on_a_grid_passes_the_gradient_of_a_gradient_as_if_it_was_not_rounded():
    inputs = randn(5, 4).requires_grad_(True)
    (gradient,) = torch.autograd.grad((quantize_gradient(inputs, torch.round) ** 3).sum(), inputs, create_graph=True)
    assert torch.equal(gradient, (3 * inputs**2).round())
    (second,) = torch.autograd.grad(gradient.sum(), inputs)
    assert torch.equal(second, (6 * inputs).round())  # it flows back the same way


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weights": 4, "activations": 4},
        {"weights": 2, "method": "stochastic"},
        {"weights": "ternary"},
        {"weights": 4, "method": "wage", "activation_grad_bits": 8},
        {"weights": 4, "activations": 4, "method": {"weights": "lsq", "activations": "pact"}},
        {"weights": 4, "activations": 4, "method": "dorefa", "weight_grad_bits": 6},
        {"weights": "binary", "activations": "binary"},
        {"weights": "fp8", "activations": "fp8"},
    ],
    ids=str,
)
def test_a_critic_with_a_penalty_trains(settings, make_module, make_trainer, loader):
    class Critic(make_module):
        def training_step(self, batch, batch_idx):
            inputs = batch[0].requires_grad_(True)
            found = self(inputs)
            (gradient,) = torch.autograd.grad(found.sum(), inputs, create_graph=True)
            return found.mean() + (gradient.norm(dim=1) - 1).square().mean()

    module = Critic(net=lambda: nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)))
    before = module.net[0].weight.detach().clone()
    make_trainer([QuantizationAwareTraining(begin=1, first="same", last="same", **settings)], max_epochs=1).fit(
        module, loader
    )
    assert bool(module.net[0].weight.isfinite().all())
    assert not torch.equal(module.net[0].weight, before)
