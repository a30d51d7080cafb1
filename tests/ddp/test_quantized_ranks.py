"""Two real processes that train quantized: their data differ, their weights, ranges and learned steps do not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = ("ranges", "widening", "learned")

pytestmark = pytest.mark.ddp


@pytest.fixture(scope="module", params=["lightning.pytorch", "pytorch_lightning"])
def seen(request, tmp_path_factory):
    pytest.importorskip(request.param)
    folder = tmp_path_factory.mktemp("ddp")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.ddp.quantized_ranks", request.param, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return {(name, rank): json.loads((folder / f"{name}-{rank}.json").read_text()) for name in CASES for rank in (0, 1)}


@pytest.mark.parametrize("name", CASES)
def test_ranks_have_equal_weights_and_equal_grids_after_every_batch(name, seen):
    first, second = seen[name, 0], seen[name, 1]
    assert first == second
    assert len(set(first["weights"])) == 8


@pytest.mark.parametrize("name", CASES)
def test_the_grids_follow_the_training(name, seen):
    assert len(set(seen[name, 0]["grids"])) >= 5
