"""A group of ours in the user's optimizer leaves the user's groups, schedulers and state as they were."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from lightning_compress.nn.optimizer_groups import extra_param_group

SCHEDULERS = {
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, 2, 0.5),
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, [lambda step: 0.9**step, lambda step: 0.5**step]),
    "multiplicative": lambda optimizer: lr_scheduler.MultiplicativeLR(optimizer, [lambda _: 0.9, lambda _: 0.5]),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, [0.1, 0.2], total_steps=12),
    "cyclic": lambda optimizer: lr_scheduler.CyclicLR(optimizer, [0.01, 0.02], [0.1, 0.2], step_size_up=3),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 10),
    "restarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 4),
    "plateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, min_lr=[1e-3, 2e-3]),
    "sequential": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.LinearLR(optimizer, 0.1), lr_scheduler.ExponentialLR(optimizer, 0.9)], [3]
    ),
    "chained": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    ),
}


class KeepsValues:
    """As timm has it: no scheduler of torch's, with a value of its own for each group."""

    def __init__(self, optimizer):
        self.optimizer, self.base_values, self.steps = optimizer, [one["lr"] for one in optimizer.param_groups], 0

    def step(self):
        self.steps += 1
        for group, value in zip(self.optimizer.param_groups, self.base_values, strict=True):
            group["lr"] = value * 0.9**self.steps


SCHEDULERS["of its own kind"] = KeepsValues


def weights():
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))


def sgd(first, second):
    groups = [{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.2, "weight_decay": 0.1}]
    return torch.optim.SGD(groups, momentum=0.9)


def train(optimizer, scheduler, parameters, steps):
    rates = []
    for _ in range(steps):
        optimizer.zero_grad()
        sum(parameter.sum() for parameter in parameters).backward()
        optimizer.step()
        plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
        scheduler.step(1.0) if plateau else scheduler.step()
        rates.append([group["lr"] for group in optimizer.param_groups])
    return rates


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_the_users_groups_train_as_if_nobody_had_joined_and_ours_follows_the_second(kind):
    alone = weights()
    optimizer = sgd(*alone)
    wanted = train(optimizer, SCHEDULERS[kind](optimizer), alone, 8)
    beside, ours = weights(), nn.Parameter(torch.ones(()))
    optimizer = sgd(*beside)
    scheduler = SCHEDULERS[kind](optimizer)
    found = train(optimizer, scheduler, beside, 2)
    with extra_param_group(optimizer, [scheduler], {"step": ours}, beside[1], weight_decay=0.0):
        found += train(optimizer, scheduler, [*beside, ours], 4)
    found += train(optimizer, scheduler, beside, 2)
    assert [rates[:2] for rates in found] == wanted
    assert all(rates[2] == rates[1] for rates in found[2:6])
    assert all(torch.equal(one, other) for one, other in zip(alone, beside, strict=True))
    assert float(ours.detach()) < 1.0


def test_ours_has_no_decay_where_the_group_it_is_like_has():
    first, second = weights()
    optimizer, ours = sgd(first, second), nn.Parameter(torch.ones(()))
    with extra_param_group(optimizer, [], {"step": ours}, second, weight_decay=0.0):
        assert optimizer.param_groups[2]["weight_decay"] == 0.0
        assert optimizer.param_groups[1]["weight_decay"] == 0.1


def test_a_group_may_come_where_it_was_before_and_follows_its_own_all_the_same():
    first, second = weights()
    optimizer, ours = sgd(first, second), nn.Parameter(torch.ones(()))
    scheduler = SCHEDULERS["lambda"](optimizer)
    with extra_param_group(optimizer, [scheduler], {"step": ours}, second, place=1):
        (rates,) = train(optimizer, scheduler, [first, second, ours], 1)
        assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1, 1]
        assert optimizer.param_groups[1]["params"][0] is ours
    assert rates == [0.1 * 0.9, 0.2 * 0.5, 0.2 * 0.5]
    assert optimizer.param_groups[1]["params"][0] is second
    assert len(scheduler.lr_lambdas) == len(scheduler.base_lrs) == 2


def test_afterwards_optimizer_and_scheduler_are_as_they_were():
    parameters, ours = weights(), nn.Parameter(torch.ones(()))
    optimizer = sgd(*parameters)
    scheduler = SCHEDULERS["lambda"](optimizer)
    groups, lists = len(optimizer.param_groups), [list(scheduler.base_lrs), list(scheduler.lr_lambdas)]
    with extra_param_group(optimizer, [scheduler], {"step": ours}, parameters[0]):
        train(optimizer, scheduler, [*parameters, ours], 2)
        assert ours in optimizer.state
    assert len(optimizer.param_groups) == groups
    assert [scheduler.base_lrs, scheduler.lr_lambdas] == lists
    assert ours not in optimizer.state


def test_a_state_that_was_loaded_meanwhile_is_left_too():
    parameters, ours = weights(), nn.Parameter(torch.ones(()))
    optimizer = sgd(*parameters)
    scheduler = SCHEDULERS["step"](optimizer)
    with extra_param_group(optimizer, [scheduler], {"step": ours}, parameters[0]):
        train(optimizer, scheduler, [*parameters, ours], 2)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        scheduler.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    assert len(optimizer.param_groups) == 2
    assert len(scheduler.base_lrs) == 2


def test_groups_with_names_get_a_named_one():
    first, second = weights()
    optimizer = torch.optim.AdamW([("first", first), ("second", second)])
    ours = nn.Parameter(torch.ones(()))
    with extra_param_group(optimizer, [], {"step": ours}, first):
        assert optimizer.param_groups[1]["param_names"] == ["step"]


def test_other_optimizers_schedulers_are_left_alone():
    first, second = weights()
    mine, other = torch.optim.SGD([first], lr=0.1), torch.optim.SGD([second], lr=0.1)
    scheduler = lr_scheduler.StepLR(other, 1)
    with extra_param_group(mine, [scheduler], {"step": nn.Parameter(torch.ones(()))}, first):
        assert scheduler.base_lrs == [0.1]
