"""What flows where is seen as the user wrote it, and watching leaves nothing behind."""

import torch
from torch import nn
from torch.nn import functional

from lightning_compress.nn.dataflow import trace_dataflow


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
    with trace_dataflow(model) as flow:
        model(torch.randn(2, 2, 4, 4))
    conv, norm, relu, add = (operation(flow, name) for name in ("conv2d", "batch_norm", "relu_", "add_"))
    assert conv.outputs[0] in norm.inputs
    assert norm.outputs == relu.inputs
    mean, linear = operation(flow, "mean"), operation(flow, "linear")
    assert mean.outputs[0] in linear.inputs
    assert add is not None


def test_a_value_changed_in_place_is_another_value():
    model = Small()
    with trace_dataflow(model) as flow:
        model(torch.randn(2, 2, 4, 4))
    relu = operation(flow, "relu_")
    assert relu.inputs != relu.outputs
    # The sum takes what the activation made, not what the norm made, though both were one tensor.
    later = next(one for one in flow.operations if set(relu.outputs) <= set(one.inputs))
    assert set(relu.inputs).isdisjoint(later.inputs)


def test_each_operation_knows_the_innermost_module_that_made_it():
    model = Small()
    with trace_dataflow(model) as flow:
        functional.cross_entropy(model(torch.randn(2, 2, 4, 4)), torch.tensor([0, 1]))
    assert [operation(flow, name).module for name in ("conv2d", "batch_norm", "relu_", "linear")] == [
        "conv", "norm", "", "head",
    ]  # fmt: skip
    assert operation(flow, "cross_entropy").module is None


def test_a_part_that_is_written_into_makes_another_value():
    class Writing(nn.Module):
        def forward(self, values):
            values = values.relu()
            values[:, 0] = -2.0
            return values + 0

    with trace_dataflow(Writing()) as flow:
        Writing()(torch.randn(2, 3))  # not the one that is watched: operations are seen all the same
    write, add = (operation(flow, name) for name in ("__setitem__", "add"))
    assert write.inputs == operation(flow, "relu").outputs
    assert add.inputs == write.outputs != write.inputs


def test_numbers_among_the_arguments_are_known():
    with trace_dataflow(nn.Identity()) as flow:
        torch.add(torch.ones(2), torch.ones(2), alpha=-1)
        functional.pad(torch.ones(2), (0, 1), value=-3.0)
    assert operation(flow, "add").numbers == {"alpha": -1.0}
    assert -3.0 in operation(flow, "pad").numbers.values()


def test_a_norm_over_several_processes_is_one_operation_though_torch_does_not_show_it():
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values):
            return values * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 2

    norm = nn.SyncBatchNorm(2)
    type(norm).forward, forward = lambda _self, values: Hidden.apply(values), type(norm).forward
    try:
        with trace_dataflow(norm) as flow:
            norm(torch.randn(2, 2, 4, 4).relu()).sigmoid()
    finally:
        type(norm).forward = forward
    assert names(flow) == ["randn", "relu", "batch_norm", "sigmoid"]
    _, relu, normed, sigmoid = flow.operations
    assert (relu.outputs, normed.outputs) == (normed.inputs, sigmoid.inputs)


def test_arguments_count_in_the_order_of_the_parameters_however_they_are_written():
    class Scaled(nn.Module):
        def forward(self, values, scale):
            return values * scale

    model, values, scale = Scaled(), torch.ones(2, 3), torch.ones(3)
    with trace_dataflow(model) as flow:
        model(values, scale), model(scale=scale, values=values)
    first, second = flow.inputs[""]
    assert first == second


def test_the_sources_of_a_value_are_all_that_it_was_made_of():
    with trace_dataflow(nn.Identity()) as flow:
        values = torch.ones(2)
        (values.sigmoid() + values.tanh()).relu()
        values.exp()
    sources = flow.ancestors(operation(flow, "relu").outputs)
    wanted = {operation(flow, name).outputs[0] for name in ("sigmoid", "tanh", "add", "relu")}
    assert sources == wanted | set(operation(flow, "sigmoid").inputs)


def test_watching_changes_no_number_and_leaves_no_hook():
    torch.manual_seed(0)
    model, images = Small(), torch.randn(2, 2, 4, 4)
    model.eval()
    wanted = model(images)
    with trace_dataflow(model):
        found = model(images)
    assert torch.equal(found, wanted)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_is_compiled_is_seen_as_its_author_knows_it():
    model = nn.Sequential(torch.compile(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), backend="eager"), nn.Linear(2, 1))
    with trace_dataflow(model) as flow:
        model(torch.randn(1, 2))
    assert list(flow.inputs) == ["", "0", "0.0", "0.1", "1"]
    assert "relu" in names(flow)
