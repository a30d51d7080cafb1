"""Pruning criteria: how much each weight matters.

A criterion is a function that asks for what it needs by naming it; only what it names is gathered:

| name | what | shape |
|---|---|---|
| `weight` | the weight as it is | `(out, in, *kernel)` |
| `grad` | its gradient at this optimizer step: accumulated, reduced over ranks, not yet clipped | as `weight` |
| `weight_grad_sum` | the sum of `weight * grad` over the steps of the phase | as `weight` |
| `initial_weight` | the weight as training began | as `weight` |
| `input_norm` | the L2 norm of each input feature, over what was seen since the last update | broadcasts to `weight` |
| `generator` | a seeded random generator on the CPU, the same at every update | |

It returns scores of the shape of `weight`; a higher score is kept longer.
"""

import torch
from torch import Tensor

OFFERED = ("weight", "grad", "weight_grad_sum", "initial_weight", "input_norm", "generator")


def magnitude(weight: Tensor) -> Tensor:
    """Score each weight by its absolute value.

    Reference: Han et al., 2015, section 3.1, https://arxiv.org/abs/1506.02626

    >>> magnitude(torch.tensor([[0.5, -2.0]]))
    tensor([[0.5000, 2.0000]])
    """
    return weight.abs()


def random(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Score each weight by chance, in [0, 1): the control that every criterion must beat.

    The same generator gives the same scores at every update, so that what is pruned stays pruned.

    >>> scores = [random(torch.zeros(2, 3), torch.Generator().manual_seed(0)) for _ in range(2)]
    >>> scores[0].shape, torch.equal(*scores)
    (torch.Size([2, 3]), True)
    """
    return torch.rand(weight.shape, generator=generator).to(weight.device)


def gradient(grad: Tensor) -> Tensor:
    """Score each weight by the absolute value of its gradient: how fast the loss would change with it.

    >>> gradient(torch.tensor([[0.5, -2.0]]))
    tensor([[0.5000, 2.0000]])
    """
    return grad.abs()


def taylor(weight: Tensor, grad: Tensor) -> Tensor:
    """Score each weight by the first-order change of the loss when it is removed, `|weight * grad|`.

    Reference: Molchanov et al., 2019, section 3.1, https://arxiv.org/abs/1906.10771

    >>> taylor(torch.tensor([[3.0, -1.0]]), grad=torch.tensor([[0.5, 2.0]]))
    tensor([[1.5000, 2.0000]])
    """
    return (weight * grad).abs_()


def movement(weight_grad_sum: Tensor) -> Tensor:
    """Score each weight by how far training moved it away from zero, `-sum(weight * grad)`.

    Reference: Sanh et al., 2020, section 4, https://arxiv.org/abs/2005.07683

    >>> movement(torch.tensor([[1.0, -2.0]]))  # a positive sum: the steps moved the weight towards zero
    tensor([[-1.,  2.]])
    """
    return -weight_grad_sum


def wanda(weight: Tensor, input_norm: Tensor) -> Tensor:
    """Score each weight by its size times that of its input, `|weight| * input_norm`.

    Reference: Sun et al., 2023, section 3, https://arxiv.org/abs/2306.11695

    >>> wanda(torch.tensor([[1.0, -2.0], [3.0, 4.0]]), input_norm=torch.tensor([[10.0, 1.0]]))
    tensor([[10.,  2.],
            [30.,  4.]])
    """
    return weight.abs() * input_norm
