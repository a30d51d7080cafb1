"""`report`: measure a model, and compare it with an earlier report."""

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
    """Measure a model without changing its modes, buffers, gradients, hooks or the random streams.

    Args:
        model: any module whose parameters have values.
        example_input: a batch that the model takes: a tensor, a tuple of positional or a dict of keyword arguments.
            Without it there are no MACs and no latency.
        baseline: the report to compare with, such as that of the dense model.
        metrics: values that were measured elsewhere, such as the accuracy: numbers, or tensors with one element.
        history: pairs of step and value, by the name of the value ("sparsity"), for the plots.
        name: of the model; None: its class.
        batch_dim: the batch dimension of `example_input`; None: it has none. The example is cut or repeated along this
            dimension: MACs are counted at batch 1, latency is timed at batch 1 and 64.
        latency: whether to time the model, on the CPU in eval mode.
        threads: number of torch's threads while timing.
        runs, seconds: `runs` calls of each batch size are timed, or fewer if they take longer than `seconds`.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if a parameter has no values (lazy, on the meta device, sharded), or if the model does not take
            `example_input`, or if a number is out of its range.

    >>> import torch
    >>> dense = report(nn.Linear(4, 2), torch.zeros(1, 4), latency=False)
    >>> dense.parameters, dense.macs, dense.sparsity  # 4 * 2 weights and 2 biases
    (10, 8, 0.0)
    >>> zeroed = nn.Linear(4, 2)
    >>> _ = nn.init.zeros_(zeroed.weight)
    >>> pruned = report(zeroed, torch.zeros(1, 4), latency=False, baseline=dense)
    >>> pruned.nonzero, pruned.before.nonzero, pruned.weight_sparsity
    (2, 10, 1.0)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report measures a torch.nn.Module, but got a {type(model).__name__}. Pass the model first.")
    if not isinstance(baseline, Report | None):
        raise TypeError(
            f"baseline is a Report, but is a {type(baseline).__name__}. Pass the result of report(...) or "
            f"Report.load('....json')."
        )
    protocol = MeasureOptions(batch_dim, latency, threads, runs, seconds)
    values = {key: float(value) for key, value in (metrics or {}).items()}
    curves = {key: tuple((int(step), float(one)) for step, one in pairs) for key, pairs in (history or {}).items()}
    if wrong := [(key, pair) for key, pairs in curves.items() for pair in pairs if not isfinite(pair[1])]:
        raise ValueError(
            f"history is pairs of step and finite number, but '{wrong[0][0]}' holds {wrong[0][1]}. Leave this pair out."
        )
    before = replace(baseline, before=None) if baseline else None
    bare = measure_model(model, example_input, protocol)
    return replace(bare, name=name or bare.name, metrics=values, history=curves, before=before)
