"""Store whole numbers in an ONNX file in as few bits as it has types for, and unpack them where the file is loaded.

The nodes that unpack take constants alone. ONNX Runtime computes these once, when it loads a file, and its integer
kernels take what comes out.
"""

from typing import Any

import ml_dtypes
import numpy
import onnx
from onnx import NodeProto

from lightning_compress.export.onnx.qdq.graph import Array, Graph


class InitializerStore:
    """Constants of whole numbers; equal ones are stored once.

    Attributes:
        nodes: that unpack, in an order in which they can be computed.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[NodeProto] = []
        self._stored: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def integer(self, codes: Array, wanted: str, unsigned: bool = False) -> str:
        """The name of a value of these codes: int8, int16 if they need it, or uint8."""
        dtype = numpy.uint8 if unsigned else numpy.int8 if _fits(codes, 8) else numpy.int16
        codes = codes.astype(dtype)
        key = (codes.dtype.str, codes.shape, codes.tobytes())
        if key not in self._stored:
            self._stored[key] = self._packed(codes, wanted)
        return self._stored[key]

    def add(self, operator: str, inputs: list[str], wanted: str, **attributes: Any) -> str:
        """Add a node that computes with constants; the name of what comes out."""
        node = self.graph.make(operator, inputs, wanted, **attributes)
        self.nodes.append(node)
        return str(node.output[0])

    def _packed(self, codes: Array, wanted: str) -> str:
        different = numpy.unique(codes)
        if len(different) <= 4 and codes.size >= 64:
            return self._in_bytes(codes, different, wanted)
        signed, factor = codes.dtype != numpy.uint8, _power_of_two_in(codes)
        if codes.dtype.itemsize > 1 or not _fits(codes // factor, 4, signed):
            return self.graph.add_constant(f"{wanted}.codes", codes)
        small = (codes // factor).astype(ml_dtypes.int4 if signed else ml_dtypes.uint4)
        name = self.graph.add_constant(f"{wanted}.codes", small)
        if factor > 1:
            name = self.add("Cast", [name], f"{wanted}.numbers", to=onnx.TensorProto.INT32)
            multiplier = self.graph.add_constant(f"{wanted}.factor", numpy.int32(factor))
            name = self.add("Mul", [name, multiplier], f"{wanted}.multiplied")
        return self.add("Cast", [name], f"{wanted}.unpacked", to=_type(codes))

    def _in_bytes(self, codes: Array, different: Array, wanted: str) -> str:
        """Several to a byte, the first in its lowest bits, as places in a table of the codes that occur."""
        bits = 1 if len(different) <= 2 else 2
        shifts = numpy.arange(0, 8, bits, dtype=numpy.uint8)
        places = numpy.searchsorted(different, codes.reshape(-1)).astype(numpy.uint8)
        padded = numpy.pad(places, (0, -len(places) % len(shifts))).reshape(-1, len(shifts))
        packed = numpy.bitwise_or.reduce(padded << shifts, axis=1).reshape(-1, 1)
        constant = self.graph.add_constant
        name = constant(f"{wanted}.packed", packed)
        name = self.add("BitShift", [name, constant("shifts", shifts)], f"{wanted}.shifted", direction="RIGHT")
        name = self.add("BitwiseAnd", [name, constant("mask", numpy.uint8(2**bits - 1))], f"{wanted}.masked")
        name = self.add("Reshape", [name, constant("flat", numpy.array([-1]))], f"{wanted}.flat")
        ends = [constant("begin", numpy.array([0])), constant("end", numpy.array([len(places)]))]
        name = self.add("Slice", [name, *ends], f"{wanted}.cut")
        name = self.add("Cast", [name], f"{wanted}.places", to=onnx.TensorProto.INT32)
        name = self.add("Gather", [constant(f"{wanted}.table", different), name], f"{wanted}.found", axis=0)
        shape = constant(f"{wanted}.shape", numpy.array(codes.shape, dtype=numpy.int64))
        return self.add("Reshape", [name, shape], f"{wanted}.unpacked")


def _fits(codes: Array, bits: int, signed: bool = True) -> bool:
    lowest, highest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return not codes.size or bool(codes.min() >= lowest and codes.max() <= highest)


def _power_of_two_in(codes: Array) -> int:
    """The largest power of two that all codes are multiples of, up to 64."""
    together = int(numpy.bitwise_or.reduce(codes.reshape(-1), initial=64))
    return together & -together


def _type(codes: Array) -> int:
    return int(onnx.helper.np_dtype_to_tensor_dtype(codes.dtype))
