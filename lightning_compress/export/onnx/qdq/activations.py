"""Quantizers of activations as `QuantizeLinear` and `DequantizeLinear`, in the way that runtimes recognize."""

from dataclasses import dataclass
from typing import Any

import numpy
from onnx import NodeProto, helper

from lightning_compress.export.onnx.qdq.capture import DOMAIN, MARKER
from lightning_compress.export.onnx.qdq.graph import Graph

LOWEST, HIGHEST = 0, 255
SMALLEST_GAIN = 2.0**20
CLIPS = ("Relu", "Clip")


@dataclass(frozen=True)
class ActivationGrid:
    """Where in the graph the whole numbers of one call of a quantizer are.

    Attributes:
        quantizer, number: its name, and how often it was called before.
        codes: name of the uint8 value.
        step, zero_point: of the rounding: the code of `value` is `value / step + zero_point`, rounded and clipped.
        lowest, highest: of the codes that occur.
        gain: what steps are multiplied with on the way back to floats; more than 1 where only a sign is kept.
    """

    quantizer: str
    number: int
    codes: str
    step: float
    zero_point: int
    lowest: int = LOWEST
    highest: int = HIGHEST
    gain: float = 1.0

    @property
    def scale(self) -> float:
        """What the codes stand for: `(codes - zero_point) * scale`."""
        return self.step * self.gain


@dataclass(frozen=True)
class _Grid:
    quantizer: str
    number: int
    step: float
    zero_point: int
    lowest: int
    highest: int

    @classmethod
    def of(cls, marker: NodeProto) -> "_Grid":
        values: dict[str, Any] = {one.name: helper.get_attribute_value(one) for one in marker.attribute}
        numbers = [values[name] for name in ("zero_point", "lowest", "highest")]
        return cls(values["quantizer"].decode(), values["number"], float(numpy.float32(values["scale"])), *numbers)

    def code(self, value: float) -> int:
        """The whole number of a value, as `QuantizeLinear` rounds it."""
        return int(numpy.clip(numpy.rint(value / self.step) + self.zero_point, self.lowest, self.highest))


def quantize_activations(graph: Graph) -> list[ActivationGrid]:
    """Replace each quantizer by a `QuantizeLinear` and a `DequantizeLinear`, and tell where they are.

    A clip right before a quantizer is computed after it, on whole numbers: with rounding that never decreases this is
    the same, and only then an integer kernel can write its result at once. What takes one value through equal grids
    shares the two nodes.

    Raises:
        ValueError: if a quantizer lies in the body of a loop or branch.
    """
    places: list[ActivationGrid] = []
    for marker, grids in _share(graph):
        gain = _take_gain(graph, marker)
        codes, lowest, highest = _quantize(graph, marker, grids[0], gain)
        places += [
            ActivationGrid(grid.quantizer, grid.number, codes, grid.step, grid.zero_point, lowest, highest, gain)
            for grid in grids
        ]
    graph.drop_unused()
    if any(one.domain == DOMAIN for one in graph.model().opset_import):
        raise ValueError(
            "A quantizer lies in the body of a loop or branch, which no integer kernel reaches: ignore it."
        )
    return places


def _share(graph: Graph) -> list[tuple[NodeProto, list[_Grid]]]:
    """Let quantizers with equal grids that take one value be one; the markers that stay, with the grids of each."""
    shared: dict[tuple[Any, ...], tuple[NodeProto, list[_Grid]]] = {}
    for marker in [node for node in graph.nodes if node.domain == DOMAIN and node.op_type == MARKER]:
        grid = _Grid.of(marker)
        key = (marker.input[0], grid.step, grid.zero_point, grid.lowest, grid.highest)
        first, grids = shared.setdefault(key, (marker, []))
        grids.append(grid)
        if first is not marker:
            graph.replace(marker, [helper.make_node("Identity", [first.output[0]], [marker.output[0]])])
    drop_identity_nodes(graph)
    return list(shared.values())


def _take_gain(graph: Graph, marker: NodeProto) -> float:
    """The number that all who take a quantizer's values multiply them with first; the marker then makes the product.

    A grid that keeps no more than a sign has steps of next to nothing, and what it makes of them is of another size:
    `DequantizeLinear` does both at once.
    """
    takers = graph.consumers().get(marker.output[0], [])
    gains = [_factor(graph, node, marker.output[0]) for node in takers]
    if marker.output[0] in graph.outputs or not gains or None in gains or len(set(gains)) > 1:
        return 1.0
    for node in takers:
        graph.replace(node, [helper.make_node("Identity", [marker.output[0]], list(node.output))])
    drop_identity_nodes(graph)
    return float(gains[0] or 1.0)


def _factor(graph: Graph, node: NodeProto, value: str) -> float | None:
    """What a node multiplies a value with, if that is one number, and large enough to be a gain."""
    factors = [graph.constant(name) for name in node.input if name != value]
    if node.op_type != "Mul" or len(factors) != 1 or factors[0] is None or factors[0].size != 1:
        return None
    factor = float(factors[0].item())
    return factor if factor >= SMALLEST_GAIN else None


def _quantize(graph: Graph, marker: NodeProto, grid: _Grid, gain: float) -> tuple[str, int, int]:
    source, lowest, highest = _without_clips(graph, marker.input[0], grid)
    parameters = _parameters(graph, grid)
    quantize = graph.make("QuantizeLinear", [source, *parameters], f"{grid.quantizer}.codes")
    nodes, codes = [quantize], quantize.output[0]
    if (lowest, highest) != (LOWEST, HIGHEST):
        limits = [
            graph.add_constant(f"{grid.quantizer}.{name}", numpy.uint8(limit))
            for name, limit in (("lowest", lowest), ("highest", highest))
        ]
        nodes.append(graph.make("Clip", [codes, *limits], f"{grid.quantizer}.clipped"))
        codes = nodes[-1].output[0]
    if gain != 1.0:
        parameters = [_constant(graph, f"{grid.quantizer}.size", numpy.float32(grid.step * gain)), parameters[1]]
    nodes.append(helper.make_node("DequantizeLinear", [codes, *parameters], [marker.output[0]]))
    graph.replace(marker, nodes)
    return codes, lowest, highest


def _parameters(graph: Graph, grid: _Grid) -> list[str]:
    """Names of scale and zero point, the same for every call of a quantizer."""
    values = {"scale": numpy.float32(grid.step), "zero_point": numpy.uint8(grid.zero_point)}
    return [_constant(graph, f"{grid.quantizer}.{part}", value) for part, value in values.items()]


def _constant(graph: Graph, name: str, value: Any) -> str:
    return name if graph.constant(name) is not None else graph.add_constant(name, value)


def _without_clips(graph: Graph, name: str, grid: _Grid) -> tuple[str, int, int]:
    """The value before the clips that lead to `name` alone, and the codes that they clip to."""
    lowest, highest = grid.lowest, grid.highest
    makers, takers = graph.producers(), graph.consumers()
    while (maker := makers.get(name)) is not None and maker.op_type in CLIPS:
        limits = _limits(graph, maker)
        if limits is None or len(takers[name]) > 1 or name in graph.outputs:
            break
        lowest = int(numpy.clip(grid.code(limits[0]), lowest, highest))
        highest = int(numpy.clip(grid.code(limits[1]), lowest, highest))
        name = maker.input[0]
    return name, lowest, highest


def _limits(graph: Graph, clip: NodeProto) -> tuple[float, float] | None:
    if clip.op_type == "Relu":
        return 0.0, numpy.inf
    limits = [-numpy.inf, numpy.inf]
    for place, name in enumerate(clip.input[1:3]):
        if name:
            value = graph.constant(name)
            if value is None:
                return None
            limits[place] = float(value)
    return limits[0], limits[1]


def drop_identity_nodes(graph: Graph) -> None:
    """Take out `Identity` nodes, but for those that make an output."""
    names: dict[str, str] = {}
    kept = []
    for node in graph.nodes:
        for place, name in enumerate(node.input):
            node.input[place] = names.get(name, name)
        if node.op_type == "Identity" and node.output[0] not in graph.outputs:
            names[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    graph.nodes = kept
