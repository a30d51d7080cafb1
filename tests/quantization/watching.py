"""What tests of the callback look at."""

import torch
from torch import nn

from lightning_compress import remove_quantizers
from lightning_compress.quantization.lookup import quantized_of


def equal(one, other):
    """Whether two modules hold the same values, bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def as_trained(module):
    """The module as the optimizer knew it: with the float weights behind those on grids, and without quantizers."""
    quantized_of(module).restore_latents()
    remove_quantizers(module)
    return module


def noted(pl, quantization, what):
    """A callback that notes something of the quantized model after each batch."""

    class Note(pl.Callback):
        def __init__(self):
            self.by_batch = []

        def on_train_batch_end(self, trainer, *_):
            self.by_batch.append(what(quantization))

    return Note()


def is_active(quantization):
    return quantization.quantized is not None and quantization.quantized.state.enabled


def normed(make_module):
    """A classifier with BatchNorm."""
    return lambda **arguments: make_module(
        net=lambda: nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)), **arguments
    )
