"""The module that computes predictions in a step is found, whatever else the step calls."""

import pytest
import torch
from torch import nn

from lightning_compress.distillation.student_discovery import StudentDiscovery


class Model(nn.Module):
    """A network, a head and a loss, called one after the other by `step`."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        self.loss = nn.MSELoss()

    def step(self, x):
        return self.loss(self.net(x), torch.zeros(len(x), 3))


def test_the_module_that_works_is_found_among_others():
    model = Model()
    discovery = StudentDiscovery(model)
    with discovery.recording():
        model.step(torch.randn(2, 4))
    root, calls = discovery.found()
    assert root is model.net
    assert len(calls) == 1


def test_an_exception_in_a_call_does_not_confuse_the_next_step():
    model = Model()
    discovery = StudentDiscovery(model)
    with discovery.recording(), pytest.raises(RuntimeError):
        model.net(torch.randn(2, 5))
    with discovery.recording():
        model.step(torch.randn(2, 4))
    assert discovery.found()[0] is model.net


def test_hooks_go_away():
    model = Model()
    StudentDiscovery(model).remove()
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())
