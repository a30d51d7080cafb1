"""What makes a weight important, by hand and by brute force."""

import pytest
import torch
from torch import nn

from lightning_compress.core.registry import call_with_supported_args, registered, required_args
from lightning_compress.pruning.functional import criteria
from lightning_compress.pruning.functional.topk import top_k_mask

every_criterion = pytest.mark.parametrize("criterion", registered(criteria).values(), ids=registered(criteria))


def offered(shape, dtype=torch.float32):
    """Something for each name that a criterion may ask for."""
    generator = torch.Generator().manual_seed(0)
    drawn = {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name in ("weight", "grad", "weight_grad_sum", "initial_weight")
    }
    norm = torch.rand(1, *shape[1:2], *[1] * (len(shape) - 2), generator=generator).to(dtype)
    return {**drawn, "input_norm": norm, "generator": torch.Generator().manual_seed(1)}


@every_criterion
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_criterion_keeps_the_shape_and_its_inputs(criterion, shape, dtype):
    given = offered(shape, dtype)
    before = {name: value.clone() for name, value in given.items() if isinstance(value, torch.Tensor)}
    scores = call_with_supported_args(criterion, **given)
    assert scores.shape == shape
    assert scores.isfinite().all()
    for name, value in before.items():
        assert torch.equal(given[name], value), name
        assert scores.data_ptr() != given[name].data_ptr(), f"scores share the memory of {name}"


@every_criterion
def test_every_criterion_asks_only_for_what_is_offered(criterion):
    assert required_args(criterion)
    assert required_args(criterion) <= set(criteria.OFFERED)


@every_criterion
def test_no_criterion_touches_the_users_random_stream(criterion):
    before = torch.get_rng_state()
    call_with_supported_args(criterion, **offered((4, 3)))
    assert torch.equal(torch.get_rng_state(), before)


def test_magnitude_and_gradient_forget_the_sign():
    assert criteria.magnitude(torch.tensor([[1.0, -2.0, 0.0]])).tolist() == [[1.0, 2.0, 0.0]]
    assert criteria.gradient(torch.tensor([[-3.0, 0.5, 0.0]])).tolist() == [[3.0, 0.5, 0.0]]


def test_taylor_is_the_change_of_a_linear_loss_when_a_weight_is_removed():
    torch.manual_seed(0)
    layer = nn.Linear(3, 4).double()
    inputs, slopes = torch.randn(5, 3).double(), torch.randn(5, 4).double()

    def loss():
        return (layer(inputs) * slopes).sum()

    loss().backward()
    scores = criteria.taylor(layer.weight.detach(), layer.weight.grad)
    with torch.no_grad():
        dense = loss()
        for place in [(row, column) for row in range(4) for column in range(3)]:
            kept = layer.weight[place].clone()
            layer.weight[place] = 0.0
            assert scores[place].item() == pytest.approx((loss() - dense).abs().item(), abs=1e-12)
            layer.weight[place] = kept


def test_movement_is_the_descent_of_a_score_on_the_straight_through_gradient():
    # In the paper a score s is learned beside each weight: s <- s - lr * dL/ds, where dL/ds = dL/dw * w.
    generator = torch.Generator().manual_seed(0)
    weights, grads = torch.randn(6, 2, 3, generator=generator), torch.randn(6, 2, 3, generator=generator)
    score, total = torch.zeros(2, 3), torch.zeros(2, 3)
    for weight, grad in zip(weights, grads, strict=True):
        score = score - 1.0 * grad * weight
        total = total + weight * grad
    assert torch.allclose(criteria.movement(total), score)


def test_movement_prefers_the_weight_that_goes_away_from_zero():
    # One step of gradient descent on each: 1.0 -> 1.5, -1.0 -> -1.5, 1.0 -> 0.5, -1.0 -> -0.5.
    weight, grad = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.tensor([-0.5, 0.5, 0.5, -0.5])
    assert criteria.movement(weight * grad).tolist() == [0.5, 0.5, -0.5, -0.5]


def test_wanda_by_hand():
    weight, norm = torch.tensor([[1.0, -2.0], [3.0, 0.5]]), torch.tensor([[2.0, 0.25]])
    assert criteria.wanda(weight, norm).tolist() == [[2.0, 0.5], [6.0, 0.125]]


def test_random_is_the_same_at_each_update_so_that_its_masks_are_nested():
    weight = torch.randn(20, 30)
    scores = [criteria.random(weight, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*scores)
    assert not torch.equal(scores[0], criteria.random(weight, torch.Generator().manual_seed(4)))
    assert ((scores[0] >= 0) & (scores[0] < 1)).all()
    wider = torch.ones(20, 30, dtype=torch.bool)
    for kept in (500, 300, 100, 1):
        mask = top_k_mask(criteria.random(weight, torch.Generator().manual_seed(3)), kept)
        assert not (mask & ~wider).any()
        wider = mask
