"""A callback that replaces modules in mid-run: resume, checkpoints, stages, averages, failures, other callbacks."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import get_ema_avg_fn

from lightning_compress import (
    AveragedTeacher,
    ChannelPruning,
    Distillation,
    FineTuning,
    Pruning,
    QuantizationAwareTraining,
    export,
    load_compressed,
)
from lightning_compress.training.initialize_from import StartFrom
from tests.conftest import adamw, sgd
from tests.contract.test_contract import same, saver, traces
from tests.training.toy import LowRank

BOTH = ("net.0", "net.2")  # at steps 4 and 6
every_optimizer = pytest.mark.parametrize("optimizer", [sgd, adamw], ids=["sgd", "adamw"])


def kinds(module):
    return [type(one).__name__ for one in module.net]


def fitted(make_trainer, module, loader, callbacks, **arguments):
    trainer = make_trainer(callbacks, **{"max_epochs": 3, **arguments})
    trainer.fit(module, loader)
    return trainer


# Steps that change something: with 8 batches an epoch, or 2 of 4 with accumulation.
RUNS = {
    "before": ({"begin": 12, "end": 20}, 8, {}),
    "between": ({"begin": 4, "every": 10, "end": 14}, 8, {}),
    "after": ({"begin": 4, "end": 6}, 8, {}),
    "accumulated": ({"begin": 1, "every": 2, "end": 5}, 2, {"accumulate_grad_batches": 4}),
}


@pytest.mark.parametrize(("times", "step", "arguments"), RUNS.values(), ids=RUNS)
@every_optimizer
def test_resumed_equals_uninterrupted_bit_for_bit(
    optimizer, times, step, arguments, pl, make_module, make_trainer, loader, tmp_path
):
    path, whole, resumed = tmp_path / "epoch.ckpt", make_module(optimizer), make_module(optimizer)
    first = fitted(make_trainer, whole, loader, [LowRank(layers=BOTH, **times), saver(pl, path, step)], **arguments)
    second = make_trainer([LowRank(layers=BOTH, **times)], max_epochs=3, **arguments)
    second.fit(resumed, loader, ckpt_path=path)
    assert kinds(whole) == kinds(resumed) == ["Sequential", "ReLU", "Sequential"]
    assert same(dict(whole.state_dict()), dict(resumed.state_dict()))
    assert same(first.optimizers[0].state_dict(), second.optimizers[0].state_dict())
    states = [one._checkpoint_connector.dump_checkpoint()["callbacks"]["lightning_compress/low_rank"]
              for one in (first, second)]  # fmt: skip
    assert same(*states)


@every_optimizer
def test_it_trains_as_a_loop_written_by_hand(optimizer, make_module, make_trainer, loader):
    module, by_hand = make_module(optimizer), make_module(optimizer)
    fitted(make_trainer, module, loader, [LowRank()], max_epochs=1)
    old = by_hand.configure_optimizers()
    for step, batch in enumerate(loader, 1):
        old.zero_grad()
        nn.functional.cross_entropy(by_hand(batch[0]), batch[1]).backward()
        old.step()
        if step == 4:
            layer, kept = by_hand.net[0], dict(old.state)
            u, s, v = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
            factors = nn.Sequential(nn.Linear(8, 2, bias=False), nn.Linear(2, 16))
            with torch.no_grad():
                factors[0].weight.copy_(s[:2, None].sqrt() * v[:2])
                factors[1].weight.copy_(u[:, :2] * s[:2].sqrt())
            factors[1].bias = layer.bias
            by_hand.net[0] = factors
            old = by_hand.configure_optimizers()
            for parameter in by_hand.parameters():
                if parameter in kept:
                    old.state[parameter] = kept[parameter]
    assert same(dict(module.state_dict()), dict(by_hand.state_dict()))


def test_the_checkpoint_is_plain_and_says_what_stands_where(make_module, make_trainer, loader, tmp_path):
    module = make_module()
    trainer = fitted(make_trainer, module, loader, [LowRank(layers=BOTH)])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    entry = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["lightning_compress/low_rank"]
    assert entry["kind"] == "structure"
    assert [(one["name"], one["order"]) for one in entry["replacements"]] == [("net.0", 0), ("net.2", 1)]
    again = load_compressed(type(module), tmp_path / "last.ckpt")
    assert same(dict(again.state_dict()), dict(module.state_dict()))
    assert kinds(again) == ["Sequential", "ReLU", "Sequential"]


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def test_one_submodule_is_loaded_with_what_was_replaced_in_it(make_module, make_trainer, loader, tmp_path):
    module = make_module()
    fitted(make_trainer, module, loader, [LowRank(layers=BOTH)]).save_checkpoint(tmp_path / "last.ckpt")
    net = load_compressed(Net, tmp_path / "last.ckpt")
    x = torch.randn(4, 8)
    assert torch.equal(net(x), module(x))


def test_plans_of_several_callbacks_are_replayed_in_the_order_of_the_run(
    pl, make_module, make_trainer, loader, tmp_path
):
    # The second of the list acts first, and the first one factors a layer of what that one has made.
    class Inner(LowRank):
        def replaced_modules(self, pl_module):
            return ()

    def callbacks():
        return [Inner(1, ["net.0.1"], 10, 12, name="later"), LowRank(3, ["net.0"], 4, 8, name="earlier")]

    whole, resumed = make_module(), make_module()
    trainer = fitted(
        make_trainer, whole, loader, [*callbacks(), *(saver(pl, tmp_path / f"{step}.ckpt", step) for step in (8, 16))]
    )
    assert type(whole.net[0][1]) is nn.Sequential
    for step in (8, 16):
        resumed = make_module()
        make_trainer(callbacks(), max_epochs=3).fit(resumed, loader, ckpt_path=tmp_path / f"{step}.ckpt")
        assert same(dict(whole.state_dict()), dict(resumed.state_dict()))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = load_compressed(type(whole), tmp_path / "last.ckpt")
    assert same(dict(again.state_dict()), dict(whole.state_dict()))


def test_every_stage_takes_the_structure_of_the_checkpoint(make_module, make_trainer, loader, tmp_path):
    module = make_module()
    trainer = fitted(make_trainer, module, loader, [LowRank(layers=BOTH)])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    (expected,) = trainer.validate(module, loader, verbose=False)
    for stage in ("test", "validate"):
        fresh = make_module()
        (found,) = getattr(make_trainer([LowRank(layers=BOTH)]), stage)(
            fresh, loader, ckpt_path=tmp_path / "last.ckpt", verbose=False
        )
        assert found == expected
        assert kinds(fresh) == ["Sequential", "ReLU", "Sequential"]


def test_validate_before_fit_changes_nothing(make_module, make_trainer, loader):
    module, plain = make_module(), make_module()
    trainer = make_trainer([LowRank()], max_epochs=3)
    trainer.validate(module, loader, verbose=False)
    assert kinds(module) == kinds(plain)
    trainer.fit(module, loader)
    fitted(make_trainer, plain, loader, [LowRank()])
    assert same(dict(module.state_dict()), dict(plain.state_dict()))


def test_a_checkpoint_of_before_puts_the_old_modules_back(pl, make_module, make_trainer, loader, tmp_path):
    module, fresh = make_module(), make_module()
    callback = LowRank(layers=BOTH, begin=10, end=14)
    trainer = fitted(make_trainer, module, loader, [callback, saver(pl, tmp_path / "early.ckpt", 8)])
    (found,) = trainer.test(module, loader, ckpt_path=tmp_path / "early.ckpt", verbose=False)
    (expected,) = make_trainer().test(fresh, loader, ckpt_path=tmp_path / "early.ckpt", verbose=False)
    assert kinds(module) == kinds(fresh) == ["Linear", "ReLU", "Linear"]
    assert found == expected
    make_trainer([callback], max_epochs=3).fit(module, loader, ckpt_path=tmp_path / "early.ckpt")
    assert kinds(module) == ["Sequential", "ReLU", "Sequential"]


def test_one_callback_serves_several_fits(make_module, make_trainer, loader):
    callback, first, second, fresh = LowRank(), make_module(), make_module(), make_module()
    fitted(make_trainer, first, loader, [callback])
    fitted(make_trainer, second, loader, [callback])
    assert same(dict(first.state_dict()), dict(second.state_dict()))
    trainer = fitted(make_trainer, fresh, loader, [callback], max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(fresh, loader)  # goes on with what stands there
    assert kinds(fresh) == ["Sequential", "ReLU", "Linear"]
    assert [one.replacement.name for one in callback.replaced] == ["net.0"]


def test_nothing_of_ours_stays_in_the_module(pl, make_module, make_trainer, loader):
    class Crash(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 5:
                raise RuntimeError("power cut")

    plain = make_module(net=lambda: nn.Sequential(
        nn.Sequential(nn.Linear(8, 2, bias=False), nn.Linear(2, 16)), nn.ReLU(), nn.Linear(16, 3)))  # fmt: skip
    plain_trainer = make_trainer([Crash()], max_epochs=3)
    with pytest.raises(RuntimeError, match="power cut"):
        plain_trainer.fit(plain, loader)
    module = make_module()
    trainer = make_trainer([LowRank(), Crash()], max_epochs=3)
    with pytest.raises(RuntimeError, match="power cut"):
        trainer.fit(module, loader)
    assert traces(module, trainer, []) == traces(plain, plain_trainer, [])


def test_a_replacement_that_fails_leaves_module_optimizer_and_average_as_they_were(
    pl, make_module, make_trainer, loader
):
    class Fails(LowRank):
        def replace_modules(self, trainer, pl_module, changes, seed=0):
            (change,) = changes
            bad = self.plan(pl_module, "net.2")
            bad = type(change)(bad, lambda old, new: 1 / 0)
            before = [id(one) for one in trainer.optimizers[0].param_groups[0]["params"]]
            with pytest.raises(ZeroDivisionError):
                super().replace_modules(trainer, pl_module, [change, bad])
            assert [id(one) for one in trainer.optimizers[0].param_groups[0]["params"]] == before
            assert self.replaced == []

    module, plain = make_module(), make_module()
    average = pl.callbacks.WeightAveraging(avg_fn=get_ema_avg_fn(0.5))
    fitted(make_trainer, module, loader, [average, Fails(layers=BOTH)], max_epochs=1)
    fitted(make_trainer, plain, loader, [pl.callbacks.WeightAveraging(avg_fn=get_ema_avg_fn(0.5))], max_epochs=1)
    assert same(dict(module.state_dict()), dict(plain.state_dict()))


def test_averages_get_the_same_modules_and_a_resume_has_the_same_average(
    pl, make_module, make_trainer, loader, tmp_path
):
    def callbacks():
        return [
            pl.callbacks.WeightAveraging(avg_fn=get_ema_avg_fn(0.5)),
            LowRank(layers=BOTH, begin=4, end=14, every=10),
        ]

    path, whole, resumed = tmp_path / "epoch.ckpt", make_module(), make_module()
    trainer = fitted(make_trainer, whole, loader, [*callbacks(), saver(pl, path, 8)])
    make_trainer(callbacks(), max_epochs=3).fit(resumed, loader, ckpt_path=path)
    assert kinds(whole) == ["Sequential", "ReLU", "Sequential"]
    assert same(dict(whole.state_dict()), dict(resumed.state_dict()))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = load_compressed(type(whole), tmp_path / "last.ckpt")
    assert same(dict(again.state_dict()), dict(whole.state_dict()))


def test_schedulers_go_on_as_they_were(make_module, make_trainer, loader):
    def scheduled(parameters):
        optimizer = sgd(parameters)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=24)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    class Rates(LowRank):
        seen = ()

        def on_train_batch_end(self, trainer, *rest):
            super().on_train_batch_end(trainer, *rest)
            group = trainer.optimizers[0].param_groups[0]
            self.seen = (*self.seen, (group["lr"], group["momentum"]))

    acts, idles = Rates(), Rates(layers=())
    for callback in (acts, idles):
        module = make_module(lambda parameters: scheduled(parameters)["optimizer"])
        module.configure_optimizers = lambda module=module: scheduled(module.parameters())
        fitted(make_trainer, module, loader, [callback])
    assert acts.seen == idles.seen
    assert len(set(acts.seen)) > 10


def test_a_run_starts_from_a_checkpoint_with_other_modules(pl, make_module, make_trainer, loader, tmp_path):
    old = make_module()
    fitted(make_trainer, old, loader, [LowRank(layers=BOTH)], max_epochs=1).save_checkpoint(tmp_path / "old.ckpt")
    whole, by_hand, resumed = make_module(), make_module(net=lambda: old.net), make_module()
    trainer = fitted(make_trainer, whole, loader, [StartFrom(tmp_path / "old.ckpt"), saver(pl, tmp_path / "8.ckpt", 8)])
    fitted(make_trainer, by_hand, loader, [])
    assert same(dict(whole.state_dict()), dict(by_hand.state_dict()))
    (tmp_path / "old.ckpt").unlink()
    make_trainer([StartFrom(tmp_path / "old.ckpt")], max_epochs=3).fit(resumed, loader, ckpt_path=tmp_path / "8.ckpt")
    assert same(dict(whole.state_dict()), dict(resumed.state_dict()))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert same(dict(load_compressed(type(whole), tmp_path / "last.ckpt").state_dict()), dict(whole.state_dict()))


def test_a_run_that_starts_from_a_thin_module_replaces_what_is_left(pl, make_module, make_trainer, loader, tmp_path):
    thin = ChannelPruning(sparsity=0.5, begin=2, end=4, every=2)
    fitted(make_trainer, make_module(), loader, [thin], max_epochs=1).save_checkpoint(tmp_path / "thin.ckpt")

    def callbacks():
        return [StartFrom(tmp_path / "thin.ckpt"), LowRank()]

    whole, resumed = make_module(), make_module()
    trainer = fitted(make_trainer, whole, loader, [*callbacks(), saver(pl, tmp_path / "8.ckpt", 8)])
    assert [one.weight.shape for one in whole.net[0]] == [(2, 8), (8, 2)]
    assert set(trainer.callbacks[0].cut.kept) == {"net.2.weight"}
    make_trainer(callbacks(), max_epochs=3).fit(resumed, loader, ckpt_path=tmp_path / "8.ckpt")
    assert same(dict(whole.state_dict()), dict(resumed.state_dict()))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = load_compressed(type(whole), tmp_path / "last.ckpt")
    assert same(dict(again.state_dict()), dict(whole.state_dict()))
    assert again.net[2].in_features == 8


def test_a_compiled_part_goes_on_compiled(make_module, make_trainer, loader, tmp_path):
    torch.compiler.reset()
    module, plain = make_module(), make_module()
    module.net = torch.compile(module.net, backend="eager")
    trainer = fitted(make_trainer, module, loader, [LowRank(layers=BOTH)])
    fitted(make_trainer, plain, loader, [LowRank(layers=BOTH)])
    assert same([*module.parameters()], [*plain.parameters()])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fresh = make_module()
    fresh.net = torch.compile(fresh.net, backend="eager")
    (found,) = make_trainer([LowRank()]).test(fresh, loader, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    (expected,) = trainer.test(module, loader, verbose=False)
    assert found == expected


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_what_comes_out_is_exported(suffix, make_module, make_trainer, loader, tmp_path):
    module = make_module()
    callbacks = [LowRank()]
    if suffix == ".pt2":
        callbacks.append(QuantizationAwareTraining(begin=16, end=24))
    fitted(make_trainer, module, loader, callbacks).save_checkpoint(tmp_path / "last.ckpt")
    model, x = load_compressed(type(module), tmp_path / "last.ckpt"), next(iter(loader))[0]
    export(model, tmp_path / f"model{suffix}", x)
    if suffix == ".onnx":
        ort = pytest.importorskip("onnxruntime")
        session = ort.InferenceSession(tmp_path / "model.onnx")
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        assert torch.allclose(found, module.eval()(x), atol=1e-5)
    else:
        found = torch.export.load(tmp_path / "model.pt2").module()(x)
        assert torch.allclose(found, model.eval()(x), atol=1e-5)


# Other callbacks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("other", "words"), [
    (lambda: Pruning(begin=6, end=12), "'low_rank' would replace the modules of net.0.weight, and 'pruning'"),
    (lambda: QuantizationAwareTraining(begin=6), "needs shapes that stay from begin=6 on"),
    (lambda: ChannelPruning(sparsity=0.5, begin=2, end=6, every=2), "'channels'"),
    (lambda: FineTuning(learning_rate=0.01, begin=0, end=8), "would be about the same"),
    (lambda: Distillation(AveragedTeacher()), "'distillation' is taught by AveragedTeacher, a copy of the module, but"),
    (lambda: FineTuning(freeze="net.0", begin=12, end=16), "would replace 'net.0', but 'finetuning' counts on 'net.0'"),
])  # fmt: skip
def test_another_callback_on_the_same_layer_at_the_same_time_is_refused(
    other, words, make_module, make_trainer, loader
):
    module = make_module()
    with pytest.raises(ValueError, match=words):
        fitted(make_trainer, module, loader, [LowRank(), other()])
    assert kinds(module) == ["Linear", "ReLU", "Linear"]


FOLLOWERS = {
    "pruning": lambda: Pruning(0.5, begin=12, end=20, every=2, criterion="taylor"),
    "pruning_elsewhere": lambda: Pruning(0.5, begin=2, end=20, every=2, ignore="net.0"),
    "quantization": lambda: QuantizationAwareTraining(begin=12, end=24),
    "freeze_elsewhere": lambda: FineTuning(freeze="net.2", begin=2, end=12),
    "pruning_by_its_old_name": lambda: Pruning(0.5, begin=12, end=20, every=2, targets="net.0.weight"),
    "rates": lambda: FineTuning(learning_rate="x0.1", weight_decay=0.0, layer_decay=0.5, begin=12, end=20),
    "channels_later": lambda: ChannelPruning(sparsity=0.5, begin=12, end=20, every=4, targets="net.0"),
    "rewind": lambda: FineTuning(rewind=11, begin=14, end=20),
}


@pytest.mark.parametrize("step", [8, 16])
@pytest.mark.parametrize("other", FOLLOWERS.values(), ids=FOLLOWERS)
def test_callbacks_that_come_after_go_on_with_the_new_modules_and_resume(
    other, step, pl, make_module, make_trainer, loader, tmp_path
):
    whole, resumed, path = make_module(sgd), make_module(sgd), tmp_path / "epoch.ckpt"
    first = fitted(make_trainer, whole, loader, [LowRank(), other(), saver(pl, path, step)])
    second = make_trainer([LowRank(), other()], max_epochs=3)
    second.fit(resumed, loader, ckpt_path=path)
    assert kinds(whole) == ["Sequential", "ReLU", "Linear"]
    assert same(dict(whole.state_dict()), dict(resumed.state_dict()))
    assert same(first.optimizers[0].state_dict(), second.optimizers[0].state_dict())


def test_monitors_judge_what_comes_after_the_last_replacement_and_a_late_phase_is_told(
    pl, make_module, make_trainer, loader, tmp_path
):
    class Gated(LowRank):
        gate_best = True

    best = pl.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss", filename="{step}", save_top_k=1)
    trainer = make_trainer([Gated(begin=10, end=14), best], max_epochs=3, enable_checkpointing=True)
    trainer.fit(make_module(lambda parameters: torch.optim.SGD(parameters, lr=1e-3, maximize=True)), loader, loader)
    assert best.best_model_path.endswith("step=16.ckpt")  # without the gate it were that of step 8: losses rise
    stop = pl.callbacks.LambdaCallback(on_train_epoch_end=lambda trainer, _: setattr(trainer, "should_stop", True))
    with pytest.warns(UserWarning, match="'low_rank' never began: the run ended before begin=100. No module was"):
        make_trainer([LowRank(begin=100, end=110), stop], max_epochs=20).fit(make_module(), loader)


def test_new_weights_are_pruned_as_others(make_module, make_trainer, loader):
    module, pruning = make_module(), Pruning(0.5, begin=12, end=20, every=2)
    fitted(make_trainer, module, loader, [LowRank(), pruning])
    assert set(pruning.masks) == {"net.0.0.weight", "net.0.1.weight", "net.2.weight"}
    assert [float((module.get_parameter(name) == 0).float().mean()) for name in pruning.masks] == [0.5, 0.5, 0.5]
