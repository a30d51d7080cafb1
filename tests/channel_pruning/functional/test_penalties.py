"""Gradients of penalties, against autograd of the penalties written out."""

import pytest
import torch

from lightning_compress.channel_pruning.functional.penalties import group_lasso_gradient, slimming_gradient


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_slimming_is_the_gradient_of_the_absolute_value():
    gamma = drawn(7).requires_grad_()
    (0.3 * gamma.abs().sum()).backward()
    assert torch.allclose(slimming_gradient(gamma, 0.3), gamma.grad)
    assert slimming_gradient(torch.tensor([0.0, -2.0, 1.0]), 0.5).tolist() == [0.0, -0.5, 0.5]


def test_group_lasso_is_the_gradient_of_the_norms():
    weight = drawn(5, 9).requires_grad_()
    (0.3 * 9**0.5 * weight.square().sum(1).sqrt().sum()).backward()
    assert torch.allclose(group_lasso_gradient(weight, 0.3), weight.grad)


def test_group_lasso_is_0_at_0_and_of_full_length_however_small_the_weights():
    weight = torch.tensor([[0.0, 0.0], [3e-30, 4e-30]])
    assert group_lasso_gradient(weight, 1.0)[0].tolist() == [0.0, 0.0]
    assert group_lasso_gradient(weight, 1.0)[1].tolist() == pytest.approx([0.6 * 2**0.5, 0.8 * 2**0.5])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_they_keep_the_precision_and_the_input(dtype):
    for penalty, weight in [(slimming_gradient, drawn(4).to(dtype)), (group_lasso_gradient, drawn(4, 3).to(dtype))]:
        before = weight.clone()
        gradient = penalty(weight.requires_grad_(), 0.1)
        assert gradient.dtype == dtype
        assert gradient.shape == weight.shape
        assert not gradient.requires_grad
        assert torch.equal(weight, before)


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_a_strength_is_at_least_0(strength):
    with pytest.raises(ValueError, match="at least 0"):
        slimming_gradient(torch.ones(2), strength)
    with pytest.raises(ValueError, match="at least 0"):
        group_lasso_gradient(torch.ones(2, 2), strength)


def test_group_lasso_wants_rows():
    with pytest.raises(ValueError, match=r"flatten\(1\)"):
        group_lasso_gradient(torch.ones(2, 3, 3, 3), 0.1)
