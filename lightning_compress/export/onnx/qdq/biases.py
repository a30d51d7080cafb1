"""Biases as int32, which integer kernels add before they scale."""

from collections.abc import Sequence

import numpy

from lightning_compress.export.onnx.qdq.graph import Array, Graph
from lightning_compress.export.onnx.qdq.kernels import BIAS_INPUT, IntegerKernel
from lightning_compress.export.onnx.qdq.storage import InitializerStore
from lightning_compress.quantization.integer_bias import LARGEST_BIAS, finer_scale

# A bias of no more steps than float32 has digits is exact there.
SPARE = 2**8


def scales_with_bias_room(
    graph: Graph, kernels: Sequence[IntegerKernel], codes: Array, scales: Array, zeros: Array
) -> tuple[Array, Array, Array]:
    """Whole numbers, scales and zeros of the same weight, for which int32 holds the biases of its kernels well.

    Steps are halved as long as the numbers may be doubled, since a bias is rounded to them: with weights of 2 bits they
    are large. Where a bias would be more steps than int32 can count, as in a channel whose BatchNorm has died and left
    weights of next to nothing, they are widened. Then those weights round to zero, and that changes the output by less
    than a thirty-thousandth of the bias for each input. A channel without weights takes the steps that its bias asks
    for.
    """
    biases = [(kernel, bias) for kernel in kernels if (bias := bias_of(graph, kernel)) is not None]
    if not biases:
        return codes, scales, zeros
    factor = finer_scale(int(max(numpy.abs(codes).max(initial=1), numpy.abs(zeros).max(initial=1))))
    codes, scales, zeros = codes * factor, scales / numpy.float32(factor), zeros * factor
    steps = codes - zeros.reshape(-1, 1)
    sizes = [numpy.abs(bias.astype(numpy.float64)) / kernel.place.scale for kernel, bias in biases]
    least = numpy.max(sizes, axis=0) / LARGEST_BIAS
    if not scales.ndim:
        least = least.max(initial=0.0)
    empty = (steps == 0).all(1) if scales.ndim else (steps == 0).all()
    wider = numpy.where(empty & (least > 0), least * SPARE, numpy.maximum(scales, least)).astype(numpy.float32)
    steps = numpy.rint(steps * (scales / wider).reshape(-1, 1)).astype(codes.dtype)
    return steps + zeros.reshape(-1, 1), wider, zeros


def bias_of(graph: Graph, kernel: IntegerKernel) -> Array | None:
    """The bias, if it is constant."""
    return None if kernel.bias is None else graph.constant(kernel.bias)


def add_integer_bias(graph: Graph, store: InitializerStore, kernel: IntegerKernel, scales: Array, title: str) -> float:
    """Let the kernel take its bias as int32; the largest error of the rounding, in units of the bias."""
    bias = bias_of(graph, kernel)
    if bias is None:
        return 0.0
    steps = numpy.broadcast_to(numpy.float32(kernel.place.scale) * scales.astype(numpy.float32), bias.shape)
    codes = numpy.rint(bias.astype(numpy.float64) / steps).astype(numpy.int32)
    names = [graph.add_constant(f"{title}.bias", codes), graph.add_constant(f"{title}.bias_scale", steps)]
    kernel.node.input[BIAS_INPUT] = store.add("DequantizeLinear", names, f"{title}.bias_dequantized", axis=0)
    return float(numpy.abs(codes * steps.astype(numpy.float64) - bias).max(initial=0.0))
