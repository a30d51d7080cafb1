"""Penalties that drive whole units to zero, as the gradients that are added to those of the loss.

Added once, after gradients are accumulated, reduced and unscaled, they are exact whatever the precision of the run.
"""

import math

import torch
from torch import Tensor


def slimming_gradient(gamma: Tensor, strength: float) -> Tensor:
    """Gradient of `strength * |gamma|`, summed over units; 0 at 0.

    Args:
        gamma: scales of a normalisation layer, shape `(units,)`.
        strength: at least 0; 1e-5 to 1e-4 in the paper.

    Returns:
        Shape and precision of `gamma`.

    Raises:
        ValueError: if `strength` is negative or not finite.

    Reference: Liu et al., 2017, equation 1, https://arxiv.org/abs/1708.06519

    >>> slimming_gradient(torch.tensor([2.0, 0.0, -3.0]), strength=0.5)
    tensor([ 0.5000,  0.0000, -0.5000])
    """
    return gamma.detach().sign() * _checked(strength)


def group_lasso_gradient(weight: Tensor, strength: float) -> Tensor:
    """Gradient of `strength * sqrt(elements) * |w|_2` of each unit's weights w, summed over units; 0 where all are 0.

    The root makes large and small groups pay alike, after Yuan and Lin, 2006, https://doi.org/10.1111/j.1467-9868.2005.00532.x

    Args:
        weight: a row for each unit, shape `(units, elements)`.
        strength: at least 0.

    Returns:
        Shape and precision of `weight`.

    Raises:
        ValueError: if `weight` is no matrix, or `strength` is negative or not finite.

    Reference: Wen et al., 2016, section 3.1, https://arxiv.org/abs/1608.03665

    >>> group_lasso_gradient(torch.tensor([[3.0, 0.0, 4.0, 0.0], [0.0, 0.0, 0.0, 0.0]]), strength=0.5)
    tensor([[0.6000, 0.0000, 0.8000, 0.0000],
            [0.0000, 0.0000, 0.0000, 0.0000]])
    """
    if weight.dim() != 2:
        raise ValueError(f"weight has a row for each unit, but shape {tuple(weight.shape)}. Pass weight.flatten(1).")
    wide = weight.detach().double()  # the squares of small weights would be 0 in less
    norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    unit = torch.where(norm > 0, wide / norm, 0.0)
    return (unit * (_checked(strength) * math.sqrt(weight.shape[1]))).to(weight.dtype)


def _checked(strength: float) -> float:
    if not (math.isfinite(strength) and strength >= 0):
        raise ValueError(f"strength is a number of at least 0, but is {strength}. Try 1e-4.")
    return float(strength)
