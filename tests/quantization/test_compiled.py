"""Compiled modules are quantized as others are: from `begin` on, in training and validation, and no more afterwards."""

import pytest
import pytorch_lightning
import torch
from torch import nn
from torch._dynamo.utils import counters

from lightning_compress import QuantizationAwareTraining
from tests.conftest import sgd
from tests.quantization.watching import as_trained, equal, is_active

pytestmark = pytest.mark.filterwarnings("ignore")
LSQ = {"weights": 4, "activations": 4, "first": "same", "last": "same"}


@pytest.fixture
def pl():
    """To compile takes long, and how does not depend on the name."""
    return pytorch_lightning


@pytest.fixture(autouse=True)
def _forgotten():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def silent(make_module):
    """A module whose training step does not log: Lightning cannot do that in a module that is compiled whole."""

    class Silent(make_module):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

    return Silent


def compiled(module, how, backend="eager"):
    if how == "submodule":
        module.net = torch.compile(module.net, backend=backend)
    elif how == "in place":
        module.net.compile(backend=backend)
    elif how == "whole":
        return torch.compile(module, backend=backend)
    return module


WAYS = {"submodule": {}, "in place": LSQ, "whole": LSQ}


@pytest.mark.parametrize("way", WAYS)
def test_it_trains_and_validates_what_an_uncompiled_module_does(way, silent, make_trainer, loader):
    ours, theirs = silent(sgd), silent(sgd)
    # Hooks have to be there before the first compiled step, so that a compiled module is watched in that one already:
    # it is quantized at `begin`, and others, whose step `begin` is watched, one step later.
    callbacks = [QuantizationAwareTraining(begin=begin, **WAYS[way]) for begin in (5, 4)]
    trainers = [make_trainer([one], max_epochs=2) for one in callbacks]
    trainers[0].fit(compiled(ours, way), loader, loader)
    trainers[1].fit(theirs, loader, loader)
    assert is_active(callbacks[0])
    in_training = float(trainers[0].callback_metrics["val_loss"])
    assert in_training == float(trainers[1].callback_metrics["val_loss"])
    # Outside of the run it computes as it was trained, until the quantizers are taken off.
    values = loader.dataset.tensors[0][:8]
    for training, gradients in ((True, True), (False, False)):
        with torch.set_grad_enabled(gradients):
            assert torch.equal(ours.train(training).net(values), theirs.train(training).net(values))
    assert trainers[0].validate(ours, loader, verbose=False)[0]["val_loss"] == in_training
    assert equal(as_trained(ours), as_trained(theirs))
    assert make_trainer().validate(ours, loader, verbose=False)[0]["val_loss"] != in_training


def test_it_does_so_under_autograds_own_tracing_too(silent, make_trainer, loader):
    ours, theirs = compiled(silent(sgd), "submodule", "aot_eager"), silent(sgd)
    for module, begin in ((ours, 5), (theirs, 4)):
        make_trainer([QuantizationAwareTraining(begin=begin, **LSQ)], max_epochs=1).fit(module, loader)
    assert equal(as_trained(ours), as_trained(theirs))


@pytest.mark.parametrize("how", ["submodule", "in place"])
def test_nothing_is_compiled_anew_once_all_has_begun(how, pl, silent, make_trainer, loader):
    frames = []

    class Count(pl.Callback):
        def on_train_epoch_end(self, *_):
            frames.append(counters["frames"]["total"])

    quantization = QuantizationAwareTraining(begin=4, freeze_ranges=10)
    make_trainer([quantization, Count()], max_epochs=4).fit(compiled(silent(), how), loader, loader)
    assert frames[0] > 0
    assert frames[2] == frames[3]
