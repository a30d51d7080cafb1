"""Runs that are quantized by the callback, and runs in which the same is written by hand."""

import pytest
from torch import nn

from tests.conftest import adamw
from tests.quantization.by_hand import Place, on_grid


@pytest.fixture
def by_hand(make_module):
    """A factory of classifiers like those of `make_module`, quantized by hand after a number of batches."""

    class ByHand(make_module):
        def __init__(self, optimizer=adamw, watched=2, high=127):
            super().__init__(optimizer)
            self.watched, self.high, self.batches = watched, high, 0
            self.places = [Place(), Place()]

        def forward(self, values):
            if self.batches <= self.watched:
                return self.net(values)
            for place in self.places:
                place.follows = self.training
            first, _, second = self.net
            values = nn.functional.linear(
                self.places[0](values), on_grid(first.weight, high=self.high), first.bias
            ).relu()
            return nn.functional.linear(self.places[1](values), on_grid(second.weight, high=self.high), second.bias)

        def training_step(self, batch, batch_idx):
            self.batches += 1
            return super().training_step(batch, batch_idx)

    return ByHand
