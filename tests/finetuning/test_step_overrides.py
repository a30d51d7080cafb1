"""Within a step groups are split; before and after it they are the user's own."""

import pytest
import torch
from torch import nn

from lightning_compress import FineTuning
from lightning_compress.finetuning.step_overrides import override_param_groups, split_param_groups
from tests.conftest import sgd
from tests.finetuning.by_hand import equal

OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01, amsgrad=True),
    "adamw-foreach": lambda groups: torch.optim.AdamW(groups, lr=0.01, foreach=True),
    "adamw-fused": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.01, lr_decay=0.1),
    "nadam": lambda groups: torch.optim.NAdam(groups, lr=0.01),
    "radam": lambda groups: torch.optim.RAdam(groups, lr=0.01),
    "adamax": lambda groups: torch.optim.Adamax(groups, lr=0.01),
    "asgd": lambda groups: torch.optim.ASGD(groups, lr=0.01),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.01),
    "rprop": lambda groups: torch.optim.Rprop(groups, lr=0.01),
}


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(4, 3, generator=generator)) for _ in range(3)]


def gradients(several, step):
    generator = torch.Generator().manual_seed(step)
    for one in several:
        one.grad = torch.randn(4, 3, generator=generator)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_parameter_is_stepped_as_in_a_group_of_its_own(make):
    ours, theirs = parameters(), parameters()
    factors = dict(zip(ours, (0.5, 1.0, 2.0), strict=True))
    optimizer, apart = make(ours), make([{"params": [one]} for one in theirs])
    for group, factor in zip(apart.param_groups, (0.5, 1.0, 2.0), strict=True):
        group["lr"] *= factor
    values = lambda place, group, parameter: {"lr": group["lr"] * factors[parameter]}
    groups = list(optimizer.param_groups)
    with override_param_groups(optimizer, lambda: values, lambda: []):
        for step in range(5):
            gradients(ours, step), gradients(theirs, step)
            optimizer.step(), apart.step()
            assert all(one is other for one, other in zip(optimizer.param_groups, groups, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert [len(group["params"]) for group in optimizer.param_groups] == [3]


def test_equal_settings_stay_together_and_names_go_along():
    several = parameters()
    optimizer = sgd([(f"p{place}", one) for place, one in enumerate(several)])
    (group,) = optimizer.param_groups
    parts = split_param_groups(0, group, lambda _, group, one: {"lr": 0.5 if one is several[1] else group["lr"]})
    assert [(part["lr"], part["param_names"]) for part in parts] == [(0.1, ["p0", "p2"]), (0.5, ["p1"])]
    assert [len(part["params"]) for part in parts] == [2, 1]
    assert split_param_groups(0, group, lambda *_: {"lr": 0.1, "weight_decay": 0.01}) == [group]
    assert split_param_groups(0, {**group, "params": [], "param_names": []}, lambda *_: {"lr": 0.5})[0]["params"] == []


def test_a_rate_that_is_a_tensor_stays_one_and_the_same():
    several, rate = parameters(), torch.tensor(0.1)
    optimizer = torch.optim.AdamW(several, lr=rate, foreach=False)
    values = lambda place, group, one: {"lr": float(group["lr"]) * (0.5 if one is several[0] else 1.0)}
    with override_param_groups(optimizer, lambda: values, lambda: []):
        gradients(several, 0)
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate == torch.tensor(0.1)


def test_what_an_optimizer_writes_into_its_group_stays():
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                group["count"] = group.get("count", 0) + 1
            super().step(closure)

    several = parameters()
    optimizer = Counting(several, lr=0.1)
    values = lambda place, group, one: {"lr": 0.5 if one is several[0] else 0.1}
    with override_param_groups(optimizer, lambda: values, lambda: []):
        for step in range(3):
            gradients(several, step)
            optimizer.step()
    assert optimizer.param_groups[0]["count"] == 3


def test_a_closure_sees_the_users_groups_and_an_exception_leaves_them():
    several, seen = parameters(), []
    optimizer = sgd(several)

    def closure(fails=False):
        seen.append([(group["lr"], len(group["params"])) for group in optimizer.param_groups])
        gradients(several, 0)
        if fails:
            raise RuntimeError("power cut")
        return torch.tensor(1.0)

    values = lambda place, group, one: {"lr": 0.5 if one is several[0] else 0.2}
    with override_param_groups(optimizer, lambda: values, lambda: []):
        before = several[0].detach().clone()
        assert optimizer.step(closure) == 1.0
        optimizer.step(closure=closure)
        with pytest.raises(RuntimeError, match="power cut"):
            optimizer.step(lambda: closure(fails=True))
    assert seen == [[(0.1, 3)]] * 3
    assert not torch.equal(several[0], before)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_step_that_fails_half_way_leaves_the_users_groups_when_all_is_over():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("power cut")

    optimizer = Failing(parameters(), lr=0.1)
    with (
        pytest.raises(RuntimeError, match="power cut"),
        override_param_groups(optimizer, lambda: lambda *_: {"lr": 9.0}, list),
    ):
        optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.1]


def lbfgs(rate):
    return lambda several: torch.optim.LBFGS(several, lr=rate, max_iter=3)


def test_lbfgs_takes_one_rate_for_all(make_module, make_trainer, loader):
    module, by_hand = make_module(lbfgs(0.02)), make_module(lbfgs(0.01))
    make_trainer([FineTuning(learning_rate="x0.5")], max_epochs=1).fit(module, loader)
    make_trainer(max_epochs=1).fit(by_hand, loader)
    assert equal(module, by_hand)
