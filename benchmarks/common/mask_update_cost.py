"""Time and memory of one mask update: `Pruner.update`, global magnitude, 24 linear layers."""

import gc
import statistics
import time
from collections.abc import Callable

from torch import nn

from lightning_compress.nn.selection import select
from lightning_compress.pruning.allocation import PrunableLayers
from lightning_compress.pruning.functional import criteria, distributions
from lightning_compress.pruning.granularity import parse_granularity
from lightning_compress.pruning.pruner import Pruner

from .memory import peak_tensor_bytes, reset_peak, resident_bytes

LAYERS = 24


def update_cost(weights: int, updates: int) -> dict[str, float]:
    """Seconds and memory of a mask update, in this process."""
    _updates(LAYERS * 64 * 64)  # so that what is loaded once is not counted
    gc.collect()
    pruner = _pruner(weights)
    size_bytes = sum(one.parameter.nbytes for one in pruner.layers.by_name.values())
    before = resident_bytes("VmRSS")
    pruner.update(0.5)
    reset_peak()
    seconds = [_timed(lambda: pruner.update(0.8))]
    resident = resident_bytes("VmHWM") - before
    seconds += [_timed(lambda step=step: pruner.update(0.8 + step / 100)) for step in range(1, updates)]
    held = peak_tensor_bytes(lambda: _updates(weights)) - size_bytes
    count = size_bytes // 4
    return {
        "weights": count,
        "weights_bytes": size_bytes,
        "seconds": statistics.median(seconds),
        "seconds_per_million": statistics.median(seconds) / count * 1e6,
        "peak_tensor_bytes": held,
        "peak_tensor_bytes_over_weights": held / size_bytes,
        "peak_resident_bytes": resident,
        "peak_resident_bytes_over_weights": resident / size_bytes,
    }


def _pruner(weights: int) -> Pruner:
    side = round((weights / LAYERS) ** 0.5)
    model = nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(LAYERS)))
    layers = PrunableLayers({one.name: one for one in select(model).chosen}, parse_granularity("weight"))
    return Pruner(layers, criteria.magnitude, distributions.global_)


def _updates(weights: int) -> None:
    pruner = _pruner(weights)
    for sparsity in (0.5, 0.8):
        pruner.update(sparsity)


def _timed(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin
