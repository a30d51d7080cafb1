"""From the exporter's graph to the one that is written: activations, weights and biases as integers."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import onnx
from onnx import ModelProto

from lightning_compress._version import __version__
from lightning_compress.export.onnx.qdq.activations import ActivationGrid, quantize_activations
from lightning_compress.export.onnx.qdq.capture import DOMAIN, CapturedModel
from lightning_compress.export.onnx.qdq.gates import gate_integers
from lightning_compress.export.onnx.qdq.graph import Graph
from lightning_compress.export.onnx.qdq.initializers import LocatedWeight, WeightLocator
from lightning_compress.export.onnx.qdq.kernels import LAYERS, integer_kernels, still_dequantized
from lightning_compress.export.onnx.qdq.padding import pad_integers
from lightning_compress.export.onnx.qdq.pooling import pool_integers
from lightning_compress.export.onnx.qdq.runtime import optimized_graph
from lightning_compress.export.onnx.qdq.weights import WeightType, WrittenWeights, write_weights
from lightning_compress.quantization.lowering.deployed_model import DeployedModel


@dataclass(frozen=True, eq=False)
class BuiltModel:
    """A graph of integers.

    Attributes:
        model: as it is written.
        places: where the quantizers of activations are in it.
        located: the weights by the constants that the exporter made of them.
        written: what has become of these constants.
        integer_kernels: of the graph that ONNX Runtime makes of it, by name.
        float_size_bytes: of the same graph with float32 weights.
    """

    model: ModelProto
    places: list[ActivationGrid]
    located: dict[str, LocatedWeight]
    written: WrittenWeights
    integer_kernels: dict[str, int]
    float_size_bytes: int

    @property
    def layer_kernels(self) -> int:
        """How many nodes compute a layer with integers."""
        return sum(count for name, count in self.integer_kernels.items() if name in LAYERS)

    def names(self, constants: Iterable[str]) -> list[str]:
        """The weights that these constants are made of, in the order of the graph."""
        chosen = set(constants)
        return list(dict.fromkeys(name for one in self.located if one in chosen for name in self.located[one].names))


def build_qdq_model(deployable: DeployedModel, exported: CapturedModel, weight_type: WeightType) -> BuiltModel:
    """Build the graph; layers that ONNX Runtime has no integer kernel for get weights that unpack to floats.

    Raises:
        ValueError: if a weight is not found.
    """
    start = Graph(exported.model)
    places = quantize_activations(start)
    pad_integers(start, [place.codes for place in places])
    pool_integers(start)
    gate_integers(start)
    floating = start.model()
    constants = {name: start.constant(name) for name in start.constants if start.is_float(name)}
    located = WeightLocator(deployable.weights).locate(
        {name: value for name, value in constants.items() if value is not None}, exported.unused, exported.looked_up
    )
    in_float: set[str] = set()
    while True:
        model, written = _integers(floating, places, located, weight_type, in_float)
        optimized = optimized_graph(model)
        stuck = still_dequantized(optimized, written.integer)
        if not stuck:
            break
        in_float |= {written.integer[name] for name in stuck}
    return BuiltModel(model, places, located, written, integer_kernels(optimized), floating.ByteSize())


def _integers(
    floating: ModelProto,
    places: list[ActivationGrid],
    located: dict[str, LocatedWeight],
    weight_type: WeightType,
    in_float: Collection[str],
) -> tuple[ModelProto, WrittenWeights]:
    graph = Graph(floating)
    written = write_weights(graph, located, places, weight_type, in_float)
    return stamped_model(graph), written


def stamped_model(graph: Graph) -> ModelProto:
    """The model of a graph, checked, with our name in place of what the exporter tells of the machine and its sources.

    Raises:
        Exception: onnx's own, if the model is not right.
    """
    model = graph.model()
    model.producer_name, model.producer_version = DOMAIN, __version__
    model.doc_string = ""
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {"made_by": f"{DOMAIN} {__version__}"})
    onnx.checker.check_model(model)
    return model
