"""Copies that average a model's weights: found where they are kept, and named like the model's weights."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_compress._lightning import kept_averages
from lightning_compress.nn import weight_averages


def find_averages(model, callbacks):
    return weight_averages.find_averages(model, kept_averages(SimpleNamespace(callbacks=callbacks)))


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


class Keeper:
    """What `WeightAveraging` and, with a method of its own, `StochasticWeightAveraging` look like."""

    def __init__(self, average):
        self._average_model = average


class Updater(Keeper):
    def update_parameters(self, *args): ...


def test_a_model_without_averages_has_none():
    assert list(find_averages(network(), [])) == []
    assert list(find_averages(network(), [object(), Keeper(None), Updater(None), Keeper(network())])) == []


def test_an_average_of_a_callback_has_the_names_of_the_model():
    model = network()
    average = AveragedModel(model)
    (found,) = find_averages(model, [object(), Keeper(average)])
    assert found.owner is average
    assert list(found.parameters) == [name for name, _ in model.named_parameters()]
    assert found.parameters["2.weight"] is average.module[2].weight


def test_a_plain_copy_belongs_to_the_callback_that_updates_it():
    model = network()
    callback = Updater(copy.deepcopy(model))
    (found,) = find_averages(model, [callback])
    assert found.owner is callback
    assert found.parameters["0.bias"] is callback._average_model[0].bias


class Module(nn.Module):
    """A module that keeps an average of a part of itself."""

    def __init__(self, part="net", wrap=lambda module: module):
        super().__init__()
        self.head = nn.Linear(2, 2)
        self.net = wrap(network())
        self.ema = AveragedModel(getattr(self, part))


@pytest.mark.parametrize("wrap", [lambda module: module, torch.compile], ids=["plain", "compiled"])
def test_an_average_inside_the_module_has_the_names_of_the_part_it_copies(wrap):
    module = Module(wrap=wrap)
    (found,) = find_averages(module, [])
    assert found.owner is module.ema
    assert list(found.parameters) == ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]
    assert {id(value) for value in found.parameters.values()} == {id(value) for value in module.ema.parameters()}


def test_every_average_is_found_once():
    module = Module()
    module.second = AveragedModel(module.head)
    outer = AveragedModel(module.net)
    found = list(find_averages(module, [Keeper(outer)]))
    assert [one.owner for one in found] == [outer, module.ema, module.second]
    assert list(found[2].parameters) == ["head.weight", "head.bias"]


def test_an_average_of_something_else_is_refused():
    module = network()
    module.append(AveragedModel(nn.Linear(7, 7)))
    with pytest.raises(ValueError, match="averages nothing that is found in the module.*Keep it in a callback"):
        list(find_averages(module, []))


def test_updating_the_average_updates_what_was_found():
    model = network()
    average = AveragedModel(model, avg_fn=lambda old, new, count: (old + new) / 2)
    (found,) = find_averages(model, [Keeper(average)])
    average.update_parameters(model)
    with torch.no_grad():
        model[0].weight.zero_()
    before = found.parameters["0.weight"].detach().clone()
    average.update_parameters(model)
    assert torch.equal(found.parameters["0.weight"], before / 2)
