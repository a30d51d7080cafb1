"""What quantizers learn is trained by the user's optimizers, as its layer is, and leaves nothing in them."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from lightning_compress import QuantizationAwareTraining
from lightning_compress.quantization.learned_parameters import add_damping, attachments, quantize_gradients
from tests.conftest import adamw, sgd
from tests.quantization.by_hand import Perceptron, quantized, randn, seeded
from tests.quantization.watching import as_trained, noted

LSQ = {"weights": 4, "activations": 4, "first": "same", "last": "same"}


def lsq(values, step, quant_min, quant_max):
    """The paper's equations left to autograd; the step's gradient is scaled by a detour that has no value."""
    features = values.shape[1:].numel()
    scaled = step / (features * quant_max) ** 0.5
    step = scaled + (step - scaled).detach()
    places = (values / step).clamp(quant_min, quant_max)
    return (places + (places.round() - places).detach()) * step


@pytest.fixture
def lsq_by_hand(make_module):
    """A factory of classifiers that learn the steps of LSQ by code of their own, from the third batch on."""

    class ByHand(make_module):
        def __init__(self, optimizer):
            super().__init__(optimizer)
            self.steps = nn.ParameterList([torch.ones(16, 1), torch.ones(3, 1), torch.ones(()), torch.ones(())])
            self.batches, self.begun = 0, set()

        def forward(self, values):
            if self.batches <= 2:
                return self.net(values)
            for place, layer in ((0, self.net[0]), (1, self.net[2])):
                self.begin(place, layer.weight, 7, 1)
            first, second = (lsq(self.net[2 * one].weight, self.steps[one], -7, 7) for one in (0, 1))
            self.begin(2, values, 7)
            values = nn.functional.linear(lsq(values, self.steps[2], -8, 7), first, self.net[0].bias).relu()
            self.begin(3, values, 15)
            return nn.functional.linear(lsq(values, self.steps[3], 0, 15), second, self.net[2].bias)

        @torch.no_grad()
        def begin(self, place, values, quant_max, *dim):
            if place not in self.begun:
                self.begun.add(place)
                self.steps[place].copy_(
                    2 * values.abs().mean(*dim, **({"keepdim": True} if dim else {})) / quant_max**0.5
                )

        def training_step(self, batch, batch_idx):
            self.batches += 1
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            optimizer = self.optimizer(self.net.parameters())
            optimizer.add_param_group({"params": list(self.steps), "weight_decay": 0.0})
            return optimizer

    return ByHand


@pytest.mark.parametrize("optimizer", [sgd, adamw], ids=["sgd", "adamw"])
@pytest.mark.parametrize("arguments", [{}, {"gradient_clip_val": 0.1}, {"accumulate_grad_batches": 2}], ids=str)
def test_steps_are_learned_as_by_hand(optimizer, arguments, lsq_by_hand, make_module, make_trainer, loader):
    begin = 2 if "accumulate_grad_batches" not in arguments else 1
    quantization = QuantizationAwareTraining(begin=begin, freeze_ranges=None, **LSQ)
    ours, theirs = make_module(optimizer), lsq_by_hand(optimizer)
    if "accumulate_grad_batches" in arguments:
        theirs.batches = 1  # the first of the two batches of step 1 is watched
    make_trainer([quantization], max_epochs=2, **arguments).fit(ours, loader)
    make_trainer(max_epochs=2, **arguments).fit(theirs, loader)
    as_trained(ours)
    for one, other in zip(ours.parameters(), theirs.net.parameters(), strict=True):
        assert torch.allclose(one, other, atol=2e-5)
    learned = list(quantization.quantized.learned().values())
    assert len(learned) == 4
    assert all(torch.allclose(one, other, atol=2e-5) for one, other in zip(learned, theirs.steps, strict=True))
    assert not any(torch.equal(one, torch.ones_like(one)) for one in learned)


def test_the_first_batch_alone_gives_the_first_step(pl, make_module, make_trainer, loader):
    quantization = QuantizationAwareTraining(begin=2, **LSQ)
    note = noted(pl, quantization, lambda one: one.quantized and {
        name: float(step.detach()) for name, step in one.quantized.learned().items() if step.ndim == 0
    })  # fmt: skip
    module = make_module(lambda parameters: torch.optim.SGD(parameters, lr=1e-12))
    make_trainer([quantization, note], max_epochs=1).fit(module, loader)
    third = list(loader)[2][0]
    with torch.no_grad():
        inner = module.net[1](module.net[0](third))
    first = note.by_batch[2]
    assert first["activations/net.0 input 0/step"] == pytest.approx(2 * float(third.abs().mean()) / 7**0.5, rel=1e-5)
    assert first["activations/net.1 output/step"] == pytest.approx(2 * float(inner.mean()) / 15**0.5, rel=0.1)
    assert note.by_batch[-1] == pytest.approx(first)


# Who trains them ----------------------------------------------------------------------------------------------------


def two_groups(parameters):
    several = list(parameters)
    groups = [{"params": several[:2], "lr": 0.1}, {"params": several[2:], "lr": 0.01, "momentum": 0.5}]
    return torch.optim.SGD(groups, momentum=0.9, weight_decay=0.01)


def test_each_group_trains_the_steps_of_its_own_layers_and_no_decay_pulls_at_them():
    model = seeded(Perceptron)
    found = quantized(model, randn(5, 6), **LSQ)
    first, second = attachments(found, [two_groups(model.parameters())])
    assert list(first.learned) == ["weights/net.0.weight/step", "activations/net.0 input 0/step"]
    assert list(second.learned) == ["weights/net.2.weight/step", "activations/net.1 output/step"]
    assert (first.reference_param.parameter, second.reference_param.parameter) == (
        model.net[0].weight,
        model.net[2].weight,
    )
    assert first.changed == second.changed == {"weight_decay": 0.0}


def test_the_clips_of_pact_are_pulled_down_by_the_decay_of_the_weights():
    model = seeded(Perceptron)
    found = quantized(model, randn(5, 6), method={"weights": "lsq", "activations": "pact"}, **LSQ)
    changed = {tuple(one.learned): one.changed for one in attachments(found, [sgd(model.parameters())])}
    assert changed == {
        ("weights/net.0.weight/step", "weights/net.2.weight/step"): {"weight_decay": 0.0},
        ("activations/net.0 input 0/clip", "activations/net.1 output/clip"): {},
    }


def test_steps_of_layers_that_nobody_trains_go_to_the_first_that_is_trained():
    model = seeded(Perceptron)
    found = quantized(model, randn(5, 6), **LSQ)
    (only,) = attachments(found, [sgd(model.net[2].parameters())])
    assert only.reference_param.parameter is model.net[2].weight
    assert len(only.learned) == 4
    assert attachments(found, [sgd([nn.Parameter(torch.ones(1))])]) == []


def test_several_optimizers_of_a_manual_loop_train_the_steps_of_their_layers(pl, make_module, make_trainer, loader):
    class Manual(make_module):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
                optimizer.step()

        def configure_optimizers(self):
            return sgd(self.net[0].parameters()), adamw(self.net[2].parameters())

    groups = []

    class Look(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            groups.extend([[len(group["params"]) for group in one.param_groups] for one in trainer.optimizers])

    quantization, module = QuantizationAwareTraining(**LSQ), Manual()  # from half of the run on
    trainer = make_trainer([Look(), quantization], max_epochs=1)
    trainer.fit(module, loader)
    assert groups == [[2, 2], [2, 2]]
    assert [[len(group["params"]) for group in one.param_groups] for one in trainer.optimizers] == [[2], [2]]
    assert all(one.grad is not None for one in quantization.quantized.learned().values())


# Schedulers ---------------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "each step": (lambda one: lr_scheduler.StepLR(one, 3, 0.5), {"interval": "step"}),
    "each epoch": (lambda one: lr_scheduler.ExponentialLR(one, 0.5), {"interval": "epoch"}),
    "one cycle": (lambda one: lr_scheduler.OneCycleLR(one, 0.1, total_steps=24), {"interval": "step"}),
    "functions": (lambda one: lr_scheduler.LambdaLR(one, lambda step: 0.9**step), {"interval": "step"}),
    "plateau": (lambda one: lr_scheduler.ReduceLROnPlateau(one, patience=0), {"monitor": "val_loss"}),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers_move_the_steps_rates_along_and_keep_the_users(kind, pl, make_module, make_trainer, loader):
    make, settings = SCHEDULERS[kind]

    class Scheduled(make_module):
        def configure_optimizers(self):
            optimizer = sgd(self.parameters())
            self.made = make(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.made, **settings}}

    class Rates(pl.Callback):
        def __init__(self):
            self.by_batch = []

        def on_train_batch_start(self, trainer, *_):
            self.by_batch.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    plain, ours, alone, beside = Rates(), Rates(), Scheduled(), Scheduled()
    # Without training, both have the same validation loss.
    trainer = make_trainer([plain], max_epochs=3, gradient_clip_val=1e-9)
    trainer.fit(alone, loader, loader)
    quantization = QuantizationAwareTraining(begin=6, **LSQ)
    monitor = pl.callbacks.LearningRateMonitor("step")
    make_trainer(
        [ours, quantization, monitor],
        max_epochs=3,
        gradient_clip_val=1e-9,
        logger=pl.loggers.CSVLogger(trainer.default_root_dir),
    ).fit(beside, loader, loader)
    assert [rates[:1] for rates in ours.by_batch] == plain.by_batch
    assert all(rates == [rates[0]] * 2 for rates in ours.by_batch[6:])
    assert {name: value for name, value in vars(beside.made).items() if isinstance(value, list)}.keys() == {
        name for name, value in vars(alone.made).items() if isinstance(value, list)
    }
    for name, value in vars(alone.made).items():
        if isinstance(value, list):
            assert len(getattr(beside.made, name)) == len(value), name


# Gradients ----------------------------------------------------------------------------------------------------------


def test_gradients_of_weights_lie_on_their_grid_for_the_optimizer_that_gets_them():
    model = seeded(Perceptron)
    found = quantized(model, randn(5, 6), method="wage", weight_grad_bits=8, weights=4)
    model(randn(5, 6)).square().sum().backward()
    other = model.net[2].weight.grad.clone()
    found.set_step(3)
    quantize_gradients(found, sgd(model.net[0].parameters()))
    gradient = model.net[0].weight.grad
    assert torch.equal(gradient, (gradient * 128).round() / 128)
    assert not torch.equal(other, (other * 128).round() / 128)
    assert torch.equal(model.net[2].weight.grad, other)


def test_damping_pulls_once_per_weight_and_only_inside_of_the_grid():
    model = seeded(Perceptron)
    found = quantized(model, randn(5, 6), weights=3, method="min_max")
    found.freeze_observers()
    weight = model.net[0].weight
    with torch.no_grad():
        weight[0, 0] = 10.0
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    add_damping(found, 0.25, sgd(model.net[0].parameters()))
    scale = found.weights["net.0.weight"].scale
    inside = weight.abs() <= 3 * scale
    expected = 0.5 * (weight - (weight / scale).round().clamp(-3, 3) * scale) * inside
    assert torch.allclose(weight.grad, expected, atol=1e-7)
    assert weight.grad[0, 0] == 0
    assert not model.net[2].weight.grad.any()


# Weights that are kept within bounds --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ({"weights": "binary", "method": "binary_connect"}, 1.0),  # Courbariaux et al., 2015, section 2.4
        ({"weights": 2, "method": "wage"}, 0.5),  # 1 - 2 ** (1 - bits): Wu et al., 2018, section 3.3.4
        ({"weights": 3, "activations": 4, "method": "wage"}, 0.75),
    ],
    ids=str,
)
def test_weights_of_methods_with_a_bound_are_clipped_after_each_update(
    settings, bound, pl, make_module, make_trainer, loader
):
    module = far_out(make_module())
    quantization = QuantizationAwareTraining(begin=3, first="same", last="same", **settings)
    note = noted(pl, quantization, lambda _: size(module))
    trainer = make_trainer([quantization, note], max_epochs=1)
    trainer.fit(module, loader)
    assert note.by_batch[2] > bound  # not before the quantized phase
    assert max(note.by_batch[4:]) == bound
    far_out(module)
    trainer.optimizers[0].step()
    assert size(module) > bound  # and not after the run


def test_other_weights_and_biases_have_no_bound(make_module, make_trainer, loader):
    module = far_out(make_module())
    quantization = QuantizationAwareTraining(
        begin=0, weights="binary", method="binary_connect", first="same", last="same", targets="net.0"
    )
    make_trainer([quantization], max_epochs=1).fit(module, loader)
    assert float(module.net[0].weight.detach().abs().max()) <= 1.0
    assert float(module.net[0].bias.detach().abs().max()) > 1.0
    assert float(module.net[2].weight.detach().abs().max()) > 1.0


def far_out(module):
    """With weights and biases up to 3.5."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(3.5 / parameter.abs().max())
    return module


def size(module):
    return max(float(module.net[place].weight.detach().abs().max()) for place in (0, 2))
