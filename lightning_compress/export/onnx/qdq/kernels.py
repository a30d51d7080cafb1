"""Which layers integer kernels can compute, and which of them ONNX Runtime does compute with one."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from onnx import ModelProto, NodeProto, helper

from lightning_compress.export.onnx.qdq.activations import ActivationGrid
from lightning_compress.export.onnx.qdq.graph import Array, Graph

# These hand whole numbers on as they are, so that their grid is that of what they take.
MOVES = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Expand", "Identity")
# Names that ONNX Runtime gives to its kernels for layers with weights, and to others that compute with whole numbers.
LAYERS = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "ConvInteger", "MatMulInteger")
OTHERS = ("QLinear", "QAttention", "QEmbed")
WEIGHT_INPUT, BIAS_INPUT = 1, 2
LARGEST_SUM = 2**15 - 1


@dataclass(frozen=True, eq=False)
class IntegerKernel:
    """A node that an integer kernel may compute.

    Attributes:
        node: Conv, Gemm or MatMul.
        place: whose grid the input lies on.
        axis: of the weight, along which the output's channels lie.
    """

    node: NodeProto
    place: ActivationGrid
    axis: int

    @property
    def bias(self) -> str | None:
        """Name of the bias, if it has one."""
        return (
            self.node.input[BIAS_INPUT] if len(self.node.input) > BIAS_INPUT and self.node.input[BIAS_INPUT] else None
        )

    def may_saturate(self, codes: Array) -> bool:
        """Whether CPUs without VNNI instructions can get a wrong sum of two products.

        They add `input * weight` of two neighbours into 16 bits. Depthwise convolutions have kernels of their own,
        which do not.

        Args:
            codes: of the weight, a row per channel.
        """
        if self.node.op_type == "Conv" and _attribute(self.node, "group", 1) == len(codes) > 1:
            return False
        if codes.shape[1] < 2:
            return False
        two = codes.copy()
        two.partition((1, codes.shape[1] - 2), axis=1)
        largest = max(int(two[:, -2:].clip(0).sum(1).max()), int(-two[:, :2].clip(None, 0).sum(1).min()))
        return largest * self.place.highest > LARGEST_SUM


def find_kernel(graph: Graph, node: NodeProto, weight: str, places: Iterable[ActivationGrid]) -> IntegerKernel | None:
    """The kernel that takes this constant as its weight, if there may be one."""
    if list(node.input).count(weight) != 1 or node.input[WEIGHT_INPUT:][:1] != [weight]:
        return None
    axis = _channel_axis(graph, node, weight)
    place = _origin(graph, node.input[0], {one.codes: one for one in places})
    return None if axis is None or place is None else IntegerKernel(node, place, axis)


def _channel_axis(graph: Graph, node: NodeProto, weight: str) -> int | None:
    if node.op_type == "Conv":
        return 0
    value = graph.constant(weight)
    if node.op_type == "MatMul" and value is not None and value.ndim == 2:
        return 1
    plain = all(_attribute(node, name, one) == one for name, one in (("alpha", 1.0), ("beta", 1.0), ("transA", 0)))
    return 1 - int(_attribute(node, "transB", 0)) if node.op_type == "Gemm" and plain else None


def _origin(graph: Graph, name: str, places: dict[str, ActivationGrid]) -> ActivationGrid | None:
    """Whose grid a value lies on, if it lies on one: it was made of the whole numbers there by moving them about."""
    makers = graph.producers()
    while name not in places and (maker := makers.get(name)) is not None:
        if maker.op_type not in (*MOVES, "DequantizeLinear", "Pad"):
            return None
        name = maker.input[0]
    return places.get(name)


def _attribute(node: NodeProto, name: str, default: float) -> float:
    return next((float(helper.get_attribute_value(one)) for one in node.attribute if one.name == name), default)


def integer_kernels(optimized: ModelProto) -> dict[str, int]:
    """How many kernels of whole numbers an optimized graph has, by their names."""
    return dict(Counter(node.op_type for node in optimized.graph.node if node.op_type.startswith((*LAYERS, *OTHERS))))


def still_dequantized(optimized: ModelProto, weights: Iterable[str]) -> set[str]:
    """Which of these weights an optimized graph turns into floats at each call, by the names of their whole numbers."""
    taken = {node.input[0] for node in optimized.graph.node if node.op_type == "DequantizeLinear"}
    return taken & set(weights)
