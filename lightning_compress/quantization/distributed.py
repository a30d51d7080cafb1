"""Several ranks, one set of grids."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from lightning_compress.core.distributed import all_ranks_equal, is_distributed, tensor_hash
from lightning_compress.quantization.placement.sites import ActivationPlacement
from lightning_compress.quantization.quantized_model import QuantizedModel


def check_equal_placements(layout: ActivationPlacement, device: torch.device) -> None:
    """Refuse to quantize if the ranks' first steps took different ways through the model.

    Raises:
        ValueError: if so, on every rank.
    """
    if not is_distributed():
        return
    written = torch.tensor(bytearray(repr(layout.state_dict()).encode()), dtype=torch.uint8)
    if not all_ranks_equal(tensor_hash([written]), device):
        raise ValueError(
            "The ranks called different layers in their first quantized step, so that their quantizers would differ. "
            "Leave layers that only some batches reach out by ignore."
        )


def broadcast_learned(quantized: QuantizedModel, shared: set[str]) -> None:
    """Let all ranks go on with what the first rank that has reached a place has found there.

    Args:
        quantized: of this rank.
        shared: places where that is done; this adds to them.
    """
    waiting = {name: one for name, one in quantized.activations.items() if one.learned and name not in shared}
    if not is_distributed() or not waiting:
        return
    absent = dist.get_world_size()
    sources = [dist.get_rank() if one.calibrated else absent for one in waiting.values()]
    agreed = torch.tensor(sources, device=next(iter(waiting.values())).scale.device)
    dist.all_reduce(agreed, dist.ReduceOp.MIN)
    for (name, quantizer), source in zip(waiting.items(), agreed.tolist(), strict=True):
        if source < absent:
            for parameter in quantizer.parameters():
                dist.broadcast(parameter.detach(), src=source)
            quantizer.calibrated = True
            shared.add(name)


def average_gradients(learned: Iterable[nn.Parameter]) -> None:
    """Average the gradients of what the wrapper of the model does not know over the ranks.

    To do so twice changes nothing. A rank that has not reached a place counts with zero; if none has, nothing is done.
    """
    parameters = list(learned)
    if not is_distributed() or not parameters:
        return
    reached = [torch.full((1,), float(one.grad is not None), device=one.device) for one in parameters]
    gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
    flat = torch.cat([*reached, *(gradient.reshape(-1) for gradient in gradients)])
    dist.all_reduce(flat)
    flat.div_(dist.get_world_size())
    anywhere, *parts = torch.split(flat, [len(parameters), *(one.numel() for one in parameters)])
    for parameter, part, somewhere in zip(parameters, parts, anywhere.tolist(), strict=True):
        if somewhere:
            parameter.grad = part.view_as(parameter).clone() if parameter.grad is None else parameter.grad
            parameter.grad.copy_(part.view_as(parameter))


def all_reduce_ranges(quantized: QuantizedModel) -> None:
    """Let all ranks have one range at each place: the mean of theirs, or the widest where ranges only widen."""
    followed = [one for one in quantized.activations.values() if one.uses_observer]
    if not is_distributed() or not followed:
        return
    ranges = torch.stack([torch.stack([-one.minimum, one.maximum]) for one in followed])
    seen = torch.tensor([[float(one.calibrated)] for one in followed], device=ranges.device)
    widest, total = ranges.masked_fill(seen == 0, -torch.inf), torch.cat([ranges * seen, seen], dim=1)
    dist.all_reduce(total)
    if any(one.range.widens for one in followed):
        dist.all_reduce(widest, dist.ReduceOp.MAX)
    counts = total[:, 2].tolist()
    for place, quantizer in enumerate(followed):
        if counts[place]:
            quant_min, quant_max = widest[place] if quantizer.range.widens else total[place, :2] / counts[place]
            quantizer.minimum.copy_(-quant_min), quantizer.maximum.copy_(quant_max)
            quantizer.compute_qparams()
            quantizer.calibrated = True
