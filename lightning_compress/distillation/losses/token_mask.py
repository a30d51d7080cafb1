"""Tokens of a language model: which positions a loss counts."""

import torch
from torch import Tensor


def next_token_mask(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Where the logits of a causal language model predict a label that counts.

    The logits at a position predict the label after it, so that the last position of a sequence never counts.

    Args:
        labels: integer, shape `(batch, length)`, not shifted: the label at a position is the token at that position.
        ignore_index: the label of tokens that do not count, such as padding and prompt.

    Returns:
        Boolean, shape `(batch, length)`: the `mask` of the losses in `language`.

    Raises:
        ValueError: if `labels` are no integers, or have another number of dimensions.

    >>> next_token_mask(torch.tensor([[7, -100, 8, 9]])).tolist()
    [[False, True, True, False]]
    """
    if labels.ndim != 2 or labels.is_floating_point():
        raise ValueError(f"labels are integers of shape (batch, length), but are {labels.dtype} {tuple(labels.shape)}.")
    return torch.cat([labels[:, 1:] != ignore_index, labels.new_zeros(len(labels), 1, dtype=torch.bool)], dim=1)
