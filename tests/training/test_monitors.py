"""Monitors that must not judge a half-compressed model, tried on Lightning's own callbacks."""

from types import SimpleNamespace

import pytest
import torch

from lightning_compress.training.monitors import paused_early_stopping, reset_monitors

INF = float("inf")


def checkpoint_of(pl, **arguments):
    """A `ModelCheckpoint` and a function that shows it a value, as at the end of an epoch; nothing is written."""
    checkpoint = pl.callbacks.ModelCheckpoint(monitor="loss", **arguments)
    trainer, epoch = (
        SimpleNamespace(strategy=SimpleNamespace(reduce_boolean_decision=lambda decision, **_: decision)),
        [],
    )
    checkpoint._save_checkpoint = checkpoint._remove_checkpoint = lambda *_: None
    checkpoint._should_remove_checkpoint = lambda *_: False
    checkpoint._get_metric_interpolated_filepath_name = lambda *_: f"epoch={len(epoch)}"

    def show(value):
        current = torch.tensor(value)
        if checkpoint.check_monitor_top_k(trainer, current):
            checkpoint._update_best_and_save(current, trainer, {})
        epoch.append(value)
        return checkpoint.best_model_path

    return checkpoint, show


@pytest.mark.parametrize(("mode", "dense", "pruned"), [("min", 0.1, [0.9, 0.5, 0.7]), ("max", 0.9, [0.1, 0.5, 0.3])])
@pytest.mark.parametrize("top", [1, 2, 3, -1])
def test_what_was_best_before_loses_to_all_that_comes_after(pl, mode, dense, pruned, top):
    checkpoint, show = checkpoint_of(pl, mode=mode, save_top_k=top)
    for value in (dense, dense, dense):
        assert show(value) == "epoch=0"
    assert reset_monitors([checkpoint]) == ["loss"]
    assert [show(value) for value in pruned] == ["epoch=3", "epoch=4", "epoch=4"]
    assert checkpoint.best_model_score == 0.5
    kept = {1: {"epoch=4"}, 2: {"epoch=4", "epoch=5"}, 3: {"epoch=3", "epoch=4", "epoch=5"}}
    assert set(checkpoint.best_k_models) == kept.get(top, {f"epoch={number}" for number in range(6)})


def test_until_something_better_comes_the_saved_one_stays(pl):
    checkpoint, show = checkpoint_of(pl)
    show(0.1)
    reset_monitors([checkpoint])
    assert checkpoint.best_model_path == "epoch=0"
    assert checkpoint.best_model_score == checkpoint.kth_value == INF
    assert show(float("nan")) == "epoch=0"


def test_a_checkpoint_that_has_seen_nothing_or_compares_nothing_is_left_alone(pl):
    fresh, show = checkpoint_of(pl)
    assert reset_monitors([fresh]) == ["loss"]
    assert fresh.best_model_score is None
    assert show(0.3) == "epoch=0"
    plain = pl.callbacks.ModelCheckpoint()
    before = dict(vars(plain))
    assert reset_monitors([plain, pl.callbacks.Timer(), object()]) == []
    assert vars(plain) == before


@pytest.mark.parametrize(("mode", "dense", "pruned"), [("min", 0.1, 0.9), ("max", 0.9, 0.1)])
def test_early_stopping_begins_anew(pl, mode, dense, pruned):
    stopping = pl.callbacks.EarlyStopping("loss", mode=mode, patience=2)
    fresh = stopping.best_score
    assert stopping._evaluate_stopping_criteria(torch.tensor(dense))[0] is False
    assert stopping._evaluate_stopping_criteria(torch.tensor(pruned))[0] is False
    assert (stopping.wait_count, stopping.best_score) == (1, torch.tensor(dense))
    assert reset_monitors([stopping]) == ["loss"]
    assert (stopping.wait_count, stopping.best_score) == (0, fresh)
    assert stopping._evaluate_stopping_criteria(torch.tensor(pruned))[0] is False
    assert stopping.best_score == torch.tensor(pruned)


@pytest.mark.parametrize("at_train_end", [False, True])
def test_early_stopping_is_held_until_the_end_is_reached(pl, at_train_end):
    stopping = pl.callbacks.EarlyStopping("loss", patience=1, check_on_train_epoch_end=at_train_end)
    trainer = SimpleNamespace(
        state=SimpleNamespace(fn=pl.trainer.states.TrainerFn.FITTING),
        sanity_checking=False,
        fast_dev_run=False,
        callback_metrics={"loss": torch.tensor(1.0)},
        should_stop=False,
        current_epoch=7,
        world_size=1,
        strategy=SimpleNamespace(reduce_boolean_decision=lambda decision, **_: decision),
    )

    def epoch():
        for hook in ("on_validation_end", "on_train_epoch_end"):
            getattr(stopping, hook)(trainer, None)
        return trainer.should_stop

    reached = False
    with paused_early_stopping([stopping, object()], lambda: reached):
        assert not any(epoch() for _ in range(5))
        assert stopping.wait_count == 0
        reached = True
        assert [epoch(), epoch()] == [False, True]
    assert not {"on_validation_end", "on_train_epoch_end"} & vars(stopping).keys()
    assert stopping.stopped_epoch == 7
