"""A sweep here: each run has its settings and a folder, a failing one is told, and the rest are compared."""

import json
import os
import sys

import pytest
import torch

from lightning_compress.cli import main
from lightning_compress.reporting import report

SWEEP = """
method: grid
metric: {name: val_loss, goal: minimize}
parameters: {pruning.final_sparsity: {values: [0.5, 0.75, 0.9]}}
early_terminate: {type: hyperband, min_iter: 3}
"""
RECIPE = "callbacks: [Pruning: {end: 50%}, CompressionReport: {latency: false}]"

# What a training script's Trainer does with these variables is tested where they are read.
SCRIPT = """
import json, os, pathlib, sys

print(os.environ["WANDB_MODE"], os.environ["LIGHTNING_COMPRESS_RECIPE"])
settings = dict(one.strip().split("=", 1) for one in os.environ["LIGHTNING_COMPRESS_SET"].split(";"))
sparsity = float(settings["pruning.final_sparsity"])
if sparsity == 0.75:
    sys.exit("the loss is not finite")
measured = json.loads(pathlib.Path(sys.argv[1]).read_text())
measured["metrics"] = {"val_loss": 1 - sparsity}
folder = pathlib.Path(settings["callbacks.1.dirpath"])
(folder / "compression_report.json").write_text(json.dumps(measured))
"""


@pytest.fixture(autouse=True)
def _files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name, text in (("s.yaml", SWEEP), ("r.yaml", RECIPE), ("train.py", SCRIPT)):
        (tmp_path / name).write_text(text)
    report(torch.nn.Linear(2, 3)).save(tmp_path / "measured.json")


def test_runs_come_one_after_the_other_and_a_failing_one_does_not_end_the_sweep(tmp_path, capsys):
    program = ["--", sys.executable, "train.py", "measured.json"]
    assert main(["sweep", "s.yaml", "--recipe", "r.yaml", "--set", "pruning.begin=5%", *program]) == 1
    printed = capsys.readouterr().out
    assert "Left to W&B, and not done here: early_terminate." in printed
    assert "Run 1 of 3, pruning.final_sparsity=0.5, is done" in printed
    assert "Run 2 of 3, pruning.final_sparsity=0.75, failed with exit code 1" in printed
    assert "  the loss is not finite\n" in printed
    assert "Best by val_loss: pruning.final_sparsity=0.9." in printed
    folder = tmp_path / "sweep_s"
    for number in "123":
        assert f"offline {tmp_path / 'r.yaml'}" in (folder / number / "output.txt").read_text()
    _, _, *rows = (folder / "table.md").read_text().splitlines()
    assert [row.split(" | ")[0] for row in rows] == ["| pruning.final_sparsity=0.5", "| pruning.final_sparsity=0.9"]
    assert main(["sweep", "s.yaml", "--recipe", "r.yaml", *program]) == 2
    assert "has something in it already. Go on with its sweep by --resume" in capsys.readouterr().err
    # The journal of a sweep that was killed in its second run.
    journal = folder / "study.journal"
    lines = journal.read_text().splitlines(keepends=True)
    told = [index for index, line in enumerate(lines) if json.loads(line).get("state") in (1, 3)]  # complete, failed
    journal.write_text("".join(lines[: told[1]]))
    before = (folder / "1" / "output.txt").stat().st_mtime_ns
    assert main(["sweep", "s.yaml", "--recipe", "r.yaml", "--resume", *program]) == 1
    printed = capsys.readouterr().out
    assert "Run 1 of 3" not in printed
    assert "Run 2 of 3, pruning.final_sparsity=0.75, failed with exit code 1" in printed
    assert "Run 3 of 3, pruning.final_sparsity=0.9, is done" in printed
    assert (folder / "1" / "output.txt").stat().st_mtime_ns == before
    assert len((folder / "table.md").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["s.yaml", "--recipe", "r.yaml", "--", "no_such_program"], "no command 'no_such_program' to start"),
        (["s.yaml", "--recipe", "r.yaml"], "Write it after --"),
        (["s.yaml", "--recipe", "qat_int8", "--", sys.executable], "nothing is named 'pruning'"),
        (["s.yaml", "--recipe", "r.yaml", "--set", "pruning.begin=60%", "--", sys.executable], "begin"),
        (["s.yaml", "--recipe", "r.yaml", "--resume", "--", sys.executable], "has no sweep to go on with"),
        (["qat_bit", "--recipe", "r.yaml", "--", sys.executable], "Did you mean 'qat_bits'?"),
    ],
)
def test_what_cannot_run_is_refused_before_the_first_run(tmp_path, capsys, arguments, words):
    assert main(["sweep", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "sweep_s").exists()


def test_join_puts_the_arguments_of_wandbs_agent_into_the_environment_of_a_program(tmp_path, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(os, "name", "posix")
    monkeypatch.setattr(os, "execvpe", lambda *given: started.append(given) or sys.exit(7))
    with pytest.raises(SystemExit, match="7"):
        main(["join", "r.yaml", "--pruning.end=40%", "--pruning.ignore=[fc]", "--", "python", "train.py", "--lr=3"])
    ((program, arguments, environment),) = started
    assert (program, arguments) == ("python", ["python", "train.py", "--lr=3"])
    assert environment["LIGHTNING_COMPRESS_RECIPE"] == str(tmp_path / "r.yaml")
    assert environment["LIGHTNING_COMPRESS_SET"] == "pruning.end=40%; pruning.ignore=[fc]"
    for given, words in (
        (["--pruning.ende=40%"], "Did you mean 'end'?"),
        (["--pruning.end"], "is no setting"),
        (["--report.dirpath=a;b"], "has a semicolon"),
    ):
        assert main(["join", "r.yaml", *given, "--", "python"]) == 2
        assert words in capsys.readouterr().err
    assert len(started) == 1
