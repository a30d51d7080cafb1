"""What is made of files of packed weights that are damaged, that lie, or that are not ours."""

import json
import random

import pytest
import torch
from safetensors.torch import save_file

from lightning_compress.export.packed.safetensors import read_tensors, state_fingerprint, write_tensors
from lightning_compress.export.packed.write import read_packed, write_packed
from tests.export.packed.test_write import small

FLIPS = 250
NASTY = [-1, 0, 3, 17, 2**31, 2**62, 2**70, 1.5, True, None, "x", [], {}, [2**40, 2**40], [-4, -6], [0, 2**62, 2**62]]


def with_told(tensors, metadata):
    """A file whose fingerprint is right, whatever it tells."""
    told = {name: text for name, text in metadata.items() if name != "lightning_compress.sha256"}
    return tensors, {**told, "lightning_compress.sha256": state_fingerprint(tensors, told)}


def test_any_other_safetensors_file_is_refused(tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / "file")
    with pytest.raises(ValueError, match=r"was not written by write_packed.*safetensors.torch.load_file"):
        read_packed(tmp_path / "file")


@pytest.mark.parametrize("version", [1, 3, 0, None, "2", True])
def test_another_version_is_refused_as_such(tmp_path, version):
    write_packed(tmp_path / "file", *small())
    tensors, told = read_tensors(tmp_path / "file")
    changed = json.dumps({**json.loads(told["lightning_compress"]), "version": version})
    write_tensors(tmp_path / "file", *with_told(tensors, {**told, "lightning_compress": changed}))
    with pytest.raises(ValueError, match="this program reads 2"):
        read_packed(tmp_path / "file")


@pytest.mark.parametrize("seed", range(2))
def test_random_flips_of_bits_are_all_noticed(tmp_path, seed):
    draw = random.Random(seed)
    write_packed(tmp_path / "file", *small())
    right = (tmp_path / "file").read_bytes()
    for _ in range(FLIPS):
        wrong = bytearray(right)
        for _ in range(draw.choice([1, 1, 1, 3])):
            wrong[draw.randrange(len(wrong))] ^= 1 << draw.randrange(8)
        if wrong != right:
            (tmp_path / "file").write_bytes(wrong)
            with pytest.raises(ValueError):
                read_packed(tmp_path / "file")


def test_every_truncation_is_noticed(tmp_path):
    write_packed(tmp_path / "file", *small())
    right = (tmp_path / "file").read_bytes()
    for length in [*range(0, len(right), 7), len(right) - 1]:
        (tmp_path / "file").write_bytes(right[:length])
        with pytest.raises(ValueError):
            read_packed(tmp_path / "file")


@pytest.mark.parametrize("key", ["bits", "offset", "step", "shape", "dtype", "axis", "group"])
@pytest.mark.parametrize("name", ["weight", "head"])
def test_a_description_that_lies_is_refused_or_gives_the_shape_it_says(tmp_path, name, key):
    write_packed(tmp_path / "file", *small())
    tensors, told = read_tensors(tmp_path / "file")
    true = json.loads(told["lightning_compress"])["weights"][name][key]
    for nasty in (nasty for nasty in NASTY if nasty != true or type(nasty) is not type(true)):
        lie = json.loads(told["lightning_compress"])
        lie["weights"][name][key] = nasty
        write_tensors(tmp_path / "lie", *with_told(tensors, {**told, "lightning_compress": json.dumps(lie)}))
        try:
            found = read_packed(tmp_path / "lie")
        except ValueError:
            continue
        # No lie, but another possible grid.
        assert key in ("offset", "step", "axis", "group")
        assert type(nasty) is int
        assert found[name].shape == (4, 6)


@pytest.mark.parametrize(
    ("part", "tensor"),
    [
        ("weight.codes", torch.zeros(8, dtype=torch.uint8)),
        ("weight.codes", torch.zeros(9, dtype=torch.int8)),
        ("weight.scale", torch.ones(3)),
        ("weight.scale", torch.ones(4, 2, dtype=torch.int32)),
        ("weight.scale", torch.ones(4, 2).to(torch.float8_e5m2)),
        ("weight.scale", None),
        ("weight.levels", torch.ones(8)),
        ("head.levels", torch.ones(2)),
        ("head.levels", torch.ones(3, 1)),
        ("head.scale", torch.ones(())),
        ("weight", torch.ones(4, 6)),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit_their_description_are_refused(tmp_path, part, tensor):
    write_packed(tmp_path / "file", *small())
    tensors, told = read_tensors(tmp_path / "file")
    tensors[part] = tensor
    write_tensors(tmp_path / "file", *with_told({k: v for k, v in tensors.items() if v is not None}, told))
    with pytest.raises(ValueError, match="file is damaged"):
        read_packed(tmp_path / "file")


@pytest.mark.parametrize(
    "change",
    [
        {"same": {"twin": "nobody"}},
        {"same": {"bias": "half"}},
        {"same": {"twin": 3}},
        {"same": {"twin": "weight.codes"}},
        {"same": None},
        {"casts": {"nobody": "F32"}},
        {"casts": {"bias": "I32"}},
        {"casts": {"weight.codes": "F32"}},
        {"casts": []},
        {"weights": [1]},
        {"weights": {"weight": None}},
        {"weights": {"weight": {}}},
    ],
    ids=str,
)
def test_twins_casts_and_weights_that_are_not_there_are_refused(tmp_path, change):
    write_packed(tmp_path / "file", *small())
    tensors, told = read_tensors(tmp_path / "file")
    lie = json.dumps({**json.loads(told["lightning_compress"]), **change})
    write_tensors(tmp_path / "file", *with_told(tensors, {**told, "lightning_compress": lie}))
    with pytest.raises(ValueError, match="file is damaged"):
        read_packed(tmp_path / "file")


@pytest.mark.parametrize("text", ['{"version', "[" * 10**5, "NaN"], ids=["cut", "nested", "no number"])
def test_metadata_that_are_no_json_are_damage_of_that_file(tmp_path, text):
    write_packed(tmp_path / "file", *small())
    tensors, told = read_tensors(tmp_path / "file")
    write_tensors(tmp_path / "file", *with_told(tensors, {**told, "lightning_compress": text}))
    with pytest.raises(ValueError, match=r"file is damaged.*(Unterminated|nested too deeply|NaN).*fetch it again"):
        read_packed(tmp_path / "file")
