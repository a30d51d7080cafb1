"""Any two public callbacks in one run: both keep what they promise, resumed or not, or are refused before a step."""

import re
from itertools import combinations_with_replacement

import pytest
import torch
from torch import nn

from lightning_compress import (
    ChannelPruning,
    CompressionReport,
    Distillation,
    FineTuning,
    Pruning,
    QuantizationAwareTraining,
)
from tests.contract.settings import public_callbacks, teacher
from tests.contract.test_contract import same, saver
from tests.pairs import PAIRS, REFUSED, network
from tests.pairs_table import PATH, table

# Each order under another Lightning name: that both names act alike is seen in the contract tests.
in_both_orders = pytest.mark.parametrize(
    ("pl", "turned"), [("lightning.pytorch", False), ("pytorch_lightning", True)], indirect=["pl"], ids=["", "turned"]
)


def every(pairs):
    return pytest.mark.parametrize("pair", pairs, ids=lambda pair: f"{pair.first}+{pair.second}")


def test_every_two_public_callbacks_have_an_entry():
    names = sorted(kind.__name__ for kind in public_callbacks())
    assert {pair.kinds() for pair in PAIRS} == set(combinations_with_replacement(names, 2))


def test_the_table_for_readers_is_that_of_the_tests():
    assert PATH.read_text(encoding="utf-8") == table(), "write it anew: python -m tests.pairs_table"


@in_both_orders
@every([pair for pair in PAIRS if pair.verdict != REFUSED])
def test_both_keep_what_they_promise_and_a_resumed_run_ends_in_the_same_bits(
    pair, turned, pl, make_module, make_trainer, loader, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path, seen = tmp_path / "epoch.ckpt", {}

    class See(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            seen[trainer.global_step] = {name: value.clone() for name, value in pl_module.state_dict().items()}

    whole, resumed = make_module(net=network), make_module(net=network)
    ours, again = in_order(pair, turned), in_order(pair, turned)
    one, two = make_trainer([*ours, See(), saver(pl, path, 8)], max_epochs=2), make_trainer(again, max_epochs=2)
    one.fit(whole, loader)
    two.fit(resumed, loader, ckpt_path=path)
    assert same(dict(whole.state_dict()), dict(resumed.state_dict()))
    assert same(one.optimizers[0].state_dict(), two.optimizers[0].state_dict())
    for callback, other in zip(ours, again, strict=True):
        assert same(callback.checkpoint_state(), other.checkpoint_state())
        PROMISES[type(callback)](callback, whole, seen)


@in_both_orders
@every([pair for pair in PAIRS if pair.verdict == REFUSED])
def test_what_does_not_go_together_is_refused_before_the_first_step(
    pair, turned, pl, make_module, make_trainer, loader
):
    module, trainer = make_module(net=network), make_trainer(in_order(pair, turned), max_epochs=2)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(pair.why)):
        trainer.fit(module, loader)
    assert same(dict(module.state_dict()), before)


def in_order(pair, turned):
    return pair.callbacks()[::-1] if turned else pair.callbacks()


# What each promises ---------------------------------------------------------------------------------------------------


def weights_are_zero_as_masked_and_as_many_as_asked(pruning, module, seen):
    weights = dict(module.named_parameters())
    for name, mask in pruning.masks.items():
        assert bool((weights[name][~mask] == 0).all())
    assert abs(pruning.sparsity - pruning.final_sparsity) < 0.05


def half_of_the_channels_are_gone(channels, module, seen):
    for name in channels.pruner.originals:
        if name in {group.name for group in channels.pruner.prunable_groups}:
            assert module.get_submodule(name).out_features == 8
    assert channels.pruner.sparsity == 0.5


def the_teacher_is_a_guest(distillation, module, seen):
    (tutor,) = distillation.distiller.objective.tutors
    inside = {id(one) for one in module.parameters()}
    assert tutor.teacher.module is None or not inside & {id(one) for one in tutor.teacher.module.parameters()}
    if isinstance(distillation.teacher, nn.Module):
        assert same(dict(distillation.teacher.state_dict()), dict(teacher().state_dict()))


def weights_lie_on_grids(quantization, module, seen):
    known = quantization.quantized
    assert known.state.enabled
    assert known.weights
    for name, held in known.quantized_weights().items():
        assert held.parameter is dict(module.named_parameters())[name]
        rows = known.weights[name](held.parameter.detach())
        assert max(len(row.unique()) for row in rows) <= 2 ** known.weights[name].fmt.bits


def what_is_frozen_stood_still_and_what_was_rewound_came_back(finetuning, module, seen):
    if finetuning.freeze:
        before, after = seen[4]["net.2.weight"], seen[12]["net.2.weight"]
        if before.shape == after.shape:
            assert torch.equal(after, torch.where(after == 0, 0.0, before))
        else:  # what is left of it after a cut of its inputs
            assert all(any(torch.equal(column, one) for one in before.T) for column in after.T)
    if finetuning.rewind is not None:
        assert finetuning.rewinding.done


def the_end_is_measured(report, module, seen):
    assert report.report.parameters == sum(one.numel() for one in module.parameters())
    assert report.report.before.parameters == sum(one.numel() for one in network().parameters())


PROMISES = {
    Pruning: weights_are_zero_as_masked_and_as_many_as_asked,
    ChannelPruning: half_of_the_channels_are_gone,
    Distillation: the_teacher_is_a_guest,
    QuantizationAwareTraining: weights_lie_on_grids,
    FineTuning: what_is_frozen_stood_still_and_what_was_rewound_came_back,
    CompressionReport: the_end_is_measured,
}
