"""Numbers wide enough for exponentials, norms and sums of squares, whatever the precision of the run."""

import torch
from torch import Tensor


def to_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is if it is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def inner_dtype(rows: Tensor, columns: Tensor) -> Tensor:
    """`rows @ columns.T` of two matrices, or of batches of them, in float32 or wider."""
    # Autocast would compute it in half precision, however wide the two are.
    with torch.autocast(rows.device.type, enabled=False):
        return to_float32(rows) @ to_float32(columns).mT
