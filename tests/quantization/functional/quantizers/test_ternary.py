"""Ternary weights by their papers' formulas in plain Python, and by brute force."""

import pytest
import torch

from lightning_compress.quantization.functional.quantizers import ttq, twn


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_twn_is_the_formula_of_the_paper():
    values = drawn(3, 40).double()
    found = twn(values)
    for row, result, scale in zip(values.tolist(), found.values.tolist(), found.scale, strict=True):
        threshold = 0.7 * sum(map(abs, row)) / len(row)
        large = [abs(one) for one in row if abs(one) > threshold]
        mean = sum(large) / len(large)
        expected = [0.0 if abs(one) <= threshold else mean if one > 0 else -mean for one in row]
        assert result == pytest.approx(expected)
        assert scale.item() == pytest.approx(mean)


def test_the_scale_of_twn_is_the_best_for_its_choice_of_weights():
    values = drawn(1, 200)
    found = twn(values)

    def error(scale):
        return (found.values.sign() * scale - values).square().sum().item()

    best = error(found.scale.item())
    assert all(error(found.scale.item() * share) > best for share in (0.9, 0.99, 1.01, 1.1))


def test_twn_is_near_the_best_of_all_thresholds():
    sizes = drawn(1, 2000).abs().sort(descending=True).values[0]
    # With the k largest weights at their mean, the error is |w|^2 - (sum of those)^2 / k.
    gains = sizes.cumsum(0).square() / torch.arange(1, 2001)
    best = sizes.square().sum() - gains.max()
    found = (twn(sizes[None]).values - sizes).square().sum()
    assert found < 1.02 * best


def test_the_gradient_of_twn_passes_everywhere_as_it_is():
    values, upstream = (5 * drawn(2, 30)).requires_grad_(), drawn(2, 30, seed=1)
    twn(values).values.backward(upstream)
    assert torch.equal(values.grad, upstream)


def test_equal_weights_keep_their_size():
    assert twn(torch.tensor([[2.0, -2.0, 2.0]])).values.tolist() == [[2.0, -2.0, 2.0]]


def test_ttq_by_hand():
    values = torch.tensor([[-2.0, -0.2, -0.1, 0.0, 0.1, 0.3, 1.0]], requires_grad=True)
    positive, negative = torch.tensor([[0.5]], requires_grad=True), torch.tensor([[3.0]], requires_grad=True)
    found = ttq(values, positive, negative)  # The threshold is 0.1.
    assert found.values.tolist() == [[-3.0, -3.0, 0.0, 0.0, 0.0, 0.5, 0.5]]
    found.values.backward(torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]]))
    assert positive.grad.tolist() == [[32.0 + 64.0]]
    assert negative.grad.tolist() == [[-(1.0 + 2.0)]]
    assert values.grad.tolist() == [[3.0, 6.0, 4.0, 8.0, 16.0, 16.0, 32.0]]


def test_the_slopes_of_the_levels_are_those_of_finite_differences():
    values, upstream = drawn(3, 30).double(), drawn(3, 30, seed=1).double()
    positive = torch.tensor([[0.5], [1.0], [2.0]]).double().requires_grad_()
    negative = torch.tensor([[1.5], [0.3], [0.7]]).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda *levels: ttq(values, *levels).values * upstream, (positive, negative))


def test_a_level_below_zero_counts_by_its_size():
    values = drawn(2, 20)
    below, above = torch.tensor([[-0.5], [-0.5]]), torch.tensor([[0.5], [0.5]])
    assert torch.equal(ttq(values, below, below).values, ttq(values, above, above).values)


def test_the_first_levels_are_the_mean_sizes_beyond_the_threshold():
    rows = torch.tensor([[2.0, 4.0, 0.1, -1.0, -0.15], [1.0, 1.0, 1.0, 1.0, 1.0]])
    # The first row's threshold is 0.2; the second has no negative weights.
    assert ttq.learned["positive"](rows, -1, 1).tolist() == [[3.0], [1.0]]
    assert ttq.learned["negative"](rows, -1, 1).tolist() == [[1.0], [1.0]]
