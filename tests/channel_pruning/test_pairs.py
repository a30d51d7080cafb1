"""Thin modules beside averages, norms that are compared, and exports; pairs of callbacks: `tests/test_pairs.py`."""

import pytest
import torch
from torch import nn

from lightning_compress import ChannelPruning, Distillation, FineTuning


def channels(**arguments):
    return ChannelPruning(**{"sparsity": 0.5, "begin": 2, "end": 12, "every": 5, **arguments})


def test_an_average_of_the_weights_gets_thin_too(pl, make_module, make_trainer, loader):
    average = pl.callbacks.WeightAveraging()
    module = make_module()
    make_trainer([channels(), average], max_epochs=3).fit(module, loader)
    assert module.net[0].out_features == 8
    assert module.net[0].weight.shape == (8, 8)  # the average's weights, which the callback puts in at the end
    assert bool(module.net[0].weight.isfinite().all())


def normed():
    return nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )


@pytest.mark.parametrize("other", [
    lambda: Distillation(normed(), losses={("net.1", "1"): "hint"}),
    lambda: FineTuning(freeze="net.1", begin=5, end=9),
], ids=["compared", "frozen"])  # fmt: skip
def test_what_goes_through_a_norm_that_stays_whole_stays_whole_before_it(other, make_module, make_trainer, loader):
    module = make_module(net=normed)
    make_trainer([other(), channels()], max_epochs=3).fit(module, loader)
    assert (module.net[0].out_features, module.net[1].num_features, module.net[3].out_features) == (16, 16, 8)


def test_a_module_that_is_thin_can_be_compiled_saved_and_exported(make_module, make_trainer, loader, tmp_path):
    module = make_module()
    make_trainer([channels()], max_epochs=3).fit(module, loader)
    torch.save(module.net, tmp_path / "net.pt")
    x = torch.randn(4, 8)
    program = torch.export.export(module.net.eval(), (x,))
    torch.testing.assert_close(program.module()(x), module.net(x))
    assert isinstance(module.net[0], nn.Linear)
