"""Calls that go the same way are one way."""

import torch
from torch import nn

from lightning_compress.nn.dataflow import trace_dataflow
from lightning_compress.quantization.placement.call_alignment import AlignedCalls


def tracks(model, *inputs):
    with trace_dataflow(model) as flow:
        for one in inputs:
            model(one)
    return AlignedCalls(flow)


def test_the_boundary_of_a_value_is_the_innermost_module_that_returned_it():
    found = tracks(nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Identity()), torch.randn(1, 2))
    assert found.boundary(found.outputs("0.0")) == "0.0"


def test_two_calls_of_a_network_are_one_track():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    found = tracks(model, torch.randn(1, 2), torch.randn(3, 2))
    first, second = found.flow.outputs["1"]
    assert found.outputs("1") == (first, second) == found.inputs("2")[0]
    assert found.boundary((first, second)) == "1"
    assert found.boundary((first,)) is None
    (use,) = found.consumers_of((first, second))
    assert (use.module, use.outputs) == ("2", (found.outputs("2"),))
    assert found.producer((first, second)).inputs == (found.outputs("0"),)
    assert found.argument_positions((first, second)) == [("2", 0)]


def test_a_module_that_is_called_on_its_own_output_has_no_common_way():
    layer = nn.Linear(2, 2)
    found = tracks(nn.Sequential(layer, nn.Identity(), layer), torch.randn(1, 2))
    assert found.producer(found.inputs("0")[0]) is None  # what comes first was made by nothing
    assert found.boundary(found.inputs("0")[0]) is None


def test_calls_that_are_used_differently_have_no_common_uses():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, values):
            return self.layer(values).relu() + self.layer(-values).tanh()

    found = tracks(Twice(), torch.randn(1, 2))
    assert found.consumers_of(found.outputs("layer")) is None


def test_a_module_that_uses_its_own_result_is_no_boundary():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.auxiliary = nn.Linear(2, 2), nn.Linear(2, 1)

        def forward(self, values):
            values = self.layer(values).relu()
            self.kept = self.auxiliary(values)
            return values

    found = tracks(nn.Sequential(Inner(), nn.Linear(2, 1)), torch.randn(1, 2))
    assert found.boundary(found.outputs("0")) is None
