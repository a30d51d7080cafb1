"""Learned grids: gradients by the papers' formulas in plain Python, and by autograd of an independent form."""

import math

import pytest
import torch

from lightning_compress.quantization.functional.quantizers import lsq, pact


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# LSQ ----------------------------------------------------------------------------------------------------------------


def lsq_of_one(value, step, quant_min, quant_max):
    """Equations 1 to 3 of the paper: the value on the grid, its slope by the step, and by the value."""
    ratio = value / step
    if ratio <= quant_min:
        return quant_min * step, quant_min, 0.0
    if ratio >= quant_max:
        return quant_max * step, quant_max, 0.0
    return round(ratio) * step, round(ratio) - ratio, 1.0


@pytest.mark.parametrize(("quant_min", "quant_max"), [(-8, 7), (-7, 7), (-1, 1), (-128, 127)])
def test_values_and_gradients_of_weights_are_those_of_the_paper(quant_min, quant_max):
    values, upstream = drawn(3, 50).double().requires_grad_(), drawn(3, 50, seed=1).double()
    step = torch.tensor([[0.1], [0.37], [1.9]], dtype=torch.float64, requires_grad=True)
    found = lsq(values, quant_min, quant_max, step)
    found.values.backward(upstream)
    for row in range(3):
        ones = [lsq_of_one(value, step[row].item(), quant_min, quant_max) for value in values[row].tolist()]
        assert found.values[row].tolist() == pytest.approx([one[0] for one in ones])
        by_step = sum(one[1] * slope for one, slope in zip(ones, upstream[row].tolist(), strict=True))
        assert step.grad[row].item() == pytest.approx(by_step / math.sqrt(50 * quant_max))
        passed = [one[2] * slope for one, slope in zip(ones, upstream[row].tolist(), strict=True)]
        assert values.grad[row].tolist() == pytest.approx(passed)


def test_gradients_of_activations_are_those_of_the_paper_and_count_the_features_of_one_sample():
    values, upstream = drawn(6, 2, 5, 5).double().requires_grad_(), drawn(6, 2, 5, 5, seed=1).double()
    step = torch.tensor(0.21, dtype=torch.float64, requires_grad=True)
    lsq(values, 0, 15, step).values.backward(upstream)
    ones = [lsq_of_one(value, 0.21, 0, 15) for value in values.flatten().tolist()]
    by_step = sum(one[1] * slope for one, slope in zip(ones, upstream.flatten().tolist(), strict=True))
    assert step.grad.shape == ()
    assert step.grad.item() == pytest.approx(by_step / math.sqrt(2 * 5 * 5 * 15))


def test_gradients_are_those_of_autograd_with_the_rounding_left_out_of_it():
    values, upstream = drawn(4, 300).double().requires_grad_(), drawn(4, 300, seed=1).double()
    step = (drawn(4, 1, seed=2).double().exp() / 5).requires_grad_()
    lsq(values, -7, 7, step).values.backward(upstream)
    by_values, by_step = values.grad.clone(), step.grad.clone()
    values.grad = step.grad = None
    clipped = (values / step).clamp(-7, 7)
    ((clipped + (clipped.round() - clipped).detach()) * step).backward(upstream)
    assert torch.allclose(by_values, values.grad)
    assert torch.allclose(by_step, step.grad / math.sqrt(300 * 7))


def test_the_slope_by_the_step_is_that_of_finite_differences_where_values_are_clipped():
    values, step = torch.tensor([[30.0, -30.0, 25.0]]).double(), torch.tensor([[1.0]]).double().requires_grad_()
    lsq(values, -8, 7, step).values.sum().backward()
    change = (lsq(values, -8, 7, step + 1e-3).values.sum() - lsq(values, -8, 7, step - 1e-3).values.sum()) / 2e-3
    assert step.grad.item() == pytest.approx(change.item() / math.sqrt(3 * 7))


def test_a_step_below_zero_counts_by_its_size_and_comes_back():
    values = drawn(2, 40)
    step = torch.tensor([[0.3], [-0.3]], requires_grad=True)
    found = lsq(values, -7, 7, step)
    assert torch.equal(found.values, lsq(values, -7, 7, step.abs()).values)
    assert torch.equal(found.scale, step.detach().abs())
    upstream = values.sign()  # Where all outputs grow, so does the step's size.
    found.values.backward(upstream)
    same = torch.tensor([[0.3], [0.3]], requires_grad=True)
    lsq(values, -7, 7, same).values.backward(upstream)
    assert torch.allclose(step.grad, same.grad * torch.tensor([[1.0], [-1.0]]))


def test_a_step_of_zero_is_no_division_by_zero():
    found = lsq(drawn(2, 4), -7, 7, torch.zeros(2, 1, requires_grad=True))
    assert found.values.isfinite().all()
    assert (found.scale > 0).all()


def test_negative_activations_become_zero_on_a_grid_from_zero():
    found = lsq(torch.tensor([[-3.0, 0.4, 99.0]]), 0, 15, torch.tensor(0.5))
    assert found.values.tolist() == [[0.0, 0.5, 7.5]]


def test_the_first_step_is_that_of_the_paper():
    rows = torch.tensor([[1.0, -3.0], [0.5, 0.5]])
    assert torch.allclose(lsq.learned["step"](rows, -4, 4), torch.tensor([[2.0], [0.5]]))
    assert lsq.learned["step"](torch.zeros(1, 5), -4, 4).tolist() == [[1.0]]


@pytest.mark.parametrize(("quant_min", "quant_max"), [(-1, 1), (-3, 3), (-7, 7)])
def test_descent_on_the_error_brings_the_step_near_the_best_of_all(quant_min, quant_max):
    values = drawn(1, 1000)
    step = torch.nn.Parameter(3 * lsq.learned["step"](values, quant_min, quant_max))
    optimizer = torch.optim.SGD([step], lr=0.3)

    def error(one):
        return (lsq(values, quant_min, quant_max, one).values - values).square().mean()

    for _ in range(200):
        optimizer.zero_grad()
        # The gradient is scaled for a loss that is a sum over weights.
        (error(step) * math.sqrt(1000 * quant_max)).backward()
        optimizer.step()
    best = min(error(torch.tensor([[one / 50]])).item() for one in range(1, 150))
    assert error(step).item() < 1.1 * best


def test_a_learned_step_in_half_precision_runs_keeps_its_own_precision():
    values, step = drawn(2, 64).bfloat16().requires_grad_(), torch.tensor([[0.3], [0.2]], requires_grad=True)
    lsq(values, -7, 7, step).values.float().sum().backward()
    assert (values.grad.dtype, step.grad.dtype) == (torch.bfloat16, torch.float32)


# PACT ---------------------------------------------------------------------------------------------------------------


def test_pact_by_hand():
    values = torch.tensor([[-1.0, 0.0, 0.4, 1.1], [2.9, 3.0, 3.1, 50.0]], requires_grad=True)
    clip = torch.tensor(3.0, requires_grad=True)
    found = pact(values, 3, clip)
    assert found.values.tolist() == [[0.0, 0.0, 0.0, 1.0], [3.0, 3.0, 3.0, 3.0]]
    assert (found.scale.item(), found.zero_point.item()) == (1.0, 0)
    found.values.backward(torch.tensor([[1.0, 2.0, 4.0, 8.0], [16.0, 32.0, 64.0, 128.0]]))
    # The clip's slope is 1 from itself on; its value is not rounded below.
    assert clip.grad.item() == 32 + 64 + 128
    assert values.grad[0, 0] == 0
    assert values.grad[0, 2:].tolist() == [4.0, 8.0]
    assert values.grad[1].tolist() == [16.0, 0.0, 0.0, 0.0]


def test_pact_is_the_formula_of_the_paper():
    values, clip, steps = drawn(500).double() * 4, 2.7, 15
    bounded = 0.5 * (values.abs() - (values - clip).abs() + clip)
    expected = (bounded * (steps / clip)).round() * (clip / steps)
    assert torch.allclose(pact(values, steps, torch.tensor(clip).double()).values, expected)


def test_the_clips_slope_is_that_of_finite_differences_on_a_fine_grid():
    values, clip = 3 * drawn(500).double(), torch.tensor(2.0).double().requires_grad_()
    pact(values, 2**16, clip).values.sum().backward()
    change = (pact(values, 2**16, clip + 0.01).values.sum() - pact(values, 2**16, clip - 0.01).values.sum()) / 0.02
    assert clip.grad.item() == pytest.approx(change.item(), rel=0.02)


def test_values_of_both_signs_are_clipped_at_both_ends_if_the_grid_has_numbers_below_zero():
    values, clip = torch.tensor([-9.0, -1.1, 0.2, 9.0], requires_grad=True), torch.tensor(-7.0, requires_grad=True)
    found = pact(values, 7, clip, quant_min=-8)
    assert found.values.tolist() == [-7.0, -1.0, 0.0, 7.0]
    found.values.backward(torch.tensor([1.0, 1.0, 1.0, 3.0]))
    assert values.grad.tolist() == [0.0, 1.0, 1.0, 0.0]
    assert clip.grad.item() == -(3.0 - 1.0)  # Below zero the clip counts by its size.


def test_the_first_clip_is_ten_or_the_largest_value_if_that_is_smaller():
    first = pact.learned["clip"]
    assert first(torch.tensor([[-30.0, 2.0, 4.0]]), 0, 15).tolist() == [[4.0]]
    assert first(torch.tensor([[-30.0, 2.0, 40.0]]), 0, 15).tolist() == [[10.0]]
    assert first(torch.tensor([[-3.0, 2.0]]), -8, 7).tolist() == [[3.0]]
    assert first(torch.tensor([[-3.0, -2.0]]), 0, 15).tolist() == [[1.0]]


def test_weight_decay_on_the_clip_pulls_it_down_and_never_through_zero():
    clip = torch.nn.Parameter(torch.tensor(10.0))
    optimizer = torch.optim.SGD([clip], lr=0.5, weight_decay=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        # Nothing reaches the clip, so decay alone moves it.
        pact(torch.zeros(1, 8), 15, clip).values.sum().backward()
        optimizer.step()
    assert 0 < clip.item() < 1e-4
