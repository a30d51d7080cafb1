"""What cannot be done is refused in words, before the weights change."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import AveragedTeacher, Distillation, PeerTeacher
from tests.contract.settings import Peer
from tests.distillation.by_hand import (
    equal,
    network,
    plain,
    weights,
)
from tests.distillation.test_kinds_of_teachers import PlainTeacher


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"temperature": 0}, r"temperature .* above 0, but is 0"),
        ({"temperature": -1.0}, "is -1.0"),
        ({"final_temperature": 0.0}, "final_temperature"),
        ({"alpha": 1.5}, r"in \[0, 1\], but is 1.5"),
        ({"alpha": True}, "but is True"),
        ({"losses": "kl_divergance"}, "Did you mean 'kl_divergence'"),
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
        ({"cache": "x", "cache_form": "int4"}, "int4"),
    ],
)
def test_bad_arguments_are_refused_at_construction(arguments, words, teacher):
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
        ({"teacher": AveragedTeacher(), "cache": "x"}, "AveragedTeacher changes during training"),
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
