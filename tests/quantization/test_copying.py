"""Copies of models that torch can copy; others are refused with the way out."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lightning_compress import quantize


def test_a_weight_that_a_hook_of_torch_computes_is_refused_until_it_is_permanent():
    model = nn.Sequential(nn.Linear(4, 4), prune.l1_unstructured(nn.Linear(4, 2), "weight", 0.5))
    batches = [torch.ones(2, 4)]
    with pytest.raises(ValueError, match=r"'1' holds 'weight', which was computed .*prune\.remove"):
        quantize(model, batches)
    prune.remove(model[1], "weight")
    found = quantize(model, batches)
    assert torch.equal(found[1].weight, model[1].weight)
