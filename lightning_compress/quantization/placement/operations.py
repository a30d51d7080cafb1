"""What torch's functions do to activations, as far as it matters where those are quantized."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

DROPOUTS = {functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d, torch.dropout}
# These move numbers about and make no new ones, so what lay on a grid lies on it still.
MOVES = {
    *DROPOUTS, functional.max_pool1d, functional.max_pool2d, functional.max_pool3d, torch.max_pool1d, torch.max_pool2d,
    torch.max_pool3d, torch.flatten, torch.reshape, torch.transpose, torch.permute, torch.squeeze, torch.unsqueeze,
    torch.chunk, torch.split, torch.unbind, functional.pad, functional.pixel_shuffle, Tensor.view, Tensor.reshape,
    Tensor.flatten, Tensor.unflatten, Tensor.transpose, Tensor.permute, Tensor.squeeze, Tensor.unsqueeze,
    Tensor.contiguous, Tensor.chunk, Tensor.split, Tensor.unbind, Tensor.expand, Tensor.__getitem__, Tensor.to,
    Tensor.movedim,
}  # fmt: skip
# Runtimes have integer kernels for these, or compute them after the input was dequantized at no harm.
JOINS = {
    torch.add, torch.cat, torch.concat, torch.concatenate, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__,
    Tensor.__radd__, torch.mean, Tensor.mean, functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d,
    functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d, functional.adaptive_avg_pool3d,
}  # fmt: skip
# These gate one activation with another, as squeeze-and-excitation does.
PRODUCTS = {torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__imul__, Tensor.__rmul__}
SUMS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__}
PAD_VALUE = (3, "value")  # position and name of that argument
# With the position and the name of their lower limit.
CLAMPS: dict[Any, tuple[int, str]] = {
    **dict.fromkeys((functional.hardtanh, functional.hardtanh_), (1, "min_val")),
    **dict.fromkeys((torch.clamp, torch.clamp_, torch.clip, Tensor.clamp, Tensor.clamp_, Tensor.clip), (1, "min")),
    **dict.fromkeys((torch.clamp_min, Tensor.clamp_min, Tensor.clamp_min_), (1, "min")),
}
# Kernels take these along: a clip is what a grid with its zero at one end does anyway.
RELUS = {functional.relu, functional.relu_, functional.relu6, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
CLIPS = RELUS | set(CLAMPS)
NON_NEGATIVE = RELUS | {
    functional.softmax, torch.softmax, Tensor.softmax, torch.sigmoid, Tensor.sigmoid, functional.sigmoid,
    functional.hardsigmoid,
}  # fmt: skip
# What is made of non-negative numbers alone by these is not negative.
KEEP_SIGN = MOVES | JOINS | PRODUCTS
