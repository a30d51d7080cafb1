"""Two real processes that distil: equal weights on both, and equal to the loss written by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = ("by_hand", "distilled", "cached", "learned", "averaged", "peer")

pytestmark = pytest.mark.ddp


@pytest.fixture(scope="module", params=["lightning.pytorch", "pytorch_lightning"])
def seen(request, tmp_path_factory):
    pytest.importorskip(request.param)
    folder = tmp_path_factory.mktemp("ddp")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.ddp.distilled_ranks", request.param, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return {(name, rank): json.loads((folder / f"{name}-{rank}.json").read_text()) for name in CASES for rank in (0, 1)}


@pytest.mark.parametrize("name", CASES)
def test_ranks_have_equal_weights_at_every_step(name, seen):
    first, second = seen[name, 0], seen[name, 1]
    assert first == second
    assert len(first["weights"]) == 8
    assert len(set(first["weights"])) == 8
    assert first["keys"] == seen["by_hand", 0]["keys"]


def test_it_equals_the_loss_written_by_hand(seen):
    assert seen["distilled", 0]["weights"] == seen["by_hand", 0]["weights"]


@pytest.mark.parametrize("name", ["learned", "peer"])
def test_what_trains_beside_the_model_is_equal_too_and_learns(name, seen):
    beside = seen[name, 0]["beside"]
    assert beside == seen[name, 1]["beside"]
    assert len(set(beside)) == len(beside)


def test_epoch_metrics_are_of_all_ranks(seen):
    first, second = seen["distilled", 0]["metrics"], seen["distilled", 1]["metrics"]
    assert first == second
    assert {"compress/distillation/agreement_epoch", "compress/distillation/teacher_accuracy_epoch"} <= first.keys()
