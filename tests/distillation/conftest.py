"""A teacher, and modules with a training step of one's own, under each Lightning name."""

import pytest

from tests.conftest import adamw
from tests.distillation.by_hand import network


@pytest.fixture
def teacher():
    return network(32, seed=7)


@pytest.fixture
def step_of(pl):
    """A factory of modules with a training step of one's own."""

    def make(step, net=network, optimizer=adamw, manual=False, forward=None):
        class Module(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.net = net()
                self.automatic_optimization = not manual

            def training_step(self, batch, batch_idx):
                return step(self, batch)

            def configure_optimizers(self):
                return optimizer(self.parameters())

        if forward is not None:
            Module.forward = forward
        return Module()

    return make
