"""A cut leaves what indexing by hand leaves: in tensors, in gradients, in what optimizers remember, in files."""

import copy
import io

import pytest
import torch
from torch import nn

from lightning_compress.nn.channel_cut import Cut, cut_prefix
from lightning_compress.nn.surgery import (
    cut_in_training,
    cut_model,
    cut_optimizer,
    refuse_unknown_state,
    reshape_model,
    slice_tensor,
    temporarily_cut,
)

KEPT = torch.tensor([0, 2, 3, 6])  # of 8 hidden units


class Net(nn.Module):
    """One hidden layer of eight units, with a buffer that is not saved and an attribute for their number."""

    def __init__(self, units=8):
        super().__init__()
        self.width = units
        self.first, self.second = nn.Linear(5, units), nn.Linear(units, 3)
        self.register_buffer("scale", torch.linspace(1, 2, units), persistent=False)
        self.register_buffer("saved", torch.linspace(2, 3, units))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)) * self.scale * self.saved)


KEPT_OF = {
    "first.weight": {0: KEPT}, "first.bias": {0: KEPT}, "second.weight": {1: KEPT},
    "scale": {0: KEPT}, "saved": {0: KEPT},
}  # fmt: skip
CUT = Cut(KEPT_OF, {"": {"width": 4}, "first": {"out_features": 4}, "second": {"in_features": 4}})

OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.01),
    "sgd_nesterov_foreach": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "sgd_fused": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01),
    "adam_foreach": lambda ps: torch.optim.Adam(ps, lr=0.01, foreach=True),
    "adam_fused": lambda ps: torch.optim.Adam(ps, lr=0.01, fused=True),
    "adamw_amsgrad": lambda ps: torch.optim.AdamW(ps, lr=0.01, amsgrad=True),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.1),
    "rmsprop_centered": lambda ps: torch.optim.RMSprop(ps, lr=0.01, centered=True, momentum=0.5),
    "nadam": lambda ps: torch.optim.NAdam(ps, lr=0.01),
    "adamax": lambda ps: torch.optim.Adamax(ps, lr=0.01),
    "adadelta": lambda ps: torch.optim.Adadelta(ps, lr=1.0),
    "rprop": lambda ps: torch.optim.Rprop(ps, lr=0.01),
    "asgd": lambda ps: torch.optim.ASGD(ps, lr=0.01),
    "radam": lambda ps: torch.optim.RAdam(ps, lr=0.01),
}


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def by_hand(full):
    """A net of four units with the weights of the eight that stay."""
    small = Net(4)
    with torch.no_grad():
        small.first.weight.copy_(full.first.weight[KEPT])
        small.first.bias.copy_(full.first.bias[KEPT])
        small.second.weight.copy_(full.second.weight[:, KEPT])
        small.second.bias.copy_(full.second.bias)
        small.scale.copy_(full.scale[KEPT])
        small.saved.copy_(full.saved[KEPT])
    return small


def at_hand(name, value):
    """The rows or columns of a full-size tensor that stay."""
    if name.startswith("first."):
        return value[KEPT]
    return value[:, KEPT] if name == "second.weight" else value


def loss_of(model, batch):
    return model(batch).square().mean()


def step(model, optimizer, batch):
    optimizer.zero_grad()
    loss_of(model, batch).backward()
    optimizer.step()


def batches(count, seed=1):
    return torch.randn(count, 7, 5, generator=torch.Generator().manual_seed(seed))


# The module ----------------------------------------------------------------------------------------------------------


def test_a_cut_keeps_the_same_objects_and_what_indexing_by_hand_keeps():
    model = net()
    loss_of(model, batches(1)[0]).backward()
    full, objects = copy.deepcopy(model), dict(model.named_parameters())
    gradients = {name: one.grad.clone() for name, one in model.named_parameters()}
    cut_model(model, CUT)
    assert all(one is objects[name] for name, one in model.named_parameters())
    for name, one in by_hand(full).state_dict().items():
        assert torch.equal(model.state_dict()[name], one), name
    for name, one in model.named_parameters():
        assert torch.equal(one.grad, at_hand(name, gradients[name])), name
    assert torch.equal(model.scale, full.scale[KEPT])
    assert (model.width, model.first.out_features, model.second.in_features) == (4, 4, 4)
    x = batches(1)[0]
    torch.testing.assert_close(model(x), by_hand(full)(x))


def test_undo_puts_everything_back_bit_for_bit():
    model = net()
    loss_of(model, batches(1)[0]).backward()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: one.detach().clone() for name, one in tensors.items()}
    gradients = {name: one.grad for name, one in model.named_parameters()}
    values = {name: one.clone() for name, one in gradients.items()}
    undo = cut_model(model, CUT)
    undo()
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(now[name] is tensors[name] and torch.equal(now[name], before[name]) for name in tensors)
    assert all(one.grad is gradients[name] for name, one in model.named_parameters())
    assert all(torch.equal(one.grad, values[name]) for name, one in model.named_parameters())
    assert (model.width, model.first.out_features, model.second.in_features) == (8, 8, 8)


def test_a_gradient_of_the_smaller_shape_does_not_outlive_the_cut():
    model = net()
    undo = cut_model(model, CUT)
    loss_of(model, batches(1)[0]).backward()
    undo()
    assert model.first.weight.grad is None
    loss_of(model, batches(1)[0]).backward()
    assert model.first.weight.grad.shape == (8, 5)


def test_a_trial_is_undone_after_an_exception_too():
    model = net()
    before = copy.deepcopy(model.state_dict())

    def failing():
        with temporarily_cut(model, CUT):
            assert model.width == 4
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert model.width == 8
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("wrong", [Cut({**KEPT_OF, "third.weight": {0: KEPT}}), Cut(KEPT_OF, {"third": {"width": 4}})])
def test_a_name_that_is_not_there_is_refused_and_nothing_is_changed(wrong):
    model = net()
    with pytest.raises(KeyError):
        cut_model(model, wrong)
    assert [tuple(one.shape) for one in model.parameters()] == [tuple(one.shape) for one in Net().parameters()]


def test_a_slice_is_a_copy_that_does_not_hold_the_large_tensor():
    large = torch.randn(8, 5)
    small = slice_tensor(large, {0: KEPT})
    assert small.untyped_storage().nbytes() == 4 * 5 * 4
    small.zero_()
    assert bool(large.any())


def test_tied_tensors_are_cut_once_and_stay_tied():
    model = nn.ModuleDict({"embed": nn.Embedding(10, 8), "head": nn.Linear(8, 10, bias=False)})
    model["head"].weight = model["embed"].weight
    expected = model["embed"].weight.detach()[:, KEPT]
    cut_model(model, Cut({"embed.weight": {1: KEPT}, "head.weight": {1: KEPT}}))
    assert model["head"].weight is model["embed"].weight
    assert torch.equal(model["head"].weight, expected)


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_parameter_with_a_hook_that_has_been_in_a_backward_pass_still_learns(register):
    """The accumulator that a hook keeps alive remembers the old shape."""
    model, seen = net(), []
    getattr(model.first.weight, register)(lambda one: seen.append(tuple(one.shape)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, optimizer, batches(1)[0])
    cut_model(model, CUT)
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    for batch in batches(2):
        step(model, optimizer, batch)
    assert seen == [(8, 5), (4, 5), (4, 5)]
    for name, one in model.named_parameters():
        assert one.grad.shape == one.shape, name
        assert float((one.detach() - before[name]).abs().max()) > 0, name


# Cuts as values ------------------------------------------------------------------------------------------------------


def test_a_graph_that_somebody_keeps_does_not_hold_on_to_the_old_shape():
    model, kept = net(), []
    for _ in range(2):
        loss = loss_of(model, batches(1)[0])
        loss.backward()
        kept.append(loss)  # with its graph, as a list of losses in a training loop
    cut_in_training(model, CUT, [])
    model.zero_grad()
    loss_of(model, batches(1)[0]).backward()
    assert model.first.weight.grad.shape == (4, 5)
    assert model.first.weight.dtype == torch.float32


def test_a_cut_after_another_equals_cutting_twice():
    twice, once, then = net(), net(), torch.tensor([1, 3])
    second = Cut(
        {"first.weight": {0: then, 1: torch.tensor([0, 4])}, "first.bias": {0: then}, "second.weight": {1: then}},
        {"first": {"out_features": 2}},
    )
    cut_model(twice, CUT)
    cut_model(twice, second)
    cut_model(once, second.composed_with(CUT))
    assert torch.equal(once.first.weight, net().first.weight[[2, 6]][:, [0, 4]])
    for (name, one), other in zip(twice.state_dict().items(), once.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert once.first.out_features == twice.first.out_features == 2
    assert once.width == twice.width == 4


def test_a_cut_comes_back_from_a_file_of_plain_values():
    cut = Cut({"norm.weight": {0: KEPT}, "conv.weight": {1: torch.tensor([1])}}, {"norm": {"normalized_shape": (4,)}})
    file = io.BytesIO()
    torch.save(cut.state_dict(), file)
    file.seek(0)
    again = Cut.from_state_dict(torch.load(file, weights_only=True))
    assert again.attributes == {"norm": {"normalized_shape": (4,)}}
    assert {name: list(dims) for name, dims in again.kept.items()} == {"norm.weight": [0], "conv.weight": [1]}
    assert torch.equal(again.kept["norm.weight"][0], KEPT)
    assert again.kept["conv.weight"][1].dtype == torch.long


# Files of another width ----------------------------------------------------------------------------------------------


def test_a_whole_model_takes_the_shapes_of_a_thinner_file():
    thin = net(1)
    cut_model(thin, CUT)
    model = net()
    objects = list(model.parameters())
    reshape_model(model, thin.state_dict(), CUT)
    model.load_state_dict(thin.state_dict())
    assert all(one is other for one, other in zip(model.parameters(), objects, strict=True))
    x = batches(1)[0]
    assert torch.equal(model(x), thin(x))  # the buffer that no file holds is cut too
    assert model.width == 4


BEFORE = {"": {"width": 8}, "first": {"out_features": 8}, "second": {"in_features": 8}}


def test_a_model_that_is_cut_already_takes_the_shapes_of_a_wider_file():
    model, wide = net(), net(1)
    kept = {name: dims for name, dims in KEPT_OF.items() if name != "scale"}
    now = Cut(kept, CUT.attributes, BEFORE)
    cut_model(model, now)
    reshape_model(model, wide.state_dict(), Cut(), now)
    assert [tuple(one.shape) for one in model.parameters()] == [tuple(one.shape) for one in wide.parameters()]
    model.load_state_dict(wide.state_dict())
    assert (model.width, model.first.out_features, model.second.in_features) == (8, 8, 8)


def test_a_buffer_that_no_file_holds_is_cut_on_by_what_it_was_at_first():
    model, thinner = net(), net(1)
    first, both = Cut({"scale": {0: KEPT}}), Cut({"scale": {0: torch.tensor([2, 6])}})
    cut_model(model, first)
    reshape_model(model, thinner.state_dict(), both, first)
    assert torch.equal(model.scale, net().scale[[2, 6]])
    for wanted in (Cut(), Cut({"scale": {0: torch.tensor([1, 2])}})):
        with pytest.raises(ValueError, match=r"'scale' is in no file.* built anew"):
            reshape_model(model, thinner.state_dict(), wanted, both)
    fresh = net()  # what another model has lost does not matter
    reshape_model(fresh, thinner.state_dict(), first, both)
    assert torch.equal(fresh.scale, net().scale[KEPT])


def test_to_reshape_a_model_twice_is_to_reshape_it_once():
    thin = net(1)
    cut_model(thin, CUT)
    model = net()
    for _ in range(2):
        reshape_model(model, thin.state_dict(), CUT)
    assert torch.equal(model.scale, thin.scale)


# Optimizers ----------------------------------------------------------------------------------------------------------


def kept_by_parameter(model):
    return {one: KEPT_OF[name] for name, one in model.named_parameters() if name in KEPT_OF}


def cut_with_optimizer(model, optimizer):
    shapes = {one: one.shape for one in model.parameters()}
    cut_model(model, CUT)
    cut_optimizer(optimizer, kept_by_parameter(model), shapes)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_after_a_cut_equal_those_of_a_net_that_never_had_the_other_weights(name):
    model = net()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    *before, next_one, last = batches(5)
    for batch in before:
        step(model, optimizer, batch)
    expected = by_hand(model)
    reference = OPTIMIZERS[name](list(expected.parameters()))
    for (key, full), one in zip(model.named_parameters(), expected.parameters(), strict=True):
        reference.state[one] = {
            entry: (at_hand(key, value) if value.shape == full.shape else value).clone()
            if isinstance(value, torch.Tensor)
            else value
            for entry, value in optimizer.state[full].items()
        }
    assert any(isinstance(one, torch.Tensor) and one.ndim for one in reference.state[expected.first.weight].values())
    cut_with_optimizer(model, optimizer)
    moved = model.first.weight.detach().clone()
    for batch in (next_one, last):
        step(model, optimizer, batch)
        step(expected, reference, batch)
    assert float((model.first.weight.detach() - moved).abs().max()) > 0
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_groups_and_their_order_stay():
    model = net()
    optimizer = torch.optim.Adam(
        [{"params": model.second.parameters(), "lr": 0.5}, {"params": model.first.parameters()}]
    )
    step(model, optimizer, batches(1)[0])
    cut_with_optimizer(model, optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 1e-3]
    assert optimizer.param_groups[1]["params"][0] is model.first.weight


def test_rows_and_columns_of_adafactor_are_cut_each_by_its_own_indices():
    weight = nn.Parameter(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.Adafactor([weight])
    weight.grad = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    rows, columns = (optimizer.state[weight][key].clone() for key in ("row_var", "col_var"))
    columns_kept, shape = torch.tensor([1, 5]), weight.shape
    weight.grad, weight.data = None, weight.data[KEPT][:, columns_kept].clone()
    cut_optimizer(optimizer, {weight: {0: KEPT, 1: columns_kept}}, {weight: shape})
    assert torch.equal(optimizer.state[weight]["row_var"], rows[KEPT])
    assert torch.equal(optimizer.state[weight]["col_var"], columns[:, columns_kept])
    weight.square().sum().backward()
    optimizer.step()
    assert weight.isfinite().all()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_the_momentum_of_muon_is_cut():
    weight = nn.Parameter(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.Muon([weight])
    weight.square().sum().backward()
    optimizer.step()
    momentum, shape = optimizer.state[weight]["momentum_buffer"].clone(), weight.shape
    weight.grad, weight.data = None, weight.data[KEPT].clone()
    cut_optimizer(optimizer, {weight: {0: KEPT}}, {weight: shape})
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], momentum[KEPT])
    weight.square().sum().backward()
    optimizer.step()


def test_an_optimizer_that_has_not_stepped_has_nothing_to_cut():
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    cut_with_optimizer(model, optimizer)
    step(model, optimizer, batches(1)[0])
    assert optimizer.state[model.first.weight]["exp_avg"].shape == (4, 5)


def test_lbfgs_is_refused():
    with pytest.raises(ValueError, match="LBFGS"):
        refuse_unknown_state([torch.optim.LBFGS(net().parameters())])


@pytest.mark.parametrize(
    "strange", [torch.zeros(3, 8, 5), torch.zeros(40), [torch.zeros(8, 5)], {"inner": torch.zeros(8, 5)}],
    ids=["three dimensions", "flat", "list", "dict"],
)  # fmt: skip
def test_what_cannot_be_cut_is_refused_by_name_and_nothing_is_changed(strange):
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer, batches(1)[0])
    optimizer.state[model.first.weight]["strange"] = strange
    before = {key: dict(value) for key, value in optimizer.state.items()}
    with pytest.raises(ValueError, match="Adam remembers 'strange'"):
        refuse_unknown_state([optimizer])
    with pytest.raises(ValueError, match="Adam remembers 'strange'"):
        cut_optimizer(optimizer, kept_by_parameter(model), {one: one.shape for one in model.parameters()})
    for parameter, state in before.items():
        assert all(optimizer.state[parameter][key] is value for key, value in state.items())


def test_every_known_optimizer_passes_the_first_look():
    for make in OPTIMIZERS.values():
        model = net()
        optimizer = make(list(model.parameters()))
        step(model, optimizer, batches(1)[0])
        refuse_unknown_state([optimizer])


# Names and layouts ---------------------------------------------------------------------------------------------------


def test_the_memory_format_is_kept():
    model = nn.Sequential(nn.Conv2d(4, 8, 3)).to(memory_format=torch.channels_last)
    cut_model(model, Cut({"0.weight": {0: KEPT}}))
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_part_and_the_whole_have_their_own_names():
    whole = CUT.prefixed("net")
    assert whole.kept.keys() == {f"net.{name}" for name in KEPT_OF}
    assert whole.attributes.keys() == {"net", "net.first", "net.second"}
    part = whole.restricted_to("net.")
    assert (part.kept.keys(), part.attributes) == (KEPT_OF.keys(), CUT.attributes)
    names = [name for name, _ in (*net().named_parameters(), *net().named_buffers())]
    assert (cut_prefix(whole, names), cut_prefix(CUT, names)) == ("net.", "")
