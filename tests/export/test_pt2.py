"""Programs of torch.export: small, the same bit for bit, and refused where they would not be."""

import re
import zipfile
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_compress.export.deployable import Deployable, WeightGrid
from lightning_compress.export.pt2 import Pt2Report, write_pt2

GENERATOR = torch.Generator()


class Step(nn.Module):
    """A quantizer of activations, as deployables have them."""

    def __init__(self, zero_point=0):
        super().__init__()
        self.register_buffer("scale", torch.tensor(0.05))
        self.register_buffer("zero_point", torch.tensor(zero_point, dtype=torch.int32))

    def forward(self, values):
        return torch.fake_quantize_per_tensor_affine(values, self.scale, self.zero_point, 0, 255)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.depthwise, self.head = nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 5)

    def forward(self, images):
        hidden = functional.relu(self.first(images))
        hidden = functional.relu(hidden + self.second(hidden))
        return self.head(self.depthwise(hidden).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.embedding, self.cell = nn.Embedding(20, 8), kind(8, 6, batch_first=True)

    def forward(self, tokens):
        return self.cell(self.embedding(tokens))[0][:, -1]


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)

    def forward(self, values):
        return {"values": self.norm(values + self.attention(values, values, values)[0]), "first": values[:, 0]}


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, values, mask=None, scale=1.0):
        hidden = self.layer(values) * scale
        return hidden if mask is None else hidden.masked_fill(mask, 0.0)


def grid_of(weight, bits, axis=0, group=0):
    """Weight on a symmetric grid, by definition."""
    high = 2 ** (bits - 1) - 1
    if group:
        by_group = weight.transpose(0, axis).reshape(weight.shape[axis], -1, group)
        scale = by_group.abs().amax(2) / high
        swapped = weight.transpose(0, axis).shape
        codes = (by_group / scale.unsqueeze(2)).round().reshape(swapped).transpose(0, axis)
    else:
        dims = [dim for dim in range(weight.ndim) if dim != axis]
        scale = weight.abs().amax(dims, keepdim=True) / high
        codes = (weight / scale).round()
    return WeightGrid(codes.to(torch.int32), scale, bits, axis, group)


def deployed(module, bits=8, group=0, like=r".*weight.*"):
    """The module with all its matrices on grids."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in module.parameters():
            parameter.data = torch.randn_like(parameter) * 0.3
    axes = {f"{name}.weight": 1 for name, one in module.named_modules() if isinstance(one, nn.ConvTranspose2d)}
    module.eval().requires_grad_(False)
    grids = {}
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1 and re.fullmatch(like, name):
            grids[name] = grid_of(parameter, bits, axes.get(name, 0), group)
            parameter.copy_(grids[name].values())
    return Deployable(module, grids)


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def tokens(*shape):
    return torch.randint(0, 20, shape, generator=torch.Generator().manual_seed(1))


@contextmanager
def step_by_step():
    """Without the fused attention of modules, which adds in another order than programs do."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def loaded(path):
    return torch.export.load(path).module()


def weights_in(path):
    return torch.export.load(path).state_dict


MODELS = {
    "residual": (Residual, random(4, 3, 8, 8)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 6, 2, stride=2), nn.ReLU()), random(4, 3, 5, 5)),
    "lstm": (lambda: Recurrent(nn.LSTM), tokens(4, 7)),
    "gru": (lambda: Recurrent(nn.GRU), tokens(4, 7)),
    "attention": (Attending, random(4, 5, 8)),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), random(4, 5, 8)),
    "multilayer": (lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 3)), random(4, 8)),
}


@pytest.mark.parametrize(("make", "example"), MODELS.values(), ids=MODELS)
def test_the_loaded_program_is_the_module_bit_for_bit_and_holds_no_quantized_weight_as_floats(tmp_path, make, example):
    model = deployed(make())
    write_pt2(model, tmp_path / "model.pt2", example)
    read = torch.export.load(tmp_path / "model.pt2")
    for name, grid in model.weights.items():
        assert name not in read.state_dict
        assert read.state_dict[f"{name}_stored.codes"].dtype == torch.int8
        assert torch.equal(read.state_dict[f"{name}_stored.codes"].int(), grid.codes)
        assert torch.equal(read.state_dict[f"{name}_stored.scale"], grid.scale)
    program = read.module()
    for rows in (1, 2, 4, 9):
        batch = example.repeat(3, *[1] * (example.ndim - 1))[:rows]
        with torch.no_grad(), step_by_step():
            expected, found = model.module(batch), program(batch)
        if isinstance(expected, dict):
            assert found.keys() == expected.keys()
            expected, found = expected["values"], found["values"]
        assert torch.equal(found, expected)


def test_quantizers_of_activations_compute_in_the_program(tmp_path):
    model = deployed(Residual())
    model.module.quantizers = nn.ModuleDict({"inside": Step(zero_point=100), "door": Step()}).eval()
    model.module.first.register_forward_hook(lambda _module, _args, output: model.module.quantizers["inside"](output))
    model.module.register_forward_pre_hook(
        lambda module, args, kwargs: ((module.quantizers["door"](args[0]),), kwargs), with_kwargs=True
    )
    example = random(4, 3, 8, 8)
    before = {name: one.clone() for name, one in model.module.quantizers.named_buffers()}
    write_pt2(model, tmp_path / "model.pt2", example)
    after = dict(model.module.quantizers.named_buffers())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    program = torch.export.load(tmp_path / "model.pt2")
    assert sum("round" in str(node.target) for node in program.graph.nodes) == 2
    assert torch.equal(program.module()(random(9, 3, 8, 8)), model.module(random(9, 3, 8, 8)))


def test_a_quantizer_of_the_users_own_is_exported_too(tmp_path):
    model = deployed(nn.Sequential(nn.Linear(8, 4), Step(zero_point=3)))
    write_pt2(model, tmp_path / "model.pt2", random(4, 8))
    program = torch.export.load(tmp_path / "model.pt2")
    assert torch.equal(program.state_dict["1.zero_point"], torch.tensor(3, dtype=torch.int32))
    assert torch.equal(program.module()(random(9, 8)), model.module(random(9, 8)))


class Side(nn.ModuleDict):
    """Layers side by side, each with its output."""

    def forward(self, values):
        return {name: layer(values) for name, layer in self.items()}


@pytest.mark.parametrize("group", [0, 25])
def test_weights_of_any_width_come_out_as_they_are_and_narrow_ones_are_packed(tmp_path, group):
    numbers_to_a_byte = {2: 4, 3: 2, 4: 2, 5: 1, 8: 1, 12: 0.5}
    layers = {f"{bits}": deployed(nn.Linear(125, 131), bits, group) for bits in numbers_to_a_byte}
    model = Side({name: layer.module for name, layer in layers.items()}).eval()
    grids = {f"{name}.weight": layer.weights["weight"] for name, layer in layers.items()}
    write_pt2(Deployable(model, grids), tmp_path / "model.pt2", random(4, 125))
    held, identity = weights_in(tmp_path / "model.pt2"), torch.eye(125)
    found, expected = loaded(tmp_path / "model.pt2")(identity), model(identity)
    for bits, numbers in numbers_to_a_byte.items():
        codes = held[f"{bits}.weight_stored.codes"]
        assert codes.numel() * codes.dtype.itemsize == -(-125 * 131 // numbers)
        assert torch.equal(found[f"{bits}"], expected[f"{bits}"])


def test_small_weights_are_not_packed_for_the_program_would_grow_by_more(tmp_path):
    report = write_pt2(deployed(nn.Linear(16, 16), bits=2), tmp_path / "model.pt2", random(4, 16))
    assert report.weights == 16 * 16 + 16 * 4


def test_packing_makes_the_file_smaller_where_it_is_done(tmp_path):
    sizes = []
    for bits in (4, 8):
        report = write_pt2(deployed(nn.Linear(34, 32), bits), tmp_path / "model.pt2", random(4, 34))
        sizes.append(report.size_bytes)
    assert sizes[0] < sizes[1]


def test_levels_are_looked_up(tmp_path):
    sizes, grids = [(count, size) for count in (2, 3, 16, 200) for size in (7, 200)], {}
    model = Side({f"{count} {size}": nn.Linear(131, size) for count, size in sizes}).eval().requires_grad_(False)
    for count, size in sizes:
        levels = torch.linspace(-1, 1, count)
        codes = torch.randint(0, count, (size, 131), generator=torch.Generator().manual_seed(0))
        grids[f"{count} {size}.weight"] = WeightGrid(codes, None, 8, levels=levels)
        model[f"{count} {size}"].weight.copy_(levels[codes])
    write_pt2(Deployable(model, grids), tmp_path / "model.pt2", random(4, 131))
    found, expected = loaded(tmp_path / "model.pt2")(random(3, 131)), model(random(3, 131))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    stored = {name: one.numel() for name, one in weights_in(tmp_path / "model.pt2").items() if name.endswith(".codes")}
    numbers_to_a_byte = {(2, 7): 8, (3, 7): 4, (2, 200): 8, (3, 200): 4, (16, 200): 2}
    for count, size in sizes:
        packed = -(-131 * size // numbers_to_a_byte.get((count, size), 1))
        assert stored[f"{count} {size}.weight_stored.codes"] == packed


def test_transposed_groups_come_out_as_they_are(tmp_path):
    model = deployed(nn.Sequential(nn.ConvTranspose2d(3, 6, 2, stride=2)), bits=4, group=6)
    write_pt2(model, tmp_path / "model.pt2", random(4, 3, 5, 5))
    assert torch.equal(loaded(tmp_path / "model.pt2")(random(2, 3, 5, 5)), model.module(random(2, 3, 5, 5)))


def test_a_weight_in_another_order_of_memory_and_dtype_keeps_both(tmp_path):
    module = nn.Sequential(nn.Conv2d(3, 8, 3)).to(memory_format=torch.channels_last).bfloat16().eval()
    grid = grid_of(module[0].weight.detach().float(), 8)
    module[0].weight.data = grid.values().bfloat16().to(memory_format=torch.channels_last)
    model = Deployable(module, {})
    object.__setattr__(model, "weights", {"0.weight": grid})  # deployables check floats of 32 bits only
    example = random(4, 3, 8, 8).bfloat16().to(memory_format=torch.channels_last)
    write_pt2(model, tmp_path / "model.pt2", example)
    assert weights_in(tmp_path / "model.pt2")["0.weight_stored.codes"].dtype == torch.int8


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
        Deployable(model.module, {**model.weights, "unused.weight": grid}), tmp_path / "m.pt2", random(2, 8)
    )
    assert report.weights == 8 * 4 + 4 * 4
    assert torch.equal(loaded(tmp_path / "m.pt2")(random(3, 8)), model.module(random(3, 8)))


@pytest.mark.parametrize(
    "example",
    [
        (random(4, 8), random(4, 4) > 0),
        {"values": random(4, 8), "mask": random(4, 4) > 0},
        {"mask": random(4, 4) > 0, "values": random(4, 8), "scale": 0.5},
        (random(4, 8), None, 0.5),
    ],
    ids=["tuple", "dict", "dict with a number", "tuple with None"],
)
def test_the_example_is_a_tensor_a_tuple_or_keywords(tmp_path, example):
    model = deployed(Keywords())
    write_pt2(model, tmp_path / "model.pt2", example)
    args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
    assert torch.equal(loaded(tmp_path / "model.pt2")(*args, **kwargs), model.module(*args, **kwargs))


def test_an_example_of_one_row_leaves_the_batch_open(tmp_path):
    model = deployed(nn.Sequential(nn.Linear(8, 4)))
    write_pt2(model, tmp_path / "model.pt2", random(1, 8))
    assert loaded(tmp_path / "model.pt2")(random(5, 8)).shape == (5, 4)


def test_a_fixed_batch_takes_no_other(tmp_path):
    model = deployed(nn.Sequential(nn.Linear(8, 4)))
    write_pt2(model, tmp_path / "model.pt2", random(4, 8), dynamic_batch=False)
    program = loaded(tmp_path / "model.pt2")
    assert torch.equal(program(random(4, 8)), model.module(random(4, 8)))
    with pytest.raises(Exception, match="4"):
        program(random(5, 8))


def test_the_report_counts_each_byte_of_the_file_once(tmp_path):
    report = write_pt2(deployed(Residual()), tmp_path / "model.pt2", random(4, 3, 8, 8))
    assert report.weights == (3 * 8 * 9 + 8 * 8 * 9 + 8 * 9 + 8 * 5) + 4 * (8 + 8 + 8 + 5)
    assert report.others == 4 * (8 + 8 + 8 + 5)
    assert report.size_bytes == (tmp_path / "model.pt2").stat().st_size
    assert report.libraries == ()
    assert str(Pt2Report(10, 4, 6, ("toy",))) == "20 bytes: weights 10, others 4, program 6; needs toy"


def test_the_file_has_no_pickle_no_example_and_no_path_of_this_machine(tmp_path):
    write_pt2(deployed(Residual()), tmp_path / "model.pt2", random(4, 3, 8, 8))
    archive = zipfile.ZipFile(tmp_path / "model.pt2")
    entries = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    whole = b"".join(entries.values())
    assert b"conv2d" in whole
    assert b".py" not in whole
    assert str(tmp_path).encode() not in whole
    assert random(4, 3, 8, 8).numpy().tobytes()[:64] not in whole
    assert entries["data/sample_inputs/model.pt"] == b""
    assert not any(content[:1] == b"\x80" or content[:2] == b"PK" for content in entries.values())
    assert b'"use_pickle": false' in entries["data/weights/model_weights_config.json"]
    assert b'"use_pickle": true' not in whole


def test_an_object_that_would_be_pickled_is_refused(tmp_path, monkeypatch):
    from torch.export.pt2_archive import _package

    monkeypatch.setattr(_package, "_should_use_pickle", lambda tensor: True)
    with pytest.raises(ValueError, match="would be a pickle"):
        write_pt2(deployed(nn.Linear(8, 4)), tmp_path / "model.pt2", random(4, 8))
    assert not list(tmp_path.iterdir())


def test_the_deployable_stays_as_it_is(tmp_path):
    model = deployed(Residual())
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    names, state = [name for name, _ in model.module.named_modules()], torch.get_rng_state()
    write_pt2(model, tmp_path / "model.pt2", random(4, 3, 8, 8))
    assert [name for name, _ in model.module.named_modules()] == names
    assert all(torch.equal(before[name], tensor) for name, tensor in model.module.state_dict().items())
    assert isinstance(model.module.first.weight, nn.Parameter)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.backends.mha.get_fastpath_enabled()


def in_the_middle(compute):
    class Middle(nn.Module):
        def forward(self, values):
            return compute(values)

    return deployed(nn.Sequential(nn.Linear(8, 4), Middle()))


@torch.library.custom_op("toy::unknown", mutates_args=())
def unknown(values: torch.Tensor) -> torch.Tensor:
    return values.clone()


@torch.library.custom_op("toy::known", mutates_args=())
def known(values: torch.Tensor) -> torch.Tensor:
    return values.clone()


known.register_fake(torch.empty_like)


@pytest.mark.parametrize(
    ("compute", "said"),
    [
        (
            lambda values: values if values.sum() > 0 else -values,
            r"in '1', test_pt2.py line \d+.*data-dependent.*torch.where",
        ),
        (lambda values: values[: int(values.sum() * 0 + 2)], "in '1'.*data-dependent.*torch.where"),
        (lambda values: values.view(4, -1), "specialized.*With a fixed batch it can be: give dynamic_batch=False"),
        (lambda values: torch.from_numpy(values.numpy()), r"in '1'.*\.numpy\(\).*Use operators"),
        (unknown, "in '1'.*toy::unknown.*Use operators"),
    ],
    ids=["branch", "slice", "batch", "numpy", "operator"],
)
def test_what_cannot_be_exported_is_named_and_nothing_is_written(tmp_path, compute, said):
    (tmp_path / "model.pt2").write_text("before")
    with pytest.raises(ValueError, match=f"(?s){said}"):
        write_pt2(in_the_middle(compute), tmp_path / "model.pt2", random(4, 8))
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
    assert (tmp_path / "model.pt2").read_text() == "before"


def test_a_library_of_operators_is_named_in_the_report(tmp_path):
    assert write_pt2(in_the_middle(known), tmp_path / "model.pt2", random(4, 8)).libraries == ("toy",)


def test_a_batch_that_is_a_constant_can_be_written_as_such(tmp_path):
    model = in_the_middle(lambda values: values.view(4, -1))
    write_pt2(model, tmp_path / "model.pt2", random(4, 8), dynamic_batch=False)
    assert torch.equal(loaded(tmp_path / "model.pt2")(random(4, 8)), model.module(random(4, 8)))


@pytest.mark.parametrize(
    ("compute", "said"),
    [
        (
            lambda values: values if values.shape[0] > 1 else -values,
            "computes something else than Sequential for 1 rows",
        ),
        (lambda values: values.view(-1, 2, 4), "Sequential as a program does not take 1 rows"),
        (lambda values: values * len(CALLS.append(1) or CALLS), "computes something else than Sequential for"),
    ],
    ids=["another thing for one row", "even numbers of rows alone", "another thing at every call"],
)
def test_a_program_that_computes_something_else_is_refused(tmp_path, compute, said):
    with pytest.raises(ValueError, match=said):
        write_pt2(in_the_middle(compute), tmp_path / "model.pt2", random(4, 8))
    assert not list(tmp_path.iterdir())


CALLS = []


def test_weights_that_come_out_other_than_they_are_would_be_noticed(tmp_path, monkeypatch):
    from lightning_compress.export.pt2_weights import StoredWeight

    right = StoredWeight.forward
    monkeypatch.setattr(StoredWeight, "forward", lambda self: right(self) * (1 + 2**-23))
    with pytest.raises(ValueError, match="computes something else"):
        write_pt2(deployed(Residual()), tmp_path / "model.pt2", random(4, 3, 8, 8))
    assert not list(tmp_path.iterdir())


def test_random_numbers_are_the_same_on_both_sides(tmp_path):
    write_pt2(in_the_middle(lambda values: values + torch.rand_like(values)), tmp_path / "model.pt2", random(4, 8))
    assert (tmp_path / "model.pt2").exists()


def test_what_a_model_returns_may_be_no_number(tmp_path):
    write_pt2(in_the_middle(lambda values: values / (values - values)), tmp_path / "model.pt2", random(4, 8))
    assert (tmp_path / "model.pt2").exists()


@pytest.mark.parametrize(
    ("example", "said"),
    [
        ("images", "this str holds no tensor"),
        ((), "this tuple holds no tensor"),
        (random(4, 9), "cannot be called with this example_input"),
        ({"wrong": random(4, 8)}, "cannot be called with this example_input"),
    ],
    ids=["text", "nothing", "shape", "name"],
)
def test_an_example_that_does_not_fit_is_refused(tmp_path, example, said):
    with pytest.raises(ValueError, match=said):
        write_pt2(deployed(nn.Linear(8, 4)), tmp_path / "model.pt2", example)


def test_a_module_in_training_mode_is_refused(tmp_path):
    model = deployed(nn.Sequential(nn.Linear(8, 4), nn.Dropout()))
    model.module[1].train()
    with pytest.raises(ValueError, match=r"training mode, in '1' at least: call eval\(\)"):
        write_pt2(model, tmp_path / "model.pt2", random(4, 8))


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_pt2(deployed(nn.Linear(8, 4)), tmp_path / "nowhere" / "model.pt2", random(4, 8))
