"""Channels leave in mid-run: budgets, checkpoints, and refusals before anything is touched."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import ChannelPruning, load_compressed
from lightning_compress.channel_pruning.budget import RUNTIMES
from lightning_compress.channel_pruning.functional import criteria
from lightning_compress.core.registry import registered


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 1, 10, 10, generator=generator), torch.randint(0, 3, (64,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8)


def convolutions():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 3),
    )  # fmt: skip


def fixed_width():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.hidden, self.head = nn.Conv2d(1, 8, 3), nn.Linear(512, 16), nn.Linear(16, 3)

        def forward(self, x):
            return self.head(self.hidden(self.conv(x).view(-1, 512)))

    return Net()


@pytest.mark.parametrize("criterion", sorted(registered(criteria)))
def test_every_criterion_reaches_a_budget_of_macs_and_the_module_trains_on(
    criterion, pl, make_module, make_trainer, images
):
    module = make_module(net=convolutions)
    ours = ChannelPruning(macs=0.5, criterion=criterion, begin=2, end=10, every=4)
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(pl_module.net[0].weight.detach().clone())

    make_trainer([ours, Watch()], max_epochs=2).fit(module, images)
    first, second = module.net[0].out_channels, module.net[3].out_channels
    macs = first * 9 * 64 + first * second * 9 * 36 + 3 * 4 * second
    assert 0.4 < macs / (16 * 9 * 64 + 16 * 32 * 9 * 36 + 3 * 128) <= 0.5
    assert module.net[8].in_features == 4 * second
    after = [one for one in seen if one.shape == seen[-1].shape]
    assert len(after) > 3
    assert (after[-1] - after[0]).abs().max() > 0


@pytest.mark.parametrize("budget", [{"sparsity": 0.5}, {"parameters": 0.4}, {"macs": 0.3}])
def test_what_stays_is_what_was_asked_for(budget, make_module, make_trainer, images):
    module = make_module(net=convolutions)
    before = sum(one.numel() for one in module.parameters())
    ours = ChannelPruning(**budget, begin=1, end=6, every=2)
    make_trainer([ours], max_epochs=1).fit(module, images)
    if "sparsity" in budget:
        assert (module.net[0].out_channels, module.net[3].out_channels) == (8, 16)
    if "parameters" in budget:
        assert 0.3 < sum(one.numel() for one in module.parameters()) / before <= 0.4
    assert ours.reached


def test_widths_are_multiples_of_round_to(make_module, make_trainer, images):
    module = make_module(net=convolutions)
    make_trainer([ChannelPruning(sparsity=0.6, round_to=8, begin=1, end=6)], max_epochs=1).fit(module, images)
    assert (module.net[0].out_channels, module.net[3].out_channels) == (8, 16)


def test_a_thin_checkpoint_is_tested_loaded_and_resumed(make_module, make_trainer, loader, tmp_path):
    module, ours = make_module(), ChannelPruning(sparsity=0.5, begin=1, end=6, every=2)
    trainer = make_trainer([ours], max_epochs=1)
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "thin.ckpt")
    [expected] = trainer.test(module, loader, verbose=False)
    fresh = make_trainer([ChannelPruning(sparsity=0.5, begin=1, end=6, every=2)])
    [found] = fresh.test(make_module(), loader, ckpt_path=tmp_path / "thin.ckpt", verbose=False)
    assert found == expected
    again = load_compressed(type(module), tmp_path / "thin.ckpt")
    assert again.net[0].out_features == 8
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in again.state_dict().items())
    torch.save(again.net, tmp_path / "plain.pt")


def test_a_wider_checkpoint_is_loaded_into_a_module_that_is_thin_by_now(
    pl, make_module, make_trainer, loader, tmp_path
):
    class Early(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "wide.ckpt")

    module, ours = make_module(), ChannelPruning(sparsity=0.5, begin=1, end=6, every=1)
    trainer = make_trainer([ours, Early()], max_epochs=1)
    trainer.fit(module, loader)
    thin = module.net[0].out_features
    trainer.test(module, loader, ckpt_path=tmp_path / "wide.ckpt", verbose=False)
    assert thin < module.net[0].out_features == len(torch.load(tmp_path / "wide.ckpt")["state_dict"]["net.0.bias"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "Give one budget"),
        ({"macs": 0.5, "sparsity": 0.5}, "macs=0.5"),
        ({"macs": 50}, "write 0.5"),
        ({"sparsity": 1.0}, "fraction"),
        ({"latency_ms": -1}, "above 0"),
        ({"latency_ms": 1.0, "latency_in": "tflite"}, "one of torch, onnxruntime, but is 'tflite'"),
        ({"macs": 0.5, "criterion": "l3"}, "Choose one of"),
        ({"macs": 0.5, "distribution": "erk"}, "uniform"),
        ({"macs": 0.5, "round_to": 0}, "round_to"),
        ({"macs": 0.5, "penalty": "l0"}, "slimming"),
        ({"macs": 0.5, "begin": "60%", "end": "20%"}, "not before"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, words):
    with pytest.raises(ValueError, match=words):
        ChannelPruning(**arguments)


@pytest.mark.parametrize(
    ("arguments", "net", "words"),
    [
        ({"macs": 0.001, "min_density": 0.5}, convolutions, "cannot be met.*the nearest is macs=0"),
        ({"sparsity": 0.5, "targets": "net.0"}, fixed_width, "matches no parameter"),
        ({"sparsity": 0.5, "targets": "net.conv"}, fixed_width, r"view\(-1, 512\)"),
        ({"sparsity": 0.5, "ignore": "*"}, convolutions, "No weight is left"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_module_untouched(
    arguments, net, words, make_module, make_trainer, images
):
    module = make_module(net=net)
    shapes = [one.shape for one in module.parameters()]
    with pytest.raises(ValueError, match=words):
        make_trainer([ChannelPruning(**arguments, begin=1, end=6)], max_epochs=1).fit(module, images)
    assert [one.shape for one in module.parameters()] == shapes


def test_an_optimizer_with_one_memory_for_all_weights_is_refused(make_module, make_trainer, loader):
    module = make_module(torch.optim.LBFGS)
    with pytest.raises(ValueError, match="LBFGS"):
        make_trainer([ChannelPruning(sparsity=0.5, begin=1, end=6)], max_epochs=1).fit(module, loader)


def test_soft_pruning_keeps_the_shape_until_the_end(pl, make_module, make_trainer, loader):
    shapes, zeros = [], []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            shapes.append(pl_module.net[0].out_features)
            zeros.append(int((pl_module.net[0].weight == 0).all(1).sum()))

    ours = ChannelPruning(sparsity=0.5, soft=True, schedule="constant", begin=1, end=8, every=3)
    make_trainer([ours, Watch()], max_epochs=1).fit(make_module(), loader)
    assert shapes[:-1] == [16] * 7
    assert shapes[-1] == 8
    assert zeros[0] == 8  # at the first moment
    assert zeros[1] == 0  # gradients have brought them back


def test_a_second_fit_trains_on_and_cuts_no_more(make_module, make_trainer, loader, tmp_path):
    module, ours = make_module(), ChannelPruning(sparsity=0.5, begin=1, end=6, every=2)
    make_trainer([ours], max_epochs=1).fit(module, loader)
    weights = module.net[0].weight.detach().clone()
    trainer = make_trainer([ours], max_epochs=1)
    trainer.fit(module, loader)
    assert module.net[0].out_features == 8
    assert not torch.equal(module.net[0].weight, weights)
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    assert load_compressed(type(module), tmp_path / "again.ckpt").net[0].out_features == 8


def test_a_module_with_nothing_left_to_cut_trains_on(make_module, make_trainer, loader):
    module, ours = make_module(), ChannelPruning(sparsity=0.9375, begin=1, end=6)
    make_trainer([ours], max_epochs=1).fit(module, loader)
    make_trainer([ours], max_epochs=1).fit(module, loader)
    assert module.net[0].out_features == 1


@pytest.mark.parametrize(
    ("end", "expected"),
    [(4, [0.1] * 4 + [None] * 3 + [0.1]), (5, [0.1] * 5 + [None] * 3)],
    ids=["one cut", "another cut one batch later"],
)
def test_statistics_are_plain_means_over_the_batches_after_a_cut(end, expected, pl, make_module, make_trainer, loader):
    def net():
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))

    module, means, momenta = make_module(net=net), [], []

    class Watch(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            norm = pl_module.net[1]
            norm.register_forward_pre_hook(lambda _, args: means.append(args[0].mean(0)) if norm.training else None)

        def on_train_batch_end(self, trainer, pl_module, *_):
            momenta.append(pl_module.net[1].momentum)
            if trainer.global_step == end + 3:
                self.found = pl_module.net[1].running_mean.clone()

    watch = Watch()
    ours = ChannelPruning(sparsity=0.5, begin=2, end=end, every=2, recalibrate=3)
    make_trainer([ours, watch], max_epochs=1).fit(module, loader)
    assert momenta == expected
    torch.testing.assert_close(watch.found, torch.stack(means[end : end + 3]).mean(0))


def test_a_checkpoint_from_before_the_cuts_makes_the_module_whole_again(
    pl, make_module, make_trainer, loader, tmp_path
):
    class Early(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 1:
                trainer.save_checkpoint(tmp_path / "whole.ckpt")

    module = make_module()
    trainer = make_trainer([ChannelPruning(sparsity=0.5, begin=2, end=6), Early()], max_epochs=1)
    trainer.fit(module, loader)
    assert module.net[0].out_features == module.net[2].in_features == 8
    trainer.test(module, loader, ckpt_path=tmp_path / "whole.ckpt", verbose=False)
    assert module.net[0].out_features == module.net[2].in_features == 16


def test_a_step_that_gives_features_to_layers_unknown_to_forward_is_refused(make_module, make_trainer, loader):
    class TwoHeads(make_module):
        def __init__(self):
            super().__init__()
            self.aux = nn.Linear(16, 3)

        def training_step(self, batch, batch_idx):
            features = self.net[:2](batch[0])
            return nn.functional.cross_entropy(self(batch[0]) + self.aux(features), batch[1])

    module = TwoHeads()
    with pytest.raises(ValueError, match="gives features to 'aux'"):
        make_trainer([ChannelPruning(sparsity=0.5, begin=1, end=6)], max_epochs=1).fit(module, loader)
    assert module.net[0].out_features == 16


def test_a_cut_that_fails_leaves_model_and_optimizer_as_they_were(make_module, make_trainer, loader, monkeypatch):
    module, ours = make_module(), ChannelPruning(sparsity=0.5, begin=3, end=6)
    monkeypatch.setattr("lightning_compress.channel_pruning.callback.verify_cut", lambda *_: "a reason")
    monkeypatch.setattr(
        "lightning_compress.channel_pruning.callback.fold_constants", lambda *_: pytest.fail("too early")
    )
    trainer = make_trainer([ours], max_epochs=1)
    with pytest.raises(ValueError, match="Cutting net.0 fails|Cutting 0 fails"):
        trainer.fit(module, loader)
    plain = make_module()
    other = make_trainer(max_steps=trainer.global_step)
    other.fit(plain, loader)
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in module.state_dict().items())
    states = [list(one.optimizers[0].state.values()) for one in (trainer, other)]
    assert all(torch.equal(a[key], b[key]) for a, b in zip(*states, strict=True) for key in a)


def test_a_latency_is_reached_by_what_is_measured(make_module, make_trainer, loader, monkeypatch):
    """A clock that shows a millisecond for each hidden unit, so that the answer is known."""

    class Clock:
        def __init__(self, model, *_, **__):
            self.median_ms = float(model.net[0].out_features)

    monkeypatch.setitem(RUNTIMES, "torch", Clock)
    module = make_module()
    make_trainer([ChannelPruning(latency_ms=6.0, begin=1, end=6, every=2)], max_epochs=1).fit(module, loader)
    assert module.net[0].out_features == 6


def test_penalties_add_once_however_many_optimizers_there_are(make_module, make_trainer, loader):
    """The gradient of strength * |gamma| is the strength's size, on top of what a run without it has."""

    def net():
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))

    def two(module):
        return torch.optim.SGD(module.net[3].parameters(), lr=0.1), torch.optim.SGD(module.net[1].parameters(), lr=0.1)

    class Manual(make_module):
        def __init__(self):
            super().__init__(net=net)
            self.automatic_optimization = False

        def configure_optimizers(self):
            return two(self)

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            for optimizer in self.optimizers():
                optimizer.step()

    plain, penalized = Manual(), Manual()
    make_trainer(max_epochs=1, limit_train_batches=2).fit(plain, loader)
    ours = ChannelPruning(sparsity=0.5, penalty="slimming", penalty_strength=0.5, begin=2, end=50, every=1)
    make_trainer([ours], max_epochs=1, limit_train_batches=2).fit(penalized, loader)
    torch.testing.assert_close(plain.net[1].weight - penalized.net[1].weight, torch.full((16,), 0.05))
