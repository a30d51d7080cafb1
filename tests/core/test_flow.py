"""What flows where is seen as the user wrote it, and watching leaves nothing behind."""

import torch
from torch import nn
from torch.nn import functional

from lightning_compress.core.flow import watched


class Small(nn.Module):
    """A convolution, its norm, an activation in place, and a way around all of it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.head = nn.Linear(2, 3)

    def forward(self, images):
        inner = self.norm(self.conv(images)).relu_()
        inner += images
        return self.head(inner.mean((2, 3)))


def names(flow):
    return [getattr(one.function, "__name__", "") for one in flow.operations]


def operation(flow, name):
    return next(one for one in flow.operations if getattr(one.function, "__name__", "") == name)


def test_operations_are_linked_by_the_values_they_take_and_make():
    model = Small()
    with watched(model) as flow:
        model(torch.randn(2, 2, 4, 4))
    conv, norm, relu, add = (operation(flow, name) for name in ("conv2d", "batch_norm", "relu_", "add_"))
    assert conv.outputs[0] in norm.inputs
    assert norm.outputs == relu.inputs
    mean, linear = operation(flow, "mean"), operation(flow, "linear")
    assert mean.outputs[0] in linear.inputs
    assert add is not None


def test_a_value_changed_in_place_is_another_value():
    model = Small()
    with watched(model) as flow:
        model(torch.randn(2, 2, 4, 4))
    relu = operation(flow, "relu_")
    assert relu.inputs != relu.outputs
    # The sum takes what the activation made, not what the norm made, though both were one tensor.
    later = next(one for one in flow.operations if set(relu.outputs) <= set(one.inputs))
    assert set(relu.inputs).isdisjoint(later.inputs)


def test_each_operation_knows_the_innermost_module_that_made_it():
    model = Small()
    with watched(model) as flow:
        functional.cross_entropy(model(torch.randn(2, 2, 4, 4)), torch.tensor([0, 1]))
    assert [operation(flow, name).module for name in ("conv2d", "batch_norm", "relu_", "linear")] == [
        "conv", "norm", "", "head",
    ]  # fmt: skip
    assert operation(flow, "cross_entropy").module is None


def test_the_boundary_of_a_value_is_the_innermost_module_that_returned_it():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Identity())
    with watched(model) as flow:
        model(torch.randn(1, 2))
    assert flow.boundary(operation(flow, "linear").outputs[0]) == "0.0"


def test_a_module_that_is_called_twice_is_no_boundary():
    layer = nn.Linear(2, 2)
    with watched(layer) as flow:
        layer(layer(torch.randn(1, 2)))
    assert {flow.boundary(value) for one in flow.operations for value in one.outputs} == {None}


def test_watching_changes_no_number_and_leaves_no_hook():
    torch.manual_seed(0)
    model, images = Small(), torch.randn(2, 2, 4, 4)
    model.eval()
    wanted = model(images)
    with watched(model):
        found = model(images)
    assert torch.equal(found, wanted)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_is_compiled_is_seen_as_its_author_knows_it():
    model = nn.Sequential(torch.compile(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), backend="eager"), nn.Linear(2, 1))
    with watched(model) as flow:
        model(torch.randn(1, 2))
    assert list(flow.given) == ["", "0", "0.0", "0.1", "1"]
    assert "relu" in names(flow)
