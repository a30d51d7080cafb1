"""What criteria ask for beyond the weight: against sums by hand, and refused where it cannot be seen."""

from itertools import product

import pytest
import torch
from torch import nn

from lightning_compress.pruning.functional.criteria import wanda
from lightning_compress.pruning.statistics import CriterionStatistics
from tests.pruning.layers_of import layers_of


def gathered(model, *needs, targets=None):
    return CriterionStatistics(layers_of(model, targets=targets).by_name, needs)


def listening(model, targets=None):
    """Something that has begun to listen to the inputs."""
    found = gathered(model, "input_norm", targets=targets)
    found.hooks()
    found.listening = True
    return found


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 5, 6), (2, 3, 5, 6)], ids=str)
def test_input_norms_of_a_linear_layer_are_over_all_but_the_last_dimension(shape):
    model = nn.Sequential(nn.Linear(6, 3))
    found, first, second = listening(model), drawn(*shape), drawn(*shape, seed=1)
    model(first)
    model(second)
    rows = [*first.reshape(-1, 6).tolist(), *second.reshape(-1, 6).tolist()]
    expected = [sum(row[column] ** 2 for row in rows) ** 0.5 for column in range(6)]
    norm = found.inputs_for("0.weight")["input_norm"]
    assert norm.shape == (1, 6)
    assert norm[0].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("batch", [(), (3,)], ids=["unbatched", "batched"])
def test_input_norms_of_a_convolution_are_those_of_the_channels_its_filter_sees(groups, batch):
    layer = nn.Conv2d(4, 8, 3, groups=groups)
    model, inputs = nn.Sequential(layer), drawn(*batch, 4, 5, 5)
    found = listening(model)
    model(inputs)
    norm = found.inputs_for("0.weight")["input_norm"].expand_as(layer.weight)
    channels = inputs.reshape(-1, 4, 25).square().sum((0, 2)).sqrt()
    for out, into in product(range(8), range(4 // groups)):
        seen = channels[out // (8 // groups) * (4 // groups) + into]
        assert norm[out, into].flatten().tolist() == pytest.approx([seen.item()] * 9, rel=1e-5)
    assert wanda(layer.weight, norm).shape == layer.weight.shape


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d])
def test_input_norms_of_other_convolutions(kind):
    sides = [4] * (1 if kind is nn.Conv1d else 3)
    model, inputs = nn.Sequential(kind(2, 3, 2)), drawn(2, 2, *sides)
    found = listening(model)
    model(inputs)
    expected = inputs.transpose(0, 1).flatten(1).norm(dim=1)
    norm = found.inputs_for("0.weight")["input_norm"]
    assert norm.shape == (1, 2, *[1] * len(sides))
    assert norm.flatten().tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_norms_are_summed_in_float32_and_given_in_the_weights_type():
    model = nn.Sequential(nn.Linear(2, 3)).half()
    found = listening(model)
    model(torch.full((100, 2), 30.0, dtype=torch.float16))  # 100 * 900 is more than a half can hold
    norm = found.inputs_for("0.weight")["input_norm"]
    assert (norm.dtype, norm.tolist()) == (torch.float16, [[300.0, 300.0]])


def test_only_what_is_trained_on_is_heard_and_only_while_listening():
    model = nn.Sequential(nn.Linear(2, 2))
    found, inputs = listening(model), torch.ones(1, 2)
    with torch.no_grad():
        model(inputs)
    found.listening = False
    model(inputs)
    assert found.squares == {}
    found.listening = True
    model(3 * inputs)
    assert found.squares["0.weight"].tolist() == [9.0, 9.0]
    found.reset_inputs()
    model(2 * inputs)
    assert found.squares["0.weight"].tolist() == [4.0, 4.0]


def test_handles_take_the_hooks_away():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    found = gathered(model, "input_norm")
    for handle in found.hooks():
        handle.remove()
    found.listening = True
    model(torch.ones(1, 2))
    assert found.squares == {}
    assert not any(layer._forward_pre_hooks for layer in model)


def test_nothing_is_gathered_that_is_not_asked_for():
    model = nn.Sequential(nn.Linear(2, 2))
    found = gathered(model, "weight", "grad")
    found.remember_initial()
    model(torch.ones(1, 2)).sum().backward()
    found.add_gradients(set(model.parameters()))
    found.all_reduce()
    assert found.hooks() == []
    assert found.inputs_for("0.weight") == {}
    assert found.state_dict() == {}


def test_weight_times_gradient_is_summed_for_what_is_stepped():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    found = gathered(model, "weight_grad_sum")
    expected = torch.zeros(2, 3)
    for step in range(3):
        model.zero_grad()
        model[1](model[0](drawn(4, 3, seed=step))).square().sum().backward()
        expected += model[0].weight.detach() * model[0].weight.grad
        found.add_gradients({model[0].weight, model[2].weight})
        with torch.no_grad():
            model[0].weight -= 0.1 * model[0].weight.grad
    assert torch.allclose(found.inputs_for("0.weight")["weight_grad_sum"], expected)
    assert (found.inputs_for("1.weight")["weight_grad_sum"] == 0).all()  # had gradients, but another optimizer's turn
    assert (found.inputs_for("2.weight")["weight_grad_sum"] == 0).all()  # has none


def test_initial_weights_are_those_of_the_beginning():
    model = nn.Sequential(nn.Linear(3, 2))
    found, before = gathered(model, "initial_weight"), model[0].weight.detach().clone()
    found.remember_initial()
    with torch.no_grad():
        model[0].weight.mul_(2.0)
    assert torch.equal(found.inputs_for("0.weight")["initial_weight"], before)


def test_initial_weights_that_nobody_remembered_are_missed_in_words():
    with pytest.raises(RuntimeError, match=r"0.weight.*remember_initial\(\)"):
        gathered(nn.Sequential(nn.Linear(3, 2)), "initial_weight").inputs_for("0.weight")


class Model(nn.Module):
    """Layers whose inputs a hook sees, and layers whose inputs it does not."""

    def __init__(self):
        super().__init__()
        self.recurrent = nn.LSTM(4, 5)
        self.attention = nn.MultiheadAttention(4, 2)
        self.up = nn.ConvTranspose2d(4, 2, 2)
        self.bare = nn.Parameter(torch.ones(3, 3))
        self.head = nn.Linear(4, 10)
        self.unused = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        ("recurrent", "recurrent.weight_ih_l0, recurrent.weight_hh_l0"),
        ("attention.out_proj", "attention.out_proj.weight"),  # a Linear that is never called
        ("attention.in_proj_weight", "attention.in_proj_weight"),
        ("up", "up.weight"),
        ("bare", "bare"),
        (["head", "bare"], "bare"),
    ],
)
def test_inputs_that_cannot_be_seen_are_refused_at_once(targets, named):
    with pytest.raises(ValueError, match=rf"input_norm is known for .* only, not for {named}\. ignore="):
        gathered(Model(), "input_norm", targets=targets)


def test_inputs_that_were_not_seen_are_refused_when_they_are_needed():
    model = Model()
    found = listening(model, targets=["head", "unused"])
    model.head(torch.ones(1, 4))
    with pytest.raises(RuntimeError, match=r"No input of unused.weight was seen.*ignore=\['unused.weight'\]"):
        found.all_reduce()


def test_what_is_saved_goes_on():
    needs = ("initial_weight", "weight_grad_sum", "input_norm")
    model = nn.Sequential(nn.Linear(3, 2))
    found = gathered(model, *needs)
    found.hooks()
    found.listening = True
    found.remember_initial()
    model(drawn(4, 3)).sum().backward()
    found.add_gradients(set(model.parameters()))
    again = gathered(model, *needs)
    again.load_state_dict(found.state_dict())
    again.hooks()
    again.listening = True
    with torch.no_grad():
        model[0].weight.mul_(2.0)
    model(drawn(4, 3, seed=1))
    for one in (found, again):
        one.add_gradients(set(model.parameters()))
    first, second = found.inputs_for("0.weight"), again.inputs_for("0.weight")
    assert first.keys() == second.keys() == set(needs)
    assert all(torch.equal(first[name], second[name]) for name in needs)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"initial": {"1.weight": torch.ones(2, 3)}}, "initial of '1.weight', which is not pruned here.*targets"),
        ({"initial": {"0.weight": torch.ones(3, 2)}}, r"'0.weight' has shape \[3, 2\].*another model"),
        ({"weight_grad": {"0.weight": torch.ones(2)}}, r"'0.weight' has shape \[2\]"),
        ({"weight_grad": {"0.weight": 3}}, "'0.weight' has a int"),
        ({"squares": {"0.weight": torch.ones(2)}}, r"squares of '0.weight' has shape \[2\]"),
        ({"hooks": {}}, "'hooks'"),
        (None, "NoneType"),
    ],
)
def test_what_belongs_to_another_model_is_refused(state, message):
    with pytest.raises(ValueError, match=message):
        gathered(nn.Sequential(nn.Linear(3, 2)), "initial_weight", "weight_grad_sum").load_state_dict(state)
