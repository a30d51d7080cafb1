"""Which module is the student, and which part of its output its logits."""

import pytest
from torch import nn

from tests.distillation.by_hand import (
    close,
    distillation,
    equal,
    network,
    task,
    with_teacher,
)


class Named(dict):
    """As Hugging Face's outputs: a mapping with attributes."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


class Wrapped(nn.Module):
    """A network whose input and output look otherwise."""

    def __init__(self, net, shape):
        super().__init__()
        self.inner, self.shape = net, shape

    def forward(self, x=None, **named):
        logits = self.inner(named["inputs"] if x is None else x)
        if self.shape == "hugging face":
            return Named(loss=logits.sum(), logits=logits)
        return {"dict": {"out": logits, "aux": logits * 2}, "tuple": (logits, None)}.get(self.shape, logits)


@pytest.mark.parametrize("shape", ["hugging face", "dict", "tuple"])
@pytest.mark.parametrize("by_keyword", [False, True], ids=["positional", "keyword"])
def test_outputs_and_inputs_of_every_shape(shape, by_keyword, teacher, step_of, make_trainer, loader):
    def logits(module, batch):
        output = module(inputs=batch[0]) if by_keyword else module(batch[0])
        return {"hugging face": lambda: output.logits, "dict": lambda: output["out"], "tuple": lambda: output[0]}[
            shape
        ]()

    ours = step_of(lambda self, batch: task(logits(self.net, batch), batch), net=lambda: Wrapped(network(), shape))
    theirs = step_of(with_teacher(teacher))
    make_trainer([distillation(Wrapped(teacher, shape))], max_epochs=2).fit(ours, loader)
    make_trainer(max_epochs=2).fit(theirs, loader)
    assert equal(ours, theirs)


def test_the_part_of_an_output_may_be_named(teacher, step_of, make_trainer, loader):
    ours = step_of(
        lambda self, batch: task(self.net(batch[0])["aux"] / 2, batch), net=lambda: Wrapped(network(), "dict")
    )
    theirs = step_of(with_teacher(teacher))
    answer = lambda x: {"aux": teacher(x)}
    make_trainer([distillation(answer, output=lambda out: out["aux"] / (2 if "out" in out else 1))], max_epochs=2).fit(
        ours, loader
    )
    make_trainer(max_epochs=2).fit(theirs, loader)
    assert close(ours, theirs)


def test_the_modules_own_forward_is_the_student_if_the_step_calls_it(teacher, step_of, make_trainer, loader):
    ours = step_of(lambda self, batch: task(self(batch[0]), batch), forward=lambda self, x: self.net(x))
    theirs = step_of(with_teacher(teacher))
    make_trainer([distillation(teacher)], max_epochs=2).fit(ours, loader)
    make_trainer(max_epochs=2).fit(theirs, loader)
    assert equal(ours, theirs)


def test_losses_and_metrics_that_are_modules_are_not_taken_for_students(teacher, pl, step_of, make_trainer, loader):
    from torchmetrics.classification import MulticlassAccuracy

    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.criterion = network(), nn.CrossEntropyLoss()
            self.accuracy = MulticlassAccuracy(3)

    def step(self, batch):
        logits = self.net.student(batch[0] + 0.0)  # what it is given is not the batch itself
        self.net.accuracy(logits, batch[1])
        return self.net.criterion(logits, batch[1])

    ours, theirs = step_of(step, net=Parts), step_of(with_teacher(teacher))
    make_trainer([distillation(teacher)], max_epochs=2).fit(ours, loader)
    make_trainer(max_epochs=2).fit(theirs, loader)
    assert equal(ours, theirs)


def parts_in_turn(self, batch):
    return task(self.net[2](self.net[1](self.net[0](batch[0]))), batch)


def test_several_modules_in_turn_are_refused_with_their_names(teacher, step_of, make_trainer, loader):
    with pytest.raises(ValueError, match=r"several modules in turn: 'net.0', 'net.1', 'net.2'.*student='net.0'"):
        make_trainer([distillation(teacher)], max_epochs=1).fit(step_of(parts_in_turn), loader)


def test_several_modules_in_turn_work_as_the_refusal_says(teacher, step_of, make_trainer, loader):
    ours, theirs = step_of(parts_in_turn), step_of(with_teacher(teacher))
    callback = distillation(teacher, student="net.0", losses={("net.2", "output"): "kl_divergence"})
    make_trainer([callback], max_epochs=2).fit(ours, loader)
    make_trainer(max_epochs=2).fit(theirs, loader)
    assert equal(ours, theirs)


def test_a_forward_that_is_not_a_call_is_refused_in_words(teacher, step_of, make_trainer, loader):
    with pytest.raises(ValueError, match=r"modules called: none.*not seen"):
        make_trainer([distillation(teacher)], max_epochs=1).fit(
            step_of(lambda self, batch: task(self.net.forward(batch[0]), batch), net=lambda: nn.Linear(8, 3)), loader
        )
