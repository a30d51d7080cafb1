"""Grids of a given scale, and short floating point: against torch's own operators, and by brute force."""

import pytest
import torch

from lightning_compress.quantization.functional.quantizers import floating, stochastic, uniform


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


# Uniform ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quant_min", "quant_max"), [(-127, 127), (-7, 7), (-1, 1), (0, 255), (0, 15), (-32767, 32767)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_gradients_of_rows_are_those_of_the_core_operator_bit_for_bit(quant_min, quant_max, dtype):
    values = drawn(16, 500).to(dtype)
    scale = (4 / (quant_max - quant_min)) * drawn(16, 1, seed=1).exp()
    zero_point = torch.randint(
        quant_min, quant_max + 1, (16, 1), generator=torch.Generator().manual_seed(2), dtype=torch.int32
    )
    found = gradient_and_values(lambda one: uniform(one, scale, zero_point, quant_min, quant_max).values, values)
    core = gradient_and_values(
        lambda one: torch.fake_quantize_per_channel_affine(one, scale[:, 0], zero_point[:, 0], 0, quant_min, quant_max),
        values,
    )
    assert torch.equal(found[0], core[0])
    assert torch.equal(found[1], core[1])


@pytest.mark.parametrize(("quant_min", "quant_max", "zero"), [(0, 255, 0), (0, 255, 117), (0, 15, 15), (-127, 127, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_gradients_of_activations_are_those_of_the_core_operator_bit_for_bit(
    quant_min, quant_max, zero, dtype
):
    values, scale, zero_point = drawn(7, 3, 11, 5).to(dtype), torch.tensor(0.0123), torch.tensor(zero).int()
    found = gradient_and_values(lambda one: uniform(one, scale, zero_point, quant_min, quant_max).values, values)
    core = gradient_and_values(
        lambda one: torch.fake_quantize_per_tensor_affine(one, scale, zero_point, quant_min, quant_max), values
    )
    assert torch.equal(found[0], core[0])
    assert torch.equal(found[1], core[1])


def gradient_and_values(function, values):
    values = values.clone().requires_grad_()
    result = function(values)
    result.backward(drawn(*values.shape, seed=9).to(values.dtype))
    return result.detach(), values.grad


def test_each_value_goes_to_the_nearest_place_of_the_grid():
    values, scale, zero_point = drawn(1000).double(), torch.tensor(0.3), torch.tensor(5).int()
    grid = (torch.arange(0, 16) - 5) * scale.double()
    nearest = grid[(values[:, None] - grid).abs().argmin(1)]
    assert torch.allclose(uniform(values, scale, zero_point, 0, 15).values, nearest, atol=1e-12)


def test_halves_go_to_the_even_place():
    values = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    found = uniform(values, torch.tensor(1.0), torch.tensor(0).int(), -7, 7).values
    assert found.tolist() == [0.0, 2.0, 2.0, 0.0, -2.0, -2.0]


def test_rows_have_their_own_scale_and_zero_point():
    values = torch.tensor([[0.26, -9.0], [0.26, -9.0]])
    found = uniform(values, torch.tensor([[0.1], [1.0]]), whole(0, 12)[:, None], 0, 15)
    assert torch.allclose(found.values, torch.tensor([[0.3, 0.0], [0.0, -9.0]]))


def test_the_gradient_stops_outside_the_grid():
    values = torch.tensor([-7.6, -7.4, 0.0, 7.4, 7.6], requires_grad=True)
    uniform(values, torch.tensor(1.0), torch.tensor(0).int(), -7, 7).values.sum().backward()
    assert values.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


# Stochastic rounding ------------------------------------------------------------------------------------------------


def rounded(values, seed=0, scale=0.5, quant_min=-7, quant_max=7):
    generator = torch.Generator().manual_seed(seed)
    return stochastic(values, torch.tensor(scale), torch.tensor(0).int(), quant_min, quant_max, generator).values


def test_stochastic_rounding_goes_to_one_of_two_neighbours_and_is_right_on_average():
    for value in (0.1, 0.25, 0.49, -0.1, -1.3, 2.99):
        found = rounded(torch.full((20_000,), value))
        below = torch.floor(torch.tensor(value / 0.5)) * 0.5
        assert set(found.unique().tolist()) == {below.item(), below.item() + 0.5}
        # Four standard deviations of a mean of as many draws of two values half a step apart at the most.
        assert found.mean().item() == pytest.approx(value, abs=4 * 0.25 / 20_000**0.5)


def test_what_lies_on_the_grid_stays_there_whatever_is_drawn():
    # So far from zero, float32 would round up what lies a hair below the next place.
    values = torch.arange(-32767, 32768) * 0.5
    assert torch.equal(rounded(values, quant_min=-32767, quant_max=32767), values)


def test_stochastic_rounding_depends_on_its_generator_alone():
    values = drawn(1000)
    assert torch.equal(rounded(values, seed=1), rounded(values, seed=1))
    assert not torch.equal(rounded(values, seed=1), rounded(values, seed=2))


def test_without_a_generator_stochastic_rounding_is_to_the_nearest():
    values = torch.tensor([[-9.0, -0.26, 0.24, 0.26, 9.0]])
    found = stochastic(values, torch.tensor(0.5), torch.tensor(0).int(), -4, 3, None)
    assert found.values.tolist() == [[-2.0, -0.5, 0.0, 0.5, 1.5]]


def test_stochastic_rounding_stops_the_gradient_outside_the_grid():
    values = torch.tensor([-5.0, 0.3, 5.0], requires_grad=True)
    stochastic(
        values, torch.tensor(0.5), torch.tensor(0).int(), -7, 7, torch.Generator().manual_seed(0)
    ).values.sum().backward()
    assert values.grad.tolist() == [0.0, 1.0, 0.0]


# Floating point -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
def test_eight_bits_hold_the_nearest_of_all_their_numbers(dtype, given):
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    numbers = numbers[numbers.isfinite()].unique()
    values = (drawn(3000) * 10 ** (2 * drawn(3000, seed=1))).to(given)
    distances = (values.double()[:, None] - numbers).abs()
    found = floating(values, dtype).values
    assert found.dtype == given
    assert torch.equal((found.double() - values.double()).abs(), distances.min(1).values)


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [(torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0), (torch.float16, 65504.0)],
    ids=str,
)
def test_what_is_too_large_becomes_the_largest(dtype, largest):
    values = torch.tensor([1e9, -1e9, torch.inf, -torch.inf, largest, 1.0], requires_grad=True)
    found = floating(values, dtype)
    assert found.values.tolist() == [largest, -largest, largest, -largest, largest, 1.0]
    found.values.sum().backward()
    assert values.grad.tolist() == [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_that_of_a_cast(dtype):
    values = drawn(1000)
    assert torch.equal(floating(values, dtype).values, values.to(dtype).float())
    assert torch.equal(floating(values.to(dtype), dtype).values, values.to(dtype))
