"""Masks that stay beside the model, so that its `state_dict` keeps the keys it had."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.core.bit_packing import pack, unpack
from lightning_compress.measure.metrics import Sparsity
from lightning_compress.nn.channel_cut import Kept
from lightning_compress.nn.surgery import slice_tensor


class MaskedParameters:
    """Parameters by name, each with a mask once it is pruned.

    A mask is kept in the type of its parameter, 1 where a weight stays: multiplying by it costs a tenth of what a
    boolean mask costs on a CPU, and zeroing happens at every step.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self.masks: dict[str, Tensor] = {}
        self.averaged_copies: list[Mapping[str, nn.Parameter]] = []

    def set(self, name: str, mask: Tensor) -> None:
        """Give one parameter a new mask, of its shape; True, or 1, keeps a weight."""
        self._made(name).copy_(mask)

    def allocate(self) -> None:
        """Give every parameter a mask that keeps all, if it has none: masks made among short-lived tensors scatter."""
        for name in self.parameters:
            self._made(name)

    def _made(self, name: str) -> Tensor:
        if name not in self.masks:
            self.masks[name] = torch.ones_like(self.parameters[name], requires_grad=False)
        return self.masks[name]

    @torch.no_grad()
    def apply(self) -> None:
        """Zero what is pruned."""
        if self.masks:
            torch._foreach_mul_([self.parameters[name] for name in self.masks], list(self.masks.values()))

    @torch.no_grad()
    def apply_to(self, parameters: Mapping[str, Tensor]) -> None:
        """Zero what is pruned in other tensors of the same names and shapes, on whatever device: an average, say."""
        for name, mask in self.masks.items():
            if name in parameters:
                other = parameters[name]
                other.mul_(mask.to(other.device, other.dtype))

    @torch.no_grad()
    def apply_to_gradients(self) -> None:
        """Zero the gradients of what is pruned, so that clipping and momentum see the pruned model's only."""
        pairs = [(self.parameters[name].grad, mask) for name, mask in self.masks.items()]
        present = [(grad, mask) for grad, mask in pairs if grad is not None]
        if present:
            torch._foreach_mul_([grad for grad, _ in present], [mask for _, mask in present])

    @torch.no_grad()
    def apply_to_state(self, optimizers: Iterable[Optimizer]) -> None:
        """Zero the optimizers' moments of what is pruned: should a weight come back, it starts afresh."""
        for optimizer in optimizers:
            for name, mask in self.masks.items():
                for value in optimizer.state.get(self.parameters[name], {}).values():
                    if isinstance(value, Tensor) and value.shape == mask.shape:
                        value.mul_(mask.to(value.dtype))

    def slice_channels(self, kept: Mapping[str, Kept]) -> None:
        """Cut masks as their weights have been cut."""
        self.masks = {name: slice_tensor(mask, kept[name]) for name, mask in self.masks.items()}

    def drop(self, name: str) -> None:
        """Follow one parameter no longer."""
        del self.parameters[name]
        self.masks.pop(name, None)

    @property
    def sparsity(self) -> float:
        """Fraction of the followed weights that a mask prunes."""
        pruned = sum(mask.numel() - int(mask.count_nonzero()) for mask in self.masks.values())
        return pruned / sum(parameter.numel() for parameter in self.parameters.values())

    def sparsities(self) -> dict[str, float]:
        """Fraction of exact zeros in each weight, as stored."""
        measured = {}
        for name, parameter in self.parameters.items():
            metric = Sparsity(sync_on_compute=False).to(parameter.device)
            metric.update([parameter])
            measured[name] = float(metric.compute())
        return measured

    def weighted_mean(self, values: Mapping[str, float]) -> float:
        """The mean of a value of each weight, counted by its number of elements."""
        sizes = {name: parameter.numel() for name, parameter in self.parameters.items()}
        return sum(values[name] * size for name, size in sizes.items()) / sum(sizes.values())

    def state_dict(self) -> dict[str, Any]:
        """Masks as plain tensors, eight weights in a byte, with their shapes."""
        return {name: {"shape": list(mask.shape), "bits": pack_mask(mask)} for name, mask in self.masks.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the masks of another run of the same model.

        Raises:
            ValueError: if they are damaged, or belong to other weights.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"The checkpoint's masks are damaged: a {type(state).__name__} instead of masks by name.")
        for name, saved in state.items():
            if name not in self.parameters:
                raise ValueError(
                    f"The checkpoint has a mask for '{name}', which is not pruned here. Resume with the targets of "
                    f"that run; here they are {', '.join(self.parameters)}."
                )
            _refuse_damaged(name, saved, self.parameters[name].shape)
        self.masks = {}
        for name, saved in state.items():
            self.set(name, unpack_mask(saved["bits"], self.parameters[name].shape))


def _refuse_damaged(name: str, saved: Any, shape: torch.Size) -> None:
    bits, written = (saved.get("bits"), saved.get("shape")) if isinstance(saved, Mapping) else (None, None)
    if not isinstance(bits, Tensor) or bits.dtype != torch.uint8 or not isinstance(written, list | tuple):
        raise ValueError(f"The checkpoint's mask for '{name}' is damaged: it is not a shape and packed bits.")
    if list(shape) != list(written) or bits.numel() != -(-shape.numel() // 8):
        raise ValueError(
            f"The checkpoint's mask for '{name}' has shape {list(written)} in {bits.numel()} bytes, but the weight has "
            f"shape {list(shape)}. It belongs to another model, or is damaged."
        )


def pack_mask(mask: Tensor) -> Tensor:
    """Eight entries to a byte, the first one lowest; on the CPU.

    >>> pack_mask(torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 0, 1]))
    tensor([1, 2], dtype=torch.uint8)
    """
    return pack(mask.detach().ne(0).cpu().byte(), bits=1)


def unpack_mask(packed: Tensor, shape: torch.Size) -> Tensor:
    """The mask that `pack_mask` took: a boolean tensor of `shape`.

    >>> unpack_mask(torch.tensor([5], dtype=torch.uint8), torch.Size([1, 3]))
    tensor([[ True, False,  True]])
    """
    return unpack(packed, bits=1, count=shape.numel()).bool().view(shape)
