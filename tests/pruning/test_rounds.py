"""Rounds of pruning, and the ready recipe that trains each of them anew from an early step."""

import pytest
import torch

from lightning_compress import FineTuning, Pruning, Recipe
from lightning_compress.core.phases import Run
from lightning_compress.recipe.builtin import builtin_recipes
from tests.conftest import adamw, sgd
from tests.contract.test_contract import same, saver

EPOCHS = 8
EARLY, ROUNDS = 1, (12, 25, 38, 51)  # 2 %, 20 % and so on of 64 steps, cut off
WEIGHTS = ("net.0.weight", "net.2.weight")
OF_WHAT_IS_LEFT = 1 - 0.2**0.25  # what each of four rounds prunes to end at 0.8


def callbacks():
    """Those of the recipe but the report, which comes last."""
    return Recipe.load(builtin_recipes()["lottery_ticket"]).callbacks()[:-1]


def test_each_round_begins_with_the_largest_weights_at_their_early_values(make_module, make_trainer, loader):
    module, seen = make_module(sgd), []

    def note(*_):
        seen.append({name: value.detach().clone() for name, value in module.named_parameters()})

    module.net.register_forward_pre_hook(note)
    make_trainer(callbacks(), max_epochs=EPOCHS).fit(module, loader)
    early, total = seen[EARLY], sum(seen[0][name].numel() for name in WEIGHTS)
    alive = torch.ones(total, dtype=torch.bool)
    for number, moment in enumerate(ROUNDS, start=1):
        trained = torch.cat([seen[moment - 1][name].flatten() for name in WEIGHTS]).abs()
        kept = total - round((1 - (1 - OF_WHAT_IS_LEFT) ** number) * total)
        alive = torch.zeros_like(alive).index_fill_(0, torch.where(alive, trained, -1.0).topk(kept).indices, True)
        masks = dict(zip(WEIGHTS, alive.split([128, 48]), strict=True))
        for name, value in seen[moment].items():
            mask = masks[name].view_as(value) if name in masks else 1.0
            assert torch.equal(value, early[name] * mask)
            assert not torch.equal(seen[moment - 1][name], early[name])
        for step in range(moment, (*ROUNDS, 64)[number]):
            assert all(torch.equal(seen[step][name].flatten() != 0, mask) for name, mask in masks.items())
    assert kept == 35  # a fifth of 176


def test_a_ticket_resumed_between_two_rounds_is_the_same_to_the_last_bit(
    pl, make_module, make_trainer, loader, tmp_path
):
    path, whole, resumed = tmp_path / "some.ckpt", make_module(adamw), make_module(adamw)
    first = make_trainer([*callbacks(), saver(pl, path, 16)], max_epochs=EPOCHS)
    first.fit(whole, loader)
    second = make_trainer(callbacks(), max_epochs=EPOCHS)
    second.fit(resumed, loader, ckpt_path=path)
    assert same(dict(whole.state_dict()), dict(resumed.state_dict()))
    assert same(first.optimizers[0].state_dict(), second.optimizers[0].state_dict())


def test_a_round_that_ends_early_is_pruned_before_the_next_one_begins(make_module, make_trainer, loader):
    """The second of four ends after its first epoch: the masks of the third are of what it trained to."""
    module, seen = make_module(sgd), []

    def note(*_):
        if module.training:
            seen.append({name: value.detach().clone() for name, value in module.named_parameters()})

    module.net.register_forward_pre_hook(note)
    pruning, *phases = callbacks()
    until = {"metric": "val_loss", "target": 1e9}
    phases[1] = FineTuning(learning_rate="restart", begin="20%", end="40%", rewind="2%", until=until, name="round_1")
    make_trainer([pruning, *phases], max_epochs=EPOCHS).fit(module, loader, loader)
    ended = 17  # the epoch ends at 16; masks are made in the step that reaches their moment
    assert pruning.window.times() == [12, ended, 38 - (25 - ended), 51 - (25 - ended)]
    assert [phase.window.begin for phase in phases] == [0, 12, ended, 30, 43]
    trained, early = seen[ended - 1], seen[EARLY]
    kept = 176 - round((1 - (1 - OF_WHAT_IS_LEFT) ** 2) * 176)
    sizes = torch.cat([trained[name].flatten() for name in WEIGHTS]).abs()
    alive = torch.zeros(176, dtype=torch.bool).index_fill_(0, sizes.topk(kept).indices, True)
    for name, mask in zip(WEIGHTS, alive.split([128, 48]), strict=True):
        assert torch.equal(seen[ended][name], early[name] * mask.view_as(early[name]))


def test_a_round_that_ended_early_is_resumed_to_the_last_bit(pl, make_module, make_trainer, loader, tmp_path):
    path, whole, resumed = tmp_path / "some.ckpt", make_module(adamw), make_module(adamw)
    until = {"metric": "train_loss", "target": 1e9}

    def some():
        pruning, *phases = callbacks()
        again = FineTuning(learning_rate="restart", begin="20%", end="40%", rewind="2%", until=until, name="round_1")
        return [pruning, phases[0], again, *phases[2:]]

    make_trainer([*some(), saver(pl, path, 24)], max_epochs=EPOCHS).fit(whole, loader)
    make_trainer(some(), max_epochs=EPOCHS).fit(resumed, loader, ckpt_path=path)
    assert same(dict(whole.state_dict()), dict(resumed.state_dict()))


def test_rounds_that_would_be_rewound_before_they_are_pruned_are_refused(make_module, make_trainer):
    class Unknown(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([(torch.zeros(8), 0)] * 8)

    loader, module = torch.utils.data.DataLoader(Unknown(), batch_size=4), make_module()
    with pytest.raises(ValueError, match="would rewind the weights before 'pruning' has chosen"):
        make_trainer(callbacks(), max_epochs=10).fit(module, loader)
    make_trainer(callbacks(), max_epochs=10, limit_train_batches=2).fit(module, loader)


def test_the_timeline_has_the_masks_of_a_round_and_its_beginning_at_one_moment():
    run = Run(epochs=None, max_steps=23)
    pruning, _, *phases = callbacks()
    assert pruning.timeline(run) == [
        (4, "sparsity 33.13%"), (9, "sparsity 55.28%"), (13, "sparsity 70.09%"), (18, "sparsity 80.00%"),
    ]  # fmt: skip
    assert [phase.scheduled_window(run).begin for phase in phases] == [4, 9, 13, 18]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rounds": "20%"}, "rounds is a list of two moments or more"),
        ({"rounds": ["20%"]}, "For a single one write begin"),
        ({"rounds": ["40%", "20%"]}, "'20%' does not come after '40%'"),
        ({"rounds": ["20%", "often"]}, "'often' is no duration"),
        ({"rounds": ["20%", "40%"], "every": "5%", "schedule": "linear"}, "so schedule, every cannot be given too"),
    ],
)
def test_rounds_that_are_none_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        Pruning(**arguments)


def test_rounds_that_a_run_brings_out_of_order_are_refused(make_module, make_trainer, loader):
    with pytest.raises(ValueError, match="'50%' is 4 steps, '2 steps' is 2 steps, '90%' is 7 steps. Write"):
        make_trainer([Pruning(rounds=["50%", "2 steps", "90%"])], max_epochs=1).fit(make_module(), loader)
