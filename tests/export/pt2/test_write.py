"""Programs of torch.export: small, the same bit for bit, and refused where they would not be."""

import zipfile
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_compress.export.pt2.write import Pt2Report, write_pt2
from tests.export.deployables import Step, deployed, in_the_middle, random


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


def tokens(*shape):
    return torch.randint(0, 20, shape, generator=torch.Generator().manual_seed(1))


@contextmanager
def step_by_step():
    """Without the fused attention of modules, which adds in another order than programs do."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


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
    from lightning_compress.export.pt2.weights import StoredWeight

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


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_pt2(deployed(nn.Linear(8, 4)), tmp_path / "nowhere" / "model.pt2", random(4, 8))
