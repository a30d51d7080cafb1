"""Several ranks, one set of grids."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from lightning_compress.core.ranks import agree, digest, from_first_rank, several
from lightning_compress.quantization.quantized import QuantizedModel
from lightning_compress.quantization.sites import Layout


def refuse_other_layouts(layout: Layout, device: torch.device) -> None:
    """Refuse to quantize if the ranks' first steps took different ways through the model.

    Raises:
        ValueError: if so, on every rank.
    """
    if not several():
        return
    written = torch.tensor(bytearray(repr(layout.state()).encode()), dtype=torch.uint8)
    if not agree(digest([written]), device):
        raise ValueError(
            "The ranks called different layers in their first quantized step, so that their quantizers would differ. "
            "Leave layers that only some batches reach out by ignore."
        )


def share_learned(learned: Iterable[nn.Parameter], shared: bool) -> bool:
    """Let all ranks begin with what rank 0 has found in its first batch. Returns that this is done."""
    if several() and not shared:
        from_first_rank([parameter.detach() for parameter in learned])
    return True


def average_gradients(learned: Iterable[nn.Parameter]) -> None:
    """Average the gradients of what the wrapper of the model does not know over the ranks."""
    gradients = [parameter.grad for parameter in learned if parameter.grad is not None]
    if not several() or not gradients:
        return
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat.div_(dist.get_world_size())
    parts = torch.split(flat, [one.numel() for one in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def share_ranges(quantized: QuantizedModel) -> None:
    """Let all ranks have one range at each place: the mean of theirs, or the widest where ranges only widen."""
    followed = [one for one in quantized.activations.values() if one.started and one.follows]
    if not several() or not followed:
        return
    ranges = torch.stack([torch.stack([-one.minimum, one.maximum]) for one in followed])
    widest = torch.tensor([one.range.widens for one in followed], device=ranges.device)[:, None]
    mean = ranges.clone()
    dist.all_reduce(ranges, dist.ReduceOp.MAX)
    dist.all_reduce(mean)
    agreed = torch.where(widest, ranges, mean / dist.get_world_size())
    for quantizer, (low, high) in zip(followed, agreed, strict=True):
        quantizer.minimum.copy_(-low), quantizer.maximum.copy_(high)
        quantizer.settle()
