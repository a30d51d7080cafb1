"""Quantization in a user's run: what the forward computes, what is left alone, what goes together."""

import copy

import pytest
import torch
from torch import nn

from lightning_compress import Distillation, Pruning, QuantizationAwareTraining, quantize, remove_quantizers
from lightning_compress.quantization.lookup import quantized_of
from tests.quantization.watching import as_trained, equal


def rounded(values, axis=0, bits=8):
    """Symmetric and by channel, written out."""
    others = [place for place in range(values.ndim) if place != axis]
    scale = values.abs().amax(others, keepdim=True) / (2 ** (bits - 1) - 1)
    return (values / scale).round() * scale


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Heads(nn.Module):
    """Self-attention, whose output projection is never called, and the encoder layer that has a fast path."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, tokens):
        return self.encoder(self.attention(tokens, tokens, tokens, need_weights=False)[0])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(10, 4, batch_first=True)

    def forward(self, words):
        return self.gru(self.lstm(self.words(words))[0])[0]


class Scaled(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, values, *, times=2.0):
        return nn.functional.linear(values, self.weight * times, self.bias)


MODELS = {
    "attention": (Heads, noise(2, 5, 8)),
    "recurrent": (Recurrent, torch.arange(8).reshape(2, 4)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.Conv2d(4, 2, 1, groups=2)), noise(2, 3, 4, 4)),
    "own forward": (lambda: nn.Sequential(Scaled(4, 4), nn.ReLU(), Scaled(4, 2)), noise(3, 4)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_the_forward_uses_the_weights_on_their_grids_and_keeps_its_own(name, training, gradients):
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    quantized = quantize(model, None, activations=None, progress=False).train(training)
    by_hand = copy.deepcopy(model).train(training)
    with torch.no_grad():
        for owner in by_hand.modules():
            for weight in owner.parameters(recurse=False):
                if weight.ndim >= 2:
                    weight.copy_(rounded(weight, axis=int(isinstance(owner, nn.ConvTranspose2d))))
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(quantized(inputs), by_hand(inputs), rtol=1e-5, atol=1e-6)
    assert (quantized(inputs) - model(inputs)).abs().max() > 1e-4
    assert all(map(torch.allclose, quantized.parameters(), by_hand.parameters()))
    assert not any("weight" in vars(module) for module in quantized.modules())


def test_gradients_reach_the_float_weights_through_both_grids():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    quantized = quantize(model, [noise(16, 4)], progress=False)
    quantized(noise(16, 4)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in quantized.parameters())


def test_activations_are_on_the_grid_of_what_was_seen():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    quantized = quantize(model, [noise(64, 4)], method="min_max", progress=False)
    given = []
    quantized[2].register_forward_pre_hook(lambda _module, args: given.append(args[0].detach()))
    quantized(noise(64, 4))
    known = quantized_of(quantized).activations["1 output"]
    steps = given[0] / known.scale
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    assert int(steps.round().max()) == 255  # the largest number seen is the last step
    assert float(steps.min()) == 0.0


def fit(make_trainer, loader, module, *callbacks, **arguments):
    trainer = make_trainer(callbacks, **{"max_epochs": 3, **arguments})
    trainer.fit(module, loader)
    return trainer


def test_afterwards_only_the_quantizers_are_left_until_they_are_taken_off(make_module, make_trainer, loader):
    module = make_module()
    trainer = fit(
        make_trainer, loader, module, QuantizationAwareTraining(weights=4, activations=4, begin=2, first="same")
    )
    assert any(one._forward_hooks for one in module.modules())
    remove_quantizers(module)
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in module.modules())
    plain = make_module()
    make_trainer(max_epochs=1).fit(plain, loader)
    assert vars(module).keys() == vars(plain).keys()
    assert [len(group["params"]) for group in trainer.optimizers[0].param_groups] == [4]
    assert module.state_dict().keys() == make_module().state_dict().keys()


def test_learned_steps_are_in_the_users_optimizer_without_decay(make_module, make_trainer, loader, pl):
    class Look(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            self.groups = [dict(group) for group in trainer.optimizers[0].param_groups]

    look = Look()
    learned = QuantizationAwareTraining(weights=4, activations=4, begin=2, first="same", last="same")
    fit(make_trainer, loader, make_module(), look, learned)
    assert [group["weight_decay"] for group in look.groups] == [0.01, 0.0]
    assert len(look.groups[1]["params"]) == 4  # of two weights and two places
    assert look.groups[1]["lr"] == look.groups[0]["lr"]


@pytest.mark.parametrize("first", [Pruning, QuantizationAwareTraining])
@pytest.mark.parametrize("settings", [{"weights": 8}, {"weights": "ternary", "first": "same", "last": "same"}])
def test_what_is_pruned_is_zero_on_the_grid_too(first, settings, make_module, make_trainer, loader):
    pruning = Pruning(0.5, granularity="2:4", schedule="constant", begin=1, end=15, every=3)
    quantization = QuantizationAwareTraining(begin=4, **settings)
    module = make_module()
    order = [pruning, quantization] if first is Pruning else [quantization, pruning]
    fit(make_trainer, loader, module, *order)
    known = quantized_of(module)
    for name, mask in pruning.masks.items():
        weight = known.weights[name](known.quantized_weights()[name].parameter)
        assert (weight[~mask] == 0).all()
        assert (weight.reshape(-1, 4) != 0).sum(1).max() <= 2


def test_binary_weights_and_masks_are_refused_together(make_module, make_trainer, loader):
    binary = QuantizationAwareTraining(weights="binary", first="same", last="same")
    with pytest.raises(ValueError, match=r"binary weights have no zero.*weights='ternary'"):
        fit(make_trainer, loader, make_module(), Pruning(0.5), binary)


def test_a_teacher_is_not_quantized_with_its_student(make_module, make_trainer, loader):
    teacher = make_module().net
    wanted = copy.deepcopy(teacher)
    fit(make_trainer, loader, make_module(), Distillation(teacher), QuantizationAwareTraining(weights=2, begin=2))
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in teacher.modules())
    assert torch.equal(teacher(noise(4, 8)), wanted(noise(4, 8)))


def test_a_checkpoint_is_tested_as_it_was_quantized(make_module, make_trainer, loader, tmp_path):
    settings = {"weights": 2, "activations": 3, "first": "same", "last": "same", "begin": 2}
    module, callback = make_module(), QuantizationAwareTraining(**settings)
    trainer = fit(make_trainer, loader, module, callback)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    (wanted,) = trainer.test(module, loader, verbose=False)
    path = tmp_path / "last.ckpt"
    (found,) = make_trainer([QuantizationAwareTraining(**settings)]).test(make_module(), loader, path, verbose=False)
    (without,) = make_trainer().test(make_module(), loader, path, verbose=False)
    assert found == wanted
    assert abs(without["val_loss"] - wanted["val_loss"]) > 1e-3


def test_to_calibrate_only_leaves_the_training_as_it_is(make_module, make_trainer, loader):
    plain, calibrated = make_module(), make_module()
    fit(make_trainer, loader, plain)
    fit(make_trainer, loader, calibrated, QuantizationAwareTraining(calibrate_only=True, begin=2))
    assert not quantized_of(calibrated).uncalibrated()
    assert equal(as_trained(calibrated), plain)


def test_ranges_and_norms_stay_when_they_are_frozen(make_module, make_trainer, loader, pl):
    def net():
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))

    class Note(pl.Callback):
        ranges, means = [], []

        def on_train_batch_end(self, trainer, pl_module, *_):
            known = quantized_of(pl_module)
            self.ranges.append(None if known is None else float(known.activations["net.2 output"].maximum))
            self.means.append(pl_module.net[1].running_mean.clone())

    note, module = Note(), make_module(net=net)
    quantization = QuantizationAwareTraining(begin=2, freeze_ranges=10, freeze_bn=12)
    fit(make_trainer, loader, module, note, quantization)
    assert len(set(note.ranges[2:10])) == 8
    assert len(set(note.ranges[10:])) == 1
    assert not torch.equal(note.means[10], note.means[11])
    assert all(torch.equal(mean, note.means[12]) for mean in note.means[12:])
    assert module.net[1].training


def test_bits_are_as_asked_for_by_layer(make_module, make_trainer, loader):
    def net():
        return nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, 3))

    module = make_module(net=net)
    fit(make_trainer, loader, module, QuantizationAwareTraining(weights=4, begin=2, overrides={"net.2": 3}, last=6))
    found = {name: one.fmt.bits for name, one in quantized_of(module).weights.items()}
    assert list(found.values()) == [7, 4, 3, 4, 6]  # 8 bits of which the range is reduced


def test_numbers_that_are_none_are_refused_with_the_place(make_module, make_trainer, loader):
    def net():
        return nn.Sequential(nn.Linear(8, 8), Broken(), nn.Linear(8, 3))

    with pytest.raises(ValueError, match=r"net\.1 output.*not finite"):
        fit(make_trainer, loader, make_module(net=net), QuantizationAwareTraining(begin=2))


class Broken(nn.Module):
    """Gives no numbers from its third call on."""

    calls = 0

    def forward(self, values):
        self.calls += 1
        return values * (1.0 if self.calls < 3 else float("nan"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"weights": 1}, "Did you mean 'binary'"),
        ({"weights": "int8"}, "Did you mean 8"),
        ({"weights": None, "activations": None}, "leave nothing to quantize"),
        ({"method": "lsqq"}, "Did you mean 'lsq'"),
        ({"granularity": "row"}, "'tensor', 'channel' or 'group 32'"),
        ({"begin": "60%", "end": "50%"}, "begin"),
        ({"damping": -1.0}, "damping"),
        ({"weights": 8, "initial_bits": 4}, "nothing would fall"),
        ({"weight_grad_bits": 6}, "'dorefa' or 'wage'"),
        ({"overrides": {"net.0": {"wights": 4}}}, "Did you mean 'weights'"),
    ],
)
def test_bad_arguments_are_refused_at_construction(arguments, words):
    with pytest.raises(ValueError, match=words):
        QuantizationAwareTraining(**arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"overrides": {"net.9": 4}}, r"'net.9' matches no quantized layer.* Did you mean"),
        ({"targets": "head.*"}, "matches no parameter"),
        ({"granularity": "group 7"}, r"granularity 'group 7' does not fit"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_training(arguments, words, make_module, make_trainer, loader):
    with pytest.raises(ValueError, match=words):
        fit(make_trainer, loader, make_module(), QuantizationAwareTraining(**arguments))


def test_a_layer_that_the_step_passes_by_is_refused_by_name(make_module, make_trainer, loader):
    module = make_module()
    module.auxiliary = nn.Linear(8, 3)
    with pytest.raises(ValueError, match=r"auxiliary"):
        fit(make_trainer, loader, module, QuantizationAwareTraining(begin=2))
