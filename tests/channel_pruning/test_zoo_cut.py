"""Every architecture of the zoo is cut to half where it can be, and computes what it should, or stays as it was."""

import copy

import pytest
import torch
from torch import nn

from lightning_compress.channel_pruning.cut_plan import plan_cut
from lightning_compress.channel_pruning.dependency.graph import build_dependency_graph
from lightning_compress.channel_pruning.dependency.verification import verified_groups, verify_cut
from lightning_compress.nn.surgery import cut_model
from tests.channel_pruning.zoo import ZOO, call, tensors

# Which architectures have layers that stay whole although nobody asks for their outputs, and how many such groups.
PARTLY_WHOLE = {
    "cross_attention": 1, "gru_cell_loop": 1, "gru_on_embedding": 1, "hard_coded_heads": 1,
    "hard_coded_slice": 1, "hard_coded_view": 1, "lstm_on_cnn": 1, "mlp_mixer": 1, "nonlocal_attention": 1,
    "padded_shortcut": 1, "shufflenet": 10, "softmax_over_channels": 1, "stacked_branches": 1,
    "torch_transformer": 1, "custom_linear": 1, "wavenet": 3, "maxout": 4,
}  # fmt: skip
NOTHING_TO_CUT = {
    "custom_linear", "gru_cell_loop", "nonlocal_attention", "softmax_over_channels", "spectral_norm",
    "stacked_branches", "weight_norm",
}  # fmt: skip
every_architecture = pytest.mark.parametrize("name", ZOO)


def build(name):
    torch.manual_seed(0)
    model, example = ZOO[name]()
    return model, example, verified_groups(model, example, build_dependency_graph(model, example))


def half(groups):
    return {
        one.name: tuple(range(0, one.units, 2)) for one in groups if one.unprunable_reason is None and one.units > 1
    }


@every_architecture
def test_it_is_cut_to_half_and_trains_on(name):
    model, example, groups = build(name)
    gone, before = half(groups), copy.deepcopy(model.state_dict())
    assert (not gone) == (name in NOTHING_TO_CUT), [(one.name, one.unprunable_reason) for one in groups]
    shapes = [one.shape for one in tensors(call(model, example))]
    parameters = sum(one.numel() for one in model.parameters())
    model.load_state_dict(before)
    assert verify_cut(model, example, groups, gone) is None
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())  # a trial changes nothing
    if not gone:
        return
    cut_model(model, plan_cut(groups, gone))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outputs = list(tensors(call(model, example)))
    assert [one.shape for one in outputs] == shapes
    sum(one.float().square().mean() for one in outputs if one.is_floating_point()).backward()
    weights = [one.detach().clone() for one in model.parameters()]
    optimizer.step()
    assert any(not torch.equal(old, new) for old, new in zip(weights, model.parameters(), strict=True))
    assert sum(one.numel() for one in model.parameters()) < parameters


@every_architecture
def test_what_stays_whole_is_known(name):
    _, _, groups = build(name)
    whole = [
        one
        for one in groups
        if one.unprunable_reason is not None and one.unprunable_reason != "it reaches the module's output"
    ]
    assert len(whole) == PARTLY_WHOLE.get(name, 0), [(one.name, one.unprunable_reason) for one in whole]


@pytest.mark.parametrize(
    "name", ["resnet_basic", "densenet", "inception", "mobilenet_v2", "unet", "coordconv", "lenet5"]
)
def test_a_cut_module_equals_the_whole_one_with_those_channels_multiplied_by_zero(name):
    """Not by zeros in weights, as the product checks itself, but by hooks on what layers are given."""
    model, example, groups = build(name)
    gone = half(groups)
    model.eval()
    silent = copy.deepcopy(model)
    for group in groups:
        for member in group.consumers:
            dead = [channel for channel, unit in enumerate(member.units) if unit in gone.get(group.name, ())]
            silent.get_submodule(member.axis.module).register_forward_pre_hook(
                lambda layer, args, dead=dead: args[0].index_fill(
                    -1 if isinstance(layer, nn.Linear) else 1, torch.tensor(dead), 0
                )
            )
    cut_model(model, plan_cut(groups, gone))
    for expected, found in zip(tensors(call(silent, example)), tensors(call(model, example)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_attention_loses_whole_heads_and_knows_how_many_are_left():
    model, _example, groups = build("transformer_square")  # as many heads as each is wide
    cut_model(model, plan_cut(groups, half(groups)))
    attention = model.get_submodule("blocks.0.attention")
    assert (attention.num_heads, attention.head_dim) == (3, 6)
    assert attention.query.out_features == 18


def test_the_line_that_depends_on_a_width_is_named():
    _, _, groups = build("hard_coded_heads")
    [why] = [one.unprunable_reason for one in groups if one.name == "qkv"]
    assert "zoo_corners.py, line" in why
