"""Settings under which every public callback must keep the contract; one without an entry fails the suite.

Durations are such that something is still to happen after the 8th of 24 steps, where the resume tests stop.
"""

import torch
from torch import nn

import lightning_compress
from lightning_compress import (
    AveragedTeacher,
    ChannelPruning,
    CompressionReport,
    Distillation,
    FineTuning,
    PeerTeacher,
    Pruning,
    QuantizationAwareTraining,
)
from lightning_compress.training.callback import CompressionCallback


def teacher():
    """A network of more neurons, equal each time."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))


class Peer(nn.Module):
    """Another student, with a loss of its own."""

    def __init__(self):
        super().__init__()
        self.net = teacher()
        self.net.insert(2, nn.Dropout(0.2))

    def log(self, *_, **__): ...

    log_dict = log

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


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
    Distillation: {
        "soft-targets": {"teacher": teacher()},
        "window": {"teacher": teacher(), "begin": 2, "end": 15, "every": 3, "final_alpha": 0.1, "losses": "dkd"},
        "late": {"teacher": teacher(), "begin": 10, "final_temperature": 1.0, "gradient_cosine": True},
        "learned-losses": {
            "teacher": teacher(),
            "losses": {
                ("net.0", "0"): ["projected_hint", "crd", {"loss": "vid", "weight": 0.1}], "output": "kl_divergence",
            },
        },
        "learned-late": {"teacher": teacher(), "losses": {("net.1", "1"): {"loss": "crd", "memory": 24}}, "begin": 10},
        "averaged": {"teacher": AveragedTeacher(0.9), "alpha": 0.5},
        "own-past": {"teacher": "self@15%", "alpha": 0.5, "final_alpha": 0.9},
        "peer": {"teacher": PeerTeacher(Peer()), "alpha": 0.5},
        "function": {"teacher": teacher().forward, "losses": "logit_mse", "every": 2},
        "several": {
            "teacher": [teacher(), nn.Sequential(teacher(), nn.Linear(3, 2))], "teacher_classes": [(0, 1, 2), (2, 0)],
            "teacher_weights": [3, 1],
        },
    },
    QuantizationAwareTraining: {
        "int8": {"begin": 2, "freeze_ranges": 15, "freeze_bn": 15},
        "late": {"begin": 10},
        "int4-learned": {"weights": 4, "activations": 4, "first": "same", "last": "same", "begin": 2, "damping": 1e-3},
        "falling-bits": {
            "weights": 3, "activations": 4, "initial_bits": 8, "begin": 2, "end": 20, "every": 3, "first": "same",
            "last": "same", "method": "percentile",
        },
        "ternary": {"weights": "ternary", "activations": "fp8", "first": "same", "last": "same", "begin": 0},
        "drawn": {
            "method": "dorefa", "weight_grad_bits": 6, "weights": 4, "activations": 4, "begin": 2, "first": "same",
            "last": "same",
        },
        "wage": {
            "method": "wage", "weights": 2, "weight_grad_bits": 8, "activation_grad_bits": 8, "begin": 2, "first":
            "same", "last": "same",
        },
        "stochastic-binary": {
            "method": "stochastic", "weights": "binary", "activations": 4, "first": "same", "last": "same", "begin": 2,
        },
        "percentile-groups": {"method": "percentile", "granularity": "group 2", "begin": 2, "symmetric": False},
        "calibrating": {"calibrate_only": True, "begin": 2},
    },
    FineTuning: {
        "freeze": {"freeze": "net.0", "begin": 2, "end": 15},
        "gradual": {"freeze": "*", "unfreeze": "net.2.bias", "gradual": True, "begin": 2, "end": 20},
        "restart": {"learning_rate": "restart", "warmup": "10%", "begin": 4, "end": 20},
        "rewind": {"rewind": "5%", "begin": 12, "learning_rate": "rewind"},
        "rewound": {"rewind": "5%", "begin": 6, "reset_moments": False},
        "layer-decay": {"layer_decay": 0.5, "lr_multipliers": {"*.bias": 2.0}, "weight_decay": "x0.5", "begin": 2,
        "end": 20}, "until": {"freeze": "net.2", "begin": 2, "until": {"metric": "train_loss", "target": 100.0,
        "patience": 9}}, "fixed-late": {"learning_rate": 1e-3, "weight_decay": 0.1, "begin": 10},
    },
    ChannelPruning: {
        "l2": {"macs": 0.5, "begin": 2, "end": 15, "every": 3},
        "late": {"sparsity": 0.5, "begin": 10, "end": 15},
        "taylor-global": {
            "parameters": 0.5, "criterion": "taylor", "distribution": "global", "begin": 2, "end": 15, "every": 3,
        },
        "soft": {"sparsity": 0.5, "soft": True, "schedule": "constant", "begin": 2, "end": 15, "every": 3},
        "seen": {"sparsity": 0.5, "criterion": "apoz", "begin": 2, "end": 15, "every": 3, "round_to": 4},
        "given-input": {
            "sparsity": 0.75, "criterion": "random", "example_input": torch.ones(2, 8), "begin": 2, "end": 15,
            "penalty": "group_lasso", "every": 3,
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
