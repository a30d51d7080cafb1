import time

import pytest
import torch
from torch import nn

from lightning_compress.measure import latency as latency_module
from lightning_compress.measure.latency import measure_latency


class Sleeps(nn.Module):
    """Takes as long as it is told, in turn, and remembers what it saw."""

    def __init__(self, milliseconds):
        super().__init__()
        self.milliseconds, self.calls, self.threads = milliseconds, 0, set()

    def forward(self, x):
        self.threads.add((torch.get_num_threads(), self.training, torch.is_grad_enabled()))
        time.sleep(self.milliseconds[self.calls % len(self.milliseconds)] / 1000)
        self.calls += 1
        return x


class Clock(nn.Module):
    """A model whose calls take the given milliseconds, and the clock that says so: no machine is that steady."""

    def __init__(self, milliseconds):
        super().__init__()
        self.milliseconds, self.now_ns = iter(milliseconds), 0

    def forward(self, x):
        self.now_ns += next(self.milliseconds) * 1_000_000
        return x

    def perf_counter_ns(self):
        return self.now_ns

    def perf_counter(self):
        return self.now_ns / 1e9


def test_median_and_spread_are_of_the_timed_runs_only(monkeypatch):
    clock = Clock([50, 2, 2, 2, 10, 10])  # the first call is the warm-up
    monkeypatch.setattr(latency_module, "time", clock)
    latency = measure_latency(clock, torch.ones(1), 1, runs=5, seconds=60)
    assert (latency.runs, latency.warmup_runs, latency.batch) == (5, 1, 1)
    assert latency.median_ms == 2.0
    assert latency.iqr_ms == 8.0  # the quartiles of 2, 2, 2, 10, 10 are 2 and 10


def test_the_model_runs_in_eval_on_the_asked_threads_and_they_are_put_back():
    before, model = torch.get_num_threads(), Sleeps([0])
    latency = measure_latency(model, torch.ones(1), 1, threads=before + 1, runs=3)
    assert model.threads == {(before + 1, False, False)}
    assert latency.threads == before + 1
    assert torch.get_num_threads() == before
    assert model.training


def test_time_ends_the_runs_but_not_before_five():
    latency = measure_latency(Sleeps([30]), torch.ones(1), 1, runs=200, seconds=0.05)
    assert latency.runs == 5


def test_threads_are_put_back_after_an_exception():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError):
        measure_latency(nn.Linear(2, 2), torch.ones(3), 1, threads=before + 1)
    assert torch.get_num_threads() == before


def test_one_run_has_no_spread():
    assert measure_latency(Sleeps([1]), torch.ones(1), 1, runs=1).iqr_ms == 0
