"""What weights and activations can be stored as: whole numbers of so many bits, or short floating point."""

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch

from lightning_compress.core.registry import near_miss

Bits: TypeAlias = int | str | None
Side = Literal["weights", "activations"]
FLOATS = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
NAMES = ("ternary", "binary", *FLOATS)
# What others call these formats, or what is none of ours but has one that comes near.
ELSEWHERE = {
    "1": "'binary'", "1.58": "'ternary'", "int4": "4", "int8": "8", "uint8": "8", "int16": "16", "float16": "'fp16'",
    "half": "'fp16'", "bfloat16": "'bf16'", "fp8_e4m3": "'fp8'", "fp8_e4m3fn": "'fp8'", "float8": "'fp8'",
    "float8_e4m3fn": "'fp8'", "float8_e5m2": "'fp8_e5m2'", "fp32": "None", "float32": "None", "float": "None",
    "fp4": "4", "int2": "2", "int3": "3",
}  # fmt: skip


@dataclass(frozen=True)
class NumberFormat:
    """How one number is stored.

    Attributes:
        name: as the user writes it.
        bits: of one number.
        quant_min, quant_max: smallest and largest whole number of the grid; both 0 in floating point.
        dtype: in floating point that of torch, else None.

    >>> parse_format("fp8").kind, parse_format(8).kind
    ('float', 'integer')
    """

    name: str
    bits: int
    quant_min: int
    quant_max: int
    dtype: torch.dtype | None = None

    @property
    def kind(self) -> str:
        """One of "integer", "ternary", "binary" and "float"."""
        if self.dtype is not None:
            return "float"
        return self.name if self.name in NAMES else "integer"


def parse_format(bits: Bits, what: Side = "weights") -> NumberFormat | None:
    """The format that `bits` means.

    Args:
        bits: a whole number from 2 to 16, "ternary", "binary", "fp16", "bf16", "fp8" (e4m3), "fp8_e5m2", or None for
            float32.
        what: "weights" or "activations".

    Raises:
        ValueError: if it is none of these.

    >>> parse_format(4)
    NumberFormat(name='4', bits=4, quant_min=-7, quant_max=7, dtype=None)
    >>> parse_format(4, "activations").quant_max, parse_format(None)
    (15, None)
    """
    if what not in get_args(Side):
        raise ValueError(f"what is 'weights' or 'activations', but is {what!r}.{near_miss(what, get_args(Side))}")
    if bits is None:
        return None
    return weight_format(bits) if what == "weights" else activation_format(bits)


def read_format(name: str, what: Side = "weights") -> NumberFormat | None:
    """The format of a `Format.name`, as it stands in a checkpoint.

    >>> read_format("4").bits, read_format("ternary").bits
    (4, 2)
    """
    return parse_format(int(name) if name.isdecimal() else name, what)


def weight_format(bits: int | str) -> NumberFormat:
    """The format of weights: a grid as far below zero as above, so that a channel may change its sign.

    Raises:
        ValueError: if there is none of that name, or number of bits.

    >>> form = weight_format(8)
    >>> form.quant_min, form.quant_max
    (-127, 127)
    """
    if isinstance(bits, str) and bits in NAMES:
        return _named(bits)
    return _integer(bits, quant_min=1 - _half(bits), quant_max=_half(bits) - 1)


def activation_format(bits: int | str) -> NumberFormat:
    """The format of activations: a grid from 0 on, on which a zero point makes room for negative numbers.

    Raises:
        ValueError: if there is none of that name, or number of bits.

    >>> form = activation_format(8)
    >>> form.quant_min, form.quant_max
    (0, 255)
    """
    if isinstance(bits, str) and bits in NAMES:
        return _named(bits)
    return _integer(bits, quant_min=0, quant_max=2 * _half(bits) - 1)


def _half(bits: int | str) -> int:
    """Half the number of levels of a grid of so many bits."""
    if not isinstance(bits, int) or not 2 <= bits <= 16:
        raise ValueError(
            f"{bits!r} is no format.{_mend(bits)} Write a whole number of bits from 2 to 16, one of "
            f"{', '.join(map(repr, NAMES))}, or None for float32."
        )
    return int(2 ** (bits - 1))


def _integer(bits: int | str, quant_min: int, quant_max: int) -> NumberFormat:
    return NumberFormat(str(bits), int(bits), quant_min, quant_max)


def _named(name: str) -> NumberFormat:
    if name in FLOATS:
        return NumberFormat(name, FLOATS[name].itemsize * 8, 0, 0, FLOATS[name])
    return NumberFormat(name, 2 if name == "ternary" else 1, -1, 1)


def _mend(bits: object) -> str:
    """What the user may have meant."""
    name = str(bits).lower().removeprefix("torch.")
    if name in ELSEWHERE:
        return f" Did you mean {ELSEWHERE[name]}?"
    if name in {"32", "32.0"}:
        return " Did you mean None?"
    if not isinstance(bits, bool) and name.removesuffix(".0") in {str(number) for number in range(2, 17)}:
        return f" Did you mean {name.removesuffix('.0')}, without quotes and decimals?"
    return near_miss(name, NAMES) if isinstance(bits, str) else ""
