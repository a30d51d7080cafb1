"""Numbers wide enough for exponentials, norms and codes of 16 bits, whatever the precision of the run."""

import torch
from torch import Tensor


def to_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is if it is wider.

    >>> to_float32(torch.ones(2, dtype=torch.bfloat16)).dtype, to_float32(torch.ones(2, dtype=torch.float64)).dtype
    (torch.float32, torch.float64)
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
