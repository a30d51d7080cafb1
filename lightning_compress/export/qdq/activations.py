"""Quantizers of activations as `QuantizeLinear` and `DequantizeLinear`, in the way that runtimes recognize."""

from dataclasses import dataclass
from typing import Any

import numpy
from onnx import NodeProto, helper

from lightning_compress.export.qdq.capture import DOMAIN, MARKER
from lightning_compress.export.qdq.graph import Graph

LOWEST, HIGHEST = 0, 255
CLIPS = ("Relu", "Clip")


@dataclass(frozen=True)
class Place:
    """Where in the graph the whole numbers of one call of a quantizer are.

    Attributes:
        quantizer, number: its name, and how often it was called before.
        codes: name of the uint8 value.
        scale, zero_point: what the codes stand for: `(codes - zero_point) * scale`.
        lowest, highest: of the codes that occur.
    """

    quantizer: str
    number: int
    codes: str
    scale: float
    zero_point: int
    lowest: int = LOWEST
    highest: int = HIGHEST


@dataclass(frozen=True)
class _Grid:
    quantizer: str
    number: int
    scale: float
    zero_point: int

    @classmethod
    def of(cls, marker: NodeProto) -> "_Grid":
        values: dict[str, Any] = {one.name: helper.get_attribute_value(one) for one in marker.attribute}
        scale = float(numpy.float32(values["scale"]))
        return cls(values["quantizer"].decode(), values["number"], scale, values["zero_point"])

    def code(self, value: float) -> int:
        """The whole number of a value, as `QuantizeLinear` rounds it."""
        return int(numpy.clip(numpy.rint(value / self.scale) + self.zero_point, LOWEST, HIGHEST))


def quantize_activations(graph: Graph) -> list[Place]:
    """Replace each quantizer by a `QuantizeLinear` and a `DequantizeLinear`, and tell where they are.

    A clip right before a quantizer is computed after it, on whole numbers: with rounding that never decreases this is
    the same, and only then an integer kernel can write its result at once. What takes one value through equal grids
    shares the two nodes.

    Raises:
        ValueError: if a quantizer lies in the body of a loop or branch.
    """
    places: list[Place] = []
    for marker, grids in _share(graph):
        codes, lowest, highest = _quantize(graph, marker, grids[0])
        places += [
            Place(grid.quantizer, grid.number, codes, grid.scale, grid.zero_point, lowest, highest) for grid in grids
        ]
    graph.drop_unused()
    if any(one.domain == DOMAIN for one in graph.model().opset_import):
        raise ValueError(
            "A quantizer lies in the body of a loop or branch, which no integer kernel reaches: ignore it."
        )
    return places


def _share(graph: Graph) -> list[tuple[NodeProto, list[_Grid]]]:
    """Let quantizers with equal grids that take one value be one; the markers that stay, with the grids of each."""
    shared: dict[tuple[str, float, int], tuple[NodeProto, list[_Grid]]] = {}
    for marker in [node for node in graph.nodes if node.domain == DOMAIN and node.op_type == MARKER]:
        grid = _Grid.of(marker)
        key = (marker.input[0], grid.scale, grid.zero_point)
        first, grids = shared.setdefault(key, (marker, []))
        grids.append(grid)
        if first is not marker:
            graph.replace(marker, [helper.make_node("Identity", [first.output[0]], [marker.output[0]])])
    drop_identities(graph)
    return list(shared.values())


def _quantize(graph: Graph, marker: NodeProto, grid: _Grid) -> tuple[str, int, int]:
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
    nodes.append(helper.make_node("DequantizeLinear", [codes, *parameters], [marker.output[0]]))
    graph.replace(marker, nodes)
    return codes, lowest, highest


def _parameters(graph: Graph, grid: _Grid) -> list[str]:
    """Names of scale and zero point, the same for every call of a quantizer."""
    values = {"scale": numpy.float32(grid.scale), "zero_point": numpy.uint8(grid.zero_point)}
    names = []
    for part, value in values.items():
        name = f"{grid.quantizer}.{part}"
        names.append(name if graph.constant(name) is not None else graph.add_constant(name, value))
    return names


def _without_clips(graph: Graph, name: str, grid: _Grid) -> tuple[str, int, int]:
    """The value before the clips that lead to `name` alone, and the codes that they clip to."""
    lowest, highest = LOWEST, HIGHEST
    makers, takers = graph.makers(), graph.takers()
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


def drop_identities(graph: Graph) -> None:
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
