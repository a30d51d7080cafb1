from contextlib import suppress

import numpy as np
import pytest
import torch

from lightning_compress.measure import element_bits as words
from lightning_compress.measure.index_encoding import best_width_bits, gaps_between, pack_gaps, unpack_gaps
from lightning_compress.measure.sparse_encoding import (
    HEADER_SIZE_BYTES,
    as_float32,
    decode,
    encode,
    encoded_size_bytes,
    records,
)


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist() if tensor.numel() else []


def assert_same(decoded, tensors):
    assert list(decoded) == list(tensors)
    for name, tensor in tensors.items():
        assert decoded[name].dtype == tensor.dtype
        assert decoded[name].shape == tensor.shape
        assert bits(decoded[name]) == bits(tensor), name


def random_tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for place in range(6):
        shape = torch.randint(0, 9, (int(torch.randint(0, 4, (), generator=generator)),), generator=generator).tolist()
        keep = torch.rand(shape, generator=generator) < torch.rand((), generator=generator)
        dtype = words.DTYPES[int(torch.randint(0, len(words.DTYPES), (), generator=generator))]
        values = torch.where(keep, torch.rand(shape, generator=generator) + 0.5, 0.0)
        tensors[f"layer {place} \N{GREEK SMALL LETTER BETA}"] = (values * 3).to(dtype)
    return tensors


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("seed", range(40))
def test_every_element_comes_back_bit_for_bit(seed, sparse):
    tensors = random_tensors(seed)
    assert_same(decode(encode(tensors, sparse=sparse)), tensors)


@pytest.mark.parametrize("density", [0.0, 0.0001, 0.01, 0.1, 0.4, 0.6, 1.0])
def test_each_density_comes_back_and_has_the_announced_length(density):
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(300, 700, generator=generator) * (torch.rand(300, 700, generator=generator) < density).float()
    weight = weight + 0.0  # no -0.0
    data = encode({"weight": weight})
    assert len(data) == encoded_size_bytes({"weight": weight})
    assert_same(decode(data), {"weight": weight})
    assert len(data) <= len(encode({"weight": weight}, sparse=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_numbers_that_are_none_come_back_and_minus_zero_as_zero(dtype):
    tensor = torch.tensor([0.0, float("nan"), float("inf"), -float("inf"), -0.0, 1.0] + [0.0] * 50, dtype=dtype)
    decoded = decode(encode({"x": tensor}))["x"]
    expected = tensor.clone()
    expected[4] = 0.0
    assert bits(decoded) == bits(expected)


def test_the_model_is_left_with_its_minus_zeros():
    tensor = torch.tensor([-0.0, 1.0])
    encode({"x": tensor})
    assert torch.signbit(tensor).tolist() == [True, False]


def test_a_dense_record_is_the_head_and_four_bytes_a_float():
    # name: length and 1 letter; code; type; 2 dimensions: their number, 2, 3; 6 floats
    head = 2 + 1 + 1 + 1 + 2
    (record,) = records({"w": torch.ones(2, 3)}, sparse=False)
    assert len(record) == head + 6 * 4
    assert len(encode({"w": torch.ones(2, 3)}, sparse=False)) == HEADER_SIZE_BYTES + head + 24


def test_a_bitmap_record_is_an_eighth_of_a_byte_an_element_and_the_values():
    weight = torch.zeros(32)
    weight[::2] = 1.0  # 16 of 32: the bitmap has 4 bytes, gaps would be longer
    (record,) = records({"w": weight})
    assert len(record) == (2 + 1 + 1 + 1 + 1) + 4 + 16 * 4


def test_a_gaps_record_is_by_hand():
    weight = torch.zeros(100)
    weight[[3, 50]] = torch.tensor([1.0, 2.0])  # gaps 3 and 46
    # 2 bits: 3 = skip and 0, 46 = 15 skips and 1: 18 symbols = 36 bits; 3 bits: 3, then 6 skips and 4: 8 symbols = 24
    # bits; 4 bits: 3, then 3 skips and 1: 5 symbols = 20 bits; 5 bits: 3, then skip and 15: 3 symbols = 15 bits; 6
    # bits: 12 bits
    assert best_width_bits(np.array([3, 46])) == (6, 2)
    (record,) = records({"w": weight})
    assert len(record) == (2 + 1 + 1 + 1 + 1) + (1 + 1 + 1) + 2 + 2 * 4
    assert record[-10:-8] == bytes([0b00001110, 0b11100000])


@pytest.mark.parametrize("width", [2, 3, 5, 8, 11, 16])
def test_gaps_of_any_length_survive_any_width(width):
    random = np.random.default_rng(width)
    positions = np.flatnonzero(random.random(50_000) < 0.01) + np.array([0])
    positions = np.append(positions, 1_000_000)
    packed = pack_gaps(gaps_between(positions), width)
    assert unpack_gaps(packed, width, len(positions)).tolist() == positions.tolist()


def test_more_symbols_than_a_chunk_survive():
    positions = np.arange(0, 3_000_000, 2)
    assert np.array_equal(unpack_gaps(pack_gaps(gaps_between(positions), 3), 3, len(positions)), positions)


def test_tied_tensors_are_written_once_and_come_back_tied():
    shared = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    data = encode({"embedding": shared, "bias": torch.ones(3), "head": shared})
    alone = encode({"embedding": shared, "bias": torch.ones(3)})
    assert len(data) == len(alone) + (1 + 4) + 1 + 1  # name, code, place
    decoded = decode(data)
    assert decoded["head"] is decoded["embedding"]
    assert torch.equal(decoded["head"], shared)
    assert len(encode(as_float32({"a": shared.double(), "b": shared}), sparse=False)) > 2 * shared.nbytes


def test_tied_tensors_stay_tied_as_float32():
    shared = torch.ones(10, 10, dtype=torch.float64)
    as_floats = as_float32({"a": shared, "b": shared, "count": torch.tensor(3)})
    assert as_floats["a"] is as_floats["b"]
    assert as_floats["a"].dtype == torch.float32
    assert as_floats["count"].dtype == torch.int64


def test_a_view_is_written_as_what_it_shows():
    weight = torch.arange(12.0).reshape(3, 4)
    assert torch.equal(decode(encode({"t": weight.t()}))["t"], weight.t())
    conjugate = torch.tensor([1 + 2j, 0j]).conj()
    assert torch.equal(decode(encode({"c": conjugate}))["c"], torch.tensor([1 - 2j, 0j]))


def test_a_cut_or_foreign_file_is_refused_at_every_length():
    weight = torch.zeros(50)
    weight[[1, 30]] = 1.0
    data = encode({"a": torch.ones(3), "b": weight, "c": torch.eye(4)})
    for length in range(len(data)):
        with pytest.raises(ValueError, match=r"damaged|Not a file|records end"):
            decode(data[:length])
    with pytest.raises(ValueError, match="records end at byte"):
        decode(data + b"x")
    with pytest.raises(ValueError, match="Not a file of this code"):
        decode(b"PK\x03\x04 something else")


def test_damage_is_never_another_kind_of_error():
    weight = torch.zeros(50)
    weight[[1, 30]] = 1.0
    data = encode({"b": weight, "c": torch.eye(4)})
    for place in range(len(data)):
        for change in (1, 64, 128):
            damaged = bytearray(data)
            damaged[place] ^= change
            with suppress(ValueError):
                decode(bytes(damaged))


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_a_type_without_code_is_refused():
    with pytest.raises(ValueError, match="No code for tensors of type torch.complex32"):
        encode({"x": torch.zeros(2, dtype=torch.complex32)})
