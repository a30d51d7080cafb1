"""DoReFa and WAGE by hand, and by their papers' formulas in plain Python."""

import math

import pytest
import torch

from lightning_compress.quantization.functional.quantizers import (
    dorefa_activations,
    dorefa_weights,
    wage_activations,
    wage_weights,
)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# DoReFa -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant_max", [1, 3, 7, 127])
def test_dorefa_weights_are_shares_of_the_rows_largest_tanh_in_steps(quant_max):
    values = drawn(3, 40).double()
    found = dorefa_weights(values, quant_max).values
    for row, result in zip(values.tolist(), found.tolist(), strict=True):
        largest = max(abs(math.tanh(one)) for one in row)
        assert result == pytest.approx([round(quant_max * math.tanh(one) / largest) / quant_max for one in row])


def test_dorefa_weights_reach_one_and_keep_zero():
    found = dorefa_weights(torch.tensor([[0.0, 0.01, -0.02]]), 7)
    assert found.values.abs().max().item() == pytest.approx(1.0)
    assert found.values[0, 0].item() == 0.0
    assert found.scale.tolist() == [[pytest.approx(1 / 7)]]


def test_on_a_fine_grid_dorefa_weights_are_those_of_the_paper():
    values, bits = drawn(1, 200).double(), 16
    share = values.tanh() / (2 * values.tanh().abs().max()) + 0.5
    paper = 2 * ((2**bits - 1) * share).round() / (2**bits - 1) - 1
    assert torch.allclose(dorefa_weights(values, 2 ** (bits - 1) - 1).values, paper, atol=2.0 ** (2 - bits))


def test_the_gradient_of_dorefa_weights_goes_through_the_tanh_and_the_largest():
    values, upstream = drawn(2, 6).double().requires_grad_(), drawn(2, 6, seed=1).double()
    dorefa_weights(values, 7).values.backward(upstream)
    change = torch.zeros(2, 6).double()
    for place in [(row, column) for row in range(2) for column in range(6)]:
        ends = []
        for move in (1e-5, -1e-5):
            moved = values.detach().clone()
            moved[place] += move
            ends.append((moved.tanh() / moved.tanh().abs().amax(1, keepdim=True) * upstream).sum())
        change[place] = (ends[0] - ends[1]) / 2e-5
    assert torch.allclose(values.grad, change, atol=1e-6)


def test_dorefa_activations_by_hand():
    values = torch.tensor([-0.5, 0.0, 0.1, 0.49, 0.51, 1.0, 1.5], requires_grad=True)
    found = dorefa_activations(values, 3)
    assert found.values.tolist() == pytest.approx([0.0, 0.0, 0.0, 1 / 3, 2 / 3, 1.0, 1.0])
    assert (found.scale.item(), found.zero_point.item()) == (pytest.approx(1 / 3), 0)
    found.values.sum().backward()
    assert values.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]


def test_dorefa_activations_of_both_signs_reach_from_minus_one_to_one():
    found = dorefa_activations(torch.tensor([-2.0, -0.4, 0.0, 2.0]), 2, quant_min=-2)
    assert found.values.tolist() == [-1.0, -0.5, 0.0, 1.0]


# WAGE ---------------------------------------------------------------------------------------------------------------


def wage_of_one(value, bits):
    """Equations 5 and 6 of the paper."""
    distance = 2.0 ** (1 - bits)
    return min(max(distance * round(value / distance), -1 + distance), 1 - distance)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_wage_weights_and_activations_are_those_of_the_paper(bits):
    values = drawn(3, 60).double() * 0.7
    expected = [[wage_of_one(one, bits) for one in row] for row in values.tolist()]
    weights, activations = wage_weights(values, 2 ** (bits - 1) - 1), wage_activations(values, 2**bits - 1)
    assert weights.values.tolist() == activations.values.tolist() == expected
    assert weights.scale.unique().tolist() == [2.0 ** (1 - bits)] == [activations.scale.item()]


def test_two_bits_of_wage_are_three_levels():
    found = wage_weights(torch.tensor([[-9.0, -0.26, -0.24, 0.0, 0.24, 0.26, 9.0]]), 1)
    assert found.values.tolist() == [[-0.5, -0.5, 0.0, 0.0, 0.0, 0.5, 0.5]]


def test_wage_activations_have_their_zero_in_the_middle_of_the_unsigned_grid():
    found = wage_activations(torch.tensor([-3.0, 0.0, 3.0]), 255)
    assert found.zero_point.item() == 128
    assert (found.values / found.scale + found.zero_point).tolist() == [1.0, 128.0, 255.0]


def test_wage_weights_pass_the_gradient_up_to_one_and_activations_up_to_their_last_level():
    values = torch.tensor([[-1.1, -0.9, 0.3, 0.6, 1.1]], requires_grad=True)
    wage_weights(values, 1).values.sum().backward()
    assert values.grad.tolist() == [[0.0, 1.0, 1.0, 1.0, 0.0]]
    values.grad = None
    wage_activations(values, 3).values.sum().backward()
    assert values.grad.tolist() == [[0.0, 0.0, 1.0, 0.0, 0.0]]
