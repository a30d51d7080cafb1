"""Weights as whole numbers within a program: the floats come out as they are, from few bytes."""

import pytest
import torch
from torch import nn

from lightning_compress.export.pt2.weights import StoredWeight, store_weights
from lightning_compress.export.pt2.write import write_pt2
from lightning_compress.quantization.description import WeightSpec
from lightning_compress.quantization.lowering.deployed_model import DeployedModel
from tests.export.deployables import Keywords, deployed, grid_of, loaded, random, weights_in


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8, 12, 16])
@pytest.mark.parametrize(
    ("shape", "axis", "group"),
    [((131, 125), 0, 0), ((131, 125), 0, 25), ((5, 7), 0, 0), ((12, 50, 3, 3), 1, 0), ((12, 50, 3, 3), 1, 27)],
    ids=["large", "groups", "small", "transposed", "transposed groups"],
)
def test_a_stored_weight_gives_the_values_of_its_grid(bits, shape, axis, group):
    grid = grid_of(drawn(*shape), bits, axis, group)
    weight = grid.values().contiguous()
    found = StoredWeight(grid, weight)()
    assert torch.equal(found, weight)
    assert found.is_contiguous()


@pytest.mark.parametrize(
    ("quant_min", "quant_max", "numbers"), [(-2, 1, 4), (-1, 1, 4), (0, 1, 4), (-8, 7, 2), (-9, 7, 1), (0, 8, 1)]
)
def test_signed_codes_are_packed_by_what_they_reach(quant_min, quant_max, numbers):
    codes = torch.randint(
        quant_min, quant_max + 1, (40, 41), generator=torch.Generator().manual_seed(0), dtype=torch.int32
    )
    grid = WeightSpec(codes, torch.tensor(0.5), 8)
    stored = StoredWeight(grid, grid.values())
    assert len(stored.codes.flatten()) == 40 * 41 // numbers
    assert torch.equal(stored(), codes * 0.5)


@pytest.mark.parametrize("reach", [128, 2**15, 2**20])
def test_codes_beyond_eight_bits_take_wider_integers(reach):
    grid = WeightSpec(torch.tensor([[-reach - 1, reach]]), torch.tensor(0.25), 24)
    assert torch.equal(StoredWeight(grid, grid.values())(), grid.values())


@pytest.mark.parametrize("size", [7, 200])
@pytest.mark.parametrize("count", [2, 3, 16, 200, 300])
def test_levels_are_looked_up(count, size):
    codes = torch.randint(0, count, (size, 131), generator=torch.Generator().manual_seed(0))
    grid = WeightSpec(codes, None, 8, levels=torch.linspace(-1, 1, count))
    stored = StoredWeight(grid, grid.values())
    assert torch.equal(stored(), grid.values())
    numbers_to_a_byte = {(2, 7): 8, (3, 7): 4, (2, 200): 8, (3, 200): 4, (16, 200): 2, (300, 7): 0.25, (300, 200): 0.25}
    assert stored.codes.numel() * stored.codes.dtype.itemsize == -(
        -131 * size // numbers_to_a_byte.get((count, size), 1)
    )
    assert stored.size_bytes == sum(one.numel() * one.dtype.itemsize for one in stored.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [((8, 3, 3, 3), torch.channels_last), ((8, 3, 3, 3, 3), torch.channels_last_3d), ((8, 3), torch.contiguous_format)],
    ids=str,
)
def test_a_weight_keeps_its_dtype_and_its_order_in_memory(dtype, shape, memory_format):
    grid = grid_of(drawn(*shape), 8)
    weight = grid.values().to(dtype).to(memory_format=memory_format)
    found = StoredWeight(grid, weight)()
    assert found.dtype == dtype
    assert found.stride() == weight.stride()
    assert torch.equal(found, weight)


def test_an_empty_weight_stays_empty():
    grid = WeightSpec(torch.zeros(0, 3, dtype=torch.int32), torch.ones(0, 1), 8)
    assert StoredWeight(grid, grid.values())().shape == (0, 3)


class Side(nn.ModuleDict):
    """Layers side by side, each with its output."""

    def forward(self, values):
        return {name: layer(values) for name, layer in self.items()}


def test_all_ways_of_storing_a_weight_are_exported(tmp_path):
    torch.manual_seed(0)
    levels = torch.tensor([-1.0, 2.0])
    layers = {
        "packed": (nn.Linear(40, 50), lambda weight: grid_of(weight, 4)),
        "odd": (nn.Linear(40, 51), lambda weight: grid_of(weight, 2)),
        "groups": (nn.Linear(40, 50), lambda weight: grid_of(weight, 8, group=10)),
        "wide": (nn.Linear(40, 5), lambda weight: grid_of(weight, 12)),
        "levels": (
            nn.Linear(40, 50),
            lambda weight: WeightSpec((weight > 0).int(), None, 1, levels=levels),
        ),
        "transposed": (nn.ConvTranspose1d(40, 6, 5), lambda weight: grid_of(weight, 4, axis=1, group=20)),
    }
    model, grids = Side({name: layer for name, (layer, _) in layers.items()}).eval().requires_grad_(False), {}
    for name, (layer, grid) in layers.items():
        grids[f"{name}.weight"] = grid(layer.weight)
        layer.weight.copy_(grids[f"{name}.weight"].values())
    model["transposed"] = nn.Sequential(nn.Unflatten(1, (40, 1)), model["transposed"]).eval()
    grids["transposed.1.weight"] = grids.pop("transposed.weight")
    write_pt2(DeployedModel(model, grids), tmp_path / "model.pt2", random(4, 40))
    found, expected = loaded(tmp_path / "model.pt2")(random(3, 40)), model(random(3, 40))
    assert all(torch.equal(found[name], expected[name]) for name in layers)
    stored = {name.split(".")[0]: one for name, one in weights_in(tmp_path / "model.pt2").items() if "codes" in name}
    sizes = {name: one.numel() * one.dtype.itemsize for name, one in stored.items()}
    assert sizes == {"packed": 1000, "odd": 510, "groups": 2000, "wide": 400, "levels": 250, "transposed": 600}


def test_small_weights_are_not_packed_for_the_program_would_grow_by_more(tmp_path):
    report = write_pt2(deployed(nn.Linear(16, 16), bits=2), tmp_path / "model.pt2", random(4, 16))
    assert report.weights == 16 * 16 + 16 * 4


def test_packing_makes_the_file_smaller_where_it_is_done(tmp_path):
    sizes = []
    for bits in (4, 8):
        report = write_pt2(deployed(nn.Linear(34, 32), bits), tmp_path / "model.pt2", random(4, 34))
        sizes.append(report.size_bytes)
    assert sizes[0] < sizes[1]


def test_a_shared_weight_is_stored_once(tmp_path):
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    module[2].weight = module[0].weight
    model = deployed(module)
    report = write_pt2(model, tmp_path / "model.pt2", random(4, 64))
    assert report.weights == 64 * 64 + 64 * 4
    assert report.others == 2 * 64 * 4


def test_a_weight_that_is_never_used_is_not_in_the_file(tmp_path):
    model = deployed(Keywords())
    model.module.unused = nn.Linear(50, 50).requires_grad_(False).eval()
    grid = grid_of(model.module.unused.weight, 8)
    model.module.unused.weight.copy_(grid.values())
    report = write_pt2(
        DeployedModel(model.module, {**model.weights, "unused.weight": grid}), tmp_path / "m.pt2", random(2, 8)
    )
    assert report.weights == 8 * 4 + 4 * 4
    assert torch.equal(loaded(tmp_path / "m.pt2")(random(3, 8)), model.module(random(3, 8)))


def test_a_weight_that_the_graph_holds_as_a_copy_is_not_left_as_floats_in_silence():
    model = deployed(nn.Linear(8, 4))
    graph_module = torch.export.export(model.module, (random(4, 8),)).module()
    graph_module.weight = nn.Parameter(graph_module.weight.clone())
    with pytest.raises(ValueError, match="made a copy of 'weight'"):
        store_weights(graph_module, model.module, model.weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_weights_in_short_floating_point_lie_there_in_it_and_are_read_as_they_are(tmp_path, dtype):
    module = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(16 * 4 * 4, 5)).eval().requires_grad_(False)
    module[0].to(memory_format=torch.channels_last)
    for layer in (module[0], module[2]):
        layer.weight.copy_(layer.weight.to(dtype))
    made = DeployedModel(module, {}, casts={"0.weight": dtype, "2.weight": dtype})
    report = write_pt2(made, tmp_path / "model.pt2", random(4, 3, 6, 6))
    assert report.weights == (16 * 3 * 9 + 5 * 16 * 16) * dtype.itemsize
    assert report.others == (16 + 5) * 4
    assert torch.equal(loaded(tmp_path / "model.pt2")(random(3, 3, 6, 6)), module(random(3, 3, 6, 6)))


@pytest.mark.parametrize("quant_min", [-7, -127, -32767])
@pytest.mark.parametrize("granularity", ["channel", "tensor", "group"])
def test_zero_points_lie_beside_the_codes(quant_min, granularity):
    shape = {"channel": (6, 1), "tensor": (), "group": (6, 4)}[granularity]
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(quant_min, -quant_min + 1, (6, 400), generator=draw, dtype=torch.int32)
    zero_point = torch.randint(quant_min, -quant_min + 1, shape, generator=draw, dtype=torch.int32)
    zero_point.view(-1)[0] = quant_min  # the farthest codes are twice as far away as a code may be
    scale = torch.rand(shape, generator=draw)
    grid = WeightSpec(codes, scale, 16, group=100 * (granularity == "group"), zero_point=zero_point)
    spread = (one.repeat_interleave(100, 1) if granularity == "group" else one for one in (zero_point, scale))
    wanted = (codes - next(spread)) * next(spread)
    assert torch.equal(StoredWeight(grid, wanted)(), wanted)
