"""Quantizing what flows back, by the papers' formulas in plain Python, and on average."""

import math

import pytest
import torch

from lightning_compress.quantization.functional.gradients import dorefa, quantize_gradient, wage_errors, wage_gradients


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


ALL = {
    "dorefa": lambda gradient, bits: dorefa(gradient, bits, seeded()),
    "wage_errors": wage_errors,
    "wage_gradients": lambda gradient, bits: wage_gradients(gradient, bits, seeded()),
}
every_one = pytest.mark.parametrize("quantizer", ALL.values(), ids=ALL)


@every_one
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(5,), (5, 4), (5, 4, 3, 2)], ids=str)
def test_shape_precision_and_the_gradient_itself_are_kept(quantizer, dtype, shape):
    gradient = drawn(*shape).to(dtype)
    before, state = gradient.clone(), torch.get_rng_state()
    found = quantizer(gradient, 8)
    assert (found.shape, found.dtype) == (gradient.shape, dtype)
    assert found.isfinite().all()
    assert torch.equal(gradient, before)
    assert torch.equal(torch.get_rng_state(), state)


@every_one
def test_zeros_stay_zeros(quantizer):
    assert quantizer(torch.zeros(3, 4), 8).count_nonzero() == 0


@every_one
def test_what_is_no_number_is_not_hidden(quantizer):
    assert quantizer(torch.tensor([[1.0, torch.nan]]), 8).isnan().any()


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30, 1e37])
@pytest.mark.parametrize(
    "quantizer",
    [ALL["dorefa"], wage_errors, lambda gradient, bits: wage_gradients(gradient, bits, seeded(), learning_rate=128)],
    ids=ALL,
)
def test_gradients_of_any_size_keep_their_direction(quantizer, scale):
    gradient = drawn(1, 2000) * scale
    found, given = (one.double() / one.double().norm() for one in (quantizer(gradient, 8), gradient))
    assert (found * given).sum() > 0.99


@every_one
def test_gradients_that_hardly_are_numbers_give_no_infinite_ones(quantizer):
    assert quantizer(drawn(1, 200) * 1e-42, 8).isfinite().all()


@every_one
@pytest.mark.parametrize("bits", [0, -1, 17, 6.0, True, "8"])
def test_bits_that_are_none_are_refused(quantizer, bits):
    with pytest.raises(ValueError, match="whole number") as refusal:
        quantizer(torch.ones(2, 2), bits)
    assert repr(bits) in str(refusal.value)


# The place where it happens -----------------------------------------------------------------------------------------


def test_values_go_on_as_they_are_and_what_flows_back_is_quantized():
    values, seen = drawn(2, 3).requires_grad_(), []

    def halved(gradient):
        seen.append(gradient)
        return gradient / 2

    found = quantize_gradient(values, halved)
    assert torch.equal(found, values)
    (found * torch.arange(6.0).reshape(2, 3)).sum().backward()
    assert seen[0].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert values.grad.tolist() == [[0.0, 0.5, 1.0], [1.5, 2.0, 2.5]]


def test_a_network_gets_quantized_errors_in_front_of_where_they_are_quantized_only():
    first, second = (torch.nn.Linear(4, 4) for _ in range(2))
    inputs = drawn(8, 4)
    hidden = quantize_gradient(first(inputs), lambda error: wage_errors(error, 3))
    hidden.retain_grad()
    second(hidden).square().sum().backward()
    rounded = wage_errors(hidden.grad, 3)
    assert torch.allclose(first.weight.grad, rounded.T @ inputs, atol=1e-6)
    assert torch.allclose(second.weight.grad, (2 * second(hidden)).T @ hidden, atol=1e-4)


# DoReFa -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 6])
def test_dorefa_is_the_formula_of_the_paper(bits):
    gradient = drawn(3, 40).double()
    noise = torch.rand(3, 40, generator=seeded(5)).double() - 0.5
    found = dorefa(gradient, bits, seeded(5))
    steps = 2**bits - 1
    for row, drawn_noise, result in zip(gradient.tolist(), noise.tolist(), found.tolist(), strict=True):
        largest = max(map(abs, row))
        for one, noisy, quantized in zip(row, drawn_noise, result, strict=True):
            share = min(max(one / (2 * largest) + 0.5 + noisy / steps, 0.0), 1.0)
            assert quantized == pytest.approx(2 * largest * (round(steps * share) / steps - 0.5))


def test_each_sample_has_its_own_largest():
    found = dorefa(torch.tensor([[[1.0], [-0.1]], [[100.0], [1.0]]]), 1, seeded())
    assert found.abs().flatten(1).tolist() == [[1.0, 1.0], [100.0, 100.0]]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_noise_makes_dorefa_right_on_average(bits):
    gradient = torch.tensor([[1.0, -0.9, 0.3, 0.05, 0.0, -0.41]]).repeat(20_000, 1)
    mean = dorefa(gradient, bits, seeded()).mean(0)
    step = 2 / (2**bits - 1)
    assert torch.allclose(mean, gradient[0], atol=4 * step / 2 / 20_000**0.5)


# WAGE ---------------------------------------------------------------------------------------------------------------


def shift(value):
    """The power of two whose exponent is nearest."""
    return 2.0 ** round(math.log2(value))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("scale", [0.001, 1.0, 37.0])
def test_wage_errors_are_the_formula_of_the_paper(bits, scale):
    error = scale * drawn(4, 30).double()
    distance = 2.0 ** (1 - bits)
    divisor = shift(error.abs().max().item())
    for one, found in zip(error.flatten().tolist(), wage_errors(error, bits).flatten().tolist(), strict=True):
        assert found == min(max(round(one / divisor / distance) * distance, distance - 1), 1 - distance)


def test_wage_errors_forget_their_size():
    error = drawn(4, 30)
    assert torch.equal(wage_errors(error, 8), wage_errors(error * 2.0**-20, 8))


@pytest.mark.parametrize("learning_rate", [0.125, 1.0, 8.0])
def test_wage_gradients_are_one_of_two_neighbours_and_right_on_average(learning_rate):
    gradient = torch.tensor([[1.0, -0.7, 0.3, 0.03, 0.0]]).repeat(20_000, 1)
    found = wage_gradients(gradient, 8, seeded(), learning_rate)
    exact = learning_rate * gradient[0] / 128
    whole = found * 128
    assert torch.equal(whole, whole.round())
    assert ((whole - 128 * exact).abs() < 1).all()
    assert torch.allclose(found.mean(0), exact, atol=4 * 0.5 / 128 / 20_000**0.5)


def test_wage_gradients_are_integers_of_the_papers_update():
    gradient = 0.02 * drawn(4, 30).double()
    draws = torch.rand(4, 30, generator=seeded(3)).double()
    found = wage_gradients(gradient, 8, seeded(3), learning_rate=8.0)
    divisor = shift(gradient.abs().max().item())
    for one, chance, update in zip(
        gradient.flatten().tolist(), draws.flatten().tolist(), found.flatten().tolist(), strict=True
    ):
        size = 8.0 * abs(one) / divisor
        expected = math.floor(size) + (chance < size - math.floor(size))
        assert update == math.copysign(expected, one) / 128


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_learning_rate_that_is_none_is_refused(rate):
    with pytest.raises(ValueError, match=str(rate)):
        wage_gradients(torch.ones(2), 8, seeded(), rate)
