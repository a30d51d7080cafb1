"""Evaluated outside of its run, a model computes as it did there; copies and further fits too."""

import copy

import pytest
import torch
from torch import nn

from lightning_compress import QuantizationAwareTraining, export, load_packed
from tests.quantization.watching import as_trained, equal, is_active, noted

PLAIN = {"begin": 2, "freeze_bn": None, "freeze_ranges": None, "reduce_range": False}


@pytest.mark.parametrize("settings", [{"weights": 3}, {"method": "stochastic"}, {"weights": "ternary"}], ids=str)
def test_it_is_evaluated_as_it_was_trained_with_and_without_the_callback_until_the_quantizers_are_taken_off(
    settings, make_module, make_trainer, loader
):
    quantization, module = QuantizationAwareTraining(begin=2, **settings), make_module()
    trainer = make_trainer([quantization], max_epochs=2)
    trainer.fit(module, loader, loader)
    in_training = float(trainer.callback_metrics["val_loss"])
    assert trainer.validate(module, loader, verbose=False)[0]["val_loss"] == in_training
    assert make_trainer([quantization]).test(module, loader, verbose=False)[0]["val_loss"] == in_training
    assert make_trainer().validate(module, loader, verbose=False)[0]["val_loss"] == in_training
    as_trained(module)
    floating = make_trainer().validate(module, loader, verbose=False)[0]["val_loss"]
    assert floating != in_training
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(module.net(x), y) for x, y in loader]
    assert floating == pytest.approx(float(sum(losses) / len(losses)))


@pytest.mark.parametrize("settings", [{}, {"weights": 4, "activations": 4, "first": "same", "last": "same"}], ids=str)
def test_a_checkpoint_is_evaluated_as_it_was_trained_by_a_new_callback_module_and_trainer(
    settings, pl, make_module, make_trainer, loader, tmp_path
):
    def new():
        return QuantizationAwareTraining(begin=2, freeze_ranges=12, **settings)

    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer = make_trainer([new(), checkpoint], max_epochs=3, enable_checkpointing=True)
    trainer.fit(make_module(), loader, loader)
    best = float(checkpoint.best_model_score)
    assert trainer.test(ckpt_path="best", dataloaders=loader, verbose=False)[0]["val_loss"] == best
    path, other = checkpoint.best_model_path, make_module()
    assert make_trainer([new()]).validate(other, loader, path, verbose=False)[0]["val_loss"] == best
    predicted = torch.cat(make_trainer([new()]).predict(predicting(other), loader, ckpt_path=path))
    floating = torch.cat(make_trainer().predict(predicting(make_module()), loader, ckpt_path=path))
    labels = torch.cat([y for _, y in loader])
    assert float(nn.functional.cross_entropy(predicted, labels)) == pytest.approx(best)
    assert not torch.allclose(predicted, floating)


def test_what_was_tested_can_be_exported_and_trained_on(pl, make_module, make_trainer, loader, tmp_path):
    """Lightning tests in inference mode, and what is made there stays so."""
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss")
    quantization, module = QuantizationAwareTraining(begin=2, freeze_ranges=None), make_module()
    trainer = make_trainer([quantization, checkpoint], max_epochs=3, enable_checkpointing=True)
    trainer.fit(module, loader, loader)
    trainer.test(ckpt_path="best", dataloaders=loader, verbose=False)
    export(module, tmp_path / "model.safetensors")
    packed = load_packed(make_module(), tmp_path / "model.safetensors")
    grids = dict(quantization.quantized.weights)
    for name, weight in packed.state_dict().items():
        if name in grids:
            torch.testing.assert_close(weight, grids[name](module.get_parameter(name)).detach())
    make_trainer([quantization], max_epochs=1).fit(module, loader)


def predicting(module):
    module.predict_step = lambda batch, batch_idx: module(batch[0])
    return module


def test_a_model_without_grids_is_evaluated_in_floating_point_and_that_is_said(make_module, make_trainer, loader):
    module = make_module()
    with pytest.warns(UserWarning, match="'quantization' knows no grids for this model"):
        found = make_trainer([QuantizationAwareTraining()]).validate(module, loader, verbose=False)
    assert found == make_trainer().validate(module, loader, verbose=False)


def test_a_checkpoint_of_other_arguments_is_refused_with_both(make_module, make_trainer, loader, tmp_path):
    trainer = make_trainer([QuantizationAwareTraining(begin=2)], max_epochs=1)
    trainer.fit(make_module(), loader)
    trainer.save_checkpoint(tmp_path / "eight.ckpt")
    four = QuantizationAwareTraining(begin=2, weights=4, first="same", last="same")
    with pytest.raises(ValueError, match="'net.0' was quantized with weights='7'.*now weights='4'.*reduce_range=False"):
        make_trainer([four], max_epochs=2).fit(make_module(), loader, ckpt_path=tmp_path / "eight.ckpt")


# Several fits, and copies -------------------------------------------------------------------------------------------


def test_a_second_fit_of_the_module_is_quantized_from_its_first_step_on(pl, make_module, make_trainer, loader):
    quantization, module = QuantizationAwareTraining(begin=4), make_module()
    make_trainer([quantization], max_epochs=2).fit(module, loader)
    ranges = str(quantization.quantized.activations["net.1 output"].quantizer_state())
    note = noted(
        pl, quantization, lambda one: (is_active(one), str(one.quantized.activations["net.1 output"].quantizer_state()))
    )
    make_trainer([quantization, note], max_epochs=1).fit(module, loader)
    assert all(active for active, _ in note.by_batch)
    assert note.by_batch[0][1] == ranges  # they follow again from `begin` on


def test_it_may_be_added_to_a_run_that_is_resumed(make_module, make_trainer, loader, tmp_path):
    plain = make_trainer(max_epochs=1)
    plain.fit(make_module(), loader)
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    quantization = QuantizationAwareTraining(weights=4, activations=4, begin=12)
    make_trainer([quantization], max_epochs=3).fit(make_module(), loader, ckpt_path=tmp_path / "plain.ckpt")
    assert is_active(quantization)


@pytest.mark.parametrize("moment", ["on_train_batch_start", "on_train_batch_end", "on_validation_start"])
def test_a_copy_in_mid_run_is_quantized_and_leaves_the_run_alone(moment, pl, make_module, make_trainer, loader):
    copies = []

    class Copy(pl.Callback):
        pass

    def take(self, trainer, pl_module, *_):
        if trainer.global_step == 8:
            copies.append(copy.deepcopy(pl_module.net))
            copies[-1](100 * loader.dataset.tensors[0])

    setattr(Copy, moment, take)
    plain, module = make_module(), make_module()
    make_trainer([QuantizationAwareTraining(**PLAIN)], max_epochs=2).fit(plain, loader, loader)
    make_trainer([QuantizationAwareTraining(**PLAIN), Copy()], max_epochs=2).fit(module, loader, loader)
    assert equal(module, plain)
    other = copy.deepcopy(copies[0])
    for part in other.modules():
        part._forward_hooks.clear(), part._forward_pre_hooks.clear()
    values = loader.dataset.tensors[0]
    assert not torch.equal(copies[0](values), other(values))
