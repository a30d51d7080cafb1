"""Biases as int32, which integer kernels add before they scale."""

from collections.abc import Sequence

import numpy

from lightning_compress.export.qdq.graph import Array, Graph
from lightning_compress.export.qdq.kernels import BIAS_INPUT, Kernel
from lightning_compress.export.qdq.storing import Store

# A bias leaves room in int32 for the sum of products that it is added to.
LARGEST_BIAS = 2.0**30
# Two products of 8 bits with weights up to this fit in 16 bits.
NEVER_SATURATES = 64


def with_room_for_biases(graph: Graph, kernels: Sequence[Kernel], codes: Array, scales: Array) -> tuple[Array, Array]:
    """Whole numbers and scales of the same weight, for which int32 holds the biases of its kernels well.

    Steps are halved as long as the numbers may be doubled, since a bias is rounded to them: with weights of 2 bits they
    are large. Where a bias would be more steps than int32 can count, as in a channel whose BatchNorm has died and left
    weights of next to nothing, they are widened. Then those weights round to zero, and that changes the output by less
    than a thirty-thousandth of the bias for each input.
    """
    biases = [(kernel, bias) for kernel in kernels if (bias := bias_of(graph, kernel)) is not None]
    if not biases:
        return codes, scales
    doublings = 0
    while numpy.abs(codes).max(initial=1) * 2 ** (doublings + 1) <= NEVER_SATURATES:
        doublings += 1
    codes, scales = codes * 2**doublings, scales / numpy.float32(2**doublings)
    for kernel, bias in biases:
        least = numpy.abs(bias.astype(numpy.float64)) / (kernel.place.scale * LARGEST_BIAS)
        wider = numpy.maximum(scales, least if scales.ndim else least.max(initial=0.0)).astype(numpy.float32)
        codes = numpy.rint(codes * (scales / wider).reshape(-1, 1)).astype(codes.dtype)
        scales = wider
    return codes, scales


def bias_of(graph: Graph, kernel: Kernel) -> Array | None:
    """The bias, if it is constant."""
    return None if kernel.bias is None else graph.constant(kernel.bias)


def add_integer_bias(graph: Graph, store: Store, kernel: Kernel, scales: Array, title: str) -> float:
    """Let the kernel take its bias as int32; the largest error of the rounding, in units of the bias."""
    bias = bias_of(graph, kernel)
    if bias is None:
        return 0.0
    steps = numpy.broadcast_to(numpy.float32(kernel.place.scale) * scales.astype(numpy.float32), bias.shape)
    codes = numpy.rint(bias.astype(numpy.float64) / steps).astype(numpy.int32)
    names = [graph.add_constant(f"{title}.bias", codes), graph.add_constant(f"{title}.bias_scale", steps)]
    kernel.node.input[BIAS_INPUT] = store.add("DequantizeLinear", names, f"{title}.bias_dequantized", axis=0)
    return float(numpy.abs(codes * steps.astype(numpy.float64) - bias).max(initial=0.0))
