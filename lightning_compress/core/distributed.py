"""Several processes, one model: whether they agree, and what to do if they do not."""

import hashlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def tensor_hash(tensors: Iterable[Tensor]) -> int:
    """A 63-bit hash of the bytes of all tensors, in order."""
    hashed = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        hashed.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return int.from_bytes(hashed.digest(), "little") >> 1


def all_ranks_equal(value: int, device: torch.device) -> bool:
    """Whether all ranks hold the same `value`: its smallest is its largest. Every rank gets the same answer."""
    bounds = torch.tensor([value, -value], device=device)
    dist.all_reduce(bounds, dist.ReduceOp.MIN)
    return int(bounds[0]) == -int(bounds[1])


def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Overwrite each tensor with that of rank 0, in place."""
    for tensor in tensors:
        dist.broadcast(tensor, src=0)


def all_reduce_sum_(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over all ranks, in place."""
    for tensor in tensors:
        dist.all_reduce(tensor)
