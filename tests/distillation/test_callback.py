"""The distillation callback: equal to the same loss written by hand, whatever the training step looks like."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import AveragedTeacher, BranchTeacher, Distillation, PeerTeacher
from tests.conftest import adamw, sgd
from tests.contract.settings import Peer

ALPHA, TEMPERATURE = 0.7, 3.0


def network(width=16, seed=1):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 3))


def by_hand(student, teacher, temperature=TEMPERATURE):
    """Hinton's second term, written out."""
    p = F.log_softmax(teacher.float() / temperature, -1)
    q = F.log_softmax(student.float() / temperature, -1)
    return F.kl_div(q, p, reduction="batchmean", log_target=True) * temperature**2


def weights(module):
    return [value.detach().clone() for value in module.parameters()]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


def close(one, other):
    """Equal but for the order in which gradients are added up."""
    return all(torch.allclose(a, b, atol=1e-6, rtol=1e-5) for a, b in zip(weights(one), weights(other), strict=True))


@pytest.fixture
def teacher():
    return network(32, seed=7)


@pytest.fixture
def step_of(pl):
    """A factory of modules with a training step of one's own."""

    def make(step, net=network, optimizer=adamw, manual=False, forward=None):
        class Module(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.net = net()
                self.automatic_optimization = not manual

            def training_step(self, batch, batch_idx):
                return step(self, batch)

            def configure_optimizers(self):
                return optimizer(self.parameters())

        if forward is not None:
            Module.forward = forward
        return Module()

    return make


def task(logits, batch):
    return F.cross_entropy(logits, batch[1])


def plain(self, batch):
    return task(self.net(batch[0]), batch)


def with_teacher(teacher, wrap=lambda loss: loss):
    def step(self, batch):
        logits = self.net(batch[0])
        with torch.no_grad():
            answer = teacher(batch[0])
        return wrap((1 - ALPHA) * task(logits, batch) + ALPHA * by_hand(logits, answer))

    return step


def distillation(teacher, **arguments):
    return Distillation(teacher, **{"alpha": ALPHA, "temperature": TEMPERATURE, **arguments})


# Equal, bit for bit, to the loss written by hand --------------------------------------------------------------------


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


# Where the student is -----------------------------------------------------------------------------------------------


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
    callback = distillation(teacher, student="net.0", losses={("net.2", "output"): "soft_targets"})
    make_trainer([callback], max_epochs=2).fit(ours, loader)
    make_trainer(max_epochs=2).fit(theirs, loader)
    assert equal(ours, theirs)


def test_a_forward_that_is_not_a_call_is_refused_in_words(teacher, step_of, make_trainer, loader):
    with pytest.raises(ValueError, match=r"modules called: none.*not seen"):
        make_trainer([distillation(teacher)], max_epochs=1).fit(
            step_of(lambda self, batch: task(self.net.forward(batch[0]), batch), net=lambda: nn.Linear(8, 3)), loader
        )


# Kinds of teachers --------------------------------------------------------------------------------------------------


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
        trained, teacher_class = PlainTeacher(), "tests.distillation.test_callback.PlainTeacher"
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
    callback = distillation(BranchTeacher("net.deep"), losses={"net.early": "soft_targets"})
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


# Losses of layers ---------------------------------------------------------------------------------------------------


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


# When ---------------------------------------------------------------------------------------------------------------


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


# The teacher is a guest ---------------------------------------------------------------------------------------------


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


# What is said -------------------------------------------------------------------------------------------------------


def test_terms_agreement_and_the_teachers_accuracy_are_logged(teacher, pl, step_of, make_trainer, loader):
    module = step_of(plain)
    first = next(iter(loader))
    with torch.no_grad():
        logits, answer = module.net(first[0]), teacher(first[0])
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    callback = distillation(teacher, losses={"output": ["soft_targets", {"loss": "squared_logits", "weight": 0.5}]})
    trainer = make_trainer([callback, Watch()], max_epochs=2, log_every_n_steps=1)
    trainer.fit(module, loader)
    got = {name.removeprefix("compress/distillation/"): value for name, value in seen[0].items()}
    terms = by_hand(logits, answer), 0.5 * F.mse_loss(logits, answer)
    expected = {
        "loss/task": task(logits, first),
        "loss/soft_targets": terms[0],
        "loss/squared_logits": terms[1],
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


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"temperature": 0}, r"temperature .* above 0, but is 0"),
        ({"temperature": -1.0}, "is -1.0"),
        ({"final_temperature": 0.0}, "final_temperature"),
        ({"alpha": 1.5}, r"in \[0, 1\], but is 1.5"),
        ({"alpha": True}, "but is True"),
        ({"losses": "soft_target"}, "Did you mean 'soft_targets'"),
        ({"losses": {}}, "losses is empty"),
        ({"losses": {"output": {"loss": "dkd", "bta": 2}}}, "does not take bta"),
        ({"losses": {"output": {"weight": 2}}}, "has no name"),
        ({"losses": {("a", "b", "c"): "hint"}}, "no place to compare"),
        ({"losses": {"output": {"loss": "hint", "weight": -1}}}, "at least 0, but is -1"),
        ({"losses": {"output": ["hint", "hint"]}}, "hint twice"),
        ({"losses": lambda student, teachers: 0}, "asks for 'teachers'.*Did you mean 'teacher'"),
        ({"teacher_precision": "fp16"}, "Write one of '32', 'bf16', '16'"),
        ({"teacher_weights": [1, 2]}, "2 entries for 1 teachers"),
        ({"begin": "50%", "end": "20%"}, "is not before end"),
        ({"cache": "x", "cache_form": "int4"}, None),
    ],
)
def test_bad_arguments_are_refused_at_construction(arguments, words, teacher, step_of, make_trainer, loader):
    if words is None:
        with pytest.raises(ValueError, match="int4"):
            make_trainer([Distillation(teacher, **arguments)], max_epochs=1).fit(step_of(plain), loader)
        return
    with pytest.raises(ValueError, match=words):
        Distillation(teacher, **arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"teacher": "nowhere/teacher.ckpt", "teacher_class": PlainTeacher}, "no teacher at 'nowhere/teacher.ckpt'"),
        ({"teacher": 3}, "teacher is 3. Give a module"),
        ({"teacher": network(), "student": "nett"}, "no layer 'nett'.*Did you mean 'net'"),
        ({"teacher": network(), "losses": {("net.O", "0"): "hint"}}, "no layer 'net.O'.*Did you mean"),
        ({"teacher": network(), "losses": {("net.0", "zero"): "hint"}}, "no layer 'zero' in Sequential"),
        ({"teacher": network().forward, "losses": {("net.0", "0"): "hint"}}, "function, which has no layers"),
        ({"teacher": nn.Linear(8, 5)}, r"\(8, 3\).*\(8, 5\)"),
        ({"teacher": network(24), "losses": {("net.0", "0"): "hint"}}, r"\(8, 16\).*\(8, 24\)"),
        (
            {"teacher": network(), "losses": lambda student, teacher: student - teacher},
            "shape .8, 3.*a loss is a scalar",
        ),
        ({"teacher": network(), "losses": lambda student, teacher: 3.0}, "returned 3.0"),
        ({"teacher": lambda x: "what"}, "output of type str"),
        ({"teacher": AveragedTeacher(), "cache": "x"}, "AveragedTeacher says something new"),
        (
            {"teacher": PeerTeacher(Peer()), "losses": {("net.0", "net.0"): "vid"}},
            "net.0/vid is made for one direction",
        ),
    ],
)
@pytest.mark.parametrize("begin", ["0%", "50%"])
def test_what_does_not_fit_is_refused_before_the_weights_change(arguments, words, begin, step_of, make_trainer, loader):
    module = step_of(plain)
    with pytest.raises(ValueError, match=words):
        make_trainer([Distillation(**arguments, begin=begin)], max_epochs=1).fit(module, loader)
    assert equal(module, step_of(plain))


def test_a_checkpoint_of_another_class_is_refused_in_words(step_of, make_trainer, loader, tmp_path):
    torch.save(network(5).state_dict(), tmp_path / "other.ckpt")
    callback = Distillation(tmp_path / "other.ckpt", teacher_class=PlainTeacher)
    with pytest.raises(ValueError, match=r"(?s)other.ckpt' does not load into PlainTeacher.*size mismatch"):
        make_trainer([callback], max_epochs=1).fit(step_of(plain), loader)
    with pytest.raises(ValueError, match="say of which class"):
        make_trainer([Distillation(tmp_path / "other.ckpt")], max_epochs=1).fit(step_of(plain), loader)


def test_nan_from_the_teacher_stops_the_run_before_the_weights_change(step_of, pl, make_trainer, loader):
    class Ill(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return torch.full((len(x), 3), float("nan")) if self.calls == 4 else torch.ones(len(x), 3)

    before = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            before[:] = weights(pl_module)

    module = step_of(plain)
    with pytest.raises(ValueError, match="NaN or infinity in 'output' at batch 3"):
        make_trainer([Distillation(Ill()), Watch()], max_epochs=1).fit(module, loader)
    assert all(torch.equal(one, other) for one, other in zip(weights(module), before, strict=True))


def test_a_loss_that_needs_labels_says_so_when_there_are_none(teacher, step_of, make_trainer, loader):
    unlabelled = DataLoader(TensorDataset(loader.dataset.tensors[0]), batch_size=8)
    module = step_of(lambda self, batch: self.net(batch[0]).square().mean())
    with pytest.raises(ValueError, match="'dkd' asks for 'target'.*target=1"):
        make_trainer([Distillation(teacher, losses="dkd")], max_epochs=1).fit(module, unlabelled)
