"""Weights of an earlier moment: remembered, put back, with masks, twice, and over a resume."""

import pytest
import torch
from torch import nn

from lightning_compress import FineTuning, Pruning
from tests.conftest import adamw, sgd
from tests.contract.test_contract import saver
from tests.finetuning.by_hand import equal, normed, noted, train

every_optimizer = pytest.mark.parametrize("optimizer", [sgd, adamw], ids=["sgd", "adamw"])


@every_optimizer
@pytest.mark.parametrize("keep", [True, False])
def test_a_rewound_run_is_that_of_a_loop_that_copies_weights(optimizer, keep, make_module, make_trainer, loader):
    def net():
        return normed()

    module, by_hand = make_module(optimizer, net=net), make_module(net=net).net
    stepped, kept = optimizer(by_hand.parameters()), {}

    def before(step):
        if step == 3:
            kept.update({name: value.clone() for name, value in by_hand.state_dict().items()})
        if step == 10:
            by_hand.load_state_dict(kept)
            if not keep:
                stepped.state.clear()

    make_trainer([FineTuning(rewind=3, begin=10, reset_moments=not keep)], max_epochs=2).fit(module, loader)
    train(by_hand, stepped, loader, 2, before=before)
    assert equal(module.net, by_hand)


def test_two_rewinds_of_a_lottery_ticket_with_masks_that_hold_in_every_forward_pass(
    pl, make_module, make_trainer, loader
):
    module = make_module(sgd)
    seen, weights = [], []
    module.net.register_forward_pre_hook(lambda *_: seen.append(module.net[0].weight.detach().clone()))
    pruning = Pruning(0.75, schedule="steps", begin=8, end=20, every=3)
    tickets = [FineTuning(rewind=4, begin=12, name="first"), FineTuning(rewind="10%", begin=22, name="second")]
    watch = noted(pl, lambda _: pruning.masks.get("net.0.weight", torch.ones(16, 8)).clone())
    make_trainer([*tickets, pruning, watch], max_epochs=5).fit(module, loader)
    early = seen[4]
    for begin in (12, 22):
        mask = watch.by_batch[begin - 1]
        weights.append(seen[begin])
        assert torch.equal(seen[begin], early * mask)
    assert 0 < (weights[0] == 0).sum() < (weights[1] == 0).sum() == 96
    for step in range(21, 40):
        assert (seen[step] == 0).sum() == 96


@pytest.mark.parametrize("saved_after", [1, 2, 3])
def test_a_rewind_survives_a_resume_at_any_place(saved_after, pl, make_module, make_trainer, loader, tmp_path):
    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch + 1 == saved_after:
                trainer.save_checkpoint(tmp_path / "some.ckpt")

    def callbacks():
        return [
            FineTuning(rewind=4, begin=16, name="first"),
            FineTuning(rewind=10, learning_rate="rewind", begin=28, name="second"),
            Pruning(0.5, begin=2, end=20, every=3),
        ]

    whole, resumed = make_module(adamw), make_module(adamw)
    make_trainer([*callbacks(), Save()], max_epochs=5).fit(whole, loader)
    make_trainer(callbacks(), max_epochs=5).fit(resumed, loader, ckpt_path=tmp_path / "some.ckpt")
    assert equal(whole, resumed)


def test_the_optimizer_forgets_only_what_was_rewound(make_module, make_trainer, loader):
    module = make_module(adamw)
    trainer = make_trainer([FineTuning(rewind=2, begin=10)], max_epochs=2)
    trainer.fit(module, loader)
    assert {int(state["step"]) for state in trainer.optimizers[0].state.values()} == {6}


def test_remembered_weights_do_not_stay_in_later_checkpoints(make_module, make_trainer, loader, tmp_path):
    trainer = make_trainer([FineTuning(rewind=2, begin=10)], max_epochs=2)
    trainer.fit(make_module(), loader)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["lightning_compress/finetuning"]
    assert state["rewinding"] == {"weights": {}, "done": True}


def test_phases_that_go_back_to_one_moment_share_what_they_remember(pl, make_module, make_trainer, loader, tmp_path):
    path = tmp_path / "some.ckpt"
    moments = ((2, 10), (2, 12), (3, 14))
    phases = [FineTuning(rewind=at, begin=begin, end=begin + 1, name=f"at {begin}") for at, begin in moments]
    make_trainer([*phases, saver(pl, path, 8)], max_epochs=2).fit(make_module(), loader)
    saved = torch.load(path, weights_only=True)["callbacks"]
    places = [saved[phase.state_key]["rewinding"]["weights"]["net.0.weight"].data_ptr() for phase in phases]
    assert places[0] == places[1] != places[2]


def test_a_trainer_that_goes_on_does_not_rewind_again(pl, make_module, make_trainer, loader):
    module = make_module(sgd)
    trainer = make_trainer([FineTuning(rewind=2, begin=10)], max_epochs=2)
    trainer.fit(module, loader)
    before = module.net[0].weight.clone()
    trainer.fit_loop.max_epochs = 3
    watch = noted(pl, lambda _: module.net[0].weight.clone())
    trainer.callbacks.append(watch)
    trainer.fit(module, loader)
    assert (watch.by_batch[0] - before).abs().max() < 0.2
    assert trainer.global_step == 24


def test_it_cannot_be_added_to_a_run_that_is_past_the_moment(make_module, make_trainer, loader, tmp_path):
    dense = make_trainer(max_epochs=1)
    dense.fit(make_module(), loader)
    dense.save_checkpoint(tmp_path / "dense.ckpt")
    for arguments in ({"rewind": 4}, {"learning_rate": "rewind 4 steps"}):
        with pytest.raises(ValueError, match="goes back to what was before moment 8 of this run"):
            make_trainer([FineTuning(begin=12, **arguments)], max_epochs=3).fit(
                make_module(), loader, ckpt_path=tmp_path / "dense.ckpt"
            )


def test_statistics_are_averages_over_the_batches_that_follow(pl, make_module, make_trainer, loader):
    def frozen_input():
        return nn.Sequential(nn.BatchNorm1d(8, affine=False), nn.Linear(8, 3))

    for at, first in (("begin", 2), ("end", 4)):
        module = make_module(sgd, net=frozen_input)
        tuning = FineTuning(recalibrate_bn=at, recalibrate_over=3, begin=2, end=4)
        watch = noted(pl, lambda _: (module.net[0].running_mean.clone(), module.net[0].running_var.clone()))
        make_trainer([tuning, watch], max_epochs=1).fit(module, loader)
        batches = [x for x, _ in loader][first : first + 3]
        mean, variance = watch.by_batch[first + 2]
        assert torch.allclose(mean, torch.stack([x.mean(0) for x in batches]).mean(0), atol=1e-6)
        assert torch.allclose(variance, torch.stack([x.var(0) for x in batches]).mean(0), atol=1e-6)
        later = [x for x, _ in loader][first + 3]
        assert torch.allclose(watch.by_batch[first + 3][0], 0.9 * mean + 0.1 * later.mean(0), atol=1e-6)
        assert module.net[0].momentum == 0.1
