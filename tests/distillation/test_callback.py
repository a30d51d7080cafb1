"""The distillation callback: equal to the same loss written by hand, whatever the training step looks like."""

import pytest
import torch

from tests.conftest import adamw, sgd
from tests.distillation.by_hand import (
    ALPHA,
    by_hand,
    close,
    distillation,
    equal,
    plain,
    task,
    with_teacher,
)


@pytest.mark.parametrize("optimizer", [sgd, adamw], ids=["sgd", "adamw"])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}, {"gradient_clip_val": 0.1}],
    ids=["plain", "accumulated", "bf16-mixed", "clipped"],
)
def test_it_equals_the_loss_written_by_hand(optimizer, arguments, teacher, step_of, make_trainer, loader):
    ours, theirs = step_of(plain, optimizer=optimizer), step_of(with_teacher(teacher), optimizer=optimizer)
    make_trainer([distillation(teacher)], max_epochs=2, **arguments).fit(ours, loader)
    make_trainer(max_epochs=2, **arguments).fit(theirs, loader)
    assert equal(ours, theirs)
    assert not equal(ours, step_of(plain))


def test_a_step_may_return_a_dict_and_keeps_its_other_entries(teacher, pl, step_of, make_trainer, loader):
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(outputs)

    mine = []

    def step(self, batch):
        mine.append({"loss": plain(self, batch), "shown": torch.tensor(5.0)})
        return mine[-1]

    ours, theirs = step_of(step), step_of(with_teacher(teacher))
    make_trainer([distillation(teacher), Watch()], max_epochs=2).fit(ours, loader)
    make_trainer(max_epochs=2).fit(theirs, loader)
    assert equal(ours, theirs)
    assert all(one["shown"] == 5.0 for one in seen)
    assert mine[0]["loss"] != seen[0]["loss"]  # the user's own dict is left alone


@pytest.mark.parametrize("which", [1, 2], ids=["the first", "the second"])
def test_a_step_may_return_none(which, teacher, step_of, make_trainer, loader):
    def skipping(step):
        count = []

        def skip(self, batch):
            count.append(0)
            loss = step(self, batch)
            return None if len(count) % 3 == which else loss

        return skip

    ours, theirs = step_of(skipping(plain)), step_of(skipping(with_teacher(teacher)))
    make_trainer([distillation(teacher)], max_epochs=2).fit(ours, loader)
    make_trainer(max_epochs=2).fit(theirs, loader)
    assert equal(ours, theirs)


@pytest.mark.parametrize("compiled", ["submodule", "in place", "whole"])
def test_compiled_modules_are_seen(compiled, teacher, step_of, make_trainer, loader):
    def compile_part(module):
        if compiled == "submodule":
            module.net = torch.compile(module.net, backend="eager")
        elif compiled == "in place":
            module.net.compile(backend="eager")
        else:
            module = torch.compile(module, backend="eager")
        return module

    ours, theirs = step_of(plain), step_of(with_teacher(teacher))
    student = "net" if compiled == "whole" else None
    make_trainer([distillation(teacher, student=student)], max_epochs=2).fit(compile_part(ours), loader)
    make_trainer(max_epochs=2).fit(theirs, loader)
    assert equal(ours, theirs)
    torch._dynamo.reset()


def test_a_whole_compiled_module_needs_the_students_name(teacher, step_of, make_trainer, loader):
    with pytest.raises(ValueError, match=r"whole module is compiled.*student='net'"):
        make_trainer([distillation(teacher)], max_epochs=1).fit(torch.compile(step_of(plain), backend="eager"), loader)
    torch._dynamo.reset()


def manual(loss_of):
    def step(self, batch):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss_of(self, batch))
        optimizer.step()

    return step


def test_manual_optimization_gets_the_loss_by_manual_backward(teacher, step_of, make_trainer, loader):
    ours, theirs = step_of(manual(plain), manual=True), step_of(manual(with_teacher(teacher)), manual=True)
    make_trainer([distillation(teacher)], max_epochs=2).fit(ours, loader)
    make_trainer(max_epochs=2).fit(theirs, loader)
    assert equal(ours, theirs)


def two_losses(second):
    def step(self, batch):
        first, other = self.optimizers()
        for optimizer, loss_of in ((first, lambda: self.net(batch[0]).square().mean()), (other, second(self, batch))):
            optimizer.zero_grad()
            self.manual_backward(loss_of())
            optimizer.step()

    return step


def two_optimizers(parameters):
    several = list(parameters)
    return [sgd(several[:2]), adamw(several[2:])]


def test_of_several_optimizers_the_user_names_which(teacher, step_of, make_trainer, loader):
    hand = with_teacher(teacher)
    ours = step_of(two_losses(lambda self, batch: lambda: plain(self, batch)), optimizer=two_optimizers, manual=True)
    theirs = step_of(two_losses(lambda self, batch: lambda: hand(self, batch)), optimizer=two_optimizers, manual=True)
    # The student runs twice in a step: only its last call belongs to the loss that is named.
    make_trainer([distillation(teacher, backward=1)], max_epochs=2).fit(ours, loader)
    make_trainer(max_epochs=2).fit(theirs, loader)
    assert equal(ours, theirs)


def test_several_optimizers_without_a_name_are_refused(teacher, step_of, make_trainer, loader):
    module = step_of(two_losses(lambda self, batch: lambda: plain(self, batch)), optimizer=two_optimizers, manual=True)
    with pytest.raises(ValueError, match="2 optimizers.*backward=0"):
        make_trainer([distillation(teacher)], max_epochs=1).fit(module, loader)


def test_a_backward_of_the_users_own_is_refused_in_words(teacher, step_of, make_trainer, loader):
    def step(self, batch):
        plain(self, batch).backward()
        self.optimizers().step()

    with pytest.raises(ValueError, match="manual_backward.*instead of loss.backward"):
        make_trainer([distillation(teacher)], max_epochs=1).fit(step_of(step, manual=True), loader)


def test_a_named_backward_under_automatic_optimization_is_refused(teacher, step_of, make_trainer, loader):
    with pytest.raises(ValueError, match="backward=0 names one of several"):
        make_trainer([distillation(teacher, backward=0)], max_epochs=1).fit(step_of(plain), loader)


def test_a_student_that_runs_twice_learns_from_both(teacher, step_of, make_trainer, loader):
    def views(batch):
        return batch[0], batch[0] * 1.1

    def twice(self, batch):
        return sum(task(self.net(view), batch) for view in views(batch))

    def twice_by_hand(self, batch):
        logits = [self.net(view) for view in views(batch)]
        lessons = [by_hand(one, teacher(view).detach()) for one, view in zip(logits, views(batch), strict=True)]
        return (1 - ALPHA) * sum(task(one, batch) for one in logits) + ALPHA * (lessons[0] + lessons[1]) / 2

    ours, theirs = step_of(twice), step_of(twice_by_hand)
    make_trainer([distillation(teacher)], max_epochs=1).fit(ours, loader)
    make_trainer(max_epochs=1).fit(theirs, loader)
    assert close(ours, theirs)
