"""What stands still, or is held near its place, in the last part of training."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_compress import QuantizationAwareTraining
from tests.conftest import sgd
from tests.quantization.watching import is_active, normed, noted


@pytest.mark.parametrize("validated", [True, False])
def test_norms_keep_their_statistics_from_freeze_bn_on_and_get_their_modes_back(
    validated, pl, make_module, make_trainer, loader
):
    module = normed(make_module)()
    quantization = QuantizationAwareTraining(begin=2, freeze_bn=10)
    note = noted(pl, quantization, lambda _: (module.net[1].running_mean.clone(), module.net[1].training))
    trainer = make_trainer([quantization, note], max_epochs=3, **({"val_check_interval": 3} if validated else {}))
    trainer.fit(module, loader, loader if validated else None)
    means, modes = zip(*note.by_batch, strict=True)
    assert modes == (True,) * 10 + (False,) * 14
    changes = [not torch.equal(one, other) for one, other in pairwise(means)]
    assert changes == [True] * 9 + [False] * 14
    assert module.net[1].training


def test_a_norm_that_the_user_has_frozen_stays_so(make_module, make_trainer, loader):
    class Frozen(make_module):
        def on_train_batch_start(self, *_):
            self.net[1].eval()

    module = Frozen(net=lambda: nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)))
    make_trainer([QuantizationAwareTraining(begin=2, freeze_bn=4)], max_epochs=1).fit(module, loader)
    assert not module.net[1].running_mean.any()


@pytest.mark.parametrize("settings", [{}, {"method": "min_max"}, {"symmetric": False, "method": "percentile"}], ids=str)
def test_ranges_keep_their_bits_from_freeze_ranges_on(settings, pl, make_module, make_trainer, loader):
    def ranges(quantization):
        if quantization.quantized is None:
            return None
        return {name: str(one.quantizer_state()) for name, one in quantization.quantized.activations.items()} | {
            name: str(one.quantizer_state()) for name, one in quantization.quantized.weights.items()
        }

    quantization = QuantizationAwareTraining(begin=2, freeze_ranges=10, **settings)
    note = noted(pl, quantization, ranges)
    make_trainer([quantization, note], max_epochs=3).fit(make_module(sgd), loader, loader)
    assert note.by_batch[8] != note.by_batch[9]
    assert all(one == note.by_batch[10] for one in note.by_batch[10:])


def test_damping_adds_twice_the_distance_from_the_grid_to_the_gradient(pl, make_module, make_trainer, loader):
    seen = []

    class Watch(pl.Callback):
        """Listed around the one of ours."""

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append([one.grad.clone() for one in (pl_module.net[0].weight, pl_module.net[2].weight)])

    before, after = Watch(), Watch()
    quantization = QuantizationAwareTraining(
        weights=3, activations=None, method="min_max", first="same", last="same", begin=0, damping=0.5
    )
    module = make_module(sgd)
    make_trainer([before, quantization, after], max_epochs=1, limit_train_batches=1).fit(module, loader)
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))  # the watched step has none
    seen.clear()
    weights = []
    module.on_before_zero_grad = lambda *_: weights.append([module.net[0].weight.clone(), module.net[2].weight.clone()])
    make_trainer([before, quantization, after], max_epochs=1, limit_train_batches=1).fit(module, loader)
    for plain, damped, weight in zip(*seen, weights[0], strict=True):
        scale = weight.abs().amax(1, keepdim=True) / 3
        assert torch.allclose(damped - plain, 2 * 0.5 * (weight - (weight / scale).round() * scale), atol=1e-6)


def test_damping_lessens_oscillation(pl, make_module, make_trainer, loader):
    def flips(damping):
        quantization = QuantizationAwareTraining(
            weights=3, activations=None, first="same", last="same", begin=0, damping=damping, freeze_ranges=None
        )

        def codes(one):
            if not is_active(one):
                return None
            quantizer, weight = one.quantized.weights["net.0.weight"], module.net[0].weight
            values, scale = quantizer.on_grid(weight.detach())
            return (values / scale.detach()).round()

        module, note = make_module(sgd), noted(pl, quantization, codes)
        make_trainer([quantization, note], max_epochs=6).fit(module, loader)
        late = note.by_batch[24:]
        return sum(int((one != other).sum()) for one, other in pairwise(late))

    assert flips(0.5) < 0.6 * flips(0.0)
