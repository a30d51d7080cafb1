"""Weights packed into a file and read again, bit for bit; and what is made of files that are not as they were."""

import ast
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_compress.core import bit_packing as packing
from lightning_compress.export import atomic_write as replacing
from lightning_compress.export.packed import format as packed_format
from lightning_compress.export.packed import safetensors as packed_file
from lightning_compress.export.packed import write as packed
from lightning_compress.export.packed.safetensors import read_metadata
from lightning_compress.export.packed.write import PackedReport, load_packed, read_packed, write_packed
from lightning_compress.quantization.description import WeightSpec
from lightning_compress.quantization.lowering import deployed_model as deployable


def drawn(quant_min, quant_max, shape, seed=0):
    return torch.randint(
        quant_min, quant_max + 1, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32
    )


def steps(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.01


GRIDS = {
    "8 bits by channel": WeightSpec(drawn(-127, 127, (4, 6)), steps(4, 1), 8),
    "4 bits of a tensor": WeightSpec(drawn(-7, 7, (4, 6)), steps(), 4),
    "3 bits by group": WeightSpec(drawn(-3, 3, (4, 6)), steps(4, 2), 3, group=3),
    "2 bits of a convolution": WeightSpec(drawn(-1, 1, (4, 3, 3, 3)), steps(4, 1, 1, 1), 2),
    "5 bits of a transposed convolution": WeightSpec(drawn(-15, 15, (3, 4, 2, 2)), steps(1, 4, 1, 1), 5, axis=1),
    "4 bits by group of a transposed one": WeightSpec(drawn(-7, 7, (3, 4, 2, 2)), steps(4, 3), 4, axis=1, group=4),
    "1 bit": WeightSpec(drawn(0, 1, (5, 7)) * 2 - 1, steps(5, 1), 1),
    "12 bits": WeightSpec(drawn(-2047, 2047, (4, 6)), steps(4, 1), 12),
    "zero points by channel": WeightSpec(
        drawn(-127, 127, (4, 6)), steps(4, 1), 8, zero_point=torch.tensor([[-127], [0], [5], [127]], dtype=torch.int32)
    ),
    "a zero point of a tensor of 12 bits": WeightSpec(
        drawn(-2047, 2047, (4, 6)), steps(), 12, zero_point=torch.tensor(-900, dtype=torch.int32)
    ),
    "levels": WeightSpec(drawn(0, 2, (4, 6)), None, 2, levels=torch.tensor([-0.3, 0.0, 0.7])),
    "many levels": WeightSpec(drawn(0, 4, (40, 6)), None, 2, levels=torch.tensor([-0.3, -0.2, 0.0, 0.7, 0.8])),
    "nothing": WeightSpec(torch.zeros(0, 6, dtype=torch.int32), steps(0, 1), 8),
    "one number": WeightSpec(torch.tensor(3), torch.tensor(0.1), 8),
}
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


def bits_of(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def written(path, grid, **more):
    report = write_packed(path, {"weight": grid.values(), **more}, {"weight": grid})
    return report, read_packed(path)


def small():
    grid = GRIDS["3 bits by group"]
    table = GRIDS["levels"]
    state = {"weight": grid.values(), "head": table.values(), "bias": torch.ones(3), "half": torch.ones(2).half()}
    return state, {"weight": grid, "head": table}


@every_grid
def test_every_grid_comes_back_bit_for_bit(tmp_path, grid):
    _, state = written(tmp_path / "file", grid)
    expected = grid.values() + 0.0
    assert state["weight"].dtype == torch.float32
    assert state["weight"].shape == expected.shape
    assert bits_of(state["weight"]) == bits_of(expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_come_back_as_torch_has_fake_quantized_them(tmp_path, bits):
    weight = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(bits))
    quant_max = 2 ** (bits - 1) - 1
    scale, zero_point = weight.abs().amax((1, 2, 3)) / quant_max, torch.zeros(6, dtype=torch.int32)
    values = torch.fake_quantize_per_channel_affine(weight, scale, zero_point, 0, -quant_max, quant_max)
    codes = (weight / scale.reshape(6, 1, 1, 1)).round().clamp(-quant_max, quant_max).to(torch.int32)
    grid = WeightSpec(codes, scale.reshape(6, 1, 1, 1), bits)
    write_packed(tmp_path / "file", {"weight": values}, {"weight": grid})
    assert bits_of(read_packed(tmp_path / "file")["weight"]) == bits_of(values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_quantized_weight_keeps_its_dtype(tmp_path, dtype):
    grid = GRIDS["4 bits of a tensor"]
    weight = grid.values().to(dtype)
    write_packed(tmp_path / "file", {"weight": weight}, {"weight": grid})
    found = read_packed(tmp_path / "file")["weight"]
    assert found.dtype == dtype
    assert bits_of(found) == bits_of(weight)


def test_everything_else_stays_as_it_is(tmp_path):
    others = {
        "half": torch.randn(3).half(),
        "brain": torch.randn(2, 3).bfloat16(),
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "negative zero": torch.tensor([-0.0, float("nan"), float("inf")]),
        "nothing": torch.empty(0, 3),
        "turned": torch.randn(2, 3).T,
    }
    _, state = written(tmp_path / "file", GRIDS["levels"], **others)
    for name, tensor in others.items():
        assert state[name].dtype == tensor.dtype, name
        assert bits_of(state[name]) == bits_of(tensor), name
    assert state.keys() == {"weight", *others}


@pytest.mark.parametrize(
    ("name", "codes", "scales", "levels"),
    [
        ("8 bits by channel", 24, 16, 0),
        ("4 bits of a tensor", 12, 4, 0),
        ("3 bits by group", 9, 32, 0),
        ("2 bits of a convolution", 27, 16, 0),
        ("1 bit", 5, 20, 0),  # 35 bits
        ("levels", 6, 0, 12),
        ("many levels", 90, 0, 20),  # five levels take 3 bits, whatever the grid says
        ("nothing", 0, 0, 0),
    ],
)
def test_the_report_counts_each_byte_of_the_file_once(tmp_path, name, codes, scales, levels):
    report, _ = written(tmp_path / "file", GRIDS[name], bias=torch.ones(5), half=torch.ones(3).half())
    assert (report.codes, report.scales, report.levels, report.others) == (codes, scales, levels, 26)
    assert report.size_bytes == (tmp_path / "file").stat().st_size
    assert report.header == 8 + int.from_bytes((tmp_path / "file").read_bytes()[:8], "little")


def test_a_report_reads_as_one_line():
    report = PackedReport(codes=100, scales=20, levels=3, others=4, header=200)
    assert str(report) == "327 bytes: codes 100, scales 20, levels 3, others 4, header 200"


def test_a_binary_weight_with_a_row_of_zeros_takes_a_bit_more(tmp_path):
    codes = GRIDS["1 bit"].codes.clone()
    codes[2] = 0
    report, state = written(tmp_path / "file", WeightSpec(codes, steps(5, 1), 1))
    assert report.codes == 9  # 70 bits
    assert torch.equal(state["weight"], codes * steps(5, 1))


def test_the_library_sees_bytes_scales_and_levels_by_name(tmp_path):
    state, weights = small()
    write_packed(tmp_path / "file", state, weights)
    found = load_file(tmp_path / "file")
    assert found.keys() == {"weight.codes", "weight.scale", "head.codes", "head.levels", "bias", "half"}
    assert torch.equal(found["weight.scale"], weights["weight"].scale)
    assert torch.equal(found["head.levels"], weights["head"].levels)
    stream = sum((code + 3) << (3 * place) for place, code in enumerate(weights["weight"].codes.flatten().tolist()))
    assert found["weight.codes"].tolist() == list(stream.to_bytes(9, "little"))


def test_what_the_library_writes_anew_is_read_as_before(tmp_path):
    state, weights = small()
    write_packed(tmp_path / "file", state, weights, {"made_by": "me"})
    save_file(load_file(tmp_path / "file"), tmp_path / "again", read_metadata(tmp_path / "file"))
    found = read_packed(tmp_path / "again")
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_metadata_are_kept(tmp_path):
    state, weights = small()
    write_packed(tmp_path / "file", state, weights, {"made_by": "me"})
    assert read_metadata(tmp_path / "file")["made_by"] == "me"


@pytest.mark.parametrize("told", [{"epoch": 3}, {3: "epoch"}, {"lightning_compress": "{}"}], ids=str)
def test_metadata_that_are_no_texts_or_take_our_name_are_refused(tmp_path, told):
    with pytest.raises(ValueError, match="metadata are texts by name"):
        write_packed(tmp_path / "file", {}, {}, told)


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float16, 2), (torch.bfloat16, 2), (torch.float8_e4m3fn, 1), (torch.float8_e5m2, 1)]
)
def test_a_tensor_that_was_rounded_to_a_shorter_dtype_is_stored_in_it(tmp_path, dtype, size):
    rounded = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)).to(dtype).float()
    report = write_packed(tmp_path / "file", {"weight": rounded}, {}, casts={"weight": dtype})
    found = read_packed(tmp_path / "file")["weight"]
    assert report.others == 30 * size
    assert found.dtype == torch.float32
    assert bits_of(found) == bits_of(rounded)


def test_a_cast_that_would_lose_something_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'weight' has values that torch.float16 does not hold"):
        write_packed(tmp_path / "file", {"weight": torch.tensor([0.1])}, {}, casts={"weight": torch.float16})


def test_a_weight_that_two_layers_share_is_stored_once(tmp_path):
    grid = GRIDS["4 bits of a tensor"]
    module = nn.Module()
    module.first, module.second = nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False)
    module.first.weight = module.second.weight = nn.Parameter(grid.values())
    module.one, module.other = nn.Linear(6, 4), nn.Linear(6, 4)
    module.one.weight = module.other.weight
    once = write_packed(tmp_path / "file", module.state_dict(), {"second.weight": grid})
    assert (once.codes, once.others) == (12, 4 * (24 + 4 + 4))
    found = read_packed(tmp_path / "file")
    assert found.keys() == module.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in module.state_dict().items())


def test_equal_tensors_that_share_no_memory_stay_two(tmp_path):
    report = write_packed(tmp_path / "file", {"a": torch.ones(4), "b": torch.ones(4)}, {})
    assert report.others == 32


def test_views_of_one_memory_stay_apart(tmp_path):
    whole = torch.arange(6.0).reshape(2, 3)
    write_packed(tmp_path / "file", {"whole": whole, "row": whole[0], "turned": whole.reshape(3, 2)}, {})
    found = read_packed(tmp_path / "file")
    assert found["row"].tolist() == [0, 1, 2]
    assert found["turned"].tolist() == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("state", "weights", "said"),
    [
        ({}, {"weight": GRIDS["levels"]}, "'weight' is not in module_state"),
        ({"weight": torch.zeros(4, 6)}, {"weight": GRIDS["levels"]}, "'weight' does not lie on its grid"),
        ({"weight": torch.zeros(6, 4)}, {"weight": GRIDS["levels"]}, "'weight' does not lie on its grid"),
        ({"weight": torch.zeros(4, 6).int()}, {"weight": GRIDS["levels"]}, "'weight' is torch.int32"),
        ({"weight": {"extra": "state"}}, {}, "'weight' is a dict"),
        ({"weight": torch.ones(2).to_sparse()}, {}, "'weight' is a torch.sparse_coo tensor"),
        (
            {"weight": GRIDS["levels"].values(), "weight.levels": torch.ones(1)},
            {"weight": GRIDS["levels"]},
            "'weight.levels' is a tensor of the module",
        ),
        (
            {"weight": torch.arange(70_000.0)},
            {"weight": WeightSpec(torch.arange(70_000), torch.tensor(1.0), 17)},
            "'weight': codes reach from 0 to 69999",
        ),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_what_would_not_come_back_is_refused_and_nothing_written(tmp_path, state, weights, said):
    (tmp_path / "file").write_text("before")
    with pytest.raises(ValueError, match=said):
        write_packed(tmp_path / "file", state, weights)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "before"


def test_a_weight_off_its_grid_by_one_bit_is_refused(tmp_path):
    weight = GRIDS["8 bits by channel"].values()
    weight.view(torch.int32)[2, 3] += 1
    with pytest.raises(ValueError, match="does not lie on its grid"):
        write_packed(tmp_path / "file", {"weight": weight}, {"weight": GRIDS["8 bits by channel"]})


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder .*nowhere"):
        write_packed(tmp_path / "nowhere" / "file", {}, {})


def test_a_module_is_loaded(tmp_path):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    grid = GRIDS["2 bits of a convolution"]
    module[0].weight.data = grid.values()
    write_packed(tmp_path / "file", module.state_dict(), {"0.weight": grid})
    fresh = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert load_packed(fresh, tmp_path / "file") is fresh
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(fresh.eval()(images), module.eval()(images))


def test_a_file_is_loaded_into_a_wider_dtype_but_not_into_a_narrower_one(tmp_path):
    module = nn.Linear(6, 4)
    write_packed(tmp_path / "file", module.state_dict(), {})
    assert torch.equal(load_packed(nn.Linear(6, 4).double(), tmp_path / "file").weight, module.weight.double())
    with pytest.raises(ValueError, match=r"'bias' is torch.bfloat16 in Linear, which does not hold the torch.float32"):
        load_packed(nn.Linear(6, 4).bfloat16(), tmp_path / "file")


def test_zero_points_that_the_reader_would_not_take_are_not_written(tmp_path):
    grid = WeightSpec(drawn(0, 9, (4, 6)), steps(), 8, zero_point=torch.tensor(40_000))
    with pytest.raises(ValueError, match="'weight' has zero points up to 40000, but they are packed in 16 bits"):
        write_packed(tmp_path / "file", {"weight": grid.values()}, {"weight": grid})


def test_a_module_without_memory_is_refused(tmp_path):
    write_packed(tmp_path / "file", nn.Linear(6, 4).state_dict(), {})
    with pytest.raises(ValueError, match="'weight' of Linear is on the meta device, where nothing can be loaded"):
        load_packed(nn.Linear(6, 4, device="meta"), tmp_path / "file")


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (nn.Linear(7, 4), r"'weight' has shape \(4, 7\) in Linear, but \(4, 6\)"),
        (nn.Linear(6, 4, bias=False), r"it lacks \[\], and has \['bias'\]"),
        (nn.Sequential(nn.Linear(6, 4)), r"it lacks \['0.bias', '0.weight'\], and has \['bias', 'weight'\]"),
    ],
    ids=["shape", "left", "missing"],
)
def test_a_module_that_does_not_fit_is_refused_and_left_alone(tmp_path, module, said):
    write_packed(tmp_path / "file", nn.Linear(6, 4).state_dict(), {})
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(ValueError, match=said):
        load_packed(module, tmp_path / "file")
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_the_reader_needs_nothing_but_torch_safetensors_and_the_standard_library():
    for file in (packed, packed_file, packed_format, packing, deployable, replacing):
        tree = ast.parse(Path(file.__file__).read_text())
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {getattr(node, "module", None) or node.names[0].name for node in imports}
        assert {name.split(".")[0] for name in names} <= {
            "torch",
            "safetensors",
            "lightning_compress",
            *sys.stdlib_module_names,
        }
        own = {name for name in names if name.startswith("lightning_compress")}
        assert all(name.split(".")[1] in ("core", "export", "quantization") for name in own), own
        assert ".numpy(" not in ast.unparse(tree)
