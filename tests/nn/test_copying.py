"""Copies of models that torch alone cannot copy."""

import torch
from torch import nn
from torch.nn.utils import prune

from lightning_compress.nn.copying import copy_without_hooks, unwrap_compiled


def test_a_weight_that_a_hook_of_torch_computes_is_computed_in_the_copy_too():
    model = nn.Sequential(nn.Linear(4, 4), prune.l1_unstructured(nn.Linear(4, 2), "weight", 0.5))
    made, numbers = model[1].weight, torch.ones(2, 4)
    copy = copy_without_hooks(model)
    assert model[1].weight is made
    assert torch.equal(copy(numbers), model(numbers))
    copy[1].weight_orig.data.mul_(2)
    assert not torch.equal(copy[1](numbers), model[1](numbers))


def test_what_is_compiled_and_stands_there_twice_is_plain_in_both_places():
    part = torch.compile(nn.Linear(4, 4), backend="eager")
    model = unwrap_compiled(nn.Sequential(part, nn.ReLU(), part))
    assert [type(one) for one in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert model[0] is model[2]
