"""What a model holds and costs, before and after: plain values for a terminal, a JSON file or a web page."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

from torch import nn

from lightning_compress.reporting.measure_model import MeasureOptions, measure_model
from lightning_compress.reporting.report import Report


def report(
    model: nn.Module,
    example_input: Any = None,
    *,
    baseline: Report | None = None,
    metrics: Mapping[str, float] | None = None,
    history: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    name: str | None = None,
    batch_dim: int | None = 0,
    latency: bool = True,
    threads: int = 1,
    runs: int = 200,
    seconds: float = 5.0,
) -> Report:
    """Measure a model and leave it as it was: modes, buffers, gradients, hooks, random streams.

    Args:
        model: any module whose parameters have values.
        example_input: a batch that the model takes: a tensor, a tuple of positional or a dict of keyword arguments.
            Without it there are no MACs and no latency.
        baseline: what to compare with: a report of the model before.
        metrics: values that were measured elsewhere, shown as they are; a tensor with one element will do.
        history: pairs of step and value, by the name of the value ("sparsity"), for the plots.
        name: of the model; None means its class.
        batch_dim: the dimension of `example_input` that runs over samples; None if it has none. MACs are counted at
            batch 1, latency is timed at 1 and 64, cut or repeated along it.
        latency: whether to time the model, on the CPU in eval mode.
        threads: of torch while timing.
        runs, seconds: timed are `runs` calls of each batch size, or fewer if they take longer than `seconds`.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if a parameter has no values (lazy, on the meta device, sharded), or if the model does not take
            `example_input`, or if a number is out of its range.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report measures a torch.nn.Module, but got a {type(model).__name__}.")
    if not isinstance(baseline, Report | None):
        raise TypeError(f"baseline is a Report, as report(...) returns, but is a {type(baseline).__name__}.")
    protocol = MeasureOptions(batch_dim, latency, threads, runs, seconds)
    values = {key: float(value) for key, value in (metrics or {}).items()}
    curves = {key: tuple((int(step), float(one)) for step, one in pairs) for key, pairs in (history or {}).items()}
    if wrong := [(key, pair) for key, pairs in curves.items() for pair in pairs if not isfinite(pair[1])]:
        raise ValueError(f"history is pairs of step and number, but '{wrong[0][0]}' holds {wrong[0][1]}.")
    before = replace(baseline, before=None) if baseline else None
    bare = measure_model(model, example_input, protocol)
    return replace(bare, name=name or bare.name, metrics=values, history=curves, before=before)
