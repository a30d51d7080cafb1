"""A module is replaced in mid-run: places in the optimizer, states, names, modes, hooks, copies, and the way back."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.optim.swa_utils import AveragedModel

from lightning_compress.nn.module_replacement import replace_in_training, replay, undo_replay
from lightning_compress.nn.replacement import Replacement, builder_path, torch_layer, torch_layers


def factors(name, inner, outer, rank, **more):
    """`name`, a Linear, as two of a lower rank."""
    layers = [
        ("Linear", {"in_features": inner, "out_features": rank, "bias": False}),
        ("Linear", {"in_features": rank, "out_features": outer}),
    ]
    return Replacement(name, builder_path(torch_layers), {"layers": layers}, **more)


def layer(name, kind, **arguments):
    return Replacement(name, builder_path(torch_layer), {"kind": kind, **arguments})


def by_svd(old, new):
    """Values of the factors; the bias stays the same parameter."""
    u, s, v = torch.linalg.svd(old.weight, full_matrices=False)
    rank = new[0].out_features
    new[0].weight.copy_(s[:rank, None].sqrt() * v[:rank])
    new[1].weight.copy_(u[:, :rank] * s[:rank].sqrt())
    new[1].bias = old.bias


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))


def train(model, optimizer, steps=3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 6, generator=generator)).square().mean().backward()
        optimizer.step()


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, amsgrad=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.01, initial_accumulator_value=0.3),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.01),
    "rprop": lambda parameters: torch.optim.Rprop(parameters, lr=0.01),
}


def everything(model):
    return list(model.parameters())


def decayed(model):
    """Groups as users make them: weights, and what is not decayed."""
    return [
        {"params": [one for one in model.parameters() if one.ndim > 1], "weight_decay": 0.1},
        {"params": [one for one in model.parameters() if one.ndim < 2], "weight_decay": 0.0},
    ]


def named(model):
    return list(model.named_parameters())


@pytest.mark.parametrize("groups", [everything, decayed, named])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_optimizer_is_as_one_that_is_built_for_the_new_model_and_goes_on_as_it_does(make, groups):
    model = network()
    optimizer = make(groups(model))
    train(model, optimizer)
    replace_in_training(model, factors("0", 6, 6, 2), by_svd, optimizers=[optimizer])
    again = network()
    replay(again, [factors("0", 6, 6, 2)])
    again.load_state_dict(model.state_dict())
    other = make(groups(again))
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    places = {id(one): place for place, one in enumerate(model.parameters())}
    others = {id(one): place for place, one in enumerate(again.parameters())}
    for mine, its in zip(optimizer.param_groups, other.param_groups, strict=True):
        assert [places[id(one)] for one in mine["params"]] == [others[id(one)] for one in its["params"]]
        assert mine.get("param_names") == its.get("param_names")
    train(model, optimizer)
    train(again, other)
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def test_new_parameters_begin_without_state_and_those_that_stay_keep_theirs():
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    train(model, optimizer)
    bias, momentum = model[0].bias, optimizer.state[model[0].bias]["momentum_buffer"].clone()
    old = model[0].weight
    replace_in_training(model, factors("0", 6, 6, 2), by_svd, optimizers=[optimizer])
    assert model[0][1].bias is bias
    assert torch.equal(optimizer.state[bias]["momentum_buffer"], momentum)
    assert old not in optimizer.state
    assert model[0][0].weight not in optimizer.state
    assert [one.shape for one in optimizer.param_groups[0]["params"]] == [one.shape for one in model.parameters()]


def test_state_is_carried_over_as_the_caller_says():
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    train(model, optimizer)
    momentum = optimizer.state[model[0].weight]["momentum_buffer"].clone()

    def halve(states, new):
        assert states.keys() == {"weight", "bias"}
        assert new.keys() == {"weight"}
        return {"weight": {"momentum_buffer": states["weight"]["momentum_buffer"][:, :3]}}

    replace_in_training(model, layer("0", "Linear", in_features=3, out_features=6, bias=False), None,
                        optimizers=[optimizer], carry_state=halve)  # fmt: skip
    assert torch.equal(optimizer.state[model[0].weight]["momentum_buffer"], momentum[:, :3])


def test_a_group_in_the_order_of_the_model_is_in_that_order_afterwards():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layers = [("Linear", {"in_features": 6, "out_features": 2}), ("Linear", {"in_features": 2, "out_features": 6})]
    replace_in_training(model, Replacement("0", builder_path(torch_layers), {"layers": layers}), optimizers=[optimizer])
    assert [id(one) for one in optimizer.param_groups[0]["params"]] == [id(one) for one in model.parameters()]


def test_groups_in_another_order_keep_it_and_a_frozen_weight_stays_out():
    model = network()
    model[2].weight.requires_grad_(False)
    order = [model[2].bias, model[0].bias, model[0].weight]
    optimizer = torch.optim.SGD(order, lr=0.1)
    replace_in_training(model, factors("0", 6, 6, 2), optimizers=[optimizer])
    replace_in_training(model, factors("2", 6, 3, 1, order=1), optimizers=[optimizer])
    expected = [model[2][1].bias, model[0][1].bias, model[0][0].weight, model[0][1].weight]
    assert [id(one) for one in optimizer.param_groups[0]["params"]] == [id(one) for one in expected]
    assert [one.requires_grad for one in model[2].parameters()] == [False, False, True]


def test_a_source_may_be_named_where_kinds_mislead():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))
    groups = [{"params": [model[0].weight], "lr": 1.0}, {"params": [model[0].bias], "lr": 2.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    plan = Replacement("0", builder_path(torch_layer), {"kind": "PReLU"}, {"weight": "bias"})
    replace_in_training(model, plan, optimizers=[optimizer])
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 1]
    assert optimizer.param_groups[1]["params"][0] is model[0].weight
    with pytest.raises(ValueError, match="sources of '1' says .'weight': 'scale'., but the new module has the param"):
        replace_in_training(model, Replacement("1", builder_path(torch_layer), {"kind": "PReLU"}, {"weight": "scale"}))


def test_device_dtype_memory_format_mode_and_frozen_parameters_are_those_of_the_old_module():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Flatten()).double().to(memory_format=torch.channels_last)
    model[0].eval()
    model[0].bias.requires_grad_(False)
    layers = [
        ("Conv2d", {"in_channels": 4, "out_channels": 2, "kernel_size": 1, "bias": False}),
        ("Conv2d", {"in_channels": 2, "out_channels": 2, "kernel_size": 3, "padding": 1, "bias": False}),
        ("Conv2d", {"in_channels": 2, "out_channels": 6, "kernel_size": 1}),
    ]
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    replace_in_training(model, Replacement("0", builder_path(torch_layers), {"layers": layers}), example_inputs=(x,))
    new = model[0]
    assert new[1].weight.is_contiguous(memory_format=torch.channels_last)
    assert {one.dtype for one in new.parameters()} == {torch.float64}
    assert not new.training
    assert not new[2].training
    assert model.training
    assert [name for name, one in new.named_parameters() if not one.requires_grad] == ["2.bias"]


def test_a_module_under_several_names_is_replaced_under_all():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Sequential(nn.ReLU())})
    model["b"].append(model["a"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replace_in_training(model, factors("b.1", 4, 4, 1), optimizers=[optimizer])
    assert isinstance(model["a"], nn.Sequential)
    assert model["b"][1] is model["a"]
    assert [id(one) for one in optimizer.param_groups[0]["params"]] == [id(one) for one in model.parameters()]


@pytest.mark.parametrize("name", ["0", "1.0"])
def test_names_go_through_compiled_modules_and_they_compile_what_is_new(name):
    torch.compiler.reset()
    model = nn.Sequential(torch.compile(nn.Linear(6, 6), backend="eager"),
                          torch.compile(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), backend="eager"))  # fmt: skip
    plain = nn.Sequential(model[0]._orig_mod, model[1]._orig_mod)
    x = torch.randn(4, 6)
    before = model(x)
    keys = set(model.state_dict())
    undo = replace_in_training(model, factors(name, 6, 6, 2), by_svd)
    new = model[0]._orig_mod if name == "0" else model[1]._orig_mod[0]
    assert isinstance(new, nn.Sequential)
    assert type(model[0]).__name__ == "OptimizedModule"
    expected = nn.Sequential(model[0]._orig_mod, model[1]._orig_mod)(x)
    assert not torch.allclose(before, expected)
    assert torch.allclose(model(x), expected)
    undo()
    assert set(model.state_dict()) == keys
    assert torch.allclose(model(x), plain(x))
    assert torch.allclose(model(x), before)


def test_hooks_of_the_place_go_on_and_can_still_be_taken_off():
    model, seen = network(), []
    first = model[0].register_forward_hook(lambda module, inputs, output: seen.append(type(module)))
    second = model[0].register_forward_pre_hook(lambda module, inputs, kwargs: None, with_kwargs=True)
    undo = replace_in_training(model, factors("0", 6, 6, 2))
    model(torch.randn(1, 6))
    assert seen == [nn.Sequential]
    first.remove()
    second.remove()
    model(torch.randn(1, 6))
    assert seen == [nn.Sequential]
    third = model[0].register_forward_hook(lambda module, inputs, output: seen.append("new"))
    undo()
    third.remove()
    model(torch.randn(1, 6))
    assert seen == [nn.Sequential]


def test_averages_begin_anew_for_the_new_module_and_only_for_it():
    model = network()
    average = AveragedModel(model, avg_fn=lambda old, new, count: old + (new - old) / 2)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    train(model, optimizer)
    average.update_parameters(model)
    train(model, optimizer)
    average.update_parameters(model)
    other = average.module[2].weight.clone()
    replace_in_training(model, factors("0", 6, 6, 2), by_svd, optimizers=[optimizer], copies=[(average.module, "")])
    assert torch.equal(average.module[0][0].weight, model[0][0].weight)
    assert average.module[0][0].weight is not model[0][0].weight
    assert torch.equal(average.module[2].weight, other)
    before = model[0][0].weight.detach().clone()
    train(model, optimizer, 1)
    average.update_parameters(model)
    assert torch.allclose(average.module[0][0].weight, (before + model[0][0].weight) / 2)


def test_an_average_of_a_part_is_changed_by_the_names_of_that_part():
    model = nn.ModuleDict({"net": network(), "head": nn.Linear(3, 2)})
    average = AveragedModel(model["net"])
    for name in ("net.0", "head"):
        plan = factors(name, 6, 6, 2) if name == "net.0" else factors(name, 3, 2, 1)
        replace_in_training(model, plan, copies=[(average.module, "net.")])
    assert isinstance(average.module[0], nn.Sequential)
    assert isinstance(average.module[2], nn.Linear)


def state_of(model, optimizer):
    modules = [(name, id(module), module.training) for name, module in model.named_modules()]
    groups = [[id(one) for one in group["params"]] for group in optimizer.param_groups]
    return modules, groups, {id(one): sorted(state) for one, state in optimizer.state.items()}


def fails(*_):
    raise RuntimeError("not today")


@pytest.mark.parametrize(("change", "words"), [
    ({"initialize": fails}, "not today"),
    ({"agree": fails}, "not today"),
    ({"carry_state": fails}, "not today"),
    ({"carry_state": lambda old, new: {"0.weight": {"momentum_buffer": torch.ones(3)}}}, r"of the shape \(3,\)"),
    ({"carry_state": lambda old, new: {"weight": {}}}, "a state for 'weight', but new are 0.weight, 1.weight, 1.bias"),
    ({"copies": [(nn.Sequential(nn.ReLU()), "0.")]}, "^$"),
    ({"copies": [(nn.Sequential(nn.ReLU()), "")], "name": "2"}, "Sequential has no module '2' that could be replaced"),
    ({"example_inputs": (torch.ones(2, 5),)}, "does not take its inputs"),
    ({"outer": 5, "example_inputs": (torch.ones(2, 6),)}, r"'0' returns \(2, 6\), but the .* returns \(2, 5\)"),
    ({"name": "3"}, "Sequential has no module '3' that could be replaced"),
    ({"name": ""}, "cannot be replaced as a unit"),
])  # fmt: skip
def test_nothing_is_changed_if_a_step_fails(change, words):
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    train(model, optimizer)
    before, values = state_of(model, optimizer), deepcopy(model.state_dict())
    plan = factors(change.pop("name", "0"), 6, change.pop("outer", 6), 2)
    if words == "^$":  # a copy of another part is left alone
        replace_in_training(model, plan, optimizers=[optimizer], **change)()
    else:
        with pytest.raises((ValueError, RuntimeError), match=words):
            replace_in_training(model, plan, optimizers=[optimizer], **change)
    assert state_of(model, optimizer) == before
    assert all(torch.equal(values[key], one) for key, one in model.state_dict().items())


@pytest.mark.parametrize(("make", "words"), [
    (lambda: nn.LazyLinear(6), "'0' is lazy: its shapes are not known"),
    (lambda: parametrizations.weight_norm(nn.Linear(6, 6)), "'0' is parametrized: its weight is computed"),
    (lambda: weight_norm(nn.Linear(6, 6)), "'0' is parametrized"),
    (lambda: prune.l1_unstructured(nn.Linear(6, 6), "weight", 0.5), "'0' is parametrized"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_weights_that_are_no_plain_parameters_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        replace_in_training(nn.Sequential(make()), factors("0", 6, 6, 2))


def test_a_parameter_that_another_module_shares_is_refused_unless_it_stays():
    model = network()
    model[2].bias = None
    model.append(nn.Linear(6, 6))
    model[3].weight = model[0].weight
    with pytest.raises(
        ValueError, match=r"'0' shares a parameter with '3.weight', which would be on its own afterwards"
    ):
        replace_in_training(model, factors("0", 6, 6, 2))
    stays = layer("0", "Linear", in_features=6, out_features=6)
    replace_in_training(model, stays, lambda old, new: setattr(new, "weight", old.weight))
    assert model[0].weight is model[3].weight


def test_an_optimizer_that_remembers_one_flat_vector_is_refused():
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(ValueError, match="LBFGS remembers old directions as one flat vector"):
        replace_in_training(model, factors("0", 6, 6, 2), optimizers=[optimizer])
    assert isinstance(model[0], nn.Linear)


def test_a_plan_is_replayed_in_its_order_and_can_be_put_back():
    model, fresh = network(), network()
    model[2].register_buffer("unsaved", torch.arange(3.0), persistent=False)
    plan = [factors("0", 6, 6, 2), layer("0.0", "Identity"), layer("2", "Identity")]
    plan = [Replacement(one.name, one.builder, one.arguments, order=order) for order, one in enumerate(plan)]
    replaced = replay(model, reversed(plan))
    assert [type(one).__name__ for one in model] == ["Sequential", "ReLU", "Identity"]
    assert [type(one).__name__ for one in model[0]] == ["Identity", "Linear"]
    assert all(one.is_meta for record in replaced for one in record.original.parameters())
    undo_replay(model, replaced)
    model.load_state_dict(fresh.state_dict())
    x = torch.randn(2, 6)
    assert torch.equal(model(x), fresh(x))
    assert torch.equal(model[2].unsaved, torch.arange(3.0))


def test_a_plan_that_cannot_be_replayed_changes_nothing():
    model = network()
    kinds = [type(one) for one in model]
    with pytest.raises(ValueError, match="has no module 'gone'"):
        replay(model, [factors("0", 6, 6, 2), Replacement("gone", builder_path(torch_layer), {"kind": "ReLU"}, {}, 1)])
    assert [type(one) for one in model] == kinds
