"""FLOP formulas that torch's counter lacks, and which operands of an operation can be weights."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

aten = torch.ops.aten
Shape = Sequence[int]


def attention_flops(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Scores and weighted values, shapes `(batch, heads, length, width)`; a causal mask saves nothing here."""
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def rnn_layer_flops(inputs: Shape, input_weight: Shape, hidden_weight: Shape, *_: Any, **__: Any) -> int:
    """One direction of one layer of oneDNN's LSTM: both weights are used once in each step of each sequence."""
    return 2 * prod(inputs[:-1]) * (prod(input_weight) + prod(hidden_weight))


def trilinear_flops(first: Shape, weight: Shape, second: Shape, *_: Any, **__: Any) -> int:
    """`nn.Bilinear`: inputs `(batch, 1, in)`, weight `(1, out, in, in)`; each weight is used once for each sample."""
    return 2 * first[0] * prod(weight)


def mv_flops(matrix: Shape, _vector: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(matrix)


def addmv_flops(_bias: Shape, matrix: Shape, _vector: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(matrix)


def dot_flops(vector: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(vector)


def addbmm_flops(_bias: Shape, first: Shape, second: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(first) * second[-1]


def mm_flops(first: Shape, second: Shape, *_: Any, **__: Any) -> int:
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
    """Those of `MISSING` that this torch has as an operation and `known`, its registry of formulas, lacks."""
    found = {getattr(aten, name): formula for name, formula in MISSING.items() if hasattr(aten, name)}
    return {operation: formula for operation, formula in found.items() if operation not in known}
