"""The safetensors format, against the library of that name, by hand, and against files that lie."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_compress.export.packed.safetensors import (
    DTYPES,
    read_metadata,
    read_tensors,
    state_fingerprint,
    write_tensors,
)

LIES = 300


def bits_of(tensor):
    return tensor.resolve_conj().contiguous().reshape(-1).view(torch.uint8).tolist()


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert bits_of(found[name]) == bits_of(tensor), name


def one_of_each():
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(0, 256, (3, 2 * dtype.itemsize), generator=generator).to(torch.uint8).view(dtype)
        for name, dtype in DTYPES.items()
        if name != "BOOL"
    }
    return {
        **tensors,
        "BOOL": torch.tensor([[True], [False]]),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        'a.long "näme"': torch.arange(5),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "conjugate": torch.tensor([1 + 2j, 3 - 1j]).conj(),
    }


def raw(header, content=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + content


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def test_the_library_reads_what_we_write(tmp_path):
    write_tensors(tmp_path / "file", one_of_each(), {"who": "we"})
    assert_same(load_file(tmp_path / "file"), one_of_each())


def test_we_read_what_the_library_writes(tmp_path):
    tensors = {name: tensor.resolve_conj().contiguous() for name, tensor in one_of_each().items()}
    save_file(tensors, tmp_path / "file", {"who": "the library"})
    found, metadata = read_tensors(tmp_path / "file")
    assert_same(found, tensors)
    assert metadata == read_metadata(tmp_path / "file") == {"who": "the library"}


def test_a_file_by_hand(tmp_path):
    content = torch.tensor([1.0, -2.0]).numpy().tobytes() + bytes([7])
    told = {"b": entry("U8", (1,), (8, 9)), "a": entry(), "__metadata__": {"x": "y"}}
    (tmp_path / "file").write_bytes(raw(told, content))
    found, metadata = read_tensors(tmp_path / "file")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"a": [1.0, -2.0], "b": [7]}
    assert metadata == {"x": "y"}


def test_the_header_is_counted_and_what_follows_is_aligned(tmp_path):
    tensors = {"a": torch.ones(1, dtype=torch.uint8), "b": torch.ones(2, dtype=torch.float64)}
    header = write_tensors(tmp_path / "file", tensors, {})
    assert header % 8 == 0
    assert (tmp_path / "file").stat().st_size == header + 1 + 16
    assert (tmp_path / "file").read_bytes()[header : header + 16] == tensors["b"].numpy().tobytes()


def test_the_same_tensors_and_metadata_give_the_same_bytes(tmp_path):
    """The library alone writes metadata in random order; six permutations are all seen in a dozen files."""
    odd = "".join(map(chr, [*range(0x300), 0x2028, 0x1F600]))
    metadata = {"z": odd, "a": '"\\/', odd: "1"}
    for number in range(12):
        write_tensors(tmp_path / str(number), one_of_each(), metadata)
    assert len({(tmp_path / str(number)).read_bytes() for number in range(12)}) == 1
    assert read_metadata(tmp_path / "0") == metadata
    assert_same(load_file(tmp_path / "0"), one_of_each())


def test_what_was_read_stays_when_the_file_is_overwritten_in_place(tmp_path):
    write_tensors(tmp_path / "file", {"a": torch.ones(3, 2)}, {})
    found, _ = read_tensors(tmp_path / "file")
    (tmp_path / "file").write_bytes(bytes((tmp_path / "file").stat().st_size))
    assert found["a"].tolist() == [[1, 1]] * 3


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(2, 2).to_sparse(), torch.ones(2, dtype=torch.complex128), torch.ones(2, device="meta")],
    ids=["sparse", "complex128", "meta"],
)
def test_tensors_that_the_format_does_not_know_are_refused(tmp_path, tensor):
    with pytest.raises(ValueError, match="'odd' is a .* which a safetensors file cannot hold"):
        write_tensors(tmp_path / "file", {"odd": tensor}, {})
    assert not (tmp_path / "file").exists()


def test_a_header_that_grows_too_large_is_refused(tmp_path):
    with pytest.raises(ValueError, match="header too large"):
        write_tensors(tmp_path / "file", {}, {"long": "x" * 100_000_000})


FALSE = {
    "nothing": b"",
    "a short length": b"\x02\0\0",
    "no header": raw(b"{}", length=0)[:8],
    "a header beyond the end": raw({"a": entry()}, b"", length=2**62),
    "a header longer than the file by one": raw(b"{}", length=3),
    "no JSON": raw(b"\xff\xfe{}"),
    "half of JSON": raw(b'{"a":'),
    "a list": raw([1]),
    "a number that is none": raw(b'{"a":NaN}'),
    "a number of a million digits": raw(b'{"a":' + b"9" * 1_000_000 + b"}"),
    "a deep nest": raw(b"[" * 1_000_000),
    "a name twice": raw(
        b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}", bytes(8)
    ),
    "metadata of numbers": raw({"__metadata__": {"a": 1}}),
    "metadata of a list": raw({"__metadata__": []}),
    "an entry that is a number": raw({"a": 1}),
    "an entry with more": raw({"a": entry(more=1)}, bytes(8)),
    "an unknown dtype": raw({"a": entry("F128")}, bytes(8)),
    "a dtype that is a list": raw({"a": entry(["F32"])}, bytes(8)),
    "a shape that is a text": raw({"a": {**entry(), "shape": "2"}}, bytes(8)),
    "a size below 0": raw({"a": entry(shape=(-1, -2))}, bytes(8)),
    "a size that is true": raw({"a": entry(shape=(2, True))}, bytes(8)),
    "a size that is a fraction": raw({"a": entry(shape=(2.0,))}, bytes(8)),
    "a shape of 2**60": raw({"a": entry(shape=(2**60,))}, bytes(8)),
    "a shape that comes round to 0": raw({"a": entry(shape=(2**32, 2**32), offsets=(0, 0))}),
    "an empty shape that torch cannot multiply": raw({"a": entry(shape=(0, 2**62, 2**62), offsets=(0, 0))}),
    "a hundred dimensions": raw({"a": entry("U8", (1,) * 100, (0, 1))}, bytes(1)),
    "three offsets": raw({"a": entry(offsets=(0, 8, 8))}, bytes(8)),
    "offsets backwards": raw({"a": entry(offsets=(8, 0))}, bytes(8)),
    "offsets below 0": raw({"a": entry(offsets=(-8, 0))}, bytes(8)),
    "offsets beyond the end": raw({"a": entry(shape=(2**40,), offsets=(0, 2**42))}, bytes(8)),
    "offsets that overlap": raw({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "one place for two": raw({"a": entry(), "b": entry()}, bytes(8)),
    "a hole": raw({"a": entry(), "b": entry(offsets=(9, 17))}, bytes(17)),
    "a hole at the beginning": raw({"a": entry(offsets=(1, 9))}, bytes(9)),
    "bytes of nobody": raw({"a": entry()}, bytes(9)),
}


@pytest.mark.parametrize("content", FALSE.values(), ids=FALSE)
def test_a_false_file_is_refused_before_memory_is_taken(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match="file is damaged, or no safetensors file") as error:
        read_tensors(tmp_path / "file")
    assert len(str(error.value)) < 600


def test_the_first_false_file_would_be_read_were_it_right(tmp_path):
    """That the files above are refused for what is false in them: this is the same, without."""
    (tmp_path / "file").write_bytes(raw({"a": entry(), "b": entry(offsets=(8, 16))}, bytes(16)))
    assert read_tensors(tmp_path / "file")[0]["b"].tolist() == [0, 0]


@pytest.mark.parametrize("seed", range(3))
def test_random_damage_is_refused_or_read_within_the_files_size(tmp_path, seed):
    draw = random.Random(seed)
    write_tensors(tmp_path / "file", {"a": torch.ones(3, 2), "b": torch.ones(5, dtype=torch.int8)}, {"who": "we"})
    right = (tmp_path / "file").read_bytes()
    refused = 0
    for _ in range(LIES):
        lie = bytearray(right)
        for _ in range(draw.choice([1, 1, 2, 5])):
            lie[draw.randrange(len(lie))] ^= 1 << draw.randrange(8)
        (tmp_path / "file").write_bytes(lie)
        try:
            found, _ = read_tensors(tmp_path / "file")
            assert sum(tensor.numel() * tensor.dtype.itemsize for tensor in found.values()) <= len(right)
        except ValueError:
            refused += 1
    assert refused > LIES / 3


def test_every_truncation_is_refused(tmp_path):
    write_tensors(tmp_path / "file", {"a": torch.ones(3, 2)}, {})
    right = (tmp_path / "file").read_bytes()
    for length in range(len(right)):
        (tmp_path / "file").write_bytes(right[:length])
        with pytest.raises(ValueError, match="damaged"):
            read_tensors(tmp_path / "file")


def test_a_byte_that_is_no_boolean_is_read_as_true(tmp_path):
    (tmp_path / "file").write_bytes(raw({"a": entry("BOOL", (3,), (0, 3))}, bytes([0, 1, 200])))
    assert read_tensors(tmp_path / "file")[0]["a"].view(torch.uint8).tolist() == [0, 1, 1]


def test_a_file_that_is_not_there_is_said_to_be_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "nowhere")


def test_the_fingerprint_sees_names_dtypes_shapes_bytes_and_metadata():
    tensors, told = {"a": torch.arange(4.0), "b": torch.ones(2)}, {"x": "1", "y": "2"}
    others = [
        ({"a": tensors["a"], "c": tensors["b"]}, told),
        ({**tensors, "a": tensors["a"].view(torch.int32)}, told),
        ({**tensors, "a": tensors["a"].reshape(2, 2)}, told),
        ({**tensors, "a": tensors["a"].flip(0)}, told),
        (tensors, {"x": "2", "y": "1"}),
    ]
    own = state_fingerprint(tensors, told)
    assert state_fingerprint(dict(reversed(tensors.items())), dict(reversed(told.items()))) == own
    assert len({own, *(state_fingerprint(*other) for other in others)}) == 6
