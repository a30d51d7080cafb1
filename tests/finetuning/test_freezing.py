"""What stands still, when, and that it is given back."""

import pytest
import torch
from torch import nn

from lightning_compress import FineTuning, Pruning
from tests.conftest import adamw, sgd
from tests.finetuning.by_hand import equal, normed, noted, train

every_optimizer = pytest.mark.parametrize("optimizer", [sgd, adamw], ids=["sgd", "adamw"])


def lbfgs(parameters):
    return torch.optim.LBFGS(parameters, lr=0.01, max_iter=3)


@every_optimizer
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_frozen_layer_is_that_of_a_loop_with_requires_grad_false(
    optimizer, accumulate, make_module, make_trainer, loader
):
    module, by_hand = make_module(optimizer), make_module().net

    def before(step):
        by_hand[0].requires_grad_(not 2 <= step < 6)

    tuning = FineTuning(freeze="net.0", begin=2, end=6)
    make_trainer([tuning], max_epochs=3, accumulate_grad_batches=accumulate).fit(module, loader)
    train(by_hand, optimizer(by_hand.parameters()), loader, 3, before=before, accumulate=accumulate)
    assert equal(module.net, by_hand)
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("optimizer", [sgd, adamw, lbfgs], ids=["sgd", "adamw", "lbfgs"])
def test_what_is_frozen_does_not_move_nor_does_its_optimizer_state(optimizer, pl, make_module, make_trainer, loader):
    module = make_module(optimizer)

    def note(trainer):
        state = trainer.optimizers[0].state.get(module.net[0].weight, {})
        return (
            module.net[0].weight.clone(),
            module.net[2].weight.clone(),
            {k: torch.clone(v) for k, v in state.items() if isinstance(v, torch.Tensor)},
        )

    watch = noted(pl, note)
    make_trainer([FineTuning(freeze="net.0.*", begin=4, end=12), watch], max_epochs=2).fit(module, loader)
    for step in range(1, 16):
        before, after = watch.by_batch[step - 1], watch.by_batch[step]
        assert torch.equal(before[0], after[0]) == (4 <= step < 12), step
        assert not torch.equal(before[1], after[1])
        if 4 <= step < 12 and optimizer is not lbfgs:
            assert before[2].keys() == after[2].keys()
            assert all(torch.equal(before[2][key], after[2][key]) for key in before[2])


@every_optimizer
def test_clipped_gradients_know_nothing_of_what_is_frozen(optimizer, make_module, make_trainer, loader):
    module, by_hand = make_module(optimizer), make_module(optimizer)
    by_hand.net[0].requires_grad_(False)
    make_trainer([FineTuning(freeze="net.0")], max_epochs=2, gradient_clip_val=0.1).fit(module, loader)
    make_trainer(max_epochs=2, gradient_clip_val=0.1).fit(by_hand, loader)
    assert equal(module, by_hand)


@pytest.mark.parametrize("behind_lightning", [False, True])
def test_a_user_who_clips_and_steps_sees_no_gradient_of_what_is_frozen(
    behind_lightning, make_module, make_trainer, loader
):
    class Manual(make_module):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=not behind_lightning)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            loss.backward() if behind_lightning else self.manual_backward(loss)
            if not behind_lightning:
                nn.utils.clip_grad_norm_(self.parameters(), 0.1)
            optimizer.step()

    module, by_hand = Manual(sgd), make_module(sgd)
    by_hand.net[0].requires_grad_(False)
    make_trainer([FineTuning(freeze="net.0")], max_epochs=2).fit(module, loader)
    clipped = {} if behind_lightning else {"gradient_clip_val": 0.1}
    make_trainer(max_epochs=2, **clipped).fit(by_hand, loader)
    assert equal(module, by_hand)


@pytest.mark.parametrize("validated", [True, False])
def test_frozen_norms_keep_their_statistics_and_others_do_not(validated, pl, make_module, make_trainer, loader):
    module = make_module(sgd, net=lambda: nn.Sequential(normed(), nn.BatchNorm1d(3), nn.BatchNorm1d(3, affine=False)))
    norms = [module.net[0][1], module.net[1], module.net[2]]
    watch = noted(
        pl, lambda _: [(one.running_mean.clone(), one.num_batches_tracked.item(), one.training) for one in norms]
    )
    tuning = FineTuning(freeze=["net.0.*", "BatchNorm1d"], unfreeze="net.1", begin=4, end=12)
    limits = {"val_check_interval": 3} if validated else {}
    make_trainer([tuning, watch], max_epochs=2, **limits).fit(module, loader, loader if validated else None)
    for place, frozen in enumerate((True, False, True)):
        means, counts, modes = zip(*(notes[place] for notes in watch.by_batch), strict=True)
        assert modes == tuple(not (frozen and 4 <= step < 12) for step in range(16))
        assert counts[-1] == (8 if frozen else 16)
        assert torch.equal(means[3], means[11]) == frozen
    assert all(one.training for one in norms)


def test_frozen_norms_keep_still_when_the_user_says_train(pl, make_module, make_trainer, loader):
    class Training(make_module):
        def on_train_epoch_start(self):
            self.train()

    module = Training(sgd, net=normed)
    watch = noted(pl, lambda _: module.net[1].num_batches_tracked.item())
    make_trainer([FineTuning(freeze="net.1", begin=4, end=20), watch], max_epochs=3).fit(module, loader)
    assert watch.by_batch == [1, 2, 3, *[4] * 17, 5, 6, 7, 8]


def test_layers_thaw_from_the_head_down_at_equal_distances(pl, make_module, make_trainer, loader):
    def net():
        return nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, 3))

    module = make_module(sgd, net=net)
    tuning = FineTuning(freeze="*", unfreeze="net.4", gradual=True, begin=4, end=24)
    watch = noted(pl, lambda _: [layer.weight.clone() for layer in module.net])
    make_trainer([tuning, watch], max_epochs=4).fit(module, loader)
    # The phase of 20 steps has 5 pieces for 4 layers.
    first_moves = {4: 0, 3: 8, 2: 12, 1: 16, 0: 20}
    for layer, unfreezes in first_moves.items():
        for step in range(1, 32):
            moves = not torch.equal(watch.by_batch[step - 1][layer], watch.by_batch[step][layer])
            assert moves == (step < 4 or step >= unfreezes), (layer, step)


def test_layers_may_be_named_from_the_input_to_the_head(pl, make_module, make_trainer, loader):
    module = make_module(sgd, net=lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)))
    layers = ["net.1", ["net.0", "net.2"]]
    tuning = FineTuning(freeze="*", unfreeze="net.2", gradual=True, layers=layers, begin=0, end=6)
    watch = noted(pl, lambda _: [layer.weight.requires_grad for layer in module.net])
    make_trainer([tuning, watch], max_epochs=1).fit(module, loader)
    assert [notes[0] for notes in watch.by_batch] == [False] * 2 + [True] * 6
    assert [notes[1] for notes in watch.by_batch] == [False] * 4 + [True] * 4


@every_optimizer
def test_what_the_user_has_frozen_is_thawed_for_a_phase(optimizer, make_module, make_trainer, loader):
    module, by_hand = make_module(optimizer), make_module().net
    module.net[0].requires_grad_(False)
    make_trainer([FineTuning(unfreeze="net.0", begin=4, end=12)], max_epochs=2).fit(module, loader)
    stepped = optimizer(by_hand.parameters())
    train(by_hand, stepped, loader, 2, before=lambda step: by_hand[0].requires_grad_(4 <= step < 12))
    assert equal(module.net, by_hand)
    assert [parameter.requires_grad for parameter in module.parameters()] == [False, False, True, True]


def test_masks_hold_on_what_is_frozen(make_module, make_trainer, loader):
    module = make_module(sgd)
    pruning = Pruning(0.5, begin=2, end=6)
    make_trainer([FineTuning(freeze="net.0", end=12), pruning], max_epochs=2).fit(module, loader)
    assert (module.net[0].weight == 0).sum() == 64


def test_what_is_frozen_is_said(pl, make_module, make_trainer, loader):
    trainer = make_trainer([FineTuning(freeze="net.0")], max_epochs=1)
    trainer.fit(make_module(), loader)
    assert trainer.callback_metrics["compress/finetuning/frozen"] == pytest.approx((128 + 16) / (128 + 16 + 48 + 3))
