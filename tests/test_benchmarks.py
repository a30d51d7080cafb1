"""Every benchmark and every script of experiments runs, as `make bench` and `make results` run them."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.common.interleaved_timing import paired
from benchmarks.common.processes import GIVE_BACK, Parts
from experiments.common.runs import RESULT_MARK, read_runs, run_all
from tests import warm

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [
    script.relative_to(ROOT)
    for folder in ("benchmarks", "experiments")
    for script in sorted((ROOT / folder).glob("*.py"))
    if not script.name.startswith("_")
]


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_every_script_runs_quickly_and_writes_what_it_found(script, tmp_path):
    if script.parent.name == "experiments":
        pytest.importorskip("mlxtend")
    output = tmp_path / "new" / "found.json"
    done = warm.run(ROOT / script, "--quick", "--output", output)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(output.read_text())


@pytest.mark.slow
def test_results_of_mnist_are_not_taken_from_the_sample(tmp_path):
    output = tmp_path / "found.json"
    done = warm.run(
        ROOT / "experiments" / "mnist_pruning.py", "--output", output, LIGHTNING_COMPRESS_DATA=str(tmp_path / "nowhere")
    )
    assert done.returncode == 1
    assert "LIGHTNING_COMPRESS_DATA" in done.stdout
    assert not output.exists()


@pytest.mark.slow
def test_a_part_runs_in_a_process_of_its_own():
    parts = Parts(str(ROOT / "benchmarks" / "pruning_overhead.py"), {})
    found = parts.run(GIVE_BACK, False, threads=1, what="update", weights=24 * 64, updates=1)
    assert found.items() >= {"weights": 24 * 64, "weights_bytes": 4 * 24 * 64}.items()


def test_a_part_that_fails_is_named_with_its_error(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import json, sys\n{}[json.loads(sys.argv[sys.argv.index('--part') + 1])['what']]\n")
    with pytest.raises(RuntimeError, match="part failed: {'threads': 1, 'what': 'missing'}(.|\n)*KeyError: 'missing'"):
        Parts(str(script), {}).run(GIVE_BACK, False, threads=1, what="missing")


def test_ratios_are_those_of_the_same_round():
    quiet = {"plain": [1.0, 2.0, 4.0], "more": [1.1, 2.2, 4.4], "twice": [2.2, 4.4, 8.8]}
    busy = {"plain": [10.0], "more": [13.0], "twice": [26.0]}
    found = paired([quiet, busy], {"more": "plain", "twice": "more"})
    assert "ratio" not in found["plain"]
    assert found["more"]["ratio_by_process"] == pytest.approx([1.1, 1.3])
    assert found["more"]["ratio"] == pytest.approx(1.1)
    assert found["more"]["ratio_standard_error"] == pytest.approx(0.1)  # of two processes, 0.2 apart
    assert (found["twice"]["over"], found["twice"]["ratio"]) == ("more", pytest.approx(2.0))
    assert [one["step_ms"] for one in found.values()] == pytest.approx([3000.0, 3300.0, 6600.0])
    assert paired(quiet, "plain")["plain"]["ratio"] == 1.0


@dataclass(frozen=True)
class Tiny:
    seed: int
    label: str = "tiny"
    epochs: int = 1

    @property
    def key(self):
        return json.dumps(asdict(self), sort_keys=True)


def test_each_run_has_a_process_of_its_own_and_finished_ones_are_kept(tmp_path):
    script, path, kept = tmp_path / "script.py", tmp_path / "runs.json", {}
    script.write_text(
        "import json, os, sys\n"
        "settings = json.loads(sys.argv[sys.argv.index('--run') + 1])\n"
        "assert settings['seed'] < 3, 'a seed too far'\n"
        "print('epoch 1: val_error 0.5')\n"
        "found = {'settings': settings, 'val_error': 0.5, 'test_error': 0.25, 'seconds': 1.0, 'process': os.getpid()}\n"
        f"print({RESULT_MARK!r} + json.dumps(found))\n"
    )
    run_all(str(script), [Tiny(1), Tiny(2)], kept, path, 2, Console(quiet=True))
    first = read_runs(path, Tiny)
    assert first == kept
    assert len({os.getpid(), *(run["process"] for run in first.values())}) == 3
    with pytest.raises(RuntimeError, match="ended with code 1(.|\n)*a seed too far"):
        run_all(str(script), [Tiny(1), Tiny(2), Tiny(3)], kept, path, 1, Console(quiet=True))
    assert read_runs(path, Tiny) == first


def test_a_second_arm_to_be_compared_with(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    from mnist_distillation import PERCEPTRON

    from common.distillation import _against_rival

    errors = {
        "no distillation": (0.02, 0.02, 0.02),
        "label smoothing": (0.02, 0.03, 0.04),
        "distillation": (0.01, 0.01, 0.01),
    }
    groups = {arm: [{"test_error": error} for error in values] for arm, values in errors.items()}
    # By hand: differences of -1, -2 and -3 points; with two degrees of freedom, p = 1 - |t| / sqrt(t ** 2 + 2).
    assert _against_rival(PERCEPTRON, groups) == [
        "Distillation minus label smoothing, paired in the same way: -2.000 ± 0.577, t(2) = -3.46, "
        "p = 0.074, within the noise.",
        "",
    ]
    assert _against_rival(PERCEPTRON, {arm: runs[:1] for arm, runs in groups.items()}) == []
