"""Inputs and outputs of modules are recorded with forward hooks."""

import pytest
import torch
from torch import nn

from lightning_compress.nn.forward_capture import ForwardCapture, display_name, get_submodule, tensors_in


class Model(nn.Module):
    """A network, a head and a loss, called one after the other by `step`."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        self.loss = nn.MSELoss()

    def step(self, x):
        return self.loss(self.net(x), torch.zeros(len(x), 3))


def test_calls_have_arguments_output_and_layers():
    model, x = Model(), torch.randn(2, 4)
    capture = ForwardCapture(model, ["net.0"])
    capture.record_calls_of(model.net)
    with capture.recording():
        output = model.net(x)
        (call,) = capture.pop_calls()
    assert call.args[0] is x
    assert call.output is output
    assert torch.equal(call.layers["net.0"].relu(), output)


def test_nothing_is_noted_outside_and_nothing_twice():
    model, x = Model(), torch.randn(2, 4)
    capture = ForwardCapture(model, ["net.0"])
    capture.record_calls_of(model.net)
    model.net(x)
    with capture.recording():
        model.net(x)
        assert len(capture.pop_calls()) == 1
        assert capture.pop_calls() == []
        model.net(x)
    with capture.recording():
        assert capture.pop_calls() == []


def test_a_layer_belongs_to_the_call_it_was_called_in():
    model, first, second = Model(), torch.randn(2, 4), torch.randn(2, 4)
    capture = ForwardCapture(model, ["net.0"])
    capture.record_calls_of(model.net)
    with capture.recording():
        outputs = [model.net(first), model.net(second)]
        calls = capture.pop_calls()
    for call, output in zip(calls, outputs, strict=True):
        assert torch.equal(call.layers["net.0"].relu(), output)


def test_hooks_go_away():
    model = Model()
    capture = ForwardCapture(model, ["net.0"])
    capture.record_calls_of(model.net)
    capture.remove()
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())


@pytest.mark.parametrize("name", ["net.0", "net._orig_mod.0"])
def test_compiled_modules_are_named_as_before(name):
    model = Model()
    first = model.net[0]
    model.net = torch.compile(model.net, backend="eager")
    assert get_submodule(model, name) is first
    assert display_name("_orig_mod.a._orig_mod") == "a"


def test_a_missing_layer_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"no layer 'net.00' in Model. Did you mean 'net.0'"):
        get_submodule(Model(), "net.00")


def test_tensors_are_found_at_any_depth():
    class Graph:
        def __init__(self):
            self.x, self.name = torch.ones(1), "graph"

    one, two = torch.zeros(1), torch.zeros(2)
    found = list(tensors_in({"a": [one, (two, "word")], "b": Graph(), "c": 3}))
    assert [value.shape for value in found] == [(1,), (2,), (1,)]
