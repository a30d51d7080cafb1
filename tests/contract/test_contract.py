"""What holds for every public callback, under both Lightning names: DESIGN's invariants, one test each."""

import random

import numpy as np
import pytest
import torch

from lightning_compress import ChannelPruning, Pruning, QuantizationAwareTraining, load_compressed, remove_quantizers
from tests.conftest import adamw, sgd
from tests.contract.settings import SETTINGS, cases, ids, public_callbacks

every_callback = pytest.mark.parametrize("make", [
    pytest.param(lambda kind=kind, arguments=arguments: kind(**arguments), id=name)
    for (kind, _, arguments), name in zip(cases(), ids(), strict=True)
])  # fmt: skip
every_optimizer = pytest.mark.parametrize("optimizer", [sgd, adamw], ids=["sgd", "adamw"])


def test_every_public_callback_has_settings_here():
    assert set(public_callbacks()) == set(SETTINGS)


def saver(pl, path, step):
    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.global_step == step:
                trainer.save_checkpoint(path)

    return Save()


def same(one, other):
    """Equal to the last bit, at any depth."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def traces(module, trainer, callbacks):
    """All that a callback could leave behind: attributes, hooks, modes."""
    found = [sorted(vars(module).keys() - {"_trainer", "_current_fx_name", "_metric_attributes"})]
    for part in module.modules():
        found.append((part.training, len(part._forward_hooks), len(part._forward_pre_hooks), len(part._backward_hooks)))
    for optimizer in trainer.optimizers:
        found.append((len(optimizer._optimizer_step_post_hooks), len(optimizer._optimizer_step_pre_hooks)))
    for callback in callbacks:
        found.append(sorted(name for name, value in vars(callback).items() if hasattr(value, "wrappers")))
    return found


@every_callback
def test_nothing_of_the_users_is_changed_after_fit(make, pl, make_module, make_trainer, loader):
    module, others = make_module(), [pl.callbacks.EarlyStopping("train_loss", patience=99)]
    plain, plain_trainer = make_module(), make_trainer(max_epochs=3)
    plain_trainer.fit(plain, loader)
    trainer = make_trainer([make(), *others], max_epochs=3)
    trainer.fit(module, loader)
    remove_quantizers(module)  # what stays until it is taken off, so that the model computes as it was trained
    assert traces(module, trainer, others) == traces(plain, plain_trainer, others)
    assert list(module.state_dict()) == list(plain.state_dict())


@every_callback
@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_batch_end", "on_train_epoch_end"])
def test_nothing_stays_after_an_exception(make, hook, pl, make_module, make_trainer, loader):
    class Crash(pl.Callback):
        pass

    def crash(self, trainer, *_):
        if hook in ("on_fit_start", "on_train_start") or trainer.global_step >= 8:
            raise RuntimeError("power cut")

    setattr(Crash, hook, crash)
    plain, module = make_module(), make_module()
    plain_trainer, trainer = make_trainer([Crash()], max_epochs=3), make_trainer([make(), Crash()], max_epochs=3)
    for one, of in ((plain_trainer, plain), (trainer, module)):
        with pytest.raises(RuntimeError, match="power cut"):
            one.fit(of, loader)
    assert traces(module, trainer, []) == traces(plain, plain_trainer, [])


@every_callback
@every_optimizer
def test_resumed_equals_uninterrupted_bit_for_bit(make, optimizer, pl, make_module, make_trainer, loader, tmp_path):
    path, whole, resumed = tmp_path / "epoch.ckpt", make_module(optimizer), make_module(optimizer)
    first = make_trainer([make(), saver(pl, path, 8)], max_epochs=3)
    first.fit(whole, loader)
    second = make_trainer([make()], max_epochs=3)
    second.fit(resumed, loader, ckpt_path=path)
    assert same(dict(whole.state_dict()), dict(resumed.state_dict()))
    assert same(first.optimizers[0].state_dict(), second.optimizers[0].state_dict())
    states = [trainer._checkpoint_connector.dump_checkpoint()["callbacks"] for trainer in (first, second)]
    ours = [{key: value for key, value in state.items() if "lightning_compress" in key} for state in states]
    assert ours[0]
    assert same(*ours)


@every_callback
def test_a_run_that_broke_off_goes_on_from_what_was_saved_then(make, pl, make_module, make_trainer, loader, tmp_path):
    """Lightning saves it after all callbacks have heard of the exception."""

    def crash(*_):
        if broken.global_step == 16:  # an epoch begins
            raise RuntimeError("power cut")

    if getattr(make(), "method", None) in ("dorefa", "stochastic", "wage"):
        pytest.skip("Lightning counts the batch that broke off, by whose number these draw")
    whole, broken, resumed = make_module(), make_module(), make_module()
    broken.on_train_batch_start = crash
    make_trainer([make()], max_epochs=3).fit(whole, loader)
    saving = pl.callbacks.OnExceptionCheckpoint(tmp_path, "broken")
    with pytest.raises(RuntimeError, match="power cut"):
        make_trainer([make(), saving], max_epochs=3, enable_checkpointing=True).fit(broken, loader)
    make_trainer([make()], max_epochs=3).fit(resumed, loader, ckpt_path=tmp_path / "broken.ckpt")
    assert same(dict(whole.state_dict()), dict(resumed.state_dict()))


@every_callback
def test_checkpoints_are_plain(make, make_module, make_trainer, loader, tmp_path):
    module, callback = make_module(), make()
    trainer = make_trainer([callback], max_epochs=3)
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert list(checkpoint["state_dict"]) == list(make_module().state_dict())
    if isinstance(callback, ChannelPruning):  # its weights have other shapes than those of a module that is new
        again = load_compressed(type(module), tmp_path / "last.ckpt")
    else:
        again = type(module).load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert same(dict(again.state_dict()), dict(module.state_dict()))


@every_callback
def test_the_users_random_stream_is_not_advanced(make, pl, make_module, make_trainer, loader):
    def streams(callbacks):
        states = []

        class Watch(pl.Callback):
            def on_train_batch_start(self, *_):
                states.append((torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()))

        pl.seed_everything(3)
        make_trainer([*callbacks, Watch()], max_epochs=3).fit(make_module(), loader)
        states.append(torch.rand(1).item())
        return states

    assert streams([make()]) == streams([])


@every_callback
def test_before_its_window_it_changes_nothing(make, pl, make_module, make_trainer, loader):
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 1

    late = make()
    late.begin, late.end = 20, 24
    plain, module = make_module(), make_module()
    make_trainer(max_epochs=2).fit(plain, loader)
    make_trainer([late, Stop()], max_epochs=3).fit(module, loader)
    assert same(dict(plain.state_dict()), dict(module.state_dict()))


@every_callback
def test_one_callback_serves_several_fits_of_several_modules(make, make_module, make_trainer, loader):
    ours, first, second, fresh = make(), make_module(), make_module(), make_module()
    make_trainer([ours], max_epochs=3).fit(first, loader)
    make_trainer([ours], max_epochs=3).fit(second, loader)
    make_trainer([make()], max_epochs=3).fit(fresh, loader)
    assert same(dict(second.state_dict()), dict(fresh.state_dict()))


@every_callback
@pytest.mark.parametrize(
    "limits", [{"fast_dev_run": 1}, {"fast_dev_run": 3}, {"limit_train_batches": 1, "max_epochs": 3}]
)
def test_the_shortest_runs_end_well(make, limits, make_module, make_trainer, loader):
    callback = make()
    callback.begin, callback.end, callback.every = "10%", "70%", "1%"
    module = make_module()
    trainer = make_trainer([callback], **limits)
    trainer.fit(module, loader)
    assert all(value.isfinite().all() for value in module.state_dict().values())
    # The first step of quantization is watched, the next one is quantized; other callbacks have no end to reach.
    quantized = isinstance(callback, QuantizationAwareTraining) and trainer.global_step > 1
    assert callback.reached == (isinstance(callback, Pruning | ChannelPruning) or quantized)


@every_callback
def test_two_callbacks_of_one_name_are_refused_by_name(make, make_module, make_trainer, loader):
    with pytest.raises(ValueError, match="Two callbacks have the name"):
        make_trainer([make(), make()], max_epochs=1).fit(make_module(), loader)


@every_callback
def test_a_damaged_entry_of_a_checkpoint_is_refused_in_words(make, make_module, make_trainer, loader, tmp_path):
    callback = make()
    trainer = make_trainer([callback], max_epochs=2)
    trainer.fit(make_module(), loader)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    checkpoint["callbacks"][callback.state_key] = {"format": "another"}
    torch.save(checkpoint, tmp_path / "damaged.ckpt")
    with pytest.raises(ValueError, match="is damaged, or was written by another version"):
        make_trainer([make()], max_epochs=3).fit(make_module(), loader, ckpt_path=tmp_path / "damaged.ckpt")
