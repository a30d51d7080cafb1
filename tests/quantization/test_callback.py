"""The callback trains, bit for bit, what a module with fake quantization in its own code trains."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import QuantizationAwareTraining
from lightning_compress.core.phases import Run
from tests.conftest import adamw, sgd
from tests.quantization.watching import as_trained, equal, is_active, normed, noted

PLAIN = {"begin": 2, "freeze_bn": None, "freeze_ranges": None, "reduce_range": False}


def close(one, other):
    return all(torch.allclose(a, b, atol=1e-4) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# By hand ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [sgd, adamw], ids=["sgd", "adamw"])
@pytest.mark.parametrize(
    ("arguments", "watched"),
    [
        ({}, 2),
        ({"accumulate_grad_batches": 2}, 3),
        ({"gradient_clip_val": 0.1}, 2),
        ({"precision": "bf16-mixed"}, 2),
        ({"precision": "64-true"}, 2),
    ],
    ids=["plain", "accumulated", "clipped", "bf16-mixed", "double"],
)
def test_it_trains_what_a_module_quantized_by_hand_trains(
    optimizer, arguments, watched, by_hand, make_module, make_trainer, loader
):
    ours, theirs = make_module(optimizer), by_hand(optimizer, watched=watched)
    trainers = (
        make_trainer([QuantizationAwareTraining(**PLAIN)], max_epochs=2, **arguments),
        make_trainer(max_epochs=2, **arguments),
    )
    trainers[0].fit(ours, loader, loader)
    trainers[1].fit(theirs, loader, loader)
    as_trained(ours)
    # In double precision torch's operators round in single.
    assert close(ours, theirs) if "64-true" in arguments.values() else equal(ours, theirs)
    losses = [float(trainer.callback_metrics["val_loss"]) for trainer in trainers]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6 if "64-true" in arguments.values() else 0)
    plain = make_module(optimizer)
    make_trainer(max_epochs=2, **arguments).fit(plain, loader)
    assert not equal(ours, plain)


def test_validation_in_the_run_is_quantized_and_changes_no_range(by_hand, make_module, make_trainer, loader):
    ours, theirs = make_module(), by_hand()
    loud = DataLoader(TensorDataset(10 * loader.dataset.tensors[0], loader.dataset.tensors[1]), batch_size=16)
    for module, callbacks in ((ours, [QuantizationAwareTraining(**PLAIN)]), (theirs, [])):
        trainer = make_trainer(callbacks, max_epochs=2, val_check_interval=3)
        trainer.fit(module, loader, loud)
        module.seen = trainer.callback_metrics["val_loss"]
    assert ours.seen == theirs.seen
    assert equal(as_trained(ours), theirs)


# When ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("begin", "arguments", "first"),
    [
        (4, {}, 5),
        ("50%", {}, 9),
        ("1 epochs", {}, 9),
        (2, {"accumulate_grad_batches": 3}, 5),  # batches 4 to 6 make step 2
        (0, {}, 2),
    ],
)
def test_the_batch_after_the_watched_one_is_the_first_that_is_quantized(
    begin, arguments, first, pl, make_module, make_trainer, loader
):
    quantization = QuantizationAwareTraining(begin=begin)
    note = noted(pl, quantization, is_active)
    make_trainer([quantization, note], max_epochs=2, **arguments).fit(make_module(), loader)
    assert note.by_batch == [batch >= first for batch in range(1, 17)]


def test_bits_fall_as_the_timeline_says(pl, make_module, make_trainer, loader):
    quantization = QuantizationAwareTraining(
        weights=2, activations=4, initial_bits=8, begin=4, end=20, every=4, first="same", last="same"
    )
    note = noted(pl, quantization, lambda one: None if one.quantized is None else one.quantized.bits)
    make_trainer([quantization, note], max_epochs=3).fit(make_module(), loader)
    # 8 - (step - 4) / 16 * 6, rounded half to even.
    expected = {4: 8, 8: 6, 12: 5, 16: 4, 20: 2}
    for step in range(4, 25):
        assert note.by_batch[step - 1] == expected[max(one for one in expected if one <= step)], step
    assert [form.bits for form in forms(quantization, "activations")] == [4, 4]
    run = quantization.timeline(run_of_24_steps())
    assert [(moment, int(text.split()[0])) for moment, text in run] == list(expected.items())


def forms(quantization, side):
    return [one.fmt for one in getattr(quantization.quantized, side).values()]


def run_of_24_steps():
    return Run(epochs=3, batches_per_epoch=8)


def test_what_does_not_fall_says_when_it_begins():
    assert QuantizationAwareTraining(begin=6).timeline(run_of_24_steps()) == [(6, "quantizes")]
    assert QuantizationAwareTraining(begin=6, calibrate_only=True).timeline(run_of_24_steps()) == [(6, "calibrates")]


def test_sparse_gradients_are_refused_before_training_unless_nothing_is_trained_on_grids(
    make_module, make_trainer, loader
):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.out = nn.Embedding(4, 6, sparse=True), nn.Linear(6, 3)

        def forward(self, values):
            return self.out(self.words((values[:, :3] > 0).long()).mean(1))

    def fit(**settings):
        module = make_module(lambda parameters: torch.optim.SGD(parameters, lr=0.1), net=Words)
        quantization = QuantizationAwareTraining(begin=2, **settings)
        trainer = make_trainer([quantization], max_epochs=1)
        trainer.fit(module, loader)
        return quantization.quantized.weights

    with pytest.raises(ValueError, match=r"'net.words' is an Embedding\(sparse=True\).*ignore=\['net.words'\]"):
        fit()
    assert set(fit(ignore=["net.words"])) == {"net.out.weight"}
    assert set(fit(calibrate_only=True)) == {"net.words.weight", "net.out.weight"}


def test_a_step_that_the_user_skips_is_not_the_watched_one(pl, make_module, make_trainer, loader):
    class Skipping(make_module):
        def training_step(self, batch, batch_idx):
            return None if batch_idx in (2, 3) else super().training_step(batch, batch_idx)

    quantization = QuantizationAwareTraining(begin=3)
    note = noted(pl, quantization, lambda one: one.quantized is not None)
    make_trainer([quantization, note], max_epochs=1).fit(Skipping(), loader)
    assert note.by_batch == [False] * 4 + [True] * 4


@pytest.mark.parametrize("begin", [100, "3 epochs"])
def test_a_trial_run_of_lightning_may_end_before_it_begins(begin, make_module, make_trainer, loader):
    quantization = QuantizationAwareTraining(begin=begin)
    make_trainer([quantization], fast_dev_run=True).fit(make_module(), loader, loader)
    assert quantization.quantized is None


def test_a_run_that_is_stopped_before_the_phase_is_told_so(pl, make_module, make_trainer, loader):
    late = QuantizationAwareTraining(begin=100, end=200)
    stop = pl.callbacks.LambdaCallback(on_train_epoch_end=lambda trainer, _: setattr(trainer, "should_stop", True))
    with pytest.warns(UserWarning, match="'quantization' never began: the run ended before begin=100. Nothing"):
        make_trainer([late, stop], max_epochs=20).fit(make_module(), loader)


def test_only_calibrated_models_train_as_if_nothing_were_there_and_are_validated_quantized(
    pl, by_hand, make_module, make_trainer, loader
):
    plain, ours = normed(make_module)(), normed(make_module)()
    make_trainer(max_epochs=3).fit(plain, loader, loader)
    quantization = QuantizationAwareTraining(calibrate_only=True, begin=2, weights=4, freeze_bn=10)
    trainer = make_trainer([quantization], max_epochs=3)
    trainer.fit(ours, loader, loader)
    quantized = trainer.callback_metrics["val_loss"]
    assert make_trainer().validate(ours, loader, verbose=False)[0]["val_loss"] == float(quantized)
    assert equal(as_trained(ours), plain)
    assert make_trainer().validate(ours, loader, verbose=False)[0]["val_loss"] != float(quantized)
    assert quantization.quantized.activations["net.2 output"].maximum > 0
