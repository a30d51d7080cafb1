"""Of several batches the range is the mean of theirs; of several calls in one batch, the widest."""

import pytest
import torch
from torch import nn

from lightning_compress import quantize
from lightning_compress.quantization.lookup import quantized_of


class Pyramid(nn.Module):
    """A layer that sees the batch, and ten times its negative."""

    def __init__(self):
        super().__init__()
        self.level, self.out = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, values):
        return self.out(self.level(values) + self.level(-10 * values))


def ends(method):
    batches = [torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0]]), torch.zeros(1, 2)]
    found = quantized_of(quantize(Pyramid(), batches, method=method, progress=False)).activations["level input 0"]
    return float(found.minimum), float(found.maximum)


def test_calls_of_one_batch_are_one_to_the_mean_and_zeros_are_none():
    assert ends("moving_average") == (pytest.approx(-(10 + 30) / 2), pytest.approx((1 + 3) / 2))


def test_a_method_that_widens_takes_the_widest_of_all():
    assert ends("min_max") == (-30.0, 3.0)
