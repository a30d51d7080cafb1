"""Whom a student learns from."""

import pytest
import torch
from torch import nn

from lightning_compress import AveragedTeacher, BranchTeacher, PeerTeacher
from tests.conftest import adamw
from tests.distillation.by_hand import (
    ALPHA,
    by_hand,
    close,
    distillation,
    equal,
    network,
    plain,
    task,
    with_teacher,
)


def test_a_function_teaches(teacher, step_of, make_trainer, loader):
    ours, theirs = step_of(plain), step_of(with_teacher(teacher))
    make_trainer([distillation(lambda x: teacher(x))], max_epochs=2).fit(ours, loader)
    make_trainer(max_epochs=2).fit(theirs, loader)
    assert equal(ours, theirs)


class PlainTeacher(nn.Sequential):
    def __init__(self):
        super().__init__(*network(32, seed=7))


@pytest.mark.parametrize("lightning", [True, False], ids=["lightning", "state dict"])
def test_a_checkpoint_teaches(lightning, teacher, step_of, make_module, make_trainer, loader, tmp_path):
    path = tmp_path / "teacher.ckpt"
    if lightning:
        trained = make_module(net=lambda: network(16, seed=7))
        trainer = make_trainer(max_epochs=1)
        trainer.fit(trained, loader)
        trainer.save_checkpoint(path)
        teacher_class = type(trained)
    else:
        trained, teacher_class = PlainTeacher(), "tests.distillation.test_kinds_of_teachers.PlainTeacher"
        torch.save(trained.state_dict(), path)
    ours, theirs = step_of(plain), step_of(with_teacher(trained))
    torch.manual_seed(4)
    make_trainer([distillation(str(path), teacher_class=teacher_class)], max_epochs=2).fit(ours, loader)
    after = torch.get_rng_state()
    torch.manual_seed(4)
    make_trainer(max_epochs=2).fit(theirs, loader)
    assert equal(ours, theirs)
    assert torch.equal(after, torch.get_rng_state())  # making a teacher to load into is not chance of the user's


def test_several_teachers_count_by_their_weights(step_of, make_trainer, loader):
    teachers = [network(32, seed=7), network(8, seed=8)]

    def step(self, batch):
        logits = self.net(batch[0])
        lessons = [by_hand(logits, one(batch[0]).detach()) for one in teachers]
        return (1 - ALPHA) * task(logits, batch) + ALPHA * (0.75 * lessons[0] + 0.25 * lessons[1])

    ours, theirs = step_of(plain), step_of(step)
    make_trainer([distillation(teachers, teacher_weights=[3, 1])], max_epochs=2).fit(ours, loader)
    make_trainer(max_epochs=2).fit(theirs, loader)
    assert close(ours, theirs)


def test_each_teacher_may_know_some_classes(step_of, make_trainer, loader):
    first, second = network(32, seed=7), nn.Sequential(network(8, seed=8), nn.Linear(3, 2))

    def step(self, batch):
        logits, labels = self.net(batch[0]), batch[1]
        total = 0.0
        for one, classes in ((first, [0, 1, 2]), (second, [2, 0])):
            rows = [row for row, label in enumerate(labels.tolist()) if label in classes]
            total = total + 0.5 * by_hand(logits[rows][:, classes], one(batch[0]).detach()[rows])
        return (1 - ALPHA) * task(logits, batch) + ALPHA * total

    ours, theirs = step_of(plain), step_of(step)
    callback = distillation([first, second], teacher_classes=[(0, 1, 2), (2, 0)])
    make_trainer([callback], max_epochs=2).fit(ours, loader)
    make_trainer(max_epochs=2).fit(theirs, loader)
    assert close(ours, theirs)


def test_an_average_of_the_student_teaches_it(pl, step_of, make_trainer, loader):
    average = network()

    def step(self, batch):
        logits = self.net(batch[0])
        return (1 - ALPHA) * task(logits, batch) + ALPHA * by_hand(logits, average(batch[0]).detach())

    class Average(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            with torch.no_grad():
                for mine, now in zip(average.parameters(), pl_module.net.parameters(), strict=True):
                    mine.lerp_(now, 1 - 0.9)

    ours, theirs = step_of(plain), step_of(step)
    make_trainer([distillation(AveragedTeacher(0.9))], max_epochs=2).fit(ours, loader)
    make_trainer([Average()], max_epochs=2).fit(theirs, loader)
    assert equal(ours, theirs)


class Exits(nn.Module):
    """A network with an early exit."""

    def __init__(self):
        super().__init__()
        self.trunk, self.early, self.deep = nn.Linear(8, 16), nn.Linear(16, 3), network(16, seed=3)
        with torch.no_grad():
            for value in (*self.trunk.parameters(), *self.early.parameters()):
                value.copy_(torch.linspace(-0.3, 0.3, value.numel()).reshape(value.shape))

    def forward(self, x):
        return self.early(self.trunk(x).relu()), self.deep(x)


def test_a_deeper_exit_teaches_an_early_one(step_of, make_trainer, loader):
    def exits(self, batch):
        early, deep = self.net(batch[0])
        return task(early, batch) + task(deep, batch)

    def exits_by_hand(self, batch):
        early, deep = self.net(batch[0])
        lesson = by_hand(early, deep.detach())
        return (1 - ALPHA) * (task(early, batch) + task(deep, batch)) + ALPHA * lesson

    ours, theirs = step_of(exits, net=Exits), step_of(exits_by_hand, net=Exits)
    callback = distillation(BranchTeacher("net.deep"), losses={"net.early": "kl_divergence"})
    make_trainer([callback], max_epochs=2).fit(ours, loader)
    make_trainer(max_epochs=2).fit(theirs, loader)
    assert equal(ours, theirs)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_peer_learns_as_much_as_it_teaches(accumulate, step_of, make_trainer, loader):
    given = step_of(plain, net=lambda: network(32, seed=7))
    callback = distillation(PeerTeacher(given))
    ours = step_of(plain)
    make_trainer([callback], max_epochs=2, accumulate_grad_batches=accumulate).fit(ours, loader)

    one, other = network(), network(32, seed=7)
    optimizers = adamw(one.parameters()), adamw(other.parameters())
    for _ in range(2):
        for number, batch in enumerate(loader, start=1):
            first, second = one(batch[0]), other(batch[0])
            lessons = by_hand(first, second.detach()), by_hand(second, first.detach())
            for logits, lesson in zip((first, second), lessons, strict=True):
                (((1 - ALPHA) * task(logits, batch) + ALPHA * lesson) / accumulate).backward()
            if number % accumulate == 0:
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
    assert equal(ours.net, one)
    assert equal(callback.teacher.peer.net, other)
    assert equal(given.net, network(32, seed=7))  # what the user gave is as it was
