"""Two real processes: equal masks and weights on both, although their random streams differ."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CRITERIA = ("magnitude", "taylor", "wanda", "random", "by_chance")


@pytest.fixture(scope="module", params=["lightning.pytorch", "pytorch_lightning"])
def two_ranks(request, tmp_path_factory):
    pytest.importorskip(request.param)
    folder = tmp_path_factory.mktemp("ddp")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.ddp.two_ranks", request.param, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    files = {(name, rank): folder / f"{name}-{rank}.json" for name in CRITERIA for rank in (0, 1)}
    return {key: json.loads(path.read_text()) for key, path in files.items()}, done.stdout + done.stderr


@pytest.mark.parametrize("criterion", CRITERIA)
def test_ranks_have_equal_masks_and_weights_at_every_step(criterion, two_ranks):
    seen, _ = two_ranks
    first, second = seen[criterion, 0], seen[criterion, 1]
    assert first == second
    assert len(first["masks"]) == 12
    assert len(set(first["masks"])) > 3
    assert first["sparsity"] == 0.75
    assert first["zeros"] == 96


def test_a_criterion_that_differs_by_rank_is_noticed(two_ranks):
    _, said = two_ranks
    assert "the ranks' masks differed" in said
