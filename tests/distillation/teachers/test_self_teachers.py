"""A module that learns from what it was at one moment of the run."""

import copy

import pytest
import torch
from torch import nn

from lightning_compress import Distillation, Recipe
from lightning_compress.core.phases import Run
from lightning_compress.distillation.teachers.self_teachers import SnapshotTeacher
from lightning_compress.nn.channel_cut import Cut
from tests.distillation.by_hand import ALPHA, by_hand, distillation, equal, network, plain, task


def normed():
    return nn.Sequential(network(), nn.BatchNorm1d(3), nn.Dropout(0.0))


@pytest.mark.parametrize(
    ("written", "begin", "taken", "taught", "accumulate"),
    [("25%", "0%", 4, 4, 1), ("1 epochs", "10 steps", 8, 10, 1), ("2 steps", "0%", 2, 2, 2), ("0%", "0%", 0, 0, 1)],
)
def test_it_learns_from_a_copy_that_was_taken_at_that_step(
    written, begin, taken, taught, accumulate, step_of, make_trainer, loader
):
    past = []

    def step(self, batch):
        done = self.trainer.global_step
        if done == taken and not past:
            past.append(copy.deepcopy(self.net).eval())
        logits = self.net(batch[0])
        if done < taught:
            return task(logits, batch)
        return (1 - ALPHA) * task(logits, batch) + ALPHA * by_hand(logits, past[0](batch[0]).detach())

    ours, theirs = step_of(plain, net=normed), step_of(step, net=normed)
    callback = distillation(f"self@{written}", begin=begin)
    make_trainer([callback], max_epochs=2, accumulate_grad_batches=accumulate).fit(ours, loader)
    make_trainer(max_epochs=2, accumulate_grad_batches=accumulate).fit(theirs, loader)
    assert equal(ours, theirs)
    assert all(map(torch.equal, ours.net[1].buffers(), theirs.net[1].buffers()))


class Buffered(nn.Module):
    """A layer with a buffer that no file holds."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 4)
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0, 4.0]), persistent=False)


def test_it_stays_as_wide_as_it_was_also_when_it_is_read_into_a_thin_module():
    cuts = [
        Cut({name: {0: torch.tensor(kept)} for name in ("layer.weight", "layer.bias", "scale")}, now, before)
        for kept, now, before in (
            ([0, 2, 3], {"layer": {"out_features": 3}}, {"layer": {"out_features": 4}}),
            ([1, 2], {"layer": {"out_features": 2}}, {"layer": {"out_features": 3}}),
        )
    ]
    model, thin = Buffered(), Buffered()
    whole, teacher, resumed = copy.deepcopy(model), SnapshotTeacher(), SnapshotTeacher()
    teacher.attach(model, [], None)
    teacher.snapshot()
    thin.layer, thin.scale = nn.Linear(2, 2), torch.zeros(2)
    for cut in cuts:
        teacher.on_channels_pruned(cut)
    resumed.attach(thin, [], None)
    resumed.load_state_dict(teacher.state_dict())
    for one in (teacher, resumed):
        assert one._model_copy.layer.out_features == 4
        assert torch.equal(one._model_copy.layer.weight, whole.layer.weight)
        assert torch.equal(one._model_copy.scale, whole.scale)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"teacher": "self"}, "does not say of when"),
        ({"teacher": "self@ten"}, "'ten' is no duration"),
        ({"teacher": ["self@80%"], "end": "70%"}, "teacher='self@80%' begins to teach at that moment, or later: begin"),
        ({"teacher": "self@10%", "cache": "x"}, "SnapshotTeacher changes during training"),
        ({"teacher": "self@10 steps", "end": "50%"}, "begin='10 steps' is moment 10 and end='50%' is moment 4"),
    ],
)
def test_what_cannot_be_is_refused_before_training(arguments, words, make_module, make_trainer, loader):
    module = make_module()
    with pytest.raises(ValueError) as caught:
        make_trainer([Distillation(**arguments)], max_epochs=1).fit(module, loader)
    assert words in str(caught.value)
    assert equal(module, make_module())


def test_a_moment_that_is_past_is_refused(make_module, make_trainer, loader, tmp_path):
    plainly = make_trainer(max_epochs=1)
    plainly.fit(make_module(), loader)
    plainly.save_checkpoint(tmp_path / "one.ckpt")
    trainer = make_trainer([Distillation("self@2 steps")], max_epochs=2)
    with pytest.raises(ValueError, match="as it was at moment 2 of this run, which is past"):
        trainer.fit(make_module(), loader, ckpt_path=tmp_path / "one.ckpt")


def test_a_trainer_that_goes_on_keeps_its_teacher(pl, make_module, make_trainer, loader):
    callback, past = Distillation("self@2 steps"), []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            if trainer.global_step == 2:
                past.append(copy.deepcopy(pl_module.net))

    module, trainer = make_module(), make_trainer([callback, Watch()], max_epochs=1)
    trainer.fit(module, loader)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader)
    assert equal(callback.distiller.objective.tutors[0].teacher._model_copy.net, past[0])


def test_the_timeline_tells_when_it_is_taken_and_when_it_teaches():
    run = Run(epochs=None, max_steps=100)
    assert Distillation("self@10%", begin="30%").timeline(run) == [
        (10, "the module as it is becomes a teacher"), (30, "begins"), (100, "ends"),
    ]  # fmt: skip
    assert Distillation("self@10%").timeline(run)[1] == (10, "begins")


def test_a_recipe_writes_it_as_it_is(tmp_path):
    (tmp_path / "r.yaml").write_text("callbacks:\n  - Distillation:\n      teacher: self@10%\n")
    (callback,) = Recipe.load(tmp_path / "r.yaml").callbacks()
    assert callback.scheduled_window(Run(epochs=None, max_steps=50)).begin == 5
