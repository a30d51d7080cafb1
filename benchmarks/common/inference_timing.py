"""Time ways of running a network on one thread in turns, so that other work of the machine slows all of them alike.

What is taken is the processor time of the process: of one thread that is the time that passes, less that in which the
machine does something else.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Effort:
    """Rounds until `seconds` are over, but no fewer than `least` and no more than `most`."""

    seconds: float
    least: int
    most: int


LONG, SHORT = Effort(15.0, 5, 1001), Effort(0.0, 1, 1)


def in_turns(called: dict[str, Callable[[], Any]], first: str, effort: Effort) -> dict[str, dict[str, float]]:
    """Median milliseconds of each, and the median of how many times as fast as `first` it is in the same round."""
    seconds: dict[str, list[float]] = {name: [] for name in called}
    for call in called.values():
        call()
    begin = time.perf_counter()
    for number in range(effort.most):
        for name, call in called.items():
            start = time.process_time()
            call()
            seconds[name].append(time.process_time() - start)
        if number + 1 >= effort.least and time.perf_counter() - begin > effort.seconds:
            break
    return {
        name: {
            "ms": 1000 * statistics.median(values),
            "speedup": statistics.median(slow / fast for slow, fast in zip(seconds[first], values, strict=True)),
            "runs": len(values),
        }
        for name, values in seconds.items()
    }
