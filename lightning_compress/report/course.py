"""What happened when in a run: its phases, and what the model was where one begins or ends."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Phase:
    """When a callback acted, in optimizer steps that were done; `end` is None if the run ended before the phase."""

    name: str
    type: str
    begin: int
    end: int | None = None


@dataclass(frozen=True)
class Boundary:
    """The model when `step` optimizer steps were done, where phases began or ended.

    `size_bytes` are of the smallest lossless file: sparse-coded, or packed integers. What is None could not be had.
    """

    step: int
    what: str
    nonzero: int
    size_bytes: int
    macs: int | None = None
    latency_ms_batch_1: float | None = None


def plain(several: tuple[Phase, ...] | tuple[Boundary, ...]) -> list[dict[str, Any]]:
    """As plain values, for JSON and checkpoints."""
    return [dict(vars(one)) for one in several]


def phases_of(values: list[Mapping[str, Any]]) -> tuple[Phase, ...]:
    """The phases that `plain` made these of.

    Raises:
        KeyError, TypeError: if it did not.
    """
    return tuple(Phase(**{one.name: each[one.name] for one in fields(Phase)}) for each in values)


def boundaries_of(values: list[Mapping[str, Any]]) -> tuple[Boundary, ...]:
    """The boundaries that `plain` made these of.

    Raises:
        KeyError, TypeError: if it did not.
    """
    return tuple(Boundary(**{one.name: each[one.name] for one in fields(Boundary)}) for each in values)
