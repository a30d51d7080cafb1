import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress.measure.macs import count_macs
from lightning_compress.nn.isolation import isolated_eval, on_cpu, preserved_random_state


class Busy(nn.Module):
    """Draws random numbers, writes buffers, replaces and adds some, and has a mode of its own."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear, self.dropout = nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Dropout(0.5)
        self.register_buffer("calls", torch.tensor([-0.0, float("nan")]))
        self.register_buffer("cache", torch.ones(2), persistent=False)
        self.register_buffer("nothing", None)
        self.modes = []

    def train(self, mode=True):
        self.modes.append(mode)
        return super().train(mode)

    def forward(self, x, fail=False):
        random.random(), np.random.rand(), torch.rand(1)
        self.calls += 1
        self.calls.data.zero_()
        self.cache = torch.zeros(5)
        self.nothing = torch.ones(1)
        self.register_buffer(f"new_{len(self._buffers)}", torch.ones(1))
        if fail:
            raise RuntimeError("as asked")
        return self.dropout(self.linear(self.norm(x)))


def state_of(model):
    return {
        "modes": [module.training for module in model.modules()],
        "buffers": {name: (id(b), b.view(torch.uint8).tolist()) for name, b in model.named_buffers() if b.dim()},
        "keys": list(model._buffers),
        "grads": [parameter.grad for parameter in model.parameters()],
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state().tolist(),
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
    }


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("how", ["isolated_eval", "count_macs"])
def test_everything_is_as_it_was(how, fail):
    model = Busy()
    model.norm.eval()  # frozen by the user
    model.modes.clear()
    before = state_of(model)
    with pytest.raises(RuntimeError, match="as asked") if fail else nullcontext():
        if how == "count_macs":
            count_macs(model, (torch.ones(3, 4), fail))
        else:
            with isolated_eval(model):
                assert not any(module.training for module in model.modules())
                model(torch.ones(3, 4), fail)
    assert state_of(model) == before
    assert model.modes == []
    assert model.nothing is None


def test_no_gradient_is_recorded_inside():
    model = nn.Linear(2, 2)
    with isolated_eval(model):
        assert not model(torch.ones(1, 2)).requires_grad
    assert model(torch.ones(1, 2)).requires_grad


def test_what_lies_on_the_cpu_stays_there():
    model = nn.Linear(2, 3)
    before = model.weight.data_ptr()
    with on_cpu(model):
        assert model.weight.data_ptr() == before
    assert model.weight.data_ptr() == before


def test_random_streams_are_kept():
    torch.manual_seed(0)
    with preserved_random_state():
        torch.rand(3)
        torch.manual_seed(9)
    first = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(first, torch.rand(1))
