"""Runs that are quantized by the callback, and runs in which the same is written by hand."""

import pytest
from torch import nn

from tests.conftest import adamw
from tests.quantization.by_hand import Place, on_grid, whole


@pytest.fixture
def by_hand(make_module):
    """A factory of classifiers like those of `make_module`, quantized by hand after a number of batches."""

    class ByHand(make_module):
        def __init__(self, optimizer=adamw, watched=2, quant_max=127):
            super().__init__(optimizer)
            self.watched, self.quant_max, self.batches = watched, quant_max, 0
            self.places = [Place(), Place()]

        def forward(self, values):
            if self.batches <= self.watched:
                return self.net(values)
            for place in self.places:
                place.follows = self.training
            first, _, second = self.net
            given = self.places[0](values)
            bias = whole(first, self.places[0], quant_max=self.quant_max)
            given = self.places[1](
                nn.functional.linear(given, on_grid(first.weight, quant_max=self.quant_max), bias).relu()
            )
            bias = whole(second, self.places[1], quant_max=self.quant_max)
            return nn.functional.linear(given, on_grid(second.weight, quant_max=self.quant_max), bias)

        def training_step(self, batch, batch_idx):
            self.batches += 1
            return super().training_step(batch, batch_idx)

    return ByHand
