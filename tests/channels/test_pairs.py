"""Channels leave while another callback works on the same module: both keep what they promise, resumed or not."""

import pytest
import torch
from torch import nn

from lightning_compress import (
    AveragedTeacher,
    ChannelPruning,
    Distillation,
    FineTuning,
    Pruning,
    QuantizationAwareTraining,
)
from tests.contract.settings import teacher
from tests.contract.test_contract import same, saver


def channels(**arguments):
    return ChannelPruning(**{"sparsity": 0.5, "begin": 2, "end": 12, "every": 5, **arguments})


OTHERS = {
    "magnitude": lambda: Pruning(final_sparsity=0.5, begin=1, end=15, every=3),
    "movement": lambda: Pruning(final_sparsity=0.5, criterion="movement", begin=1, end=15, every=3),
    "wanda": lambda: Pruning(final_sparsity=0.5, criterion="wanda", begin=1, end=15, every=3),
    "rows": lambda: Pruning(final_sparsity=0.5, granularity="row", begin=1, end=15, every=3),
    "soft-targets": lambda: Distillation(teacher(), alpha=0.5),
    "averaged-teacher": lambda: Distillation(AveragedTeacher(0.9), alpha=0.5),
    "own-past": lambda: Distillation("self@3 steps", alpha=0.5),
    "quantized-later": lambda: QuantizationAwareTraining(weights=8, activations=8, begin=14),
    "restarted": lambda: FineTuning(learning_rate="x0.5", warmup=3, begin=4, end=20),
    "rewound": lambda: FineTuning(rewind=3, begin=14, end=20),
}  # fmt: skip
every_other = pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)


@every_other
@pytest.mark.parametrize("first", ["channels-first", "channels-last"])
def test_both_work_and_a_resumed_run_ends_in_the_same_bits(
    make, first, pl, make_module, make_trainer, loader, tmp_path
):
    def callbacks(*more):
        ours = [channels(), make()]
        return [*(ours if first == "channels-first" else reversed(ours)), *more]

    path, whole, resumed = tmp_path / "epoch.ckpt", make_module(), make_module()
    one = make_trainer(callbacks(saver(pl, path, 8)), max_epochs=3)
    one.fit(whole, loader)
    two = make_trainer(callbacks(), max_epochs=3)
    two.fit(resumed, loader, ckpt_path=path)
    assert whole.net[0].out_features == 8
    assert same(dict(whole.state_dict()), dict(resumed.state_dict()))
    assert same(one.optimizers[0].state_dict(), two.optimizers[0].state_dict())
    for callback in one.callbacks:
        if isinstance(callback, Pruning):
            assert callback.sparsity >= 0.45
            assert all(
                bool((dict(whole.named_parameters())[name][~mask] == 0).all()) for name, mask in callback.masks.items()
            )


def test_an_average_of_the_weights_gets_thin_too(pl, make_module, make_trainer, loader):
    average = pl.callbacks.WeightAveraging()
    module = make_module()
    make_trainer([channels(), average], max_epochs=3).fit(module, loader)
    assert module.net[0].out_features == 8
    assert module.net[0].weight.shape == (8, 8)  # the average's weights, which the callback puts in at the end
    assert bool(module.net[0].weight.isfinite().all())


@pytest.mark.parametrize(
    "other",
    [
        lambda: QuantizationAwareTraining(weights=8, activations=8, begin=5),
        lambda: Pruning(final_sparsity=0.5, granularity="2:4", begin=5),
    ],
)
def test_cuts_after_shapes_are_fixed_are_refused(other, make_module, make_trainer, loader):
    module = make_module()
    with pytest.raises(ValueError, match="needs shapes that stay"):
        make_trainer([channels(), other()], max_epochs=3).fit(module, loader)
    assert module.net[0].out_features == 16


def test_layers_that_are_compared_or_frozen_stay_whole(make_module, make_trainer, loader):
    for other in (
        Distillation(teacher(), losses={("net.0", "0"): "projected_hint"}),
        FineTuning(freeze="net.0", end=6),
    ):
        with pytest.raises(ValueError, match="no channels that could go"):
            make_trainer([channels(), other], max_epochs=3).fit(make_module(), loader)


def test_a_module_that_is_thin_can_be_compiled_saved_and_exported(make_module, make_trainer, loader, tmp_path):
    module = make_module()
    make_trainer([channels()], max_epochs=3).fit(module, loader)
    torch.save(module.net, tmp_path / "net.pt")
    x = torch.randn(4, 8)
    program = torch.export.export(module.net.eval(), (x,))
    torch.testing.assert_close(program.module()(x), module.net(x))
    assert isinstance(module.net[0], nn.Linear)
