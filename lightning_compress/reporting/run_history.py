"""What happened when in a run: its phases, and what the model was where one begins or ends."""

from dataclasses import dataclass


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
