"""Granularity: which weights of a layer live and die together.

A weight is seen as `(out, in, *kernel)`. Each granularity turns scores of weights into scores of units, and a mask of
units back into a mask of weights. All units of one layer hold the same number of weights.
"""

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class PerWeight:
    """Every weight for itself."""

    def units(self, scores: Tensor) -> Tensor:
        """Scores of units, flat: the mean over each unit's weights, so that units of several sizes can be compared."""
        return scores.reshape(-1)

    def mask(self, units: Tensor, shape: torch.Size) -> Tensor:
        """A mask of weights from a flat mask of units."""
        return units.view(shape)

    def size(self, shape: torch.Size) -> int:
        """Weights per unit."""
        return 1

    def misfit(self, shape: torch.Size) -> str | None:
        """Why a weight of this shape cannot be pruned so, or None."""
        return None


@dataclass(frozen=True)
class Slices(PerWeight):
    """All weights that share their place in the dimensions `kept`, counted from 0; -1 stands for "all from 1 on"."""

    kept: tuple[int, ...]

    def units(self, scores: Tensor) -> Tensor:
        others = [dim for dim in range(scores.ndim) if dim not in self._kept(scores.ndim)]
        return (scores.mean(others) if others else scores).reshape(-1)

    def mask(self, units: Tensor, shape: torch.Size) -> Tensor:
        kept = self._kept(len(shape))
        return units.view([length if dim in kept else 1 for dim, length in enumerate(shape)]).expand(shape)

    def size(self, shape: torch.Size) -> int:
        kept = self._kept(len(shape))
        return math.prod(length for dim, length in enumerate(shape) if dim not in kept)

    def _kept(self, ndim: int) -> set[int]:
        return set(range(1, ndim)) if self.kept == (-1,) else set(self.kept)


@dataclass(frozen=True)
class Block(PerWeight):
    """Blocks of `rows x columns` of the weight as the matrix `(out, in * kernel)`."""

    rows: int
    columns: int

    def units(self, scores: Tensor) -> Tensor:
        rows, columns = len(scores), scores[0].numel()
        blocks = scores.reshape(rows // self.rows, self.rows, columns // self.columns, self.columns)
        return blocks.mean((1, 3)).reshape(-1)

    def mask(self, units: Tensor, shape: torch.Size) -> Tensor:
        grid = units.view(shape[0] // self.rows, -1)
        return grid.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1).view(shape)

    def size(self, shape: torch.Size) -> int:
        return self.rows * self.columns

    def misfit(self, shape: torch.Size) -> str | None:
        rows, columns = shape[0], math.prod(shape[1:])
        if rows % self.rows == 0 and columns % self.columns == 0:
            return None
        return f"a matrix of {rows} x {columns} does not divide into blocks of {self.rows} x {self.columns}"


@dataclass(frozen=True)
class NOfM(PerWeight):
    """In every `m` weights of consecutive inputs `n` stay: the pattern of sparse tensor cores, for 2:4.

    Reference: Mishra et al., 2021, section 3, https://arxiv.org/abs/2104.08378
    """

    n: int
    m: int

    def units(self, scores: Tensor) -> Tensor:
        # What the pattern keeps must not be pruned on the way to it either.
        last = scores.movedim(1, -1)
        groups = last.reshape(*last.shape[:-1], -1, self.m)
        order = groups.argsort(dim=-1, descending=True, stable=True)
        kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., : self.n], True)
        return groups.masked_fill(kept, torch.inf).flatten(-2).movedim(-1, 1).reshape(-1)

    def misfit(self, shape: torch.Size) -> str | None:
        if shape[1] % self.m == 0:
            return None
        return f"{shape[1]} inputs do not divide into groups of {self.m}"


SLICES = {"kernel": (0, 1), "row": (0,), "filter": (0,), "column": (1,), "group": (-1,)}


def parse_granularity(granularity: str) -> PerWeight:
    """Read a granularity.

    "weight"; "N:M", such as "2:4"; "block RxC", such as "block 4x4"; "kernel" (one filter's kernel for one input
    channel); "row" and "filter", two names for all weights of one output; "column" (all weights of one input); "group"
    (one place of the kernel in all filters of a layer, Lebedev & Lempitsky, 2016, https://arxiv.org/abs/1506.02515).

    Raises:
        ValueError: if there is no such granularity.
    """
    text = str(granularity).strip()
    if text == "weight":
        return PerWeight()
    if text in SLICES:
        return Slices(SLICES[text])
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        n, m = int(match[1]), int(match[2])
        if not 0 < n < m:
            raise ValueError(f"granularity '{text}' keeps {n} of {m} weights; write N:M with 0 < N < M, such as '2:4'.")
        return NOfM(n, m)
    if match := re.fullmatch(r"block (\d+) ?x ?(\d+)", text):
        rows, columns = int(match[1]), int(match[2])
        if rows * columns == 0:
            raise ValueError(
                f"granularity '{text}' has no weights in a block; write sizes above 0, such as 'block 4x4'."
            )
        return Block(rows, columns)
    raise ValueError(
        f"No granularity '{granularity}'. Choose one of {['weight', *SLICES]}, 'N:M' such as '2:4', or 'block RxC' "
        f"such as 'block 4x4'."
    )


def outputs_to_front(tensor: Tensor, owner: nn.Module) -> Tensor:
    """See a weight, or what has its shape, as `(out, in, *kernel)`: transposed convolutions store it the other way."""
    return _swapped(tensor, owner.groups) if isinstance(owner, TRANSPOSED) else tensor


def outputs_to_stored(tensor: Tensor, owner: nn.Module) -> Tensor:
    """Undo `outputs_to_front`."""
    return _swapped(tensor, owner.groups) if isinstance(owner, TRANSPOSED) else tensor


def _swapped(tensor: Tensor, groups: int) -> Tensor:
    """Exchange the first two dimensions within each group."""
    return torch.cat([part.transpose(0, 1) for part in tensor.chunk(groups)])
