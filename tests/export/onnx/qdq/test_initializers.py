import numpy
import pytest
import torch

from lightning_compress.export.onnx.qdq.initializers import WeightLocator
from lightning_compress.quantization.description import WeightSpec
from tests.export.handmade import affine


def values(located):
    """The constant, made of its whole numbers by the definition."""
    if located.levels is not None:
        matrix = located.levels[located.codes]
    else:
        scale = numpy.repeat(located.scale, located.codes.shape[1] // located.scale.shape[1], axis=1)
        matrix = located.codes.astype(numpy.float32) * scale
    tensor = matrix.reshape(located.shape)
    return tensor if located.order is None else tensor.transpose(located.order)


def grid(*shape, seed=0, **kinds):
    torch.manual_seed(seed)
    return affine(torch.randn(shape), **kinds)


def array(one):
    return one.values().numpy()


def only(grids, constants, **kwargs):
    """The one constant found, checked against what was looked for."""
    ((name, found),) = WeightLocator(grids).locate(constants, **kwargs).items()
    assert numpy.array_equal(values(found), constants[name])
    return found


def test_a_weight_is_found_by_its_name_its_content_or_its_rows():
    conv, linear = grid(6, 3, 2, 2), grid(6, 8)
    assert only({"conv": conv}, {"conv": array(conv)}).names == ("conv",)
    assert only({"conv": conv}, {"val_1": array(conv), "other": array(linear)}).order is None
    found = only({"linear": linear}, {"val_3": array(linear).T})
    assert (found.shape, found.order, found.axis) == ((6, 8), (1, 0), 1)


def test_rows_that_were_split_sorted_stacked_or_joined_are_found():
    a, b = grid(12, 8, seed=1), grid(12, 8, seed=2)
    parts = {"val_0": array(a)[:4].T.copy(), "val_1": array(a)[4:8].T.copy(), "val_2": array(a)[8:]}
    found = WeightLocator({"a": a}).locate(parts)
    assert found.keys() == parts.keys()
    assert all(numpy.array_equal(values(found[name]), parts[name]) for name in parts)
    gates = array(a).reshape(4, 3, 8)[[0, 3, 1, 2]].reshape(1, 12, 8)
    assert only({"a": a}, {"val_0": gates}).axis is None
    both = numpy.stack([gates[0], array(b)])
    assert only({"a": a, "b": b}, {"val_0": both}).names == ("a", "b")
    assert only({"a": a, "b": b}, {"val_0": numpy.concatenate([array(a), array(b)]).T}).title == "a+b"


def test_groups_and_levels_go_with_their_rows():
    grouped = grid(6, 8, group=4)
    assert only({"a": grouped}, {"val": array(grouped)[::-1].copy()}).scale.shape == (6, 2)
    tables = [
        WeightSpec(torch.randint(3, (4, 8)), None, 2, levels=torch.tensor(levels))
        for levels in ([-1.0, 0, 2], [3.0, 4, 5])
    ]
    joined = numpy.concatenate([array(one) for one in tables])
    found = only({"a": tables[0], "b": tables[1]}, {"val": joined})
    assert found.levels.tolist() == [-1, 0, 2, 3, 4, 5]


def test_transposed_convolutions_have_their_channels_along_axis_one():
    found = only({"up": grid(4, 3, 2, 2, axis=1)}, {"up": array(grid(4, 3, 2, 2, axis=1))})
    assert (found.axis, found.codes.shape) == (1, (3, 16))
    assert found.row_steps()[0].shape == (3,)


def test_equal_weights_are_one_constant_and_zeros_have_one_sign():
    one = WeightSpec(torch.zeros(4, 8, dtype=torch.int32), torch.tensor(0.5), 8)
    negative = -array(one)
    assert numpy.signbit(negative).all()
    found = WeightLocator({"a": one, "b": one}).locate({"val": negative.T.copy()})
    assert (values(found["val"]) == 0).all()


def test_equal_weights_that_are_several_constants_are_all_found_each_under_its_own_name():
    one = grid(6, 8)
    constants = {"val_0": array(one).T.copy(), "val_1": array(one).T.copy(), "val_2": array(one).T.copy()}
    found = WeightLocator({"a": one, "b": one}).locate(constants)
    assert [found[name].title for name in constants] == ["a", "b", "a"]
    tied = {"a": array(one), "val_0": array(one).T.copy()}
    assert WeightLocator({"a": one}).locate(tied).keys() == tied.keys()


def test_a_row_of_zeros_is_taken_from_the_weight_that_the_others_come_from():
    a, b = grid(6, 8, seed=1, group=4), grid(6, 8, seed=2)
    a.codes[2], b.codes[3] = 0, 0
    constants = {"val_0": array(b).T.copy(), "val_1": array(a).T.copy(), "initial": numpy.zeros((2, 8), numpy.float32)}
    found = WeightLocator({"a": a, "b": b}).locate(constants)
    assert {name: one.names for name, one in found.items()} == {"val_0": ("b",), "val_1": ("a",)}
    assert all(numpy.array_equal(values(one), constants[name]) for name, one in found.items())


def test_an_unfound_weight_is_named_unless_it_is_unused():
    a, b = grid(12, 8, seed=1), grid(12, 8, seed=2)
    constants = {"a": array(a), "half": array(b)[:6], "bias": array(b)[0], "b": array(b) * 2}
    with pytest.raises(ValueError, match=r"computed something with blocks.b.weight, .*ignore=\['blocks.b'\]"):
        WeightLocator({"a": a, "blocks.b.weight": b}).locate(constants)
    assert WeightLocator({"a": a, "blocks.b.weight": b}).locate({"a": array(a)}, ["blocks.b.weight"]).keys() == {"a"}


def test_rows_of_a_whole_tensor_share_one_scale():
    found = only({"a": grid(6, 8, granularity="tensor")}, {"a": array(grid(6, 8, granularity="tensor"))})
    assert found.row_steps()[0].ndim == 0
    with pytest.raises(ValueError, match="no scale of their own"):
        only({"a": grid(6, 8, group=4)}, {"a": array(grid(6, 8, group=4))}).row_steps()


def test_of_a_weight_that_is_only_looked_up_a_part_is_enough_but_not_nothing():
    positions, other = grid(16, 8, seed=1), grid(16, 8, seed=2)
    constants = {"val_0": array(positions)[None, 3:12], "other": array(other)}
    grids = {"positions": positions, "other": other}
    with pytest.raises(ValueError, match="computed something with positions,"):
        WeightLocator(grids).locate(constants)
    found = WeightLocator(grids).locate(constants, looked_up=["positions", "a parameter without a grid"])
    assert numpy.array_equal(values(found["val_0"]), constants["val_0"])
    with pytest.raises(ValueError, match="computed something with positions,"):
        WeightLocator(grids).locate({"val_0": 2 * constants["val_0"], "other": array(other)}, looked_up=["positions"])


def test_rows_keep_the_codes_that_stand_for_zero():
    codes, zeros = torch.arange(-6, 6).reshape(3, 4), torch.tensor([[-6], [0], [5]])
    one = WeightSpec(codes, torch.tensor([[0.5], [0.5], [0.5]]), 4, zero_point=zeros)
    constant = {"val": array(one)[::-1].copy()}
    (found,) = WeightLocator({"a": one}).locate(constant).values()
    assert numpy.array_equal((found.codes - found.zeros()) * found.scale, constant["val"])
    assert [steps.tolist() for steps in found.row_steps()] == [[0.5, 0.5, 0.5], [5, 0, -6]]
    assert WeightLocator({"b": grid(3, 4)}).tables["b"].zeros().tolist() == [[0]] * 3
