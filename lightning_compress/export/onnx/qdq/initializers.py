"""Find the quantized weights among the constants of a graph, whose names and layout the exporter has changed."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy

from lightning_compress.export.onnx.qdq.graph import Array
from lightning_compress.quantization.description import WeightSpec

# Shape and bytes of a whole weight; name of a weight and number of a row in it.
Content = tuple[tuple[int, ...], bytes]
Home = tuple[str, int]


@dataclass(frozen=True, eq=False)
class LocatedWeight:
    """A constant as whole numbers: a matrix whose rows share scales, and how the constant is made of it.

    Attributes:
        names: of the weights that its rows come from.
        codes: shape `(rows, elements)`.
        scale: shape `(rows, groups)`, or None if there are levels.
        levels: floats that the codes are indices of, or None.
        zero: codes that stand for 0, in the shape of the scale, or None.
        shape: of the matrix as a tensor; the constant is that tensor, or
        order: that tensor with its axes in this order.
    """

    names: tuple[str, ...]
    codes: Array
    scale: Array | None
    levels: Array | None
    shape: tuple[int, ...]
    order: tuple[int, ...] | None = None
    zero: Array | None = None

    @property
    def title(self) -> str:
        """One name for all its weights."""
        return "+".join(self.names)

    @property
    def axis(self) -> int | None:
        """Along which axis of the constant each place has a scale of its own; None if no axis is like that."""
        if self.scale is None or self.scale.shape[1] != 1 or self.shape[0] != len(self.codes):
            return None
        return self.order.index(0) if self.order else 0

    def row_steps(self) -> tuple[Array, Array]:
        """One scale and one zero for each row, or a single pair, 0-d, if all are equal.

        Raises:
            ValueError: if a row has more than one.
        """
        if self.scale is None or self.scale.shape[1] != 1:
            raise ValueError(f"The rows of {self.title} have no scale of their own.")
        scales, zeros = self.scale[:, 0], self.zeros()[:, 0]
        equal = len(scales) and (scales == scales[0]).all() and (zeros == zeros[0]).all()
        return (scales[0], zeros[0]) if equal else (scales, zeros)

    def zeros(self) -> Array:
        """The codes that stand for 0, in the shape of the scale."""
        if self.zero is not None:
            return self.zero
        return numpy.zeros(() if self.scale is None else self.scale.shape, numpy.int64)


class WeightLocator:
    """The grids of a model's weights, which constants are looked up in."""

    def __init__(self, grids: Mapping[str, WeightSpec]) -> None:
        self.tables = {name: _by_rows(name, grid) for name, grid in grids.items()}
        values = {name: _plain(grid.values().float().numpy()) for name, grid in grids.items()}
        self.contents: dict[str, Content] = {name: (value.shape, value.tobytes()) for name, value in values.items()}
        self.by_content = {content: name for name, content in reversed(self.contents.items())}
        self.rows: dict[bytes, list[Home]] = {}
        for name, table in self.tables.items():
            if len(table.shape) == 2:
                for row, numbers in enumerate(_matrix(values[name], table)):
                    self.rows.setdefault(numbers.tobytes(), []).append((name, row))

    def locate(
        self, constants: Mapping[str, Array], unused: Iterable[str] = (), looked_up: Iterable[str] = ()
    ) -> dict[str, LocatedWeight]:
        """Find the constants that weights have become.

        Args:
            constants: all float constants of the graph by name.
            unused: names of weights that need not be there.
            looked_up: names of weights of which a forward only takes rows, so that a part of them is enough.

        Raises:
            ValueError: if a weight is not found, or only a part of it.
        """
        plain = {name: _plain(value) for name, value in constants.items() if value.ndim > 1 or name in self.tables}
        found = {name: one for name, value in plain.items() if (one := self._as_whole(name, value)) is not None}
        # The exporter keeps one of several equal weights, so what was seen is content and not a name.
        seen = {self.contents[one.title] for one in found.values()}
        left = {home for homes in self.rows.values() for home in homes if self.contents[home[0]] not in seen}
        for name, value in plain.items():
            if name not in found and (one := self._of_rows(value, left)) is not None:
                found[name] = one
        begun = {self.contents[name] for homes in self.rows.values() for name, row in homes if (name, row) not in left}
        in_part = [name for name in looked_up if self.contents.get(name) in begun]
        self._check_all_found(seen, left, [*unused, *in_part])
        return found

    def _check_all_found(self, seen: set[Content], left: set[Home], unused: Iterable[str]) -> None:
        taken = {key for key, homes in self.rows.items() if not left.issuperset(homes)}
        pruned = {name for key, homes in self.rows.items() if key not in taken for name, _ in homes}
        pruned |= {name for name, one in self.tables.items() if len(one.shape) != 2}
        pruned = {name for name in pruned if self.contents[name] not in seen} - set(unused)
        if names := [name for name in self.tables if name in pruned]:
            raise ValueError(
                f"The exporter has computed something with {', '.join(names)}, so that no constant of the graph lies "
                f"on its grid any more. Leave the layer in floating point: ignore={[_layer(name) for name in names]}."
            )

    def _as_whole(self, name: str, value: Array) -> LocatedWeight | None:
        content = (value.shape, value.tobytes())
        same = name if self.contents.get(name) == content else self.by_content.get(content)
        return None if same is None else self.tables[same]

    def _of_rows(self, value: Array, left: set[Home]) -> LocatedWeight | None:
        """A constant whose rows, in one of the layouts it may have, are rows of weights; these are no longer left."""
        if value.ndim < 2:
            return None
        last = value.ndim - 1
        swapped = (*range(last - 1), last, last - 1)
        for order in (None, swapped):
            tensor = value if order is None else value.transpose(order)
            matrix = numpy.ascontiguousarray(tensor.reshape(-1, tensor.shape[-1]))
            homes = [self.rows.get(row.tobytes()) for row in matrix]
            chosen = _chosen([several for several in homes if several], left)
            # Zeros alone may be anything, such as the initial state of a recurrent layer.
            if len(chosen) < len(homes) or not (value.any() or left.intersection(chosen)):
                continue
            if (located := self._joined(chosen, tensor.shape, order)) is not None:
                left.difference_update(chosen)
                return located
        return None

    def _joined(self, homes: list[Home], shape: tuple[int, ...], order: tuple[int, ...] | None) -> LocatedWeight | None:
        names = tuple(dict.fromkeys(name for name, _ in homes))
        tables = [self.tables[name] for name in names]
        groups = {None if table.scale is None else table.scale.shape[1] for table in tables}
        if len(groups) > 1:
            return None
        offsets, levels = _joined_levels(names, tables)
        codes = numpy.stack([self.tables[name].codes[row] + offsets.get(name, 0) for name, row in homes])
        if levels is not None:
            return LocatedWeight(names, codes, None, levels, shape, order)
        scale = numpy.stack([_scale(self.tables[name], row) for name, row in homes])
        zero = numpy.stack([self.tables[name].zeros()[row] for name, row in homes])
        return LocatedWeight(names, codes, scale, None, shape, order, zero)


def _chosen(homes: list[list[Home]], left: set[Home]) -> list[Home]:
    """One home for each row: in the weight that most rows may come from, and one that was not chosen before."""
    counts = Counter(name for several in homes for name in {name for name, _ in several})
    return [max(several, key=lambda home: (counts[home[0]], home in left)) for several in homes]


def _by_rows(name: str, grid: WeightSpec) -> LocatedWeight:
    codes = grid.codes.numpy().astype(numpy.int64)
    swapped = numpy.swapaxes(codes, 0, grid.axis)
    matrix = swapped.reshape(len(swapped), -1)
    order = tuple(_swapped(codes.ndim, grid.axis)) if grid.axis else None
    if grid.levels is not None:
        return LocatedWeight((name,), matrix, None, grid.levels.float().numpy(), swapped.shape, order)
    if grid.scale is None:
        raise ValueError(f"The grid of '{name}' has neither a scale nor levels.")
    scale, zero = grid.scale.float().numpy(), numpy.zeros(grid.scale.shape, numpy.int64)
    if grid.zero_point is not None:
        zero = grid.zero_point.numpy().astype(numpy.int64)
    rows = (one if grid.group else numpy.broadcast_to(one.reshape(-1, 1), (len(matrix), 1)) for one in (scale, zero))
    return LocatedWeight((name,), matrix, next(rows), None, swapped.shape, order, next(rows))


def _swapped(count: int, axis: int) -> list[int]:
    order = list(range(count))
    order[0], order[axis] = order[axis], order[0]
    return order


def _matrix(value: Array, table: LocatedWeight) -> Array:
    tensor = value if table.order is None else value.transpose(table.order)
    return numpy.ascontiguousarray(tensor.reshape(table.codes.shape))


def _plain(value: Array) -> Array:
    """With one zero: -0.0 is another bit pattern, but the same whole number."""
    plain: Array = numpy.ascontiguousarray(value + numpy.float32(0))
    return plain


def _joined_levels(names: tuple[str, ...], tables: list[LocatedWeight]) -> tuple[dict[str, int], Array | None]:
    """The tables one after the other, and where each begins."""
    levels = [table.levels for table in tables if table.levels is not None]
    if not levels:
        return {}, None
    ends = numpy.cumsum([len(one) for one in levels])
    offsets = {name: int(end) - len(one) for name, end, one in zip(names, ends, levels, strict=True)}
    return offsets, numpy.concatenate(levels)


def _scale(table: LocatedWeight, row: int) -> Array:
    if table.scale is None:
        raise ValueError(f"{table.title} has no scale.")
    scale: Array = table.scale[row]
    return scale


def _layer(name: str) -> str:
    return name.rpartition(".")[0]
