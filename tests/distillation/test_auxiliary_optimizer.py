"""What trains along takes the steps that the user's optimizer takes."""

import pytest
import torch
from torch import nn

from lightning_compress.distillation.auxiliary_optimizer import AuxiliaryOptimizer, clone_optimizer, optimizer_of

MAKERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, betas=(0.8, 0.9)),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, amsgrad=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.5),
}


def pair():
    torch.manual_seed(0)
    return nn.Linear(4, 3), nn.Linear(4, 3)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_it_steps_as_the_same_optimizer_would(make):
    model, beside = pair()
    same = nn.Linear(4, 3)
    same.load_state_dict(beside.state_dict())
    followed, reference = make(model.parameters()), make(same.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(followed, 2, 0.1)
    companion, x = AuxiliaryOptimizer(beside, followed), torch.randn(5, 4)
    for _ in range(6):
        for module in (model, beside, same):
            module(x).square().sum().backward()
        reference.param_groups[0]["lr"] = followed.param_groups[0]["lr"]
        followed.step()
        companion.step()
        reference.step()
        reference.zero_grad()
        followed.zero_grad()
        schedule.step()
    assert torch.equal(beside.weight, same.weight)
    assert not torch.equal(beside.weight, pair()[1].weight)


def test_a_scaled_loss_takes_the_same_step():
    model, beside = pair()
    followed, x = MAKERS["sgd"](model.parameters()), torch.randn(5, 4)
    results = []
    for scale in (1.0, 1024.0):
        beside.load_state_dict(pair()[1].state_dict())
        (beside(x).square().sum() * scale).backward()
        AuxiliaryOptimizer(beside, followed).step(scale)
        results.append(beside.weight.detach().clone())
        beside.zero_grad()
    torch.testing.assert_close(*results)


def test_gradients_may_be_forgotten():
    model, beside = pair()
    companion = AuxiliaryOptimizer(beside, MAKERS["sgd"](model.parameters()))
    before = beside.weight.clone()
    beside(torch.randn(2, 4)).sum().backward()
    companion.forget()
    companion.step()
    assert torch.equal(before, beside.weight)


def test_an_optimizer_that_cannot_be_made_again_has_adamw_in_its_place():
    class Odd(torch.optim.SGD):
        def __init__(self, parameters, model, lr):
            super().__init__(parameters, lr=lr)
            self.model = model

    model, beside = pair()
    with pytest.warns(UserWarning, match="Odd cannot be made .*AdamW at the same learning rate"):
        made = clone_optimizer(Odd(model.parameters(), model, lr=0.3), beside.parameters())
    assert type(made) is torch.optim.AdamW
    assert made.param_groups[0]["lr"] == 0.3


def test_the_optimizer_that_holds_a_module_is_found():
    model, beside = pair()
    optimizers = [MAKERS["sgd"](beside.parameters()), MAKERS["adam"](model.parameters())]
    assert optimizer_of(optimizers, model) is optimizers[1]
    assert optimizer_of(optimizers[:1], model) is None
