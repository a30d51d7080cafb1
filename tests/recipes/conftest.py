import os
from pathlib import Path

import pytest

from lightning_compress.recipes.digits import has_all_files


@pytest.fixture(scope="session")
def mnist_folder():
    """The folder of the original files, where a machine has them."""
    named = os.environ.get("LIGHTNING_COMPRESS_DATA", Path(__file__).parents[3] / "shared" / "data")
    if not has_all_files(Path(named)):
        pytest.skip("all of MNIST is not here; LIGHTNING_COMPRESS_DATA names its folder")
    folder = Path(named) / "MNIST" / "raw"
    return folder if folder.is_dir() else Path(named)


@pytest.fixture
def no_named_folder(monkeypatch):
    monkeypatch.delenv("LIGHTNING_COMPRESS_DATA", raising=False)
