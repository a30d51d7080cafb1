import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_compress.measure.file_size import file_size
from lightning_compress.measure.sparse_encoding import decode, encode
from lightning_compress.measure.stored_tensors import count_nonzero, stored_tensors


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 10)
        self.head.weight = self.embedding.weight
        self.register_buffer("scratch", torch.zeros(3), persistent=False)


def test_names_are_those_of_the_state_dict():
    for model in (Tied(), nn.LSTM(3, 4), parametrizations.weight_norm(nn.Linear(3, 4)), nn.MultiheadAttention(8, 2)):
        assert sorted(one.name for one in stored_tensors(model)) == sorted(model.state_dict())


def test_what_is_stored_loads_into_a_new_model_after_the_file():
    model, other = Tied(), Tied()
    other.load_state_dict(decode(encode({one.name: one.tensor for one in stored_tensors(model)})))
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)


def test_a_tied_weight_is_marked_where_it_comes_second():
    assert [one.name for one in stored_tensors(Tied()) if one.tied] == ["head.weight"]


def test_a_module_under_two_names_is_one_layer():
    layer = nn.Linear(2, 2)
    found = stored_tensors(nn.ModuleDict({"a": layer, "b": layer}))
    assert [(one.name, one.layer, one.tied) for one in found] == [
        ("a.weight", "a", False),
        ("a.bias", "a", False),
        ("b.weight", "a", True),
        ("b.bias", "a", True),
    ]


def test_what_a_parametrization_stores_belongs_to_the_layer():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 3)))
    assert {one.layer for one in stored_tensors(model)} == {"0"}


def test_compiled_modules_keep_their_plain_names():
    model = nn.Sequential(torch.compile(nn.Linear(2, 2)))
    assert [(one.name, one.layer) for one in stored_tensors(model)] == [("0.weight", "0"), ("0.bias", "0")]


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([0.0, -0.0, 1e-45, float("nan")], torch.float32, 2),
        ([0, 3, -1, 0], torch.int8, 2),
        ([True, False], torch.bool, 1),
        ([0.0, 2.0], torch.bfloat16, 1),
        ([0.0, 2.0], torch.float8_e4m3fn, 1),
        ([0j, 1j], torch.complex64, 1),
    ],
)
def test_nonzeros_are_exact(values, dtype, expected):
    assert count_nonzero(torch.tensor(values).to(dtype)) == expected


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.LazyLinear(3)), "'0.weight' is lazy.*Run one batch"),
        (nn.Linear(2, 3, device="meta"), "'weight' is on the meta device.*Load the weights first"),
    ],
)
def test_a_parameter_without_values_is_refused_in_words(model, message):
    with pytest.raises(ValueError, match=message):
        stored_tensors(model)


def test_a_sparse_tensor_is_refused_in_words():
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.eye(2).to_sparse())
    with pytest.raises(ValueError, match=r"'mask' is a Tensor of layout torch.sparse_coo.*to_dense"):
        stored_tensors(model)


@pytest.mark.parametrize("sparse", [True, False])
def test_the_size_is_that_of_the_written_file(sparse, tmp_path):
    import gzip

    tensors = {one.name: one.tensor for one in stored_tensors(Tied())}
    size = file_size(tensors, sparse=sparse)
    (tmp_path / "file").write_bytes(encode(tensors, sparse=sparse))
    assert size.size_bytes == (tmp_path / "file").stat().st_size
    assert sum(size.record_bytes.values()) == size.size_bytes - 8
    assert abs(size.gzip_bytes - len(gzip.compress(encode(tensors, sparse=sparse), 6))) <= 8


def test_gzip_is_left_out_for_a_huge_model(monkeypatch):
    monkeypatch.setattr("lightning_compress.measure.file_size.GZIP_LIMIT_BYTES", 100)
    assert file_size({"w": torch.ones(25)}, sparse=True).gzip_bytes is not None
    assert file_size({"w": torch.ones(26)}, sparse=True).gzip_bytes is None
