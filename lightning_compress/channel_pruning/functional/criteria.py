"""Criteria of structured pruning: how much each unit (a filter, a channel, a neuron) matters.

A criterion is a function that asks for what it needs by naming it; only what it names is gathered:

| name | what | shape |
|---|---|---|
| `weight` | all weights that make a unit, a row each | `(units, elements)` |
| `grad` | their gradient of the loss | as `weight` |
| `gamma` | the scale of the normalisation layer behind the unit | `(units,)` |
| `gamma_grad` | its gradient of the loss | as `gamma` |
| `activations` | what the layers that read the units are given | `(samples, units, *positions)` |
| `activation_grads` | their gradient of the loss | as `activations` |
| `feature_maps` | the activations, or what the units' last layer gives | `(samples, units, height, width)` |
| `patches` | sampled inputs of one reading layer, by unit and kernel tap | `(samples, units, taps)` |
| `consumer_weight` | the weight of that layer | `(units, taps, outputs)` |
| `generator` | a seeded random generator on the CPU, the same at every update | |

It returns scores in float32, shape `(units,)`; a higher score is kept longer. Each raises ValueError where something
that it needs is None, empty, of another shape or not finite.
"""

import torch
from torch import Tensor

from lightning_compress.channel_pruning.functional.lasso import entering_order

OFFERED = (
    "weight", "grad", "gamma", "gamma_grad", "activations", "activation_grads", "feature_maps", "patches",
    "consumer_weight", "generator",
)  # fmt: skip

BINS = 100  # of the histograms of `entropy`, as in its paper

_ROWS = "flatten it to one row for each unit"
_LOOK = "let a batch go through the model while it is observed"
_SHAPES = {
    "weight": (2, "(units, elements)", _ROWS),
    "grad": (2, "(units, elements)", f"{_ROWS}, and take it between the backward pass and zero_grad()"),
    "gamma": (
        1,
        "(units,)",
        "units without an affine normalisation layer behind them have none: choose 'l1' for these",
    ),
    "activations": (None, "(samples, units, *positions)", _LOOK),
    "feature_maps": (
        4,
        "(samples, units, height, width)",
        f"{_LOOK}; choose 'apoz' or 'entropy' for units that are no matrices",
    ),
    "activation_grads": (None, "(samples, units, *positions)", f"{_LOOK}, forward and backward"),
    "patches": (3, "(samples, units, taps)", f"{_LOOK}; choose 'l1' for units that no linear or convolution reads"),
    "consumer_weight": (3, "(units, taps, outputs)", "choose 'l1' for units that no linear or convolution reads"),
}


def l1(weight: Tensor) -> Tensor:
    """Score each unit by the sum of the absolute values of its weights.

    Reference: Li et al., 2016, section 3.1, https://arxiv.org/abs/1608.08710

    >>> l1(torch.tensor([[3.0, -4.0], [1.0, 0.0]]))
    tensor([7., 1.])
    """
    (weight,) = _given(weight=weight)
    return weight.abs().sum(1).float()


def l2(weight: Tensor) -> Tensor:
    """Score each unit by the Euclidean norm of its weights.

    Reference: He et al., 2018, section 3.2, https://arxiv.org/abs/1808.06866

    >>> l2(torch.tensor([[3.0, -4.0], [1.0, 0.0]]))
    tensor([5., 1.])
    """
    (weight,) = _given(weight=weight)
    norms: Tensor = torch.linalg.vector_norm(weight, dim=1)
    return norms.float()


def random(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Score each unit by chance, in [0, 1): the control that every criterion must beat.

    The same generator gives the same scores at every update, so that what is pruned stays pruned.

    >>> scores = [random(torch.zeros(2, 3), torch.Generator().manual_seed(0)) for _ in range(2)]
    >>> scores[0].shape, torch.equal(*scores)
    (torch.Size([2]), True)
    """
    if generator is None:
        raise ValueError("generator is missing: pass a seeded torch.Generator, or the user's random stream would move.")
    (weight,) = _given(weight=weight)
    return torch.rand(len(weight), generator=generator).to(weight.device)


def fpgm(weight: Tensor) -> Tensor:
    """Score each unit by its distances to all others: one near their geometric median is the easiest to replace.

    Reference: He et al., 2019, section 3.3, https://arxiv.org/abs/1811.00250

    >>> fpgm(torch.tensor([[0.0], [1.0], [5.0]]))  # 1 + 5, 1 + 4, 5 + 4
    tensor([6., 5., 9.])
    """
    (weight,) = _given(weight=weight)
    # By a product of matrices, which is faster, the distance of equal rows would not be 0.
    distances = torch.cdist(weight, weight, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.double().sum(1).float()


def slimming(gamma: Tensor) -> Tensor:
    """Score each unit by the absolute scale that its normalisation layer gives it.

    Reference: Liu et al., 2017, section 3, https://arxiv.org/abs/1708.06519

    >>> slimming(torch.tensor([0.5, -2.0]))
    tensor([0.5000, 2.0000])
    """
    (gamma,) = _given(gamma=gamma)
    return gamma.abs().float()


def taylor(weight: Tensor, grad: Tensor) -> Tensor:
    """Score each unit by the squared first-order change of the loss when it is removed, `sum(weight * grad) ** 2`.

    Reference: Molchanov et al., 2019, equation 8, https://arxiv.org/abs/1906.10771

    >>> taylor(torch.tensor([[1.0, 2.0], [3.0, 1.0]]), grad=torch.tensor([[1.0, 1.0], [1.0, -3.0]]))
    tensor([9., 0.])
    """
    weight, grad = _alike(weight=weight, grad=grad)
    return (weight * grad).sum(1, dtype=torch.float64).square().float()


def taylor_activations(activations: Tensor, activation_grads: Tensor) -> Tensor:
    """Score each unit by the absolute first-order change of the loss when its output is removed.

    `activation * grad` is averaged over positions, its absolute value over samples. To compare layers, the paper
    divides the scores of each by their norm; here the scores are as they are.

    Reference: Molchanov et al., 2016, section 2.2, https://arxiv.org/abs/1611.06440

    >>> activations = torch.tensor([[[1.0, 1.0], [2.0, 0.0]]])  # a sample, two units, two positions
    >>> taylor_activations(activations, torch.tensor([[[1.0, -1.0], [3.0, 5.0]]]))
    tensor([0., 3.])
    """
    activations, grads = _alike(activations=activations, activation_grads=activation_grads)
    return (activations * grads).reshape(*grads.shape[:2], -1).mean(2).abs().mean(0).float()


def hrank(feature_maps: Tensor) -> Tensor:
    """Score each unit by the rank of its feature map, averaged over samples.

    Raises:
        ValueError: if a unit's output is no matrix.

    Reference: Lin et al., 2020, section 3.2, https://arxiv.org/abs/2002.10179

    >>> hrank(torch.stack([torch.eye(2), torch.ones(2, 2)])[None])
    tensor([2., 1.])
    """
    (feature_maps,) = _given(feature_maps=feature_maps)
    ranks: Tensor = torch.linalg.matrix_rank(feature_maps)
    return ranks.float().mean(0)


def entropy(activations: Tensor) -> Tensor:
    """Score each unit by how evenly its output, averaged over positions, spreads over samples.

    The entropy is that of a histogram of 100 bins from the smallest to the largest average, in nats: 0 for a constant.

    Reference: Luo and Wu, 2017, section 3.2, https://arxiv.org/abs/1706.05791

    >>> entropy(torch.tensor([[7.0, 0.0], [7.0, 1.0]]))  # a constant, and two values of equal frequency: log(2)
    tensor([0.0000, 0.6931])
    """
    (activations,) = _given(activations=activations)
    # In float64 the mean of a constant is that constant.
    pooled = activations.reshape(*activations.shape[:2], -1).mean(2, dtype=torch.float64)
    low, high = pooled.aminmax(dim=0)
    place = (pooled - low) * BINS / torch.where(high > low, high - low, 1.0)
    bins = place.long().clamp_(max=BINS - 1).T
    counts = torch.zeros(len(bins), BINS, dtype=torch.float64, device=bins.device)
    share = counts.scatter_add_(1, bins, torch.ones_like(counts[:, :1]).expand(bins.shape)) / bins.shape[1]
    terms: Tensor = torch.special.entr(share)
    return terms.sum(1).float()


def apoz(activations: Tensor) -> Tensor:
    """Score each unit by the fraction of its outputs that are not zero, in [0, 1].

    It is 1 less the paper's average percentage of zeros, so that a higher score is kept longer.

    Reference: Hu et al., 2016, section 3.1, https://arxiv.org/abs/1607.03250

    >>> apoz(torch.tensor([[0.0, 1.0], [3.0, 2.0]]))
    tensor([0.5000, 1.0000])
    """
    (activations,) = _given(activations=activations)
    others = [axis for axis in range(activations.dim()) if axis != 1]
    return torch.count_nonzero(activations, dim=others).double().div(activations[:, 0].numel()).float()


def lasso(patches: Tensor, consumer_weight: Tensor) -> Tensor:
    """Score each unit by how early the lasso takes it in, when it builds the reading layer's output from units.

    That is `min 1/2 |Y - sum_c beta_c X_c W_c|^2 + lambda |beta|_1` with W as it is: when lambda rises, the units leave
    from the lowest score to the highest.

    Returns:
        Scores in [0, 1): the fraction of the units that leave before. What is never taken in (zeros, copies) scores 0.

    Reference: He et al., 2017, section 3.1, https://arxiv.org/abs/1707.06168

    >>> patches = torch.eye(3)[:, :, None]  # each unit alone in one sample, so that units do not overlap
    >>> lasso(patches, consumer_weight=torch.tensor([[[2.0]], [[0.0]], [[1.0]]]))
    tensor([0.6667, 0.0000, 0.3333])
    """
    order = entering_order(_contributions(patches, consumer_weight))
    scores = torch.zeros(len(consumer_weight))
    scores[order] = torch.arange(len(scores) - 1, len(scores) - 1 - len(order), -1).float() / len(scores)
    return scores.to(consumer_weight.device)


def thinet(patches: Tensor, consumer_weight: Tensor) -> Tensor:
    """Score each unit by when it is removed, each time that which leaves the reading layer's output least changed.

    The change is the squared sum of what all removed units added, over all samples and outputs.

    Returns:
        Scores in [0, 1): the fraction of the units that are removed before.

    Reference: Luo et al., 2017, section 3.2, https://arxiv.org/abs/1707.06342

    >>> patches = torch.eye(3)[:, :, None]  # each unit alone in one sample, so that units do not overlap
    >>> thinet(patches, consumer_weight=torch.tensor([[[2.0]], [[0.0]], [[1.0]]]))
    tensor([0.6667, 0.0000, 0.3333])
    """
    products = _contributions(patches, consumer_weight)
    scores, removed = torch.zeros(len(products)), torch.zeros_like(products[0])
    cost = products.diagonal().clone()
    for step in range(len(products)):
        unit = int((cost + 2 * removed).argmin())
        scores[unit] = step / len(products)
        removed += products[unit]
        cost[unit] = torch.inf
    return scores.to(consumer_weight.device)


def _given(**tensors: Tensor | None) -> list[Tensor]:
    """The tensors without their history, in float32 or wider, if they are what their names promise."""
    for name, tensor in tensors.items():
        dims, shape, mend = _SHAPES[name]
        if tensor is None:
            raise ValueError(f"{name} of shape {shape} is missing: {mend}.")
        if tensor.dim() < 2 if dims is None else tensor.dim() != dims:
            raise ValueError(f"{name} has shape {shape}, but is {tuple(tensor.shape)}: {mend}.")
        if not tensor.numel():
            raise ValueError(f"{name} of shape {shape} is empty, {tuple(tensor.shape)}: {mend}.")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has values that are infinite or no numbers: look for where training diverged.")
    return [
        one.detach().to(torch.promote_types(one.dtype, torch.float32)) for one in tensors.values() if one is not None
    ]


def _alike(**tensors: Tensor | None) -> list[Tensor]:
    """As `_given`, and all of one shape."""
    given = _given(**tensors)
    shapes = {name: tuple(one.shape) for name, one in zip(tensors, given, strict=True)}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"Shapes differ: {shapes}. Take both from the same batches and units.")
    return given


def _contributions(patches: Tensor, weight: Tensor) -> Tensor:
    """Inner products of what each two units add to the reading layer's output, over samples and outputs, in float64."""
    patches, weight = (one.double() for one in _given(patches=patches, consumer_weight=weight))
    if patches.shape[1:] != weight.shape[:2]:
        raise ValueError(
            f"patches are of {tuple(patches.shape[1:])} units and taps, but consumer_weight of "
            f"{tuple(weight.shape[:2])}. Take both from the same layer."
        )
    units, taps, _ = weight.shape
    inputs, rows = patches.flatten(1), weight.flatten(0, 1)
    blocks = []
    # (X_c W_c) . (X_d W_d) = (X_c' X_d) . (W_c W_d'): so the outputs of each unit need not be held.
    step = max(1, 512 // taps) * taps
    for start in range(0, units * taps, step):
        block = slice(start, start + step)
        products = (inputs[:, block].T @ inputs).mul_(rows[block] @ rows.T)
        blocks.append(products.view(-1, taps, units, taps).sum((1, 3)))
    total = torch.cat(blocks)
    return (total + total.T) / 2
