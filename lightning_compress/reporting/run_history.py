"""Phases of a run, and the size and costs of the model where a phase begins or ends."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """The phase of a callback, in optimizer steps; `end` is None if the run ended before the phase.

    >>> Phase("pruning", "Pruning", begin=100, end=700)
    Phase(name='pruning', type='Pruning', begin=100, end=700)
    """

    name: str
    type: str
    begin: int
    end: int | None = None


@dataclass(frozen=True)
class Boundary:
    """Size and costs of the model after `step` optimizer steps, where phases began or ended.

    `size_bytes` is the length of the smallest lossless file: sparse-coded, or packed integers. A value is None where it
    could not be measured.

    >>> Boundary(step=700, what="pruning ends", nonzero=43_000, size_bytes=190_000).macs is None
    True
    """

    step: int
    what: str
    nonzero: int
    size_bytes: int
    macs: int | None = None
    latency_ms_batch_1: float | None = None
