"""Time a model on the CPU."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch
from torch import nn

from lightning_compress.nn.example_inputs import call_model
from lightning_compress.nn.isolation import isolated_eval

LEAST_RUNS = 5


@dataclass(frozen=True)
class Latency:
    """Wall time of one call at a batch size: median and interquartile range over `runs`, after `warmup_runs`.

    >>> Latency(batch=1, median_ms=2.0, iqr_ms=0.1, runs=200, warmup_runs=20, threads=1).median_ms
    2.0
    """

    batch: int
    median_ms: float
    iqr_ms: float
    runs: int
    warmup_runs: int
    threads: int


def measure_latency(
    model: nn.Module, example: Any, batch: int, *, threads: int = 1, runs: int = 200, seconds: float = 5.0
) -> Latency:
    """Time `model(example)` in eval mode without gradients, on the CPU.

    Args:
        model: left as it was, with its modes, buffers and the random streams.
        example: the input, of `batch` samples.
        batch: what to call that batch.
        threads: of torch while timing; the former number is put back.
        runs: at most so many are timed, after a tenth as many to warm up.
        seconds: stop timing after so long, but not before 5 runs.

    Raises:
        Exception: whatever the model raises for this input.

    >>> latency = measure_latency(nn.Linear(3, 2), torch.zeros(4, 3), batch=4, runs=10)
    >>> latency.runs, latency.warmup_runs, latency.median_ms > 0
    (10, 1, True)
    """
    with isolated_eval(model), _threads(threads):
        return time_calls(lambda: call_model(model, example), batch, threads=threads, runs=runs, seconds=seconds)


def time_calls(function: Callable[[], Any], batch: int, *, threads: int, runs: int, seconds: float) -> Latency:
    """Time calls of a function that computes a batch, as in `measure_latency`.

    >>> time_calls(lambda: sum(range(100)), batch=1, threads=1, runs=20, seconds=1.0).median_ms > 0
    True
    """
    warmup = _times(function, max(runs // 10, 1), seconds / 5, least=1)
    times = _times(function, runs, seconds, least=min(LEAST_RUNS, runs))
    low, _, high = quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return Latency(batch, median(times), high - low, len(times), len(warmup), threads)


def _times(function: Callable[[], Any], runs: int, seconds: float, least: int) -> list[float]:
    """Milliseconds of each run."""
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < runs and (len(times) < least or time.perf_counter() < stop):
        begin = time.perf_counter_ns()
        function()
        times.append((time.perf_counter_ns() - begin) / 1e6)
    return times


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
