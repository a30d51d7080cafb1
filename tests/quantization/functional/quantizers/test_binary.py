"""Binary weights and activations by hand, by brute force, and against the papers' theorems."""

from itertools import product

import pytest
import torch
from torch.nn import functional

from lightning_compress.quantization.functional.quantizers import (
    binary_connect,
    bnn,
    stochastic_binary,
    xnor,
    xnor_activations,
)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("quantizer", [binary_connect, bnn])
def test_signs_by_hand(quantizer):
    values = torch.tensor([[-1.5, -1.0, -0.2], [0.0, 0.7, 1.5]], requires_grad=True)
    found = quantizer(values)
    assert found.values.tolist() == [[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]]
    assert found.scale.unique().tolist() == [1.0]
    found.values.backward(torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]]))
    assert values.grad.tolist() == [[0.0, 2.0, 4.0], [8.0, 16.0, 0.0]]


@pytest.mark.parametrize(("quantizer", "size"), [(bnn, 1.0), (xnor_activations, 0.75)])
def test_behind_a_relu_there_is_something_or_nothing(quantizer, size):
    values = torch.tensor([[0.0, 0.5, 2.0, 0.5]], requires_grad=True)
    found = quantizer(values, quant_min=0)
    assert found.values.tolist() == [[0.0, size, size, size]]
    found.values.sum().backward()
    assert values.grad.tolist() == [[size, size, 0.0, size]]


def test_without_a_generator_stochastic_signs_are_those_of_the_values():
    assert torch.equal(stochastic_binary(drawn(3, 5), None).values, binary_connect(drawn(3, 5)).values)


@pytest.mark.parametrize(
    ("value", "share"), [(-2.0, 0.0), (-1.0, 0.0), (-0.5, 0.25), (0.0, 0.5), (0.6, 0.8), (1.0, 1.0), (3.0, 1.0)]
)
def test_stochastic_signs_are_positive_as_often_as_the_paper_says(value, share):
    values = torch.full((4, 5000), value, requires_grad=True)
    found = stochastic_binary(values, torch.Generator().manual_seed(0)).values
    # Four standard deviations of as many draws.
    assert (found > 0).float().mean().item() == pytest.approx(share, abs=4 * (share * (1 - share) / 20_000) ** 0.5)
    assert set(found.unique().tolist()) <= {-1.0, 1.0}
    found.sum().backward()
    assert values.grad.unique().tolist() == [float(abs(value) <= 1)]


def test_xnor_is_the_best_of_all_signs_and_scales():
    values = drawn(1, 8).double()
    found = xnor(values)
    error = (found.values - values).square().sum().item()
    for signs in product((-1.0, 1.0), repeat=8):
        pattern = torch.tensor(signs).double()
        scale = (pattern @ values[0]) / 8  # The best for this pattern, by least squares.
        assert (scale * pattern - values).square().sum().item() >= error - 1e-12
    assert found.scale.item() == pytest.approx(values.abs().mean().item())


def test_xnor_has_a_scale_for_each_row():
    found = xnor(torch.tensor([[1.0, -3.0], [0.0, 0.5]]))
    assert found.values.tolist() == [[2.0, -2.0], [0.25, 0.25]]
    assert found.scale.tolist() == [[2.0], [0.25]]


def test_the_gradient_of_xnor_is_the_chain_rule_of_the_mean_and_of_a_clipped_sign():
    values, upstream = (2 * drawn(2, 5)).double().requires_grad_(), drawn(2, 5, seed=1).double()
    xnor(values).values.backward(upstream)
    expected = torch.zeros(2, 5).double()
    for row, (weights, slopes) in enumerate(zip(values.tolist(), upstream.tolist(), strict=True)):
        mean = sum(map(abs, weights)) / 5
        signs = [1.0 if one >= 0 else -1.0 for one in weights]
        through_the_mean = sum(slope * sign for slope, sign in zip(slopes, signs, strict=True)) / 5
        for column, (one, slope, sign) in enumerate(zip(weights, slopes, signs, strict=True)):
            expected[row, column] = sign * through_the_mean + slope * mean * (abs(one) <= 1)
    assert torch.allclose(values.grad, expected)
    assert (values.detach().abs() > 1).any()


def test_a_row_of_zeros_stays_zero_in_xnor():
    found = xnor(torch.zeros(1, 3))
    assert (found.values.tolist(), found.scale.tolist()) == ([[0.0, 0.0, 0.0]], [[1.0]])


def test_xnor_activations_by_hand():
    found = xnor_activations(torch.tensor([[1.0, -3.0], [0.0, 0.5]]))
    assert found.values.tolist() == [[2.0, -2.0], [0.25, 0.25]]
    assert found.scale is None
    tokens = drawn(2, 3, 4)
    assert torch.equal(xnor_activations(tokens).values.flatten(0, 1), xnor_activations(tokens.flatten(0, 1)).values)


def test_before_a_one_by_one_convolution_they_are_the_papers_scaled_output():
    images, weights = drawn(2, 3, 5, 5), drawn(4, 3, 1, 1, seed=1)
    means = images.abs().mean(1, keepdim=True)
    expected = functional.conv2d(images.sign(), weights) * means
    assert torch.allclose(functional.conv2d(xnor_activations(images).values, weights), expected, atol=1e-6)


def test_with_a_window_the_means_are_those_of_the_papers_box():
    images = drawn(2, 3, 6, 7)
    box = torch.full((1, 1, 3, 3), 1 / 9)
    scales = functional.conv2d(images.abs().mean(1, keepdim=True), box, padding=1)
    assert torch.allclose(xnor_activations(images, window=3).values, images.sign() * scales, atol=1e-6)


@pytest.mark.parametrize("window", [0, 2, -3])
def test_a_window_without_a_middle_is_refused(window):
    with pytest.raises(ValueError, match=f"is {window}"):
        xnor_activations(torch.ones(1, 2, 4, 4), window=window)


def test_the_gradient_of_xnor_activations_passes_up_to_one_times_the_mean():
    values = torch.tensor([[0.5, -2.5], [0.2, -0.4]], requires_grad=True)
    xnor_activations(values).values.sum().backward()
    assert torch.allclose(values.grad, torch.tensor([[1.5, 0.0], [0.3, 0.3]]))
