"""What a layer can do about units that it no longer reads: refit its weight, take up their constants."""

import torch
from torch import Tensor


def least_squares(patches: Tensor, targets: Tensor, weight: Tensor | None = None, ridge: float = 1e-6) -> Tensor:
    """The weight with which a layer gives the wanted outputs most nearly, from the inputs that are left.

    It minimises `|patches . w - targets|^2 + ridge * s * |w - weight|^2`, where s is the mean over inputs of their sum
    of squares, in float64. So what the samples leave open stays as it was.

    Args:
        patches: inputs by kept unit and kernel tap, shape `(samples, units, taps)`.
        targets: what the layer gave before without its bias, shape `(samples, outputs)`.
        weight: the old weight of the kept units, shape `(units, taps, outputs)`; None for zeros.
        ridge: above 0, no unit.

    Returns:
        Weight of shape `(units, taps, outputs)`, in float32 or in float64 if the patches are.

    Raises:
        ValueError: if shapes do not fit, there are no samples, values are not finite, or `ridge` is not above 0.

    Reference: He et al., 2017, section 3.1, https://arxiv.org/abs/1707.06168; Luo et al., 2017, section 3.2.3,
    https://arxiv.org/abs/1707.06342

    >>> patches = torch.tensor([[[1.0]], [[2.0]]])  # two samples, a kept unit, a kernel tap
    >>> least_squares(patches, targets=torch.tensor([[3.0], [6.0]])).round(decimals=3)
    tensor([[[3.]]])
    """
    _check(patches, targets, weight, ridge)
    inputs, wanted = patches.detach().double().flatten(1), targets.detach().double()
    shape = (*patches.shape[1:], targets.shape[1])
    old = inputs.new_zeros(shape) if weight is None else weight.detach().double()
    missing = wanted - inputs @ old.flatten(0, 1)
    refit = old + _ridge_solution(inputs, missing, ridge).view(shape)
    return refit.to(torch.promote_types(patches.dtype, torch.float32))


def constant_units(activations: Tensor) -> tuple[Tensor, Tensor]:
    """Find the units that have one and the same value at every sample and position.

    Without one of these, the next layer misses but a constant, which its bias can take up (exactly, but for padding).

    Args:
        activations: shape `(samples, units, *positions)`.

    Returns:
        Boolean mask of shape `(units,)`, True where a unit is constant; and the values, 0 where it is not, in float32
        or wider.

    Raises:
        ValueError: if there are no samples.

    >>> constant_units(torch.tensor([[7.0, 0.0], [7.0, 1.0]]))
    (tensor([ True, False]), tensor([7., 0.]))
    """
    if activations.dim() < 2 or not activations.numel():
        raise ValueError(
            f"activations have shape (samples, units, *positions), but are {tuple(activations.shape)}. Let at least "
            f"one batch go through the model while it is observed."
        )
    values = activations.detach().transpose(0, 1).flatten(1)
    low, high = values.amin(1), values.amax(1)
    mask = low == high
    return mask, torch.where(mask, low, 0.0).to(torch.promote_types(low.dtype, torch.float32))


def _ridge_solution(inputs: Tensor, wanted: Tensor, ridge: float) -> Tensor:
    """`argmin |inputs @ w - wanted|^2 + ridge * s * |w|^2`, by whichever system is the smaller."""
    scale = float(inputs.square().sum()) / inputs.shape[1]
    if scale == 0.0:
        return inputs.T @ wanted
    by_sample = inputs.shape[0] < inputs.shape[1]
    products = inputs @ inputs.T if by_sample else inputs.T @ inputs
    products.diagonal().add_(ridge * scale)
    factor = torch.linalg.cholesky(products)
    if by_sample:
        return inputs.T @ torch.cholesky_solve(wanted, factor)
    return torch.cholesky_solve(inputs.T @ wanted, factor)


def _check(patches: Tensor, targets: Tensor, weight: Tensor | None, ridge: float) -> None:
    if patches.dim() != 3 or targets.dim() != 2 or len(patches) != len(targets) or not patches.numel():
        raise ValueError(
            f"patches have shape (samples, units, taps) and targets (samples, outputs), but are "
            f"{tuple(patches.shape)} and {tuple(targets.shape)}."
            f" Sample both at the same places, at least once, with at least one unit kept."
        )
    expected = (*patches.shape[1:], targets.shape[1])
    if weight is not None and weight.shape != expected:
        raise ValueError(
            f"weight has shape {expected}, but is {tuple(weight.shape)}. Pass it for the kept units alone."
        )
    if not ridge > 0:
        raise ValueError(f"ridge is above 0, but is {ridge}. For hardly any write 1e-9.")
    if not (patches.isfinite().all() and targets.isfinite().all()):
        raise ValueError("patches or targets have values that are infinite or no numbers: look for where they arise.")
