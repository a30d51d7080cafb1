"""What is refused, when, and in which words."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from lightning_compress import FineTuning, Recipe
from tests.conftest import sgd


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "FineTuning does nothing without one of freeze, unfreeze, learning_rate"),
        ({"learning_rate": 0}, "learning_rate is a number above 0, a factor such as 'x0.1', 'restart', .*but is 0"),
        ({"learning_rate": -0.1}, "learning_rate is a number above 0"),
        ({"learning_rate": True}, "learning_rate is a number above 0"),
        ({"learning_rate": "x0"}, "learning_rate is a number above 0"),
        ({"learning_rate": "restrat"}, "but is 'restrat'"),
        ({"learning_rate": float("nan")}, "learning_rate is a number above 0"),
        ({"learning_rate": "rewind"}, "learning_rate='rewind' needs a moment. Write learning_rate='rewind 5%'"),
        ({"learning_rate": "rewind soon"}, "'soon' is no duration"),
        ({"rewind": "5%"}, "rewind='5%' is not before begin='0%'"),
        ({"rewind": "20%", "begin": "10%"}, "rewind='20%' is not before begin='10%'"),
        ({"rewind": 10, "begin": 10}, "rewind=10 is not before begin=10"),
        ({"learning_rate": "rewind 20%", "begin": "10%"}, "is not before begin='10%'"),
        ({"layer_decay": 0}, "layer_decay is a number above 0, but is 0"),
        ({"lr_multipliers": {"net.0": 0}}, r"To let these stand still, write freeze=\['net.0'\]"),
        ({"lr_multipliers": {"net.0": "small"}}, r"lr_multipliers\['net.0'\] is a number above 0, but is 'small'"),
        ({"lr_multipliers": 0.1}, "lr_multipliers is a mapping"),
        ({"weight_decay": -1}, "weight_decay is a number of at least 0, a factor such as 'x0.1', but is -1"),
        ({"gradual": True}, "gradual=True unfreezes what is frozen"),
        ({"learning_rate": 0.1, "layers": ["net.0"]}, "layers are for gradual=True and layer_decay"),
        ({"recalibrate_bn": "middle"}, "recalibrate_bn is 'begin' or 'end', but is 'middle'"),
        ({"recalibrate_bn": "end"}, "recalibrate_bn='end' needs batches after end='100%'"),
        ({"freeze": "net.0", "begin": "70%", "end": "10%"}, "begin='70%' is not before end='10%'"),
        ({"freeze": ""}, "'' is no pattern"),
        ({"warmup": "20%", "end": "10%"}, "warmup='20%' is longer than the phase"),
        ({"warmup": "soon"}, "'soon' is no duration"),
    ],
)
def test_refuses_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        FineTuning(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"freeze": "backbone.*"}, "freeze: 'backbone.*' matches no parameter. There are net.0.weight, net.0.bias"),
        ({"freeze": "net.0", "unfreeze": "net.0.wieght"}, "Did you mean 'net.0.weight'"),
        ({"lr_multipliers": {"head.*": 2.0}}, "lr_multipliers: 'head.*' matches no parameter"),
        ({"layer_decay": 0.5, "layers": ["net.0"]}, "layers: net.2.weight, net.2.bias belong to no layer"),
        (
            {"freeze": "*"},
            r"freeze='\*' leaves nothing to train. Name in unfreeze what shall learn, such as unfreeze=\['net.2'",
        ),
        ({"rewind": 10, "begin": "50%"}, "rewind=10 is moment 10 and begin='50%' is moment 8 of this run"),
        ({"warmup": 10, "end": "50%"}, "warmup=10 is 10 steps, but the phase from begin='0%' to end='50%' has only 8"),
        ({"recalibrate_bn": "begin"}, "the module has no BatchNorm"),
    ],
)
def test_refuses_before_the_first_step(arguments, message, make_module, make_trainer, loader):
    module, trainer = make_module(sgd), make_trainer([FineTuning(**arguments)], max_epochs=2)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, loader)
    assert trainer.global_step == 0
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize(
    "first", [{"freeze": "net.0"}, {"learning_rate": 0.1}, {"lr_multipliers": {"net.0.weight": 2.0}}]
)
def test_refuses_two_phases_that_overlap_on_one_parameter(first, make_module, make_trainer, loader):
    phases = [FineTuning(end="60%", **first), FineTuning(warmup=2, begin="50%", name="second")]
    with pytest.raises(ValueError, match=r"'finetuning' \('0%' to '60%'\) and 'second' .* would both be about net.0"):
        make_trainer(phases, max_epochs=2).fit(make_module(), loader)


def test_phases_may_follow_each_other_or_share_the_model(make_module, make_trainer, loader):
    phases = [
        FineTuning(freeze="net.0", end="50%"),
        FineTuning(lr_multipliers={"net.2": 0.5}, weight_decay=None, end="50%", name="beside"),
        FineTuning(learning_rate="restart", warmup=2, begin="50%", name="after"),
    ]
    make_trainer(phases, max_epochs=2).fit(make_module(), loader)


def test_refuses_what_an_optimizer_cannot_do(make_module, make_trainer, loader):
    lbfgs, rprop = torch.optim.LBFGS, torch.optim.Rprop
    for optimizer, arguments, message in (
        (lbfgs, {"layer_decay": 0.5}, "LBFGS moves all parameters along one line"),
        (rprop, {"weight_decay": 0.1}, "weight_decay cannot be changed: Rprop has none"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer([FineTuning(**arguments)], max_epochs=2).fit(make_module(optimizer), loader)


def test_refuses_to_thaw_what_no_optimizer_has(make_module, make_trainer, loader):
    class Filtered(make_module):
        def configure_optimizers(self):
            return sgd([parameter for parameter in self.parameters() if parameter.requires_grad])

    module = Filtered()
    module.net[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"unfreeze: net.0.weight, net.0.bias belong to no optimizer"):
        make_trainer([FineTuning(unfreeze="net.0")], max_epochs=2).fit(module, loader)


def test_refuses_to_restart_what_cannot_be_copied(make_module, make_trainer, loader):
    class Bound(lr_scheduler.StepLR):
        def __deepcopy__(self, memo):
            raise TypeError("cannot pickle a socket")

    class Scheduled(make_module):
        def configure_optimizers(self):
            optimizer = sgd(self.parameters())
            return [optimizer], [Bound(optimizer, 1)]

    with pytest.raises(ValueError, match=r"Bound cannot be copied: cannot pickle a socket. Write a number"):
        make_trainer([FineTuning(learning_rate="restart")], max_epochs=2).fit(Scheduled(), loader)


def test_refuses_a_checkpoint_of_other_arguments(make_module, make_trainer, loader, tmp_path):
    trainer = make_trainer([FineTuning(learning_rate="rewind 1 steps", begin=6)], max_epochs=1)
    trainer.fit(make_module(), loader)
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    other = make_trainer([FineTuning(learning_rate="restart", begin=6)], max_epochs=3)
    with pytest.raises(ValueError, match="the checkpoint was written with another learning_rate"):
        other.fit(make_module(), loader, ckpt_path=tmp_path / "some.ckpt")


def test_a_recipe_names_it_and_its_arguments(tmp_path, make_module, make_trainer, loader):
    path = tmp_path / "phases.yaml"
    path.write_text(
        "callbacks:\n"
        "  - FineTuning: {freeze: ['net.0.*'], begin: 0%, end: 10%}\n"
        "  - Pruning: {final_sparsity: 0.5, begin: 10%, end: 60%}\n"
        "  - FineTuning: {learning_rate: restart, warmup: 5%, begin: 60%, end: 80%, name: recover}\n"
        "  - FineTuning: {lr_multipliers: {'net.0.*': 0.1}, begin: 80%, name: gently}\n"
    )
    callbacks = Recipe.load(path).callbacks()
    assert [one.name for one in callbacks] == ["finetuning", "pruning", "recover", "gently"]
    module = make_module()
    make_trainer(callbacks, max_epochs=3).fit(module, loader)
    assert (module.net[0].weight == 0).sum() == 64
    timeline = Recipe.load(path).timeline(1000)
    assert "recover" in timeline
    path.write_text("callbacks:\n  - FineTuning: {learning_rate: -1}\n")
    with pytest.raises(ValueError, match=r"phases.yaml:2.*learning_rate is a number above 0"):
        Recipe.load(path).callbacks()
    path.write_text("callbacks:\n  - FineTuning: {freze: ['net.0']}\n")
    with pytest.raises(ValueError, match="Did you mean 'freeze'"):
        Recipe.load(path)


def test_the_timeline_tells_of_a_rewind(make_module):
    from lightning_compress.core.phases import Run

    tuning = FineTuning(rewind="5%", begin="40%", end="90%")
    assert tuning.timeline(Run(epochs=None, max_steps=100)) == [
        (5, "remembers the weights"),
        (40, "begins with the weights of 5"),
        (90, "ends"),
    ]


def test_a_norm_frozen_by_its_class_needs_a_norm(make_module, make_trainer, loader):
    with pytest.raises(ValueError, match="matches no parameter"):
        make_trainer([FineTuning(freeze=nn.BatchNorm1d)], max_epochs=1).fit(make_module(), loader)
