"""The lasso's path against sklearn's, where it turns back and where features are made up of others."""

import numpy as np
import pytest
import torch

from lightning_compress.channel_pruning.functional.lasso import entering_order


def features(seed, rows, columns):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return mixed.double()


@pytest.mark.parametrize(("rows", "columns"), [(200, 30), (20, 30), (8, 3)])
@pytest.mark.parametrize("seed", range(6))
def test_it_enters_in_the_order_of_sklearns_lars(seed, rows, columns):
    linear_model = pytest.importorskip("sklearn.linear_model")
    drawn = features(seed, rows, columns)
    wanted = drawn.sum(1).numpy()
    _, _, path = linear_model.lars_path(drawn.numpy(), wanted, method="lasso", alpha_min=1e-4)
    expected = sorted((int((one != 0).argmax()), place) for place, one in enumerate(path) if (one != 0).any())
    order = entering_order(drawn.T @ drawn)
    assert order[: len(expected)] == [place for _, place in expected]
    if columns == 30:  # long enough for features to leave, and to come back
        assert (np.diff((path != 0).astype(int), axis=1) < 0).any()


def test_copies_sums_and_zeros_of_features_are_left_out():
    base = features(0, 50, 4)
    drawn = torch.cat([base, base[:, :1], base[:, :2].sum(1, keepdim=True), torch.zeros(50, 1).double()], 1)
    order = entering_order(drawn.T @ drawn)
    assert len(order) == len(set(order))
    assert 6 not in order
    assert len({0, 4} & set(order)) == 1
    assert entering_order(torch.zeros(3, 3).double()) == []


def test_of_features_that_come_in_copies_one_of_each_enters():
    for seed in range(40):
        drawn = features(seed, 40, 6).relu()[:, [0, 1, 2, 3, 4, 5, 0, 3, 3]].mul(2).round()
        order = entering_order(drawn.T @ drawn)
        assert len(order) == np.linalg.matrix_rank(drawn.numpy())
        assert len({0, 6} & set(order)) == len({3, 7, 8} & set(order)) == 1
