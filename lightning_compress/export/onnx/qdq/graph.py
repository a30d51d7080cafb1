"""An ONNX graph that is being rewritten: who makes a value, who takes it, and what is constant."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper

Array = numpy.ndarray[Any, Any]


class Graph:
    """A copy of a model's graph that nodes are added to and taken from.

    Attributes:
        nodes: in an order in which they can be computed.
    """

    def __init__(self, model: ModelProto) -> None:
        self._model = ModelProto()
        self._model.CopyFrom(model)
        graph = self._model.graph
        # These tell about values of a graph that is about to change, and quote source lines with their paths.
        del graph.value_info[:]
        for one in (graph, *_all_nodes(graph.node), *graph.input, *graph.output, *graph.initializer):
            del one.metadata_props[:]
            one.doc_string = ""
        self.nodes: list[NodeProto] = list(graph.node)
        self._constants = {one.name: one for one in self._model.graph.initializer}
        self._names = {name for node in self.nodes for name in (*node.input, *node.output)} | self._constants.keys()
        self._names |= {one.name for one in (*self._model.graph.input, *self._model.graph.output)}

    @property
    def outputs(self) -> list[str]:
        """Names of the graph's outputs."""
        return [one.name for one in self._model.graph.output]

    @property
    def constants(self) -> list[str]:
        """Names of all initializers."""
        return list(self._constants)

    def is_float(self, name: str) -> bool:
        """Whether this initializer holds float32."""
        return bool(self._constants[name].data_type == onnx.TensorProto.FLOAT)

    def constant(self, name: str) -> Array | None:
        """The value of an initializer; None if it is computed."""
        if name not in self._constants:
            return None
        value: Array = numpy_helper.to_array(self._constants[name])
        return value

    def producers(self) -> dict[str, NodeProto]:
        """Which node makes a value, by its name."""
        return {name: node for node in self.nodes for name in node.output}

    def consumers(self) -> dict[str, list[NodeProto]]:
        """Which nodes take a value, by its name: one that takes it twice stands there twice."""
        takers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in _taken(node):
                takers.setdefault(name, []).append(node)
        return takers

    def new_name(self, wanted: str) -> str:
        """A name that no value has yet, `wanted` itself if it is free."""
        name, number = wanted, 1
        while name in self._names:
            number += 1
            name = f"{wanted}_{number}"
        self._names.add(name)
        return name

    def add_constant(self, wanted: str, value: Any) -> str:
        """Add an initializer, and return its name."""
        name = self.new_name(wanted)
        self._constants[name] = numpy_helper.from_array(numpy.asarray(value), name)
        return name

    def take_constant(self, name: str) -> None:
        """Take an initializer away, so that a node can make a value of that name."""
        del self._constants[name]

    def make(self, operator: str, inputs: Iterable[str], wanted: str, **attributes: Any) -> NodeProto:
        """A node with one output under a new name; it is not put into the graph yet."""
        return helper.make_node(operator, list(inputs), [self.new_name(wanted)], **attributes)

    def replace(self, old: NodeProto, new: Iterable[NodeProto]) -> None:
        """Put nodes in the place of one."""
        place = next(place for place, node in enumerate(self.nodes) if node is old)
        self.nodes[place : place + 1] = list(new)

    def drop_unused(self) -> None:
        """Take away nodes and initializers that no output needs."""
        needed = set(self.outputs)
        kept = []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                kept.append(node)
                needed.update(_taken(node))
        self.nodes = kept[::-1]
        self._constants = {name: one for name, one in self._constants.items() if name in needed}

    def model(self) -> ModelProto:
        """The graph as it is now."""
        made = ModelProto()
        made.CopyFrom(self._model)
        del made.graph.node[:], made.graph.initializer[:]
        made.graph.node.extend(self.nodes)
        made.graph.initializer.extend(self._constants.values())
        domains = {node.domain for node in _all_nodes(self.nodes)} | {""}
        kept = [one for one in made.opset_import if one.domain in domains]
        del made.opset_import[:]
        made.opset_import.extend(kept)
        return made


def _taken(node: NodeProto) -> Iterator[str]:
    """What a node takes, the bodies of loops and branches included."""
    yield from (name for name in node.input if name)
    for inner in _bodies(node):
        for one in inner.node:
            yield from _taken(one)
        yield from (one.name for one in inner.output)


def _bodies(node: NodeProto) -> list[onnx.GraphProto]:
    found = []
    for attribute in node.attribute:
        found += [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else list(attribute.graphs)
    return found


def _all_nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    for node in nodes:
        yield node
        for inner in _bodies(node):
            yield from _all_nodes(inner.node)
