"""Tensors get smaller in place, and what was made for their old shapes with them."""

import copy

import pytest
import torch
from torch import nn

from lightning_compress.core.surgery import Cut, cut_model, cut_optimizer, refuse_unknown_state, reshape

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, 0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.1, centered=True, momentum=0.9),
    "nadam": lambda p: torch.optim.NAdam(p, 0.1),
    "radam": lambda p: torch.optim.RAdam(p, 0.1),
    "adamax": lambda p: torch.optim.Adamax(p, 0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, 0.1),
    "rprop": lambda p: torch.optim.Rprop(p, 0.1),
}  # fmt: skip
KEPT = torch.tensor([0, 2, 3, 6])


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def cut():
    rows = {0: KEPT}
    names = ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var")
    return Cut(
        {**dict.fromkeys(names, rows), "3.weight": {1: KEPT}}, {"0": {"out_features": 4}, "3": {"in_features": 4}}
    )


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_step_after_the_cut_is_the_step_of_the_whole_net_at_what_is_kept(make):
    """Each number of these optimizers is on its own, so the whole net's next step is known to the last bit."""
    whole = net()
    optimizer = make(whole.parameters())
    for step in range(3):
        for one in whole.parameters():
            one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(step + one.numel()))
        optimizer.step()
    thin = copy.deepcopy(whole)
    other = make(thin.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    shapes = {one: one.shape for one in thin.parameters()}
    by_parameter = {one: cut().kept[name] for name, one in thin.named_parameters() if name in cut().kept}
    cut_model(thin, cut())
    cut_optimizer(other, by_parameter, shapes)
    named = dict(thin.named_parameters())
    for name, one in whole.named_parameters():
        one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(9 + one.numel()))
        small = one.grad
        for dim, kept in cut().kept.get(name, {}).items():
            small = small.index_select(dim, kept)
        named[name].grad = small
    optimizer.step()
    other.step()
    for name, one in whole.named_parameters():
        expected = one
        for dim, kept in cut().kept.get(name, {}).items():
            expected = expected.index_select(dim, kept)
        assert torch.equal(named[name], expected), name


def test_parameters_stay_the_same_objects_and_go_on_learning_under_hooks():
    model, seen = net(), []
    weight = model[0].weight
    weight.register_hook(lambda grad: seen.append(grad.shape))
    weight.register_post_accumulate_grad_hook(lambda one: seen.append(one.grad.shape))
    model(torch.randn(6, 5)).sum().backward()
    gradient = weight.grad.clone()
    cut_model(model, cut())
    assert model[0].weight is weight
    assert torch.equal(weight.grad, gradient[KEPT])
    model.zero_grad()
    before = weight.detach().clone()
    model(torch.randn(6, 5)).square().sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert seen[-2:] == [(4, 5), (4, 5)]
    assert (weight - before).abs().max() > 0


def test_what_is_returned_puts_everything_back():
    model = net()
    model(torch.randn(6, 5)).sum().backward()
    state, gradients = copy.deepcopy(model.state_dict()), [one.grad.clone() for one in model.parameters()]
    cut_model(model, cut())()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(one.grad, grad) for one, grad in zip(model.parameters(), gradients, strict=True))
    assert (model[0].out_features, model[3].in_features) == (8, 8)


def test_a_name_that_is_not_there_changes_nothing():
    model = net()
    with pytest.raises(KeyError):
        cut_model(model, Cut({"0.weight": {0: KEPT}, "9.weight": {0: KEPT}}))
    assert model[0].weight.shape == (8, 5)


def test_two_cuts_are_one_and_survive_a_file(tmp_path):
    second = Cut(
        {"0.weight": {0: torch.tensor([1, 3])}, "3.weight": {0: torch.tensor([2])}}, {"0": {"out_features": 2}}
    )
    both = second.after(cut())
    torch.save(both.state(), tmp_path / "cut.pt")
    read = Cut.of(torch.load(tmp_path / "cut.pt", weights_only=True))
    assert read.kept["0.weight"][0].tolist() == [2, 6]
    assert read.kept["3.weight"][1].tolist() == KEPT.tolist()
    assert read.attributes == {"0": {"out_features": 2}, "3": {"in_features": 4}}


def test_a_module_takes_the_shapes_of_a_file_whether_thinner_or_wider():
    thin, wide = net(), net()
    cut_model(thin, cut())
    thin_state = copy.deepcopy(thin.state_dict())
    reshape(wide, thin_state, cut())
    wide.load_state_dict(thin_state)
    assert wide[0].out_features == 4
    reshape(thin, net().state_dict(), Cut(cut().kept, {"0": {"out_features": 8}, "3": {"in_features": 8}}))
    thin.load_state_dict(net().state_dict())
    assert thin(torch.randn(2, 5)).shape == (2, 3)


def test_the_memory_format_is_kept():
    model = nn.Sequential(nn.Conv2d(4, 8, 3)).to(memory_format=torch.channels_last)
    cut_model(model, Cut({"0.weight": {0: KEPT}}))
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_names_of_a_part_and_of_the_whole():
    full = cut().under("net")
    assert "net.0.weight" in full.kept
    assert full.inside("net.").kept.keys() == cut().kept.keys()
    assert full.inside("net.").attributes == cut().attributes


def test_memory_that_cannot_be_cut_is_refused_with_nothing_changed():
    model = net()
    with pytest.raises(ValueError, match="LBFGS"):
        refuse_unknown_state([torch.optim.LBFGS(model.parameters())])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.state[model[0].weight]["preconditioner"] = torch.eye(3)
    with pytest.raises(ValueError, match=r"'preconditioner' .* shape \(3, 3\)"):
        cut_optimizer(optimizer, {model[0].weight: {0: KEPT}}, {model[0].weight: torch.Size((8, 5))})
    assert torch.equal(optimizer.state[model[0].weight]["preconditioner"], torch.eye(3))
