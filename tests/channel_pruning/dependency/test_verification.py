"""Numbers that follow a group are those it needs, wherever layers are kept; compiled parts are cut as others are."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_compress.channel_pruning.cut_plan import plan_cut
from lightning_compress.channel_pruning.dependency.graph import build_dependency_graph
from lightning_compress.channel_pruning.dependency.verification import verified_groups, verify_cut
from lightning_compress.nn.surgery import cut_model


class Attention(nn.Module):
    """Four heads of eight; `depth` and `log_every` are other numbers that a head's number divides."""

    def __init__(self, around=lambda layer: layer):
        super().__init__()
        self.num_heads, self.depth, self.log_every = 4, 4, 8
        self.embed, self.head = nn.Linear(6, 24), nn.Linear(24, 5)
        self.qkv, self.out = around(nn.Linear(24, 96)), around(nn.Linear(32, 24))

    def forward(self, x):
        x = self.embed(x)
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, 8)).permute(2, 0, 3, 1, 4)
        return self.head(x + self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize(
    "around", [lambda layer: layer, nn.Sequential, lambda layer: nn.Sequential(nn.Sequential(layer))]
)
def test_only_the_number_that_the_code_needs_follows(around):
    torch.manual_seed(0)
    model, example = Attention(around), torch.randn(2, 7, 6)
    groups = verified_groups(model, example, build_dependency_graph(model, example))
    [heads] = [one for one in groups if one.name.startswith("qkv")]
    assert heads.unprunable_reason is None
    assert [(one.module, one.name, one.repeat) for one in heads.attributes] == [("", "num_heads", 1)]
    cut_model(model, plan_cut(groups, {heads.name: (1,)}))
    assert (model.num_heads, model.depth, model.log_every) == (3, 4, 8)
    assert model(example).shape == (2, 7, 5)


@pytest.mark.parametrize("which", ["a layer", "a block", "everything"])
def test_compiled_parts_are_cut_as_others_are(which):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU())
    if which == "a layer":
        block[0] = torch.compile(block[0], backend="eager")
    if which == "a block":
        block = torch.compile(block, backend="eager")
    model, example = nn.Sequential(block, nn.Linear(8, 3)), torch.randn(4, 5)
    if which == "everything":
        model = torch.compile(model, backend="eager")
    groups = verified_groups(model, example, build_dependency_graph(model, example))
    assert [(one.name, one.units, one.unprunable_reason is None) for one in groups] == [
        ("0.0", 8, True),
        ("1", 3, False),
    ]
    assert verify_cut(model, example, groups, {"0.0": (1, 6)}) is None
    cut_model(model, plan_cut(groups, {"0.0": (1, 6)}))
    layers = [one for one in model.modules() if isinstance(one, nn.Linear)]
    assert [(one.in_features, one.out_features) for one in layers] == [(5, 6), (6, 3)]
    assert model(example).shape == (4, 3)
