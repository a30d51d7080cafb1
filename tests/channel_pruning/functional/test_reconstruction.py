"""Refits against numpy's least squares, constants by hand."""

import numpy as np
import pytest
import torch

from lightning_compress.channel_pruning.functional.reconstruction import constant_units, least_squares


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("samples", [50, 7], ids=["more samples than unknowns", "fewer"])
@pytest.mark.parametrize("given", [True, False], ids=["towards the old weight", "towards zero"])
def test_it_is_numpys_least_squares_of_samples_and_ridge(samples, given):
    patches, targets, old = drawn(samples, 4, 3), drawn(samples, 5, seed=1), drawn(4, 3, 5, seed=2)
    refit = least_squares(patches, targets, weight=old if given else None, ridge=0.01)
    flat = patches.flatten(1).numpy()
    root = (0.01 * (flat**2).sum(0).mean()) ** 0.5
    below = root * (old.flatten(0, 1).numpy() if given else np.zeros((12, 5)))
    expected = np.linalg.lstsq(np.vstack([flat, root * np.eye(12)]), np.vstack([targets.numpy(), below]), rcond=None)[0]
    assert refit.shape == (4, 3, 5)
    assert np.allclose(refit.flatten(0, 1).numpy(), expected)


def test_it_makes_up_for_a_removed_copy():
    patches, old = drawn(60, 3, 2), drawn(3, 2, 4, seed=1)
    patches[:, 2] = patches[:, 0]
    targets = patches.flatten(1) @ old.flatten(0, 1)
    refit = least_squares(patches[:, :2], targets, weight=old[:2], ridge=1e-10)
    assert torch.allclose(refit[0], old[0] + old[2], atol=1e-6)
    assert torch.allclose(refit[1], old[1], atol=1e-6)


def test_what_samples_leave_open_stays_as_it_was():
    patches, old = drawn(60, 3, 2).float(), drawn(3, 2, 4, seed=1).float()
    patches[:, 1] = 0.0
    refit = least_squares(patches, drawn(60, 4, seed=2), weight=old)
    assert torch.equal(refit[1], old[1])
    assert torch.equal(least_squares(torch.zeros(9, 3, 2), torch.ones(9, 4), weight=old), old)


def test_it_keeps_its_inputs_and_widens_half_precision():
    patches, targets = drawn(30, 3, 2).half(), drawn(30, 4, seed=1).half()
    before = patches.clone(), targets.clone()
    refit = least_squares(patches, targets)
    assert refit.dtype == torch.float32
    assert torch.equal(patches, before[0])
    assert torch.equal(targets, before[1])
    assert torch.allclose(refit, least_squares(patches.double(), targets.double()).float())


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="at least once"):
        least_squares(torch.zeros(0, 2, 3), torch.zeros(0, 4))
    with pytest.raises(ValueError, match="same places"):
        least_squares(torch.zeros(5, 2, 3), torch.zeros(6, 4))
    with pytest.raises(ValueError, match="kept units alone"):
        least_squares(torch.zeros(5, 2, 3), torch.zeros(5, 4), weight=torch.zeros(3, 3, 4))
    with pytest.raises(ValueError, match="above 0"):
        least_squares(torch.zeros(5, 2, 3), torch.zeros(5, 4), ridge=0.0)
    with pytest.raises(ValueError, match="infinite"):
        least_squares(torch.full((5, 2, 3), torch.inf), torch.zeros(5, 4))
    with pytest.raises(ValueError, match="at least one batch"):
        constant_units(torch.zeros(0, 4))


def test_constant_units_have_one_value_at_every_sample_and_position():
    activations = drawn(6, 5, 2, 2).float()
    activations[:, 1] = 0.25
    activations[:, 3] = 0.0
    activations[:, 4] = 0.5
    activations[5, 4, 1, 1] = 0.75
    mask, values = constant_units(activations)
    assert mask.tolist() == [False, True, False, True, False]
    assert values.tolist() == [0.0, 0.25, 0.0, 0.0, 0.0]
    mask, values = constant_units(torch.tensor([[1.0, 2.0], [1.0, 3.0]]).bfloat16())
    assert mask.tolist() == [True, False]
    assert values.tolist() == [1.0, 0.0]
    assert values.dtype == torch.float32
