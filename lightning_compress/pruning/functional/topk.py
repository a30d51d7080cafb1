"""The highest scores among many tensors, exactly and in bounded memory: a radix selection, no sorting.

Scores are ranked as float32. Equal scores go by their order: the first tensor first, the lower index first, so that all
ranks keep the same.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 16  # entries looked at at once: what is needed beside the scores is some of these
DIGITS = (11, 11, 10)  # bits, from the top: the counts of one digit fit into the fastest cache


@dataclass(frozen=True)
class Threshold:
    """Keep every key above `key`, and the first `ties` of those equal to it.

    >>> scores = torch.tensor([0.5, 0.9, 0.5, 0.5])
    >>> threshold = global_threshold(lambda: [(scores, 1)], kept=2)
    >>> (sort_keys(scores) > threshold.key).sum(), threshold.ties  # one above, and the first of those equal
    (tensor(1), 1)
    """

    key: int
    ties: int


def sort_keys(scores: Tensor) -> Tensor:
    """Integers in the order of float32 scores, so that they can be counted digit by digit.

    >>> sort_keys(torch.tensor([-2.0, -0.0, 0.0, 3.0])).diff() >= 0
    tensor([True, True, True])
    """
    bits = scores.to(torch.float32).add(0.0).view(torch.int32)  # adding 0 makes one zero of -0.0 and 0.0
    return bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF))  # negative floats are in the opposite order


def global_threshold(tensors: Callable[[], Iterable[tuple[Tensor, int]]], kept: int) -> Threshold:
    """Find the threshold over all tensors that keeps as much as fits into `kept`.

    Args:
        tensors: called once for each digit; gives each tensor of scores with what one of its entries costs.
        kept: total cost to keep, at least 0.

    Returns:
        The threshold. Its cost is `kept` exactly if every entry costs 1.

    >>> scores = [torch.tensor([1.0, 5.0, 3.0]), torch.tensor([4.0, 2.0])]
    >>> threshold = global_threshold(lambda: [(one, 1) for one in scores], kept=2)
    >>> [(sort_keys(one) >= threshold.key).tolist() for one in scores]
    [[False, True, False], [True, False]]
    """
    prefix, shift = 0, 32
    for bits in DIGITS:
        shift -= bits
        above, digit = _top_digit(_counted(tensors(), prefix, shift, bits), kept)
        prefix, kept = (prefix << bits) + digit, kept - above
    return Threshold(prefix - (1 << 31), kept)


def count_kept(scores: Tensor, threshold: Threshold, cost: int = 1) -> tuple[int, Threshold]:
    """How many entries of `scores` a threshold keeps, and the threshold for the tensor after it.

    >>> first, second = torch.tensor([1.0, 2.0, 2.0]), torch.tensor([2.0, 3.0])
    >>> threshold = global_threshold(lambda: [(first, 1), (second, 1)], kept=3)
    >>> kept, threshold = count_kept(first, threshold)
    >>> kept, count_kept(second, threshold)[0]  # 3.0, and the first two of the three equal scores
    (2, 1)
    """
    equal, larger = 0, 0
    for part in _parts(scores):
        equal += int((part == threshold.key).sum())
        larger += int((part > threshold.key).sum())
    ties = min(equal, threshold.ties // cost)
    return larger + ties, Threshold(threshold.key, threshold.ties - ties * cost)


def top_k_mask(scores: Tensor, kept: int) -> Tensor:
    """Keep exactly the `kept` highest scores.

    Args:
        scores: any shape; a higher score is kept longer, equal ones go by their index.
        kept: number of True entries, from 0 to `scores.numel()`.

    Returns:
        Boolean mask of the shape of `scores`.

    >>> top_k_mask(torch.tensor([0.5, 0.9, 0.5, 0.5]), kept=2)
    tensor([ True,  True, False, False])
    """
    threshold = global_threshold(lambda: [(scores, 1)], kept)
    mask = torch.empty(scores.numel(), dtype=torch.bool, device=scores.device)
    ties = threshold.ties
    for index, part in enumerate(_parts(scores)):
        equal = (part == threshold.key).nonzero().flatten()[:ties]
        chosen = part > threshold.key
        chosen[equal] = True
        mask[index * CHUNK : index * CHUNK + len(part)] = chosen
        ties -= len(equal)
    return mask.view(scores.shape)


def _parts(scores: Tensor) -> Iterator[Tensor]:
    for part in torch.split(scores.reshape(-1), CHUNK):
        yield sort_keys(part)


def _counted(tensors: Iterable[tuple[Tensor, int]], prefix: int, shift: int, bits: int) -> Tensor:
    """What the entries cost whose digits above are `prefix`, by their digit."""
    total = torch.zeros(1 << bits, dtype=torch.int64)
    for scores, cost in tensors:
        for part in _parts(scores):
            digits = _digits(part, prefix, shift, bits)
            total.add_(torch.bincount(digits, minlength=1 << bits).cpu(), alpha=cost)
    return total


def _digits(part: Tensor, prefix: int, shift: int, bits: int) -> Tensor:
    """The digit at `shift` of those keys whose digits above are `prefix`; keys count from -2 ** 31, digits from 0."""
    above = shift + bits
    if above == 32:
        return (part >> shift).add_(1 << (bits - 1))
    below = part[(part >> above) == prefix - (1 << (31 - above))]
    return below.bitwise_right_shift_(shift).bitwise_and_((1 << bits) - 1)


def _top_digit(counts: Tensor, kept: int) -> tuple[int, int]:
    """The digit at which the count from the top first reaches `kept`, after the count above that digit."""
    from_top = counts.flip(0).cumsum(0)
    place = min(int(torch.searchsorted(from_top, max(kept, 1))), len(counts) - 1)
    digit = len(counts) - 1 - place
    return int(from_top[place] - counts[digit]), digit
