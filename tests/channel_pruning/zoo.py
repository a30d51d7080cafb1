"""Small architectures whose channels are coupled in every way we know of.

An entry is made by a function that takes nothing and gives a module in training mode and an example of its input, four
samples: a tensor, a tuple of positional arguments or a dict of keywords. Weights and input are random: seed before.
Every layer that makes an output, and so must stay whole, has a name that begins with `head`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.channel_pruning.zoo_attention import ATTENTION
from tests.channel_pruning.zoo_branches import BRANCHES
from tests.channel_pruning.zoo_corners import CORNERS
from tests.channel_pruning.zoo_dense import DENSE
from tests.channel_pruning.zoo_plain import PLAIN
from tests.channel_pruning.zoo_sequences import SEQUENCES

Factory = Callable[[], tuple[nn.Module, Any]]
ZOO: dict[str, Factory] = {
    make.__name__: make for make in (*PLAIN, *BRANCHES, *DENSE, *ATTENTION, *SEQUENCES, *CORNERS)
}

# What no pruner halves as a whole without changing code, or may leave partly whole, and why.
REFUSED: dict[str, str] = {
    "hard_coded_view": "`view(-1, 512)`: the channels before it must stay; halved, it would run and mix samples",
    "hard_coded_slice": "`x[:, :8]`: the first layer must stay, or lose only channels right of the cut",
    "hard_coded_heads": "`reshape(..., 4, 8)` and `reshape(..., 32)`: query, key, value must stay",
    "padded_shortcut": "zeros padded by 8 on each side: the sum and the stem must stay, or lose only what fits",
    "wavenet": "gates split by an attribute whose name does not tell: may stay where attributes are not rewritten",
    "transformer_square": "6 heads of 6: the attributes do not tell which of the two changed",
    "torch_transformer": "nn.MultiheadAttention checks its own width: it and its stream may stay, feed-forward goes",
    "cross_attention": "nn.MultiheadAttention checks its own width: it and its stream may stay, the hidden layer goes",
    "mlp_mixer": "positions cannot go: only the hidden layers of the mixing over positions, and the channels",
    "lstm_on_cnn": "gates of an LSTM are packed four to a matrix, in both directions: it may stay whole",
    "gru_on_embedding": "gates of a GRU are packed three to a matrix, in two layers: it may stay whole",
    "gru_cell_loop": "the state's width is an attribute, and the cell's gates are packed: both may stay whole",
    "spectral_norm": "the norm is over all channels: without some of them, it divides the others by something else",
    "weight_norm": "the length of an input's weights is shared: a column that goes changes the other ones' scale",
    "llama": "rotary positions pair channels within heads, and their frequencies depend on how many there are",
}


def call(model: nn.Module, example: Any) -> Any:
    """Call a model with an example of its input as entries give it."""
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def tensors(nested: Any) -> list[torch.Tensor]:
    """All tensors in an input or output, in order."""
    if isinstance(nested, torch.Tensor):
        return [nested]
    values = nested.values() if isinstance(nested, dict) else nested
    return [tensor for value in values for tensor in tensors(value)]


def first_sample(example: Any) -> Any:
    """The same input with a batch of one."""
    if isinstance(example, torch.Tensor):
        return example[:1]
    if isinstance(example, dict):
        return {name: value[:1] for name, value in example.items()}
    return tuple(value[:1] for value in example)
