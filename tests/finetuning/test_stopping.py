"""A phase that is over before its time, and the later ones that move up."""

import pytest
import torch

from lightning_compress import ChannelPruning, FineTuning, Pruning, QuantizationAwareTraining
from lightning_compress.finetuning.stopping import StopCriterion, as_stop_criterion
from tests.conftest import adamw, sgd
from tests.finetuning.by_hand import equal, noted


def told(make_module, values):
    """A classifier whose validation loss is known beforehand, epoch by epoch."""

    class Told(make_module):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", values[self.current_epoch])

    return Told


@pytest.mark.parametrize(
    ("values", "until", "ended"),
    [
        ([3.0, 2.0, 2.5, 2.2, 1.0, 0.5], {"patience": 2}, 4),
        ([3.0, 2.0, 1.9, 1.8, 1.0, 0.5], {"patience": 2, "min_delta": 0.5}, 4),
        ([3.0, 2.0, 1.9, 1.8, 1.0, 0.5], {"target": 1.95}, 3),
        ([0.125, 0.25, 0.5, 1.0, 1.0, 1.0], {"target": 0.5, "mode": "max"}, 3),
        ([6.0, 5.0, 4.0, 3.0, 2.0, 1.0], {"patience": 1}, None),
    ],
)
def test_a_phase_ends_at_the_end_of_the_epoch_that_was_enough(
    values, until, ended, pl, make_module, make_trainer, loader
):
    module = told(make_module, values)(sgd)
    tuning = FineTuning(freeze="net.0", end="5 epochs", until={"metric": "val_loss", **until})
    watch = noted(pl, lambda _: module.net[0].weight.requires_grad)
    make_trainer([tuning, watch], max_epochs=6).fit(module, loader, loader)
    last = 8 * (ended or 5)
    assert watch.by_batch == [step >= last for step in range(48)]


def phases():
    return [
        FineTuning(learning_rate="x0.1", warmup=3, begin=4, end=32, until={"metric": "val_loss", "patience": 1}),
        Pruning(0.5, begin=32, end=40, every=4),
        FineTuning(rewind=2, begin=40, end=44, learning_rate="rewind", name="rewound"),
        FineTuning(freeze="net.0", begin="44 steps", name="last"),
    ]


def test_later_phases_come_as_much_earlier(pl, make_module, make_trainer, loader):
    callbacks, module = phases(), told(make_module, [2.0, 3.0, 3.0, 3.0, 3.0, 3.0])(sgd)
    watch = noted(pl, lambda _: callbacks[1].sparsity)
    make_trainer([*callbacks, watch], max_epochs=6).fit(module, loader, loader)
    windows = [(one.window.begin, one.window.end) for one in callbacks]
    assert windows == [(4, 16), (16, 24), (24, 28), (28, 48)]  # 16 steps earlier, but for the end of the run
    # An update at n is made in the step that makes n steps complete.
    assert [watch.by_batch.index(value) + 1 for value in sorted(set(watch.by_batch))][1:] == [20, 24]


def test_what_needs_shapes_that_stay_moves_no_further_than_to_the_last_cut(make_module, make_trainer, loader):
    tuning = FineTuning(weight_decay=0.1, begin=2, end=11, until={"metric": "val_loss", "target": 9.0})
    cuts = ChannelPruning(sparsity=0.5, begin=2, end=12, every=5)
    late = [QuantizationAwareTraining(begin=14, end=24), Pruning(0.5, begin=11, end=14)]
    module = told(make_module, [1.0, 1.0, 1.0])()
    make_trainer([tuning, cuts, *late], max_epochs=3).fit(module, loader, loader)
    # The phase ends at 8, not 11; grids begin one step after the cut at 12, and the zeros are counted there.
    assert [(one.window.begin, one.window.end) for one in late] == [(13, 23), (10, 13)]
    assert module.net[0].out_features == 8


@pytest.mark.parametrize("saved_after", [1, 2, 3])
@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_a_resumed_run_has_moved_too(optimizer, saved_after, pl, make_module, make_trainer, loader, tmp_path):
    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch + 1 == saved_after:
                trainer.save_checkpoint(tmp_path / "some.ckpt")

    known = told(make_module, [2.0, 3.0, 3.0, 3.0, 3.0, 3.0])
    whole, resumed, again = known(optimizer), known(optimizer), phases()
    make_trainer([*phases(), Save()], max_epochs=6).fit(whole, loader, loader)
    make_trainer(again, max_epochs=6).fit(resumed, loader, loader, ckpt_path=tmp_path / "some.ckpt")
    assert equal(whole, resumed)
    assert [one.window.begin for one in again] == [4, 16, 24, 28]


def test_a_metric_that_is_not_logged_is_missed_after_the_first_epoch(make_module, make_trainer, loader):
    tuning = FineTuning(freeze="net.0", until={"metric": "val_los", "patience": 1})
    with pytest.raises(ValueError, match="waits for 'val_los', which has not been logged.* Did you mean 'val_loss'"):
        make_trainer([tuning], max_epochs=2).fit(make_module(), loader, loader)


def test_a_run_without_an_end_may_have_a_phase_that_ends(make_module, make_trainer, loader):
    values = [2.0, 3.0, 3.0, 3.0, 3.0]
    tuning = FineTuning(freeze="net.0", until={"metric": "val_loss", "patience": 1})
    trainer = make_trainer([tuning, Pruning(begin=2, end=9, every=1)], max_epochs=-1, max_time={"seconds": 60})
    known = told(make_module, values)

    class Stopping(known):
        def on_train_epoch_end(self):
            self.trainer.should_stop = self.current_epoch == 3

    trainer.fit(Stopping(sgd), loader, loader)
    assert tuning.window.end == 16


def test_a_metric_that_is_no_number_is_never_better():
    until = StopCriterion("loss", patience=2)
    assert [until(float("nan")) for _ in range(2)] == [False, True]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("val_loss", "until is a mapping such as"),
        ({"patience": 3}, "until needs a metric, and a patience"),
        ({"metric": "val_loss"}, "until needs a metric, and a patience"),
        ({"metric": "val_loss", "patience": 0}, "patience is a number of epochs, at least 1, but is 0"),
        ({"metric": "val_loss", "patience": 1.5}, "patience is a number of epochs"),
        ({"metric": "val_loss", "target": "low"}, "target is a number, but is 'low'"),
        ({"metric": "val_loss", "patience": 1, "mode": "least"}, "mode is 'min' or 'max', but is 'least'"),
        ({"metric": "val_loss", "patient": 1}, "until has no 'patient'. Did you mean 'patience'"),
    ],
)
def test_refuses_what_says_no_end(written, message):
    with pytest.raises(ValueError, match=message):
        as_stop_criterion(written)
    with pytest.raises(ValueError, match=message):
        FineTuning(freeze="net.0", until=written)


def test_the_metric_may_be_what_was_logged_in_training(make_module, make_trainer, loader):
    class Logged(make_module):
        def training_step(self, batch, batch_idx):
            self.log("epoch_loss", torch.tensor(float(self.current_epoch)), on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    tuning = FineTuning(freeze="net.0", until={"metric": "epoch_loss", "patience": 2})
    make_trainer([tuning], max_epochs=5).fit(Logged(), loader)
    assert tuning.window.end == 24
