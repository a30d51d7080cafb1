"""Together with other callbacks: averages, pruning, distillation and reports, in any order."""

import warnings

import pytest
import torch
from torch import nn

from lightning_compress import (
    AveragedTeacher,
    CompressionReport,
    Distillation,
    Pruning,
    QuantizationAwareTraining,
)
from lightning_compress.quantization.lookup import quantized_of
from tests.conftest import sgd
from tests.quantization.watching import equal, normed

PLAIN = {"begin": 2, "freeze_bn": None, "freeze_ranges": None, "reduce_range": False}
LSQ = {"weights": 4, "activations": 4, "first": "same", "last": "same"}

either_order = pytest.mark.parametrize("first", [True, False], ids=["first", "last"])


def ordered(first, ours, *others):
    return [ours, *others] if first else [*others, ours]


# Averages -----------------------------------------------------------------------------------------------------------


def averaging(pl, kind):
    if kind == "mean":
        return pl.callbacks.WeightAveraging()
    if kind == "ema":
        return pl.callbacks.EMAWeightAveraging(decay=0.8)
    return pl.callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2)


@either_order
@pytest.mark.parametrize("kind", ["mean", "ema", "swa"])
def test_averages_are_those_of_a_module_quantized_by_hand(
    kind, first, pl, by_hand, make_module, make_trainer, loader, tmp_path
):
    ours, theirs = make_module(sgd), by_hand(sgd)
    callbacks = ordered(first, QuantizationAwareTraining(**PLAIN), averaging(pl, kind))
    trainers = make_trainer(callbacks, max_epochs=3), make_trainer([averaging(pl, kind)], max_epochs=3)
    trainers[0].fit(ours, loader, loader)
    trainers[1].fit(theirs, loader, loader)
    assert trainers[0].callback_metrics["val_loss"] == trainers[1].callback_metrics["val_loss"]
    trainers[0].save_checkpoint(tmp_path / "last.ckpt")
    found = make_trainer([QuantizationAwareTraining(**PLAIN)]).validate(
        make_module(), loader, tmp_path / "last.ckpt", verbose=False
    )
    assert found == trainers[0].validate(ours, loader, verbose=False)


@either_order
@pytest.mark.parametrize("settings", [{}, LSQ], ids=["uniform", "learned"])
def test_the_statistics_that_swa_gathers_in_the_end_are_gathered_although_norms_stood_still(
    settings, first, pl, make_module, make_trainer, loader
):
    module = normed(make_module)()
    callbacks = ordered(first, QuantizationAwareTraining(begin=2, freeze_bn=10, **settings), averaging(pl, "swa"))
    trainer = make_trainer(callbacks, max_epochs=3)
    trainer.fit(module, loader)
    with torch.no_grad():
        inner = module.net[0](loader.dataset.tensors[0])
    assert torch.allclose(module.net[1].running_mean, inner.mean(0), atol=0.2)
    assert not torch.allclose(inner.mean(0), torch.zeros(16), atol=0.2)
    assert module.net[1].training
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    assert len(scheduler.base_lrs) == len(scheduler._last_lr) == len(trainer.optimizers[0].param_groups) == 1


def test_averages_of_what_grids_learn_are_said_to_be_missing(pl, make_module, make_trainer, loader):
    def warned(**settings):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            callbacks = [QuantizationAwareTraining(begin=2, **settings), averaging(pl, "ema")]
            make_trainer(callbacks, max_epochs=1, limit_train_batches=4).fit(make_module(), loader)
        return [str(one.message) for one in caught if "no average is kept" in str(one.message)]

    (words,) = warned(**LSQ)
    assert words.startswith("'quantization' learns a step beside the weights")
    assert warned() == []


# Pruning ------------------------------------------------------------------------------------------------------------


def pruned_and_quantized(first, pl, make_module, make_trainer, loader, settings, **arguments):
    pruning = Pruning(0.5, granularity="2:4", begin=1, end=12, every=3, criterion="wanda")
    quantization = QuantizationAwareTraining(begin=4, **settings)
    module = make_module(sgd)
    saving = arguments.pop("saving", [])
    make_trainer(ordered(first, quantization, pruning, *saving), max_epochs=3).fit(module, loader, **arguments)
    return module, pruning


@either_order
@pytest.mark.parametrize("settings", [{}, LSQ, {"symmetric": False, "granularity": "tensor"}], ids=str)
def test_masks_hold_on_the_grids_and_a_resumed_run_is_the_same(
    settings, first, pl, make_module, make_trainer, loader, tmp_path
):
    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "epoch.ckpt")

    given = (first, pl, make_module, make_trainer, loader, settings)
    module, pruning = pruned_and_quantized(*given, saving=[Save()])
    known = quantized_of(module)
    for name, mask in pruning.masks.items():
        weight = known.weights[name](known.quantized_weights()[name].parameter)
        assert (weight[~mask] == 0).all()
        assert ((weight.reshape(-1, 4) != 0).sum(1) <= 2).all()
        assert mask.float().mean() == 0.5
    again, _ = pruned_and_quantized(*given, ckpt_path=tmp_path / "epoch.ckpt")
    assert equal(module, again)


@either_order
def test_binary_weights_and_masks_are_refused_before_the_first_step(first, make_module, make_trainer, loader):
    module = make_module()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    binary = QuantizationAwareTraining(weights="binary", first="same", last="same", begin=0)
    callbacks = ordered(first, binary, Pruning(0.5))
    with pytest.raises(ValueError, match=r"net\.0\.weight, net\.2\.weight.*binary weights have no zero"):
        make_trainer(callbacks, max_epochs=1).fit(module, loader)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_binary_weights_beside_other_pruned_ones_are_fine(make_module, make_trainer, loader):
    binary = QuantizationAwareTraining(weights="binary", first="same", last="same", begin=0, targets="net.0")
    make_trainer([binary, Pruning(0.5, targets="net.2")], max_epochs=1).fit(make_module(), loader)
    assert set(binary.quantized.weights) == {"net.0.weight"}


# Distillation -------------------------------------------------------------------------------------------------------


def hooks(module):
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


class Spy:
    """A teacher that notes what it answers, and how many hooks are in it."""

    def __init__(self, teacher):
        self.teacher, self.answers, self.hooks = teacher, [], set()

    def __call__(self, values):
        answer = self.teacher(values)
        self.answers.append(answer)
        self.hooks.add(hooks(self.teacher))
        return answer


@either_order
def test_a_teacher_of_the_same_class_answers_in_floating_point(first, make_module, make_trainer, loader):
    teacher = make_module().eval()
    spy = Spy(teacher)
    distillation = Distillation(spy)
    quantization = QuantizationAwareTraining(weights=2, begin=0, first="same", last="same")
    make_trainer(ordered(first, quantization, distillation), max_epochs=1).fit(make_module(), loader)
    batches = [x for x, _ in loader]
    assert spy.hooks == {0}
    with torch.no_grad():
        assert all(torch.equal(one, teacher(x)) for one, x in zip(spy.answers, batches, strict=True))


@either_order
@pytest.mark.parametrize("resumed", [False, True], ids=["from the start", "resumed"])
def test_a_teacher_that_is_an_average_of_the_student_is_not_quantized_with_it(
    resumed, first, make_module, make_trainer, loader, tmp_path
):
    def callbacks():
        distillation = Distillation(AveragedTeacher(0.9), alpha=0.5)
        return distillation, QuantizationAwareTraining(weights=2, begin=2, first="same", last="same")

    distillation, quantization = callbacks()
    trainer = make_trainer(ordered(first, quantization, distillation), max_epochs=1)
    module = make_module()
    trainer.fit(module, loader)
    if resumed:
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        distillation, quantization = callbacks()
        trainer = make_trainer(ordered(first, quantization, distillation), max_epochs=2)
        module = make_module()
        trainer.fit(module, loader, ckpt_path=tmp_path / "last.ckpt")
    teacher = distillation.distiller.objective.tutors[0].teacher
    parts = [one for one in vars(teacher).values() if isinstance(one, nn.Module) and one is not module]
    assert parts
    assert all(hooks(part) == 0 for part in parts)


# Reports ------------------------------------------------------------------------------------------------------------


@either_order
def test_a_report_counts_a_quantized_model_and_disturbs_no_range(first, make_module, make_trainer, loader):
    plain, ours = make_module(), make_module()
    make_trainer([QuantizationAwareTraining(**PLAIN)], max_epochs=2).fit(plain, loader)
    report = CompressionReport(latency=False, print_table=False)
    quantization = QuantizationAwareTraining(**PLAIN)
    make_trainer(ordered(first, quantization, report), max_epochs=2).fit(ours, loader)
    assert equal(ours, plain)
    assert report.report.parameters == sum(one.numel() for one in plain.parameters())
