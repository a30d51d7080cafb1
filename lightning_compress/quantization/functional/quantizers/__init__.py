"""Quantizers: how a tensor is put on a grid.

A quantizer is a function that asks for what it needs by naming it:

| name | what | shape |
|---|---|---|
| `values` | weights, as a matrix whose rows have a scale each | `(rows, elements)` |
| | or activations as they are, which have one scale | `(batch, ...)` |
| `quant_min`, `quant_max` | limits of the whole numbers of the grid | ints |
| `scale` | the distance of neighbours on the grid, above 0 | `(rows, 1)`, or 0-d for activations |
| `zero_point` | the whole number that stands for 0, int32 | as `scale` |
| `dtype` | of the format, if that is floating point | |
| `generator` | a seeded random generator; None in evaluation, which draws nothing | |

and by the names of what it learns, which the decorator `learns` gives it together with how each begins. Its other
parameters are options with a default.

It returns `Quantized(values, scale, zero_point)` and leaves its inputs as they are. It computes in float32 or wider,
and returns values in the precision that it was given. A gradient goes through the rounding as if that were not there.
Zero is on every grid and stays zero, but for the binary ones, which have none. What is no number stays none.
"""

from lightning_compress.quantization.functional.quantizers.binary import (
    binary_connect,
    bnn,
    stochastic_binary,
    xnor,
    xnor_activations,
)
from lightning_compress.quantization.functional.quantizers.dorefa_wage import (
    dorefa_activations,
    dorefa_weights,
    wage_activations,
    wage_weights,
)
from lightning_compress.quantization.functional.quantizers.learned import lsq, pact
from lightning_compress.quantization.functional.quantizers.ternary import ttq, twn
from lightning_compress.quantization.functional.quantizers.uniform import floating, stochastic, uniform
from lightning_compress.quantization.functional.rounding import Quantized, code_range, for_sides, learns

OFFERED = ("values", "quant_min", "quant_max", "scale", "zero_point", "dtype", "generator")

__all__ = [
    "OFFERED",
    "Quantized",
    "binary_connect",
    "bnn",
    "code_range",
    "dorefa_activations",
    "dorefa_weights",
    "floating",
    "for_sides",
    "learns",
    "lsq",
    "pact",
    "stochastic",
    "stochastic_binary",
    "ttq",
    "twn",
    "uniform",
    "wage_activations",
    "wage_weights",
    "xnor",
    "xnor_activations",
]
