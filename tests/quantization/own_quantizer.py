"""A quantizer as a user would write it."""

from lightning_compress.quantization.functional.quantizers import Quantized


def coarse(values, scale, zero_point):
    return Quantized((values / scale).round() * scale, scale, zero_point)


def wanting(values, moon):
    return Quantized(values + moon, None, None)
