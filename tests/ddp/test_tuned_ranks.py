"""Phases on two real processes: equal weights on both, nothing that the processes miss, the result of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ddp.tuned_ranks import PHASES, run


@pytest.fixture(scope="module", params=["lightning.pytorch", "pytorch_lightning"])
def ranks(request, tmp_path_factory):
    pytest.importorskip(request.param)
    folder = tmp_path_factory.mktemp("ddp")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.ddp.tuned_ranks", request.param, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    files = {(name, rank): folder / f"{name}-{rank}.json" for name in PHASES for rank in (0, 1)}
    return {key: json.loads(path.read_text()) for key, path in files.items()}


@pytest.mark.ddp
@pytest.mark.parametrize("name", PHASES)
def test_ranks_have_equal_weights_at_every_step(name, ranks):
    assert ranks[name, 0] == ranks[name, 1]


@pytest.mark.ddp
@pytest.mark.parametrize(("name", "still"), [("frozen", range(3, 8)), ("gradual", range(1, 4))])
def test_what_is_frozen_stands_still_and_all_else_learns(name, still, ranks):
    layers = ranks[name, 0]["layers"]
    for step in range(1, 12):
        moves = [one != other for one, other in zip(layers[step - 1], layers[step], strict=True)]
        assert moves == [step not in still, True], step


@pytest.mark.ddp
@pytest.mark.parametrize("name", PHASES)
def test_one_process_with_all_the_data_comes_to_the_same(name, ranks, tmp_path):
    # Two ranks take every other sample, 8 each: together the batches of 16 in order.
    seen, _ = run(name, tmp_path, devices=1, batch_size=16)
    assert seen["last"] == pytest.approx(ranks[name, 0]["last"], abs=1e-5)
