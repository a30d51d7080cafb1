"""Rounds of pruning, each of which takes the same share of what the ones before have left.

Reference: Frankle & Carbin, 2019, section 2, https://arxiv.org/abs/1803.03635
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from lightning_compress.core.phases import Duration, parse_duration

INSTEAD_OF = ("schedule", "begin", "end", "every")


def check_rounds(rounds: Sequence[Duration], given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse rounds that are none, or stand beside what they replace.

    Args:
        rounds: the moments.
        given: what was written for the arguments that rounds are instead of.
        defaults: of these arguments.

    Raises:
        ValueError: with the arguments to leave out.
    """
    if isinstance(rounds, str) or not isinstance(rounds, Sequence) or len(rounds) < 2:
        raise ValueError(
            f"rounds is a list of two moments or more, such as ['20%', '40%', '60%'], but is {rounds!r}. For a single "
            f"one write begin, and schedule='constant'."
        )
    for one, other in pairwise(rounds):
        first, second = parse_duration(one), parse_duration(other)
        if first.unit == second.unit and first.value >= second.value:
            raise ValueError(f"rounds={list(rounds)!r} are not in order: {other!r} does not come after {one!r}.")
    if also := [name for name in INSTEAD_OF if given[name] != defaults[name]]:
        raise ValueError(
            f"rounds={list(rounds)!r} say when is pruned, and each prunes the same share of what is left, so "
            f"{', '.join(also)} cannot be given too. Leave one or the other out."
        )


def sparsity_after(done: int, rounds: int, initial: float, final: float) -> float:
    """The sparsity after some of the rounds: `1 - (1 - initial) * ((1 - final) / (1 - initial)) ** (done / rounds)`.

    >>> [round(sparsity_after(done, 3, initial=0.0, final=0.488), 6) for done in range(4)]
    [0.0, 0.2, 0.36, 0.488]
    """
    if done == rounds:
        return final
    left: float = ((1.0 - final) / (1.0 - initial)) ** (done / rounds)
    return 1.0 - (1.0 - initial) * left
