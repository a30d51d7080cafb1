"""Rounding that is learned: each weight goes up or down to where the layer's output suffers least.

Reference: Nagel et al., 2020, https://arxiv.org/abs/2004.10568
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.core.interpolation import interpolate

# The paper's: how far the sigmoid is stretched beyond [0, 1], the exponents between which the pull to the ends goes,
# and the share of the steps before it sets in.
STRETCH = 0.1
EXPONENTS = (20.0, 2.0)
WARM_UP = 0.2
# Ours, found on small networks: errors count in units of those of the nearest rounding, so that the pull is one for all
# layers, and a hundred steps of this rate lead from one end of the sigmoid to the other.
LEARNING_RATE = 0.1
PULL = 10.0


@dataclass(frozen=True, eq=False)
class RoundingCandidates:
    """The two neighbours on the grid of each number of a weight, cut into rows.

    Attributes:
        below: the whole number at or below each, zero point included.
        fraction: how far above that it lies, in [0, 1).
        scale, zero_point: of each row, shape `(rows, 1)`.
        quant_min, quant_max: limits of the whole numbers.
        free: where there is a choice; zeros stay zeros, and what lies on the grid stays there.
    """

    below: Tensor
    fraction: Tensor
    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int
    free: Tensor

    @classmethod
    def from_weight(
        cls, matrix: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int
    ) -> "RoundingCandidates":
        """Those of a weight that was cut into rows."""
        places = matrix.float() / scale
        nearest = places.round()
        # What was put on the grid before may miss its place by the last bit.
        there = (places - nearest).abs() < 1e-4
        below = torch.where(there, nearest, places.floor())
        inside = (below + zero_point >= quant_min) & (below + zero_point < quant_max)
        fraction = torch.where(there, torch.zeros_like(places), places - below)
        return cls(below + zero_point, fraction, scale, zero_point, quant_min, quant_max, ~there & inside)

    def values(self, share: Tensor) -> Tensor:
        """The rows, with each free number this share of the way from the neighbour below it to the one above."""
        going = torch.where(self.free, share, torch.zeros_like(share))
        return ((self.below + going).clamp(self.quant_min, self.quant_max) - self.zero_point) * self.scale

    def nearest(self) -> Tensor:
        """1 for what is rounded up if each goes to the nearest, else 0."""
        return (self.fraction.round() > 0).to(self.fraction.dtype)


def rectified_sigmoid(position: Tensor) -> Tensor:
    """A sigmoid that reaches 0 and 1: stretched by a tenth of its height at either end, and cut."""
    return (torch.sigmoid(position) * (1 + 2 * STRETCH) - STRETCH).clamp(0, 1)


def rounding_position(share: Tensor) -> Tensor:
    """Where the rectified sigmoid has this value in [0, 1]."""
    return torch.logit((share + STRETCH) / (1 + 2 * STRETCH))


def rounding_regularizer(share: Tensor, exponent: float) -> Tensor:
    """`1 - |2 * share - 1| ** exponent`: 0 at both ends, and 1 between them, the more so the larger the exponent."""
    return 1 - (2 * share - 1).abs() ** exponent


def regularizer_exponent(step: int, steps: int) -> float | None:
    """The exponent of `rounding_regularizer`, which falls from step to step; None during the warm-up."""
    progress = (step / max(steps - 1, 1) - WARM_UP) / (1 - WARM_UP)
    return None if progress < 0 else interpolate(*EXPONENTS, progress)


def learn_rounding(
    roundings: RoundingCandidates, error_of: Callable[[Tensor, int | None], Tensor], steps: Iterable[int], count: int
) -> Tensor:
    """The rows on their grid, rounded so that errors are small; to the nearest, where nothing better is found.

    Args:
        roundings: to choose from.
        error_of: of the rows, and of the step, whose samples are drawn by it, or None for all samples: the squared
            errors of the outputs, each of which depends on its own share of the rows, in their order.
        steps: their numbers, from 0 on.
        count: how many these are.
    """
    nearest = roundings.nearest()
    if not roundings.free.any():
        return roundings.values(nearest)
    usual = error_of(roundings.values(nearest), None)
    weight = torch.where(usual > 0, usual, torch.ones_like(usual)).reciprocal()
    position = rounding_position(roundings.fraction).requires_grad_()
    optimizer = torch.optim.Adam([position], LEARNING_RATE)
    for step in steps:
        with torch.enable_grad():
            share = rectified_sigmoid(position)
            loss = (weight * error_of(roundings.values(share), step)).mean()
            exponent = regularizer_exponent(step, count)
            if exponent is not None:
                loss = loss + PULL * rounding_regularizer(share, exponent)[roundings.free].mean()
            (position.grad,) = torch.autograd.grad(loss, position)
        optimizer.step()
    learned = (rectified_sigmoid(position.detach()) > 0.5).to(nearest.dtype)
    better = error_of(roundings.values(learned), None) < usual
    chosen = torch.where(better[:, None], learned.reshape(len(usual), -1), nearest.reshape(len(usual), -1))
    return roundings.values(chosen.reshape_as(nearest))
