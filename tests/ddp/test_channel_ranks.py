"""Two real processes lose the same channels, although each sees other batches, and train on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module", params=["lightning.pytorch", "pytorch_lightning"])
def two_ranks(request, tmp_path_factory):
    pytest.importorskip(request.param)
    folder = tmp_path_factory.mktemp("ddp")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.ddp.channel_ranks", request.param, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = ("once", "twice")
    return {name: [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)] for name in runs}


@pytest.mark.parametrize("name", ["once", "twice"])
def test_ranks_have_equal_shapes_weights_and_momenta_at_every_step(name, two_ranks):
    first, second = two_ranks[name]
    assert first == second
    assert first["shapes"][0] == [[8, 6], [8], [3, 8], [3]]
    assert first["shapes"][-1] == [[4, 6], [4], [3, 4], [3]]
    assert set(first["wrapped"]) == {"DistributedDataParallel"}


@pytest.mark.parametrize("name", ["once", "twice"])
def test_the_weights_change_at_every_step_after_the_cut(name, two_ranks):
    after = [
        step
        for step, shapes in zip(two_ranks[name][0]["hashes"], two_ranks[name][0]["shapes"], strict=True)
        if shapes[0][0] == 4
    ]
    assert len(after) > 3
    assert len({tuple(step) for step in after}) == len(after)
