"""Groups that observation finds are those that one finds by hand, and those of another library; no trace is left."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_compress.channel_pruning.dependency.graph import build_dependency_graph
from tests.channel_pruning.zoo import ZOO


def seen(model, example):
    """Of each group: units and whether they may leave, by name."""
    return {one.name: (one.units, one.unprunable_reason is None) for one in build_dependency_graph(model, example)}


def group_of(model, example, name):
    [found] = [one for one in build_dependency_graph(model, example) if one.name == name]
    return found


def units_at(group, place):
    """The units of a group's channels at "layer side"."""
    [found] = [one.units for one in group.members if f"{one.axis.module} {one.axis.side}" == place]
    return list(found)


def places(group):
    return {f"{one.axis.module} {one.axis.side}" for one in group.members}


# By hand -------------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.back, self.head = (nn.Linear(a, b) for a, b in ((5, 6), (6, 4), (4, 6), (6, 2)))

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.back(F.relu(self.inner(x))))


def test_a_sum_couples_what_is_added_channel_by_channel():
    model, example = Residual(), torch.randn(3, 5)
    assert seen(model, example) == {"stem": (6, True), "inner": (4, True), "head": (2, False)}
    stream = group_of(model, example, "stem")
    assert places(stream) == {"stem out", "inner in", "back out", "head in"}
    assert all(list(one.units) == [0, 1, 2, 3, 4, 5] for one in stream.members)
    assert places(group_of(model, example, "inner")) == {"inner out", "back in"}


class Concatenated(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 4, 1), nn.Conv2d(7, 2, 1)

    def forward(self, x):
        return self.head(torch.cat([self.left(x), self.right(x)], 1))


def test_a_concatenation_moves_channels_by_what_is_before_them():
    model, example = Concatenated(), torch.randn(2, 2, 3, 3)
    assert units_at(group_of(model, example, "left"), "head in") == [0, 1, 2, -1, -1, -1, -1]
    assert units_at(group_of(model, example, "right"), "head in") == [-1, -1, -1, 0, 1, 2, 3]


def test_a_flatten_makes_as_many_features_of_a_channel_as_it_has_positions():
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Flatten(), nn.Linear(12, 2))
    assert units_at(group_of(model, torch.randn(2, 1, 2, 2), "0"), "2 in") == [0] * 4 + [1] * 4 + [2] * 4


def test_a_depth_wise_layer_with_a_multiplier_makes_neighbours_of_a_channel():
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Conv2d(3, 6, 3, groups=3), nn.Conv2d(6, 2, 1))
    group = group_of(model, torch.randn(2, 1, 4, 4), "0")
    assert units_at(group, "1 channels") == [0, 1, 2]
    assert units_at(group, "2 in") == [0, 0, 1, 1, 2, 2]
    [depth_wise] = [one.axis for one in group.members if one.axis.module == "1"]
    assert {(one.tensor, one.size, one.repeat) for one in depth_wise.slices} == {("1.weight", 6, 2), ("1.bias", 6, 2)}


def test_a_grouped_layer_loses_one_channel_of_every_section():
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.Conv2d(6, 4, 1, groups=2), nn.Conv2d(4, 2, 1))
    example = torch.randn(2, 2, 3, 3)
    assert units_at(group_of(model, example, "0"), "1 in") == [0, 1, 2, 0, 1, 2]
    assert units_at(group_of(model, example, "1"), "2 in") == [0, 1, 0, 1]


def test_pixel_shuffle_makes_one_channel_of_four():
    model = nn.Sequential(nn.Conv2d(1, 12, 1), nn.PixelShuffle(2), nn.Conv2d(3, 2, 1))
    group = group_of(model, torch.randn(2, 1, 2, 2), "0")
    assert units_at(group, "0 out") == [0] * 4 + [1] * 4 + [2] * 4
    assert units_at(group, "2 in") == [0, 1, 2]


class Attention(nn.Module):
    """Two heads of three in a stream of five, query, key and value from one layer, positions added."""

    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.out, self.head = (nn.Linear(a, b) for a, b in ((4, 5), (5, 18), (6, 5), (5, 2)))
        self.position = nn.Parameter(torch.randn(1, 7, 5))

    def forward(self, x):
        x = self.embed(x) + self.position
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
        return self.head(x + self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)))


def test_attention_loses_whole_heads_of_query_key_and_value_together():
    heads = group_of(Attention(), torch.randn(2, 7, 4), "qkv")
    assert (heads.units, heads.unprunable_reason) == (2, None)
    assert units_at(heads, "qkv out") == [0, 0, 0, 1, 1, 1] * 3
    assert units_at(heads, "out in") == [0, 0, 0, 1, 1, 1]


def test_a_bare_parameter_loses_its_index_along_the_dimension_of_the_channels():
    stream = group_of(Attention(), torch.randn(2, 7, 4), "embed")
    assert stream.unprunable_reason is None
    assert "position dim 2" in places(stream)
    assert units_at(stream, "position dim 2") == [0, 1, 2, 3, 4]
    assert not {"position dim 0", "position dim 1"} & places(stream)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.back = nn.Embedding(9, 6), nn.Linear(6, 4), nn.Linear(4, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.embed(x)
        return self.head(x + self.back(self.inner(x)))


def test_tied_weights_lose_the_same_columns_and_keep_their_rows():
    model, example = Tied(), torch.randint(0, 9, (2, 3))
    assert seen(model, example) == {"embed": (6, True), "inner": (4, True), "head": (9, False)}
    assert places(group_of(model, example, "embed")) == {"embed out", "inner in", "back out", "head in"}


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.layer, self.head = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.layer(F.relu(self.layer(self.stem(x)))))


def test_a_layer_that_reads_itself_has_its_inputs_coupled_with_its_outputs():
    group = group_of(Reused(), torch.randn(4, 3), "stem")
    assert places(group) == {"stem out", "layer in", "layer out", "head in"}
    assert all(list(one.units) == [0, 1, 2, 3, 4] for one in group.members)


class CoordConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Conv2d(2, 3, 1), nn.Conv2d(5, 2, 1)

    def forward(self, x):
        plane = torch.linspace(-1, 1, x.shape[-1]).expand(len(x), 2, x.shape[2], -1)
        return self.head(torch.cat([plane, self.first(x)], 1))


def test_channels_that_no_layer_makes_stay_and_move_the_others():
    group = group_of(CoordConv(), torch.randn(2, 2, 4, 4), "first")
    assert units_at(group, "head in") == [-1, -1, 0, 1, 2]


def test_what_goes_into_a_layer_that_is_not_known_stays_with_its_name():
    model = nn.Sequential(nn.Embedding(7, 4), nn.GRU(4, 3, batch_first=True))
    [group] = build_dependency_graph(model, torch.randint(0, 7, (2, 5)))
    assert group.unprunable_reason == "it reaches GRU '1', which is left whole"


def test_a_layer_that_is_never_called_stays():
    model = Residual()
    model.spare = nn.Linear(3, 4)
    assert group_of(model, torch.randn(3, 5), "spare").unprunable_reason == "the module's forward does not call it"


def test_a_lazy_layer_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'1' is lazy.*run one batch"):
        build_dependency_graph(nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2)), torch.randn(2, 3))


# As another library --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "plain_cnn", "cnn_flattened", "mlp", "mlp_batchnorm", "vgg", "lenet5", "resnet_basic", "resnet_preactivation",
        "resnet_bottleneck", "mobilenet_v1", "mobilenet_v2", "densenet", "inception", "unet",
    ],
)  # fmt: skip
def test_every_unit_leaves_with_the_channels_that_torch_pruning_takes(name):
    pruning = pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    model, example = ZOO[name]()
    groups = [one for one in build_dependency_graph(model, example) if one.unprunable_reason is None]
    theirs = copy.deepcopy(model)  # it is left in eval mode
    graph = pruning.DependencyGraph().build_dependency(theirs, example_inputs=example)
    names = {module: key for key, module in theirs.named_modules()}
    compared = 0
    for group in groups:
        maker = group.producers[0]
        root = theirs.get_submodule(maker.axis.module)
        for unit in (0, group.units // 2, group.units - 1):
            ours = {
                (member.axis.module, "in" if member.axis.side == "in" else "out", channel)
                for member in group.members
                for channel, own in enumerate(member.units)
                if own == unit
            }
            channels = [channel for channel, own in enumerate(maker.units) if own == unit]
            found = graph.get_pruning_group(root, graph.get_pruner_of_module(root).prune_out_channels, channels)
            expected = set()
            for dependency, indices in found:
                if (layer := names.get(dependency.target.module)) is not None:
                    taken = graph.is_in_channel_pruning_fn(dependency.handler)
                    # Depth-wise layers and norms have their channels once, whichever side they are asked for.
                    taken &= isinstance(dependency.target.module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)
                    taken &= getattr(dependency.target.module, "groups", 1) == 1
                    expected |= {(layer, "in" if taken else "out", int(index)) for index in indices}
            assert ours == expected, (group.name, unit)
            compared += 1
    assert compared >= 6


# No trace ------------------------------------------------------------------------------------------------------------


class Watched(nn.Module):
    """Mixed modes, a forward of its own on an object, hooks, random numbers, a buffer that the forward moves."""

    def __init__(self, fails=False):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)
        self.register_buffer("calls", torch.zeros(2))
        self.norm.eval()
        self.first.forward = self.first.forward
        self.first.register_forward_hook(lambda *_: None)
        self.first.weight.grad = torch.ones(6, 4)
        self.head.requires_grad_(False)
        self.fails = fails

    def forward(self, x):
        self.calls += 1
        x = self.norm(self.first(x)) + torch.rand(1) + random.random() + np.random.rand()
        if self.fails:
            raise KeyError("mine")
        return self.head(x)


def traces(model):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "modes": [one.training for one in model.modules()],
        "objects": {name: id(one) for name, one in tensors.items()},
        "gradients": {name: (one.requires_grad, id(one.grad)) for name, one in model.named_parameters()},
        "forwards": {name: id(vars(one).get("forward")) for name, one in model.named_modules()},
        "hooks": [(len(one._forward_hooks), len(one._forward_pre_hooks)) for one in model.modules()],
        "attributes": [sorted(vars(one)) for one in model.modules()],
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "grad mode": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_the_observation_is_left(fails):
    model, example = Watched(fails), torch.randn(3, 4)
    before, values = traces(model), copy.deepcopy(model.state_dict())
    given = example.clone()
    if fails:
        with pytest.raises(KeyError, match="mine"):
            build_dependency_graph(model, example)
    else:
        build_dependency_graph(model, example)
    after = traces(model)
    assert [key for key in before if before[key] != after[key]] == []
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert torch.equal(example, given)


def test_a_module_that_writes_into_its_input_does_not_write_into_the_example():
    class Writing(Residual):
        def forward(self, x):
            x.mul_(2.0)
            return super().forward(x)

    example = torch.randn(3, 5, dtype=torch.float64)
    given = example.clone()
    build_dependency_graph(Writing().double(), example)
    assert torch.equal(example, given)


def test_two_observations_find_the_same():
    torch.manual_seed(0)
    model, example = ZOO["mobilenet_v2"]()
    assert build_dependency_graph(model, example) == build_dependency_graph(model, example)


def test_what_the_random_streams_are_at_makes_no_difference():
    model, example = Attention(), torch.randn(2, 7, 4)
    torch.manual_seed(1)
    first = build_dependency_graph(model, example)
    torch.manual_seed(2)
    assert build_dependency_graph(model, example) == first


# In the ways users have their modules --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_module_in_another_precision_has_the_same_groups(dtype):
    model, example = Attention(), torch.randn(2, 7, 4)
    expected = build_dependency_graph(model, example)
    assert build_dependency_graph(model.to(dtype), example.to(dtype)) == expected
    assert {one.dtype for one in model.parameters()} == {dtype}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_off(context):
    model, example = Residual(), torch.randn(3, 5)
    expected = build_dependency_graph(model, example)
    with context():
        assert build_dependency_graph(model, example) == expected


def test_code_that_insists_on_single_precision_is_observed_in_it():
    class Insisting(Residual):
        def forward(self, x):
            if x.dtype != torch.float32:
                raise TypeError("wrong dtype")
            return super().forward(x)

    assert build_dependency_graph(Insisting(), torch.randn(3, 5)) == build_dependency_graph(
        Residual(), torch.randn(3, 5)
    )


def test_a_batch_of_one_tells_as_much_as_a_larger_one():
    model = Residual()
    assert build_dependency_graph(model, torch.randn(1, 5)) == build_dependency_graph(model, torch.randn(8, 5))


def test_frozen_weights_are_coupled_as_others_are():
    model, example = Residual(), torch.randn(3, 5)
    expected = build_dependency_graph(model, example)
    assert build_dependency_graph(model.requires_grad_(False), example) == expected
