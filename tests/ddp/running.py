"""Run a file of this folder, which starts two processes, and read what each of them wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def run_two_ranks(script, lightning, folder, names):
    """What each rank wrote by (name, rank), and all that was said on the way."""
    pytest.importorskip(lightning)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", f"tests.ddp.{script}", lightning, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    files = {(name, rank): folder / f"{name}-{rank}.json" for name in names for rank in (0, 1)}
    return {key: json.loads(path.read_text()) for key, path in files.items()}, done.stdout + done.stderr
