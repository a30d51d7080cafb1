"""Losses of layers, windows and schedules; the teacher as a guest; what is logged."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_compress import Distillation
from tests.conftest import adamw, sgd
from tests.distillation.by_hand import (
    ALPHA,
    TEMPERATURE,
    by_hand,
    close,
    distillation,
    equal,
    network,
    plain,
    task,
    with_teacher,
)


@pytest.mark.parametrize("optimizer", [sgd, adamw], ids=["sgd", "adamw"])
def test_regressors_learn_as_if_they_were_in_the_users_optimizer(optimizer, pl, teacher, make_trainer, step_of, loader):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        regressor = nn.Linear(16, 32, bias=False)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.regressor = network(), regressor

    def step(self, batch):
        hidden = self.net.student[0](batch[0])
        logits = self.net.student[2](self.net.student[1](hidden))
        with torch.no_grad():
            wanted = teacher[0](batch[0])
        return (1 - ALPHA) * task(logits, batch) + ALPHA * (2.0 * F.mse_loss(self.net.regressor(hidden), wanted))

    ours, theirs = step_of(plain, optimizer=optimizer), step_of(step, net=Both, optimizer=optimizer)
    losses = {("net.0", "0"): {"loss": "projected_hint", "weight": 2.0}}
    callback = distillation(teacher, losses=losses)
    make_trainer([callback], max_epochs=2).fit(ours, loader)
    make_trainer(max_epochs=2).fit(theirs, loader)
    learned = list(callback.distiller.objective.learned.parameters())
    torch.testing.assert_close(learned[0], regressor.weight, atol=1e-6, rtol=1e-5)
    assert close(ours.net, theirs.net.student)
    assert not any("learned" in name or "regress" in name for name in ours.state_dict())


def test_layers_are_compared_by_a_yaml_like_pair(teacher, step_of, make_trainer, loader):
    pair, arrow = (
        {("net.1", "1"): {"loss": "projected_hint", "weight": 0.5}, "output": "dkd"},
        {"net.1 -> 1": {"loss": "projected_hint", "weight": 0.5}, "output": "dkd"},
    )
    modules = step_of(plain), step_of(plain)
    for module, losses in zip(modules, (pair, arrow), strict=True):
        make_trainer([distillation(teacher, losses=losses)], max_epochs=1).fit(module, loader)
    assert equal(*modules)


def test_a_loss_of_the_users_own_gets_what_it_names(teacher, step_of, make_trainer, loader):
    seen = {}

    def own(student, teacher, target, temperature, scale=1.0):
        seen.update(target=target.shape, temperature=temperature, scale=scale)
        return scale * (student - teacher).abs().mean()

    callback = distillation(teacher, losses={"loss": own, "scale": 3.0})
    make_trainer([callback], max_epochs=1).fit(step_of(plain), loader)
    assert seen == {"target": (8,), "temperature": TEMPERATURE, "scale": 3.0}


def test_outside_its_window_and_between_its_steps_the_loss_is_the_users(teacher, step_of, make_trainer, loader):
    number = []

    def step(self, batch):
        due = 2 <= len(number) < 11 and (len(number) - 2) % 3 == 0
        number.append(0)
        return with_teacher(teacher)(self, batch) if due else plain(self, batch)

    ours, theirs = step_of(plain), step_of(step)
    make_trainer([distillation(teacher, begin=2, end=11, every=3)], max_epochs=2).fit(ours, loader)
    make_trainer(max_epochs=2).fit(theirs, loader)
    assert equal(ours, theirs)


def test_alpha_and_temperature_follow_a_schedule(teacher, step_of, make_trainer, loader):
    number = []

    def step(self, batch):
        progress = len(number) / 16
        number.append(0)
        alpha, temperature = 0.8 + (0.2 - 0.8) * progress, 4.0 + (1.0 - 4.0) * progress
        logits = self.net(batch[0])
        with torch.no_grad():
            answer = teacher(batch[0])
        return (1 - alpha) * task(logits, batch) + alpha * by_hand(logits, answer, temperature)

    callback = Distillation(teacher, alpha=0.8, final_alpha=0.2, temperature=4.0, final_temperature=1.0)
    ours, theirs = step_of(plain), step_of(step)
    make_trainer([callback], max_epochs=2).fit(ours, loader)
    make_trainer(max_epochs=2).fit(theirs, loader)
    assert equal(ours, theirs)


def test_the_teacher_stays_as_it_was_and_outside(teacher, pl, step_of, make_trainer, loader):
    modes = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            modes.append(noisy.training)
            known = {id(one) for group in trainer.optimizers[0].param_groups for one in group["params"]}
            assert not known & {id(one) for one in noisy.parameters()}

    noisy = nn.Sequential(teacher, nn.Dropout(0.5), nn.BatchNorm1d(3))
    before, module = {name: value.clone() for name, value in noisy.state_dict().items()}, step_of(plain)
    make_trainer([distillation(noisy), Watch()], max_epochs=2).fit(module, loader)
    assert not any(modes)
    assert noisy.training  # as it was given
    assert all(torch.equal(value, before[name]) for name, value in noisy.state_dict().items())
    assert all(one.requires_grad and one.grad is None for one in noisy.parameters())
    assert list(module.state_dict()) == list(step_of(plain).state_dict())
    assert not any(one._forward_hooks for one in noisy.modules())


def test_a_teacher_in_training_mode_is_put_back_each_epoch(teacher, pl, step_of, make_trainer, loader):
    class Meddle(pl.Callback):
        def on_train_epoch_end(self, *_):
            teacher.train()

    with pytest.warns(UserWarning, match="put the teacher into training mode"):
        make_trainer([distillation(teacher), Meddle()], max_epochs=2).fit(step_of(plain), loader)


def test_a_teacher_inside_the_module_is_refused(step_of, make_trainer, loader):
    module = step_of(plain, net=lambda: nn.Sequential(network()))
    with pytest.raises(ValueError, match=r"inside the module that is trained, as 'net.0'.*BranchTeacher"):
        make_trainer([distillation(module.net[0])], max_epochs=1).fit(module, loader)
    with pytest.raises(ValueError, match="shares net.0.0.weight"):
        make_trainer([distillation(nn.Sequential(module.net))], max_epochs=1).fit(module, loader)


def test_terms_agreement_and_the_teachers_accuracy_are_logged(teacher, pl, step_of, make_trainer, loader):
    module = step_of(plain)
    first = next(iter(loader))
    with torch.no_grad():
        logits, answer = module.net(first[0]), teacher(first[0])
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    callback = distillation(teacher, losses={"output": ["kl_divergence", {"loss": "logit_mse", "weight": 0.5}]})
    trainer = make_trainer([callback, Watch()], max_epochs=2, log_every_n_steps=1)
    trainer.fit(module, loader)
    got = {name.removeprefix("compress/distillation/"): value for name, value in seen[0].items()}
    terms = by_hand(logits, answer), 0.5 * F.mse_loss(logits, answer)
    expected = {
        "loss/task": task(logits, first),
        "loss/kl_divergence": terms[0],
        "loss/logit_mse": terms[1],
        "loss/distillation": terms[0] + terms[1],
        "alpha": ALPHA,
        "temperature": TEMPERATURE,
        "agreement": (logits.argmax(-1) == answer.argmax(-1)).float().mean(),
        "teacher_accuracy": (answer.argmax(-1) == first[1]).float().mean(),
    }
    assert got == pytest.approx({name: float(value) for name, value in expected.items()}, abs=1e-6)
    final = trainer.callback_metrics
    x, y = loader.dataset.tensors
    whole = (teacher(x).argmax(-1) == y).float().mean()
    assert float(final["compress/distillation/teacher_accuracy_epoch"]) == pytest.approx(float(whole))


def test_the_cosine_between_the_gradients_is_logged_on_request(teacher, step_of, make_trainer, loader):
    module = step_of(plain)
    first = next(iter(loader))
    logits = module.net(first[0])
    vectors = [
        torch.cat([one.flatten() for one in torch.autograd.grad(loss, module.parameters(), retain_graph=True)])
        for loss in (task(logits, first), by_hand(logits, teacher(first[0]).detach()))
    ]
    callback = distillation(teacher, gradient_cosine=True)
    trainer = make_trainer([callback], max_steps=1, log_every_n_steps=1)
    trainer.fit(module, loader)
    expected = float(F.cosine_similarity(*vectors, dim=0))
    assert float(trainer.callback_metrics["compress/distillation/gradient_cosine"]) == pytest.approx(expected, abs=1e-5)
