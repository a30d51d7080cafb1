"""Whether a value can be negative, as the operations tell that made it."""

from torch.nn import functional

from lightning_compress.nn.dataflow import Dataflow, Operation
from lightning_compress.quantization.placement.operations import (
    CLAMPS,
    KEEP_SIGN,
    NON_NEGATIVE,
    PAD_VALUE,
    PRODUCTS,
    SUMS,
)


def is_non_negative(flow: Dataflow, value: int, depth: int = 64) -> bool:
    """Whether no negative number can come there."""
    made = flow.producer.get(value)
    if made is None or not depth:
        return False
    if made.function in NON_NEGATIVE or _clamps_at_zero(made):
        return True
    keeps = made.function in KEEP_SIGN and bool(made.inputs) and not _brings_negative(made)
    return keeps and all(is_non_negative(flow, one, depth - 1) for one in made.inputs)


def _clamps_at_zero(made: Operation) -> bool:
    """Whether there is a lower limit that is a number, and not below zero."""
    return any(made.numbers.get(one, -1.0) >= 0 for one in CLAMPS.get(made.function, ()))


def _brings_negative(made: Operation) -> bool:
    """Whether a number among the arguments may be what is added or padded with, and is below zero."""
    by_number = SUMS | PRODUCTS
    numbers = made.numbers.values() if made.function in by_number else [made.numbers.get(one, 0.0) for one in PAD_VALUE]
    return made.function in by_number | {functional.pad} and min(numbers, default=0.0) < 0
