"""Rounding that is learned: against the best of all roundings, found by trying each, and formulas by hand."""

from itertools import product

import pytest
import torch

from lightning_compress.quantization.ptq.rounding_candidates import (
    RoundingCandidates,
    learn_rounding,
    rectified_sigmoid,
    regularizer_exponent,
    rounding_position,
    rounding_regularizer,
)


def roundings_of(matrix, scale, limits=(-7, 7), zero_point=0):
    rows = len(matrix)
    return RoundingCandidates.from_weight(
        matrix, torch.full((rows, 1), scale), torch.full((rows, 1), zero_point, dtype=torch.int32), *limits
    )


def alike(count, features, generator):
    """Inputs that go together, so that it pays to round against the nearest."""
    return torch.randn(count, 1, generator=generator) + 0.3 * torch.randn(count, features, generator=generator)


def squared_error(matrix, inputs):
    """Of each output of a linear layer, with other weights in the place of `matrix`."""
    return lambda values, step: ((values - matrix) @ inputs.T).square().mean(1)


def test_the_sigmoid_reaches_both_ends_and_comes_back():
    assert rectified_sigmoid(torch.tensor([-4.0, 0.0, 4.0])).tolist() == [0.0, 0.5, 1.0]
    shares = torch.tensor([0.0, 0.1, 0.5, 0.99])
    assert torch.allclose(rectified_sigmoid(rounding_position(shares)), shares, atol=1e-6)


def test_indecision_is_nothing_at_the_ends_and_one_half_way():
    assert rounding_regularizer(torch.tensor([0.0, 0.25, 0.5, 1.0]), 2.0).tolist() == [0.0, 0.75, 1.0, 0.0]


def test_the_exponent_falls_after_a_fifth_of_the_steps():
    found = [regularizer_exponent(step, 101) for step in (0, 19, 20, 60, 100)]
    assert found == [None, None, 20.0, pytest.approx(11.0), 2.0]


def test_choices_are_the_neighbours_within_the_limits_and_zeros_have_none():
    matrix = torch.tensor([[0.0, 0.3, -0.3, 1.0, 5.1, -0.75]])
    found = roundings_of(matrix, 0.5, limits=(-2, 2))
    assert found.free.tolist() == [[False, True, True, False, False, True]]
    lower, upper = found.values(torch.zeros_like(matrix)), found.values(torch.ones_like(matrix))
    assert lower.tolist() == [[0.0, 0.0, -0.5, 1.0, 1.0, -1.0]]
    assert upper.tolist() == [[0.0, 0.5, 0.0, 1.0, 1.0, -0.5]]
    assert found.values(found.nearest()).tolist() == [[0.0, 0.5, -0.5, 1.0, 1.0, -1.0]]


def test_a_zero_point_moves_the_limits_along():
    found = roundings_of(torch.tensor([[-0.3, 1.3, 9.0]]), 1.0, limits=(0, 3), zero_point=1)
    assert found.values(torch.ones(1, 3)).tolist() == [[0.0, 2.0, 2.0]]
    assert found.values(torch.zeros(1, 3)).tolist() == [[-1.0, 1.0, 2.0]]


def test_it_comes_near_to_the_best_of_all_roundings_and_no_row_is_worse_off():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-3, 3, 30)[:, None]
    matrix, inputs = (torch.rand(30, 8, generator=generator) * 2 - 1) * sizes, alike(64, 8, generator)
    choices = RoundingCandidates.from_weight(matrix, sizes / 3, torch.zeros(30, 1, dtype=torch.int32), -3, 3)
    error_of = squared_error(matrix, inputs)
    tried = [choices.values(torch.tensor(ups).expand(30, 8)) for ups in product((0.0, 1.0), repeat=8)]
    best = torch.stack([error_of(values, None) for values in tried]).amin(0)
    nearest = error_of(choices.values(choices.nearest()), None)
    found = error_of(learn_rounding(choices, error_of, range(300), 300), None)
    assert (found >= 0.999 * best).all()
    hasty = error_of(learn_rounding(choices, error_of, range(10), 10), None)
    assert (found <= nearest).all()
    assert (hasty <= nearest).all()
    assert (best / nearest).mean() < 0.7
    assert (found / nearest).mean() < (best / nearest).mean() + 0.1


def test_the_nearest_stays_where_nothing_is_better():
    # Inputs that have nothing to do with each other: the error is a sum over weights, least at the nearest.
    matrix = torch.tensor([[0.3, -0.7, 1.2, 0.0]])
    choices = roundings_of(matrix, 1.0)
    found = learn_rounding(choices, squared_error(matrix, torch.eye(4)), range(50), 50)
    assert found.tolist() == [[0.0, -1.0, 1.0, 0.0]]


def test_a_weight_on_its_grid_stays_there_and_costs_no_step():
    matrix = torch.tensor([[0.0, 0.5, -1.0]])
    found = learn_rounding(roundings_of(matrix, 0.5), lambda *_: pytest.fail("nothing is to be learned"), range(5), 5)
    assert torch.equal(found, matrix)
