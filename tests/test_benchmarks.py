"""Every benchmark and every script of results runs, as `make bench` and `make results` run them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [
    script.relative_to(ROOT)
    for folder in ("benchmarks", "results")
    for script in sorted((ROOT / folder).glob("*.py"))
    if not script.name.startswith("_")
]


def run(script, *arguments, **environment):
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=600, cwd=ROOT, env={**os.environ, **environment}
    )


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_every_script_runs_quickly_and_writes_what_it_found(script, tmp_path):
    if script.parent.name == "results":
        pytest.importorskip("mlxtend")
    output = tmp_path / "new" / "found.json"
    done = run(script, "--quick", "--output", output, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(output.read_text())


@pytest.mark.slow
def test_results_of_mnist_are_not_taken_from_the_sample(tmp_path):
    output = tmp_path / "found.json"
    done = run("results/mnist_pruning.py", "--output", output, LIGHTNING_COMPRESS_DATA=str(tmp_path / "nowhere"))
    assert done.returncode == 1
    assert "LIGHTNING_COMPRESS_DATA" in done.stdout
    assert not output.exists()
