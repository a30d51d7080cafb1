"""The order in which the lasso takes its features in, exactly: a walk along the corners of its solution.

Reference: Osborne et al., 2000, https://doi.org/10.1093/imanum/20.3.389
"""

from dataclasses import dataclass

import torch
from torch import Tensor

NEGLIGIBLE = 1e-10  # of its own size: what is left of a feature that the taken ones make up
CORNERS = 8  # for each feature: a path may have far more, though hardly any has; what enters after these is left out


@dataclass(frozen=True)
class Segment:
    """A stretch of the path on which the same features are taken: `coefficients = fixed - penalty * slope`.

    Attributes:
        taken: indices of the taken features.
        factor: Cholesky factor of their inner products.
        fixed, slope: shape `(features,)`, 0 for those that are not taken.

    >>> segment = Segment([0], torch.ones(1, 1), fixed=torch.tensor([1.0, 0.0]), slope=torch.tensor([0.5, 0.0]))
    >>> segment.fixed - 1.0 * segment.slope  # the coefficients at penalty 1
    tensor([0.5000, 0.0000])
    """

    taken: list[int]
    factor: Tensor
    fixed: Tensor
    slope: Tensor


def entering_order(products: Tensor) -> list[int]:
    """The features that the lasso takes in as its penalty falls to 0, in the order in which each first enters.

    It solves `min 1/2 |sum_c z_c - sum_c beta_c z_c|^2 + penalty * |beta|_1`.

    Args:
        products: inner products of the features z, shape `(features, features)`, in float64.

    Returns:
        Their indices. Features that are zero, or made up of others, may never enter.

    >>> entering_order(torch.diag(torch.tensor([4.0, 0.0, 9.0], dtype=torch.float64)))
    [2, 0]
    """
    wanted, signs = products.sum(1), torch.zeros_like(products[0])
    never = products.diagonal() <= NEGLIGIBLE * products.diagonal().max()
    order: list[int] = []
    left_out, penalty, last = never.clone(), float("inf"), -1
    for _ in range(CORNERS * len(products)):
        segment = _segment(products, wanted, signs)
        corners, entering = _corners(products, wanted, segment, penalty, last)
        corners[left_out] = 0.0
        feature = int(corners.argmax())
        if corners[feature] <= NEGLIGIBLE * wanted.abs().max():
            break
        if not signs[feature] and _is_made_up(products, segment, feature):
            left_out[feature] = True
            continue
        if signs[feature]:
            signs[feature], left_out = 0.0, never.clone()  # what the taken ones made up may be free again
        else:
            signs[feature] = entering[feature]
            order += [feature] if feature not in order else []
        penalty, last = min(penalty, float(corners[feature])), feature
    return order


def _segment(products: Tensor, wanted: Tensor, signs: Tensor) -> Segment:
    taken = signs.nonzero().flatten()
    factor = torch.linalg.cholesky(products[taken][:, taken])
    solved = torch.cholesky_solve(torch.stack([wanted[taken], signs[taken]], 1), factor)
    fixed, slope = torch.zeros_like(signs), torch.zeros_like(signs)
    fixed[taken], slope[taken] = solved.unbind(1)
    return Segment(taken.tolist(), factor, fixed, slope)


def _corners(products: Tensor, wanted: Tensor, segment: Segment, penalty: float, last: int) -> tuple[Tensor, Tensor]:
    """For each feature the next penalty at which it enters or leaves, 0 if none, and the sign with which it enters."""
    rest, turn = wanted - products @ segment.fixed, products @ segment.slope
    # A feature enters where its correlation with what is missing, rest + penalty * turn, reaches +penalty or -penalty.
    both = torch.stack([rest / (1 - turn), -rest / (1 + turn)])
    if last >= 0:  # that which has just left is at the border still
        both[int(rest[last] + penalty * turn[last] < 0), last] = 0.0
    entering = _within(both, penalty).max(0)
    leaving = _within(segment.fixed / segment.slope, penalty)
    if last >= 0:  # that which has just entered is at zero still
        leaving[last] = 0.0
    taken = torch.zeros_like(wanted, dtype=torch.bool)
    taken[segment.taken] = True
    return torch.where(taken, leaving, entering.values), 1.0 - 2.0 * entering.indices


def _within(corners: Tensor, penalty: float) -> Tensor:
    """The corners ahead, 0 for all others."""
    return torch.where((corners > 0) & (corners <= penalty * (1 + 1e-9)), corners, 0.0)


def _is_made_up(products: Tensor, segment: Segment, feature: int) -> bool:
    """Whether a feature is a sum of multiples of the taken ones."""
    shared = products[segment.taken, feature, None]
    left = products[feature, feature] - (shared * torch.cholesky_solve(shared, segment.factor)).sum()
    return bool(left <= NEGLIGIBLE * products[feature, feature])
