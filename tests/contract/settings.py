"""Settings under which every public callback must keep the contract; one without an entry fails the suite.

Durations are such that something is still to happen after the 8th of 24 steps, where the resume tests stop.
"""

import torch

import lightning_compress
from lightning_compress import CompressionReport, Pruning
from lightning_compress.core.callback import CompressionCallback

SETTINGS = {
    Pruning: {
        "magnitude": {"final_sparsity": 0.75, "begin": 2, "end": 15, "every": 3},
        "taylor-global": {
            "final_sparsity": 0.8, "criterion": "taylor", "distribution": "global", "begin": 2, "end": 15, "every": 3,
        },
        "movement-erk": {
            "final_sparsity": 0.5, "criterion": "movement", "distribution": "erk", "begin": 2, "end": 15, "every": 3,
        },
        "wanda-lamp": {
            "final_sparsity": 0.5, "criterion": "wanda", "distribution": "lamp", "begin": 2, "end": 15, "every": 3,
        },
        "random-rows": {"final_sparsity": 0.5, "criterion": "random", "granularity": "row", "every": "1 steps"},
        "gradient-2:4": {"final_sparsity": 0.5, "criterion": "gradient", "granularity": "2:4", "begin": "10%"},
        "from-start": {
            "final_sparsity": 0.5,
            "criterion": lambda weight, initial_weight: (weight - initial_weight).abs(),
            "begin": 2, "end": 15, "every": 3,
        },
    },
    CompressionReport: {
        "untimed": {"latency": False, "print_table": False},
        "timed": {"runs": 5, "seconds": 0.1},
        "given-input": {"example_input": torch.ones(2, 8), "latency": False},
    },
}  # fmt: skip


def public_callbacks():
    public = [getattr(lightning_compress, name) for name in lightning_compress.__all__]
    return [one for one in public if isinstance(one, type) and issubclass(one, CompressionCallback)]


def cases():
    """Each callback under each of its settings, with a name to show."""
    return [(kind, name, arguments) for kind, several in SETTINGS.items() for name, arguments in several.items()]


def ids():
    return [f"{kind.__name__}-{name}" for kind, name, _ in cases()]
