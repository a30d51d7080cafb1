"""What criteria are given about units, against autograd and against what the layers that read them compute."""

import pytest
import torch
from torch import nn

from lightning_compress.channel_pruning.dependency.graph import build_dependency_graph
from lightning_compress.channel_pruning.functional.criteria import taylor_activations
from lightning_compress.channel_pruning.statistics import PATCHES, ChannelStatistics, criterion_inputs


def network():
    """Three channels, read by a convolution whose two channels a linear layer reads in 2 * 2 places each."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 2, stride=2), nn.Tanh(), nn.Flatten(),
        nn.Linear(8, 4),
    )  # fmt: skip


EXAMPLE = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def listened(model, asked, run):
    """What is gathered while `run` is under way, and the groups of the model by name."""
    groups = {one.name: one for one in build_dependency_graph(model, EXAMPLE)}
    gathered = ChannelStatistics(model, asked)
    handles = gathered.hooks()
    gathered.listening = True
    run(model)
    gathered.take_gradients([one for one in groups.values() if one.unprunable_reason is None])
    for handle in handles:
        handle.remove()
    return gathered, groups


def offered(gathered, group):
    return criterion_inputs(gathered, group, torch.Generator())


def backward(model):
    model(EXAMPLE).square().sum().backward()


def test_weights_and_gradients_are_rows_of_units():
    model = network()
    gathered, groups = listened(model, ["weight", "grad"], backward)
    kept = model[0].weight.grad.clone()
    model.zero_grad(set_to_none=False)  # as the user's step does before the cut
    [given] = offered(gathered, groups["0"])
    assert torch.equal(given["weight"], model[0].weight.reshape(3, 9))
    assert torch.equal(given["grad"], kept.reshape(3, 9))


def test_scales_are_those_of_the_norm_behind_the_units():
    model = network()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([-0.5, 0.25, 2.0]))
    gathered, groups = listened(model, ["gamma", "gamma_grad"], backward)
    [given] = offered(gathered, groups["0"])
    assert given["gamma"].tolist() == [0.5, 0.25, 2.0]
    assert torch.equal(given["gamma_grad"], model[1].weight.grad)


@pytest.mark.parametrize(("name", "upto"), [("0", 3), ("3", 6)])
def test_activations_and_their_gradients_are_what_the_reading_layer_is_given(name, upto):
    model = network()
    gathered, groups = listened(model, ["activations", "activation_grads"], backward)
    [given] = offered(gathered, groups[name])
    seen = model[:upto](EXAMPLE)
    [grad] = torch.autograd.grad(model[upto:](seen).square().sum(), seen)
    # A unit that is flattened is what it was, at each of its positions.
    positions = (5, groups[name].units, -1)
    torch.testing.assert_close(given["activations"].reshape(positions), seen.detach().reshape(positions))
    torch.testing.assert_close(given["activation_grads"].reshape(positions), grad.reshape(positions))


def test_feature_maps_are_what_a_convolution_is_given_else_what_the_layer_gives():
    model = network()
    gathered, groups = listened(model, ["feature_maps"], backward)
    assert torch.equal(offered(gathered, groups["0"])[0]["feature_maps"], model[:3](EXAMPLE))
    assert torch.equal(offered(gathered, groups["3"])[0]["feature_maps"], model[:4](EXAMPLE))


def test_each_call_has_its_own_gradient_although_backward_comes_in_reverse():
    """Two views and one loss, and a call without gradients between them, as a teacher's would be."""

    def views(model):
        first = model(EXAMPLE)
        with torch.no_grad():
            model(-EXAMPLE)
        (first.square().sum() + 3 * model(2 * EXAMPLE).square().sum()).backward()

    model = network().eval()
    gathered, groups = listened(model, ["activations", "activation_grads"], views)
    [given] = offered(gathered, groups["0"])
    seen = [model[:3](EXAMPLE), model[:3](2 * EXAMPLE)]
    grads = [
        torch.autograd.grad(factor * model[3:](one).square().sum(), one)[0]
        for factor, one in zip((1, 3), seen, strict=True)
    ]
    torch.testing.assert_close(given["activations"], torch.cat(seen).detach())
    torch.testing.assert_close(given["activation_grads"], torch.cat(grads))
    assert taylor_activations(given["activations"], given["activation_grads"]).shape == (3,)


def test_two_backward_passes_of_one_call_add_up():
    def twice(model):
        output = model(EXAMPLE)
        output.sum().backward(retain_graph=True)
        output.square().sum().backward()

    model = network()
    gathered, groups = listened(model, ["activations", "activation_grads"], twice)
    seen = model[:3](EXAMPLE)
    output = model[3:](seen)
    [grad] = torch.autograd.grad(output.sum() + output.square().sum(), seen)
    torch.testing.assert_close(offered(gathered, groups["0"])[0]["activation_grads"], grad)


@pytest.mark.parametrize(
    "reader", [nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, (2, 3), stride=(2, 1), padding=(1, 2), dilation=2)], ids=str
)
def test_patches_times_weights_of_one_unit_are_what_it_adds_to_a_convolution(reader):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Tanh(), reader, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    gathered, groups = listened(model, ["patches"], lambda model: model(EXAMPLE))
    [given] = offered(gathered, groups["0"])
    for unit in range(3):
        alone = torch.zeros_like(seen := model[:2](EXAMPLE).detach())
        alone[:, unit] = seen[:, unit]
        expected = (reader(alone) - reader.bias[:, None, None]).permute(0, 2, 3, 1).flatten(0, 2)
        found = torch.einsum("st,to->so", given["patches"][:, unit], given["consumer_weight"][unit])
        torch.testing.assert_close(found, expected.detach())


def test_patches_of_a_flattened_unit_are_all_of_its_columns():
    model = network()
    gathered, groups = listened(model, ["patches"], lambda model: model(EXAMPLE))
    [given] = offered(gathered, groups["3"])
    assert torch.equal(given["patches"], model[:6](EXAMPLE).reshape(5, 2, 4))
    assert torch.equal(given["consumer_weight"], model[6].weight.reshape(4, 2, 4).permute(1, 2, 0))


def test_of_many_patches_some_are_taken_evenly_and_of_the_whole_batch():
    """Each sample is filled with its own number, so that patches tell where they are from."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 4, 1), nn.Flatten(), nn.LazyLinear(2))
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(2)[..., None, None])
        model[1].bias.zero_()
    batch = torch.arange(200.0).reshape(200, 1, 1, 1).expand(-1, 2, 6, 6)
    model(batch)
    groups = {one.name: one for one in build_dependency_graph(model, batch[:2])}
    gathered = ChannelStatistics(model, ["patches"])
    gathered.hooks()
    gathered.listening = True
    model(batch)
    [given] = offered(gathered, groups["1"])
    origin = given["patches"][:, 0, 0]
    assert len(origin) == PATCHES
    assert (origin.min(), origin.max()) == (0, 199)
    assert abs(float(origin.mean()) - 99.5) < 1


@pytest.mark.parametrize(
    "reader",
    [
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 4, 3, padding="same"),
        nn.Conv2d(3, 3, 3, groups=1, padding="valid"),
    ],
    ids=str,
)
def test_patches_that_are_not_taken_are_refused_in_words(reader):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 1), reader, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(2))
    model(EXAMPLE)
    gathered, groups = listened(model, ["patches"], lambda model: model(EXAMPLE))
    with pytest.raises(ValueError, match="ungrouped Conv2d with a number of zeros as padding.*'1' is Conv2d"):
        offered(gathered, groups["0"])


def test_names_are_those_of_the_part_that_holds_the_groups_compiled_or_not():
    model = network()
    around = nn.ModuleDict({"net": torch.compile(model, backend="eager")})
    gathered = ChannelStatistics(around, ["activations"])
    gathered.hooks()
    gathered.listening = True
    around["net"](EXAMPLE)
    gathered.restrict_to("net")
    around["net"](EXAMPLE)
    assert {name: len(calls) for name, calls in gathered.inputs.items()} == {"0": 2, "3": 2, "6": 2}


def test_nothing_is_kept_unless_it_listens_nor_hooked_unless_asked():
    model = network()
    assert ChannelStatistics(model, ["weight", "grad", "gamma"]).hooks() == []
    gathered = ChannelStatistics(model, ["activations", "activation_grads", "feature_maps"])
    assert gathered.hooks()
    backward(model)
    assert (gathered.inputs, gathered.outputs, gathered.input_grads) == ({}, {}, {})
    gathered.listening = True
    backward(model)
    assert gathered.inputs
    assert gathered.outputs
    assert gathered.input_grads
    gathered.reset()
    assert (gathered.inputs, gathered.outputs, gathered.input_grads) == ({}, {}, {})
