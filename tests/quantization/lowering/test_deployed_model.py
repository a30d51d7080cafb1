import pytest
import torch
from torch import nn

from lightning_compress.quantization.description import WeightSpec
from lightning_compress.quantization.lowering.deployed_model import DeployedModel


def test_values_are_codes_times_the_scale_of_their_tensor_channel_or_group():
    codes = torch.arange(-6, 6).reshape(2, 6)
    assert torch.equal(WeightSpec(codes, torch.tensor(0.5), 8).values(), codes * 0.5)
    by_channel = WeightSpec(codes, torch.tensor([[2.0], [3.0]]), 8).values()
    assert torch.equal(by_channel, torch.stack([codes[0] * 2.0, codes[1] * 3.0]))
    in_groups = WeightSpec(codes, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 8, group=3).values()
    for channel, group, scale in ((0, 0, 1.0), (0, 1, 2.0), (1, 0, 3.0), (1, 1, 4.0)):
        part = slice(3 * group, 3 * group + 3)
        assert torch.equal(in_groups[channel, part], codes[channel, part] * scale)


def test_channels_of_transposed_convolutions_lie_along_axis_one_in_groups_too():
    codes = torch.randint(-7, 8, (4, 3, 2, 2))
    scale = torch.rand(3, 2) + 0.1
    values = WeightSpec(codes, scale, 4, axis=1, group=8).values()
    for channel in range(3):
        flat = codes[:, channel].reshape(-1)
        expected = torch.cat([flat[:8] * scale[channel, 0], flat[8:] * scale[channel, 1]])
        assert torch.equal(values[:, channel].reshape(-1), expected)


def test_codes_are_indices_where_there_are_levels():
    grid = WeightSpec(torch.tensor([[0, 2], [1, 1]]), None, 2, levels=torch.tensor([-0.3, 0.0, 0.9]))
    assert torch.equal(grid.values(), torch.tensor([[-0.3, 0.9], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="has no scale"):
        grid.full_scale()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"codes": torch.ones(2, 6)}, "whole numbers, but have dtype torch.float32"),
        ({"levels": torch.ones(3)}, "either a scale or a table"),
        ({"scale": None}, "either a scale or a table"),
        ({"scale": torch.ones(3, 1)}, r"scale has shape \(3, 1\), but for codes of shape \(2, 6\)"),
        ({"scale": torch.ones(2, 1), "group": 3}, r"it is one of \[\(2, 2\)\]"),
        ({"scale": None, "levels": torch.ones(3)}, "indices of 3 levels, but reach from -1 to 4"),
    ],
)
def test_a_grid_that_does_not_fit_together_is_refused(change, match):
    fitting = {"codes": torch.tensor([[0, 1, 2, 3, 4, -1]] * 2), "scale": torch.ones(2, 1), "bits": 8}
    WeightSpec(**fitting)
    with pytest.raises(ValueError, match=match):
        WeightSpec(**fitting | change)


def test_weights_must_be_there_and_lie_on_their_grid():
    layer = nn.Linear(6, 2)
    grid = WeightSpec(torch.ones(2, 6, dtype=torch.int32), torch.tensor(0.5), 8)
    with pytest.raises(ValueError, match="'weight' does not lie on its grid"):
        DeployedModel(layer, {"weight": grid})
    layer.weight.data.copy_(grid.values())
    assert DeployedModel(layer, {"weight": grid}).quantizers == {}
    with pytest.raises(ValueError, match="no parameter 'wight'; it has weight, bias"):
        DeployedModel(layer, {"wight": grid})


def test_a_shorter_dtype_must_hold_the_weight_and_be_all_that_is_said_of_it():
    layer = nn.Linear(6, 2)
    layer.weight.data.fill_(0.5)
    assert DeployedModel(layer, {}, casts={"weight": torch.float8_e4m3fn}).casts == {"weight": torch.float8_e4m3fn}
    grid = WeightSpec(torch.ones(2, 6, dtype=torch.int32), torch.tensor(0.5), 8)
    with pytest.raises(ValueError, match="'weight' has a grid, or values that torch.float16 does not hold"):
        DeployedModel(layer, {"weight": grid}, casts={"weight": torch.float16})
    with pytest.raises(ValueError, match="no parameter 'wight'; it has weight, bias"):
        DeployedModel(layer, {}, casts={"wight": torch.float16})
    layer.weight.data.fill_(0.1)
    with pytest.raises(ValueError, match="'weight' has a grid, or values that torch.float16 does not hold"):
        DeployedModel(layer, {}, casts={"weight": torch.float16})


def test_a_weight_that_is_too_short_for_its_grid_is_to_be_made_longer():
    layer = nn.Linear(6, 2)
    grid = WeightSpec(torch.ones(2, 6, dtype=torch.int32), torch.tensor(0.1), 8)
    layer.weight.data.copy_(grid.values())
    with pytest.raises(ValueError, match=r"'weight' is torch.bfloat16, too short for its grid: .float\(\) the module"):
        DeployedModel(layer.bfloat16(), {"weight": grid})


def test_a_code_other_than_0_may_stand_for_zero():
    codes = torch.tensor([[-7, 0, 7, 3], [1, 2, 3, 4]], dtype=torch.int32)
    zero_point = torch.tensor([[-7], [3]], dtype=torch.int32)
    found = WeightSpec(codes, torch.tensor([[0.5], [2.0]]), 4, zero_point=zero_point).values()
    assert found.tolist() == [[0.0, 3.5, 7.0, 5.0], [-4.0, -2.0, 0.0, 2.0]]
    groups = torch.tensor([[0, 1], [2, 3]])
    found = WeightSpec(codes, torch.ones(2, 2), 4, group=2, zero_point=groups).values()
    assert found.tolist() == [[-7.0, 0.0, 6.0, 2.0], [-1.0, 0.0, 0.0, 1.0]]
    with pytest.raises(ValueError, match=r"zero_point has shape \(2, 1\), but it has that of the scale, \(\)"):
        WeightSpec(codes, torch.tensor(1.0), 4, zero_point=zero_point)
    with pytest.raises(ValueError, match="a table of levels has none"):
        WeightSpec(codes.abs(), None, 4, levels=torch.arange(8.0), zero_point=zero_point)
