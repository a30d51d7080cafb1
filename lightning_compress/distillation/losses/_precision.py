"""Products of matrices in float32 or wider, whatever the precision of the run."""

import torch
from torch import Tensor

from lightning_compress.core.precision import to_float32


def inner_products(rows: Tensor, columns: Tensor) -> Tensor:
    """`rows @ columns.T` of two matrices, or of batches of them, in float32 or wider."""
    # Autocast would compute it in half precision, however wide the two are.
    with torch.autocast(rows.device.type, enabled=False):
        return to_float32(rows) @ to_float32(columns).mT
