"""FLOP formulas that torch's counter lacks, and which operands of an operation can be weights."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

aten = torch.ops.aten
Shape = Sequence[int]


def attention_flops(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Scores and weighted values, shapes `(batch, heads, length, width)`; a causal mask saves nothing here.

    >>> attention_flops((1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4))  # 2 heads, 2 products of 3 x 3 x 4 MACs
    288
    """
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def rnn_layer_flops(inputs: Shape, input_weight: Shape, hidden_weight: Shape, *_: Any, **__: Any) -> int:
    """One direction of one layer of oneDNN's LSTM: both weights are used once in each step of each sequence.

    >>> rnn_layer_flops((5, 1, 3), (8, 3), (8, 2))  # 5 steps, 24 + 16 weights
    400
    """
    return 2 * prod(inputs[:-1]) * (prod(input_weight) + prod(hidden_weight))


def trilinear_flops(first: Shape, weight: Shape, second: Shape, *_: Any, **__: Any) -> int:
    """`nn.Bilinear`: inputs `(batch, 1, in)`, weight `(1, out, in, in)`; each weight is used once for each sample.

    >>> trilinear_flops((4, 1, 3), (1, 2, 3, 5), (4, 1, 5))  # 4 samples, 30 weights
    240
    """
    return 2 * first[0] * prod(weight)


def mv_flops(matrix: Shape, _vector: Shape, *_: Any, **__: Any) -> int:
    """`matrix @ vector`: one multiplication and one addition for each element of the matrix.

    >>> mv_flops((3, 4), (4,))
    24
    """
    return 2 * prod(matrix)


def addmv_flops(_bias: Shape, matrix: Shape, _vector: Shape, *_: Any, **__: Any) -> int:
    """`bias + matrix @ vector`: as `mv_flops`, the bias is not counted.

    >>> addmv_flops((3,), (3, 4), (4,))
    24
    """
    return 2 * prod(matrix)


def dot_flops(vector: Shape, *_: Any, **__: Any) -> int:
    """The inner product of two vectors.

    >>> dot_flops((5,), (5,))
    10
    """
    return 2 * prod(vector)


def addbmm_flops(_bias: Shape, first: Shape, second: Shape, *_: Any, **__: Any) -> int:
    """`bias + (first @ second).sum(0)` over a batch of matrices; the bias is not counted.

    >>> addbmm_flops((3, 5), (2, 3, 4), (2, 4, 5))
    240
    """
    return 2 * prod(first) * second[-1]


def mm_flops(first: Shape, second: Shape, *_: Any, **__: Any) -> int:
    """`first @ second`.

    >>> mm_flops((3, 4), (4, 5))
    120
    """
    return 2 * prod(first) * second[-1]


MISSING: dict[str, Callable[..., int]] = {
    "_scaled_dot_product_flash_attention_for_cpu": attention_flops,
    "_scaled_dot_product_fused_attention_overrideable": attention_flops,
    "mkldnn_rnn_layer": rnn_layer_flops,
    "_trilinear": trilinear_flops,
    "mv": mv_flops,
    "addmv": addmv_flops,
    "dot": dot_flops,
    "vdot": dot_flops,
    "addbmm": addbmm_flops,
    "_int_mm": mm_flops,
}

# Which arguments may be a weight. Each element of one takes part in equally many multiplications.
WEIGHT_OPERANDS: dict[str, tuple[int, ...]] = {
    "mm": (0, 1),
    "bmm": (0, 1),
    "addmm": (1, 2),
    "baddbmm": (1, 2),
    "addbmm": (1, 2),
    "_int_mm": (0, 1),
    "mv": (0,),
    "addmv": (1,),
    "dot": (0, 1),
    "convolution": (1,),
    "_convolution": (1,),
    "cudnn_convolution": (1,),
    "_slow_conv2d_forward": (1,),
    "convolution_overrideable": (1,),
    "mkldnn_rnn_layer": (1, 2),
    "_trilinear": (1,),
}


def missing_formulas(known: dict[Any, Any]) -> dict[Any, Callable[..., int]]:
    """Those of `MISSING` that this torch has as an operation and `known`, its registry of formulas, lacks.

    >>> from torch.utils.flop_counter import flop_registry
    >>> missing_formulas(flop_registry)[aten.dot] is dot_flops
    True
    """
    found = {getattr(aten, name): formula for name, formula in MISSING.items() if hasattr(aten, name)}
    return {operation: formula for operation, formula in found.items() if operation not in known}
