"""Weights as whole numbers, or short floats, within an exported program, which computes the floats from them."""

from collections.abc import Callable, Mapping
from functools import partial
from math import prod

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from lightning_compress.quantization.description import WeightSpec

INTEGERS = {8: torch.int8, 16: torch.int16, 32: torch.int32}
DIFFERENCES = {8: torch.int16, 16: torch.int32, 32: torch.int64}
# A file grows by less than this where its program unpacks numbers of fewer than eight bits.
UNPACKING_BYTES = 500


class StoredWeights(nn.Module):
    """A weight in few bytes; called, it gives the floats."""

    @property
    def size_bytes(self) -> int:
        """What is stored of it."""
        return sum(buffer.numel() * buffer.dtype.itemsize for buffer in self.buffers())


class ShortWeight(StoredWeights):
    """A weight in a shorter dtype, which holds it without loss."""

    short: Tensor

    def __init__(self, dtype: torch.dtype, weight: Tensor) -> None:
        super().__init__()
        self.dtype = weight.dtype
        self.register_buffer("short", weight.detach().to(dtype))

    def forward(self) -> Tensor:
        return self.short.to(self.dtype)


class StoredWeight(StoredWeights):
    """A weight as codes and scales or levels; called, it gives the floats, bit for bit those of the grid.

    Codes are int8 (or int16, if they need it); where it makes the file smaller, two or four to a byte.

    Args:
        grid: codes and what they stand for.
        weight: the weight as it is, whose dtype and order in memory are kept.
    """

    codes: Tensor
    shifts: Tensor
    scale: Tensor
    zero_point: Tensor
    levels: Tensor

    def __init__(self, grid: WeightSpec, weight: Tensor) -> None:
        super().__init__()
        self.dtype, self.memory_format, self.axis = weight.dtype, _memory_format(weight), grid.axis
        self.shape = _shape(grid)
        self.swapped = _swapped(grid) if grid.group else None
        self.table = grid.levels is not None
        codes = grid.codes.transpose(0, grid.axis) if grid.group else grid.codes
        self.bits = _bits(codes, signed=not self.table)
        self._store(codes.detach().reshape(self.shape))
        if grid.levels is not None:
            self.register_buffer("levels", grid.levels.detach().clone())
        if grid.scale is not None:
            self.register_buffer("scale", _by_row(grid.scale, grid).detach().clone())
        self.shifted = grid.zero_point is not None and bool(grid.zero_point.any())
        if grid.zero_point is not None and self.shifted:
            # Wider than the codes, so that the difference does not overflow; 0-d it would take the dtype of these.
            zero_point = _by_row(grid.zero_point, grid).to(DIFFERENCES[max(self.bits, 8)])
            self.register_buffer("zero_point", zero_point if zero_point.ndim else zero_point.expand([1] * codes.ndim))

    def forward(self) -> Tensor:
        values = self.levels[self._codes().long()] if self.table else self._steps() * self.scale
        if self.swapped is not None:
            values = values.reshape(self.swapped).transpose(0, self.axis)
        # Each call that is left out makes the program shorter.
        if self.memory_format != torch.contiguous_format or self.swapped is not None:
            values = values.contiguous(memory_format=self.memory_format)
        return values if values.dtype == self.dtype else values.to(self.dtype)

    def _store(self, codes: Tensor) -> None:
        saved = codes.numel() * (8 - self.bits) // 8
        if self.bits >= 8 or saved < UNPACKING_BYTES:
            self.bits = max(self.bits, 8)
            code_dtype = torch.uint8 if self.table and self.bits == 8 else INTEGERS[self.bits]
            self.register_buffer("codes", codes.to(code_dtype).contiguous())
            return
        # A byte holds numbers that lie far apart, so that whole rows are unpacked at once: five times as fast.
        shifts = torch.arange(0, 8, self.bits, device=codes.device).unsqueeze(1)
        rows = torch.zeros(len(shifts), -(-codes.numel() // len(shifts)), dtype=torch.int32, device=codes.device)
        rows.view(-1)[: codes.numel()] = codes.reshape(-1)
        packed = ((rows & self.highest) << shifts).sum(0).to(torch.uint8)
        # A signed number is moved up to the byte's sign, and down again, which repeats the sign.
        self.register_buffer("codes", packed if self.table else packed.view(torch.int8))
        self.register_buffer("shifts", (shifts if self.table else shifts.flip(0)).to(self.codes.dtype))

    def _codes(self) -> Tensor:
        if self.bits >= 8:
            return self.codes
        codes = self._unsigned() if self.table else (self.codes << self.shifts) >> (8 - self.bits)
        count = prod(self.shape)
        return (codes if codes.numel() == count else codes.reshape(-1)[:count]).reshape(self.shape)

    def _steps(self) -> Tensor:
        return self._codes() - self.zero_point if self.shifted else self._codes()

    def _unsigned(self) -> Tensor:
        return (self.codes >> self.shifts) & self.highest

    @property
    def highest(self) -> int:
        """The highest number of so many bits."""
        return int(2**self.bits - 1)


def store_weights(
    graph_module: GraphModule,
    module: nn.Module,
    weights: Mapping[str, WeightSpec],
    casts: Mapping[str, torch.dtype] | None = None,
) -> list[StoredWeights]:
    """Let a graph compute its quantized weights from what is stored of them; the parameters are gone from it.

    Args:
        graph_module: of a program that `module` was exported to; it is changed.
        module: whose parameters the graph holds.
        weights: the grid of each quantized weight, by the parameter's name in `module`.
        casts: shorter dtypes that hold a weight without loss, by the parameter's name.

    Raises:
        ValueError: if the graph holds a weight as another tensor than the module's, so that it would stay as it is.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    ways: dict[str, Callable[[Tensor], StoredWeights]] = {
        name: partial(StoredWeight, grid) for name, grid in weights.items()
    }
    ways |= {name: partial(ShortWeight, dtype) for name, dtype in (casts or {}).items()}
    by_place = {_memory(parameters[name]): way for name, way in ways.items() if parameters[name].numel()}
    tensors_by_name = dict(graph_module.named_parameters(remove_duplicate=False))
    quantized = {name: one for name, one in tensors_by_name.items() if one.numel() and _memory(one) in by_place}
    for name in ways:
        if name in tensors_by_name and name not in quantized and tensors_by_name[name].numel():
            raise ValueError(f"torch.export made a copy of '{name}', so that it would be stored as it is, in full.")
    stored: dict[object, tuple[str, StoredWeights]] = {}
    for node in list(graph_module.graph.nodes):
        if node.op == "get_attr" and node.target in quantized:
            place = _memory(quantized[node.target])
            if place not in stored and node.users:
                stored[place] = f"{node.target}_stored", by_place[place](quantized[node.target])
                graph_module.add_submodule(*stored[place])
            if node.users:
                with graph_module.graph.inserting_before(node):
                    node.replace_all_uses_with(graph_module.graph.call_module(stored[place][0]))
            graph_module.graph.erase_node(node)
    for name in quantized:
        owner, _, leaf = name.rpartition(".")
        delattr(graph_module.get_submodule(owner), leaf)
    graph_module.recompile()
    return [weight for _, weight in stored.values()]


def _memory(tensor: Tensor) -> object:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _shape(grid: WeightSpec) -> tuple[int, ...]:
    if not grid.group:
        return tuple(grid.codes.shape)
    return grid.channels, grid.codes.numel() // grid.channels // grid.group, grid.group


def _by_row(steps: Tensor, grid: WeightSpec) -> Tensor:
    return steps.unsqueeze(-1) if grid.group else steps


def _swapped(grid: WeightSpec) -> tuple[int, ...]:
    return tuple(grid.codes.transpose(0, grid.axis).shape)


def _bits(codes: Tensor, signed: bool) -> int:
    """The least of 1 (if there is no sign), 2, 4, 8, 16 and 32 bits that hold these codes."""
    low, high = (int(one) for one in codes.aminmax()) if codes.numel() else (0, 0)
    for bits in (2, 4, 8, 16) if signed else (1, 2, 4, 8):
        least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        if least <= low and high <= most:
            return bits
    return 32


def _memory_format(weight: Tensor) -> torch.memory_format:
    for ndim, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if weight.ndim == ndim and not weight.is_contiguous() and weight.is_contiguous(memory_format=memory_format):
            return memory_format
    return torch.contiguous_format
