"""The command: what it prints, what it writes, and one clear line with exit code 2 for what it was given wrongly."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from lightning_compress import _version
from lightning_compress.cli import main

OWN_MODULE = """
import os
import torch
import pytorch_lightning as pl
from torch.utils.data import DataLoader, TensorDataset


class Net(pl.LightningModule):
    def __init__(self, width: int = 4):
        super().__init__()
        self.layer = torch.nn.Linear(width, 2)
        self.register_buffer("steps", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", float(self.current_epoch))  # the first epoch is the best

    def test_step(self, batch, batch_idx):
        self.log("test_steps", self.steps)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(pl.LightningDataModule):
    def __init__(self):
        super().__init__()
        self.folder = os.environ.get("LIGHTNING_COMPRESS_DATA")
        print("data in", self.folder)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(32, 4)), batch_size=8)

    val_dataloader = test_dataloader = train_dataloader
"""
COMPLETE = """
seed_everything: 1
model: {class_path: users_module.Net}
data: users_module.Data
trainer: {max_epochs: 2, accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
callbacks:
  - Pruning: {final_sparsity: 0.5, end: 50%}
  - ModelCheckpoint: {monitor: val_loss}
"""


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("LIGHTNING_COMPRESS_RECIPE", "LIGHTNING_COMPRESS_ALLOW", "LIGHTNING_COMPRESS_DATA"):
        monkeypatch.setenv(name, "")  # so that what the command sets is undone
        monkeypatch.delenv(name)


@pytest.fixture
def complete(tmp_path):
    (tmp_path / "users_module.py").write_text(OWN_MODULE)
    (tmp_path / "run.yaml").write_text(COMPLETE)
    yield "run.yaml"
    sys.modules.pop("users_module", None)


def refusal(capsys, *arguments):
    """The one line on stderr of a command that ends with code 2."""
    try:
        code = main(arguments)
    except SystemExit as error:
        code = error.code
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert line.startswith("lightning-compress: error: ")
    return line


# run --------------------------------------------------------------------------------------------------------------


def test_a_complete_recipe_is_trained_tested_at_its_best_and_says_where_things_lie(complete, tmp_path, capsys):
    arguments = ["--allow", "users_module.*", "--set", "pruning.final_sparsity=0.25", "--set", "model.width=4"]
    folders = ["--data-dir", "digits", "--output-dir", "out"]
    assert main(["run", complete, *arguments, *folders]) == 0
    printed = capsys.readouterr().out
    assert f"data in {tmp_path / 'digits'}" in printed
    assert re.search(r"test_steps\W+4\.0\b", printed)
    (checkpoint,) = (tmp_path / "out").rglob("*.ckpt")
    assert f"Checkpoint: {checkpoint}" in printed
    assert f"Logs: {tmp_path / 'out' / 'lightning_logs' / 'version_0'}" in printed
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]["layer.weight"]
    assert int((weights == 0).sum()) == 2


def test_a_run_goes_on_from_its_checkpoint(complete, tmp_path, capsys):
    arguments = ["--allow", "users_module.*", "--set", "trainer.enable_progress_bar=false"]
    assert main(["run", complete, *arguments, "--output-dir", "one"]) == 0
    (first,) = (tmp_path / "one").rglob("*.ckpt")
    done = torch.load(first, weights_only=True)["global_step"]
    further = ["--set", "trainer.max_epochs=4", "--ckpt-path", str(first), "--output-dir", "two"]
    assert main(["run", complete, *arguments, *further]) == 0
    steps = {torch.load(one, weights_only=True)["global_step"] for one in (tmp_path / "two").rglob("*.ckpt")}
    assert steps
    assert min(steps) > done
    assert "does not exist" in refusal(capsys, "run", complete, *arguments, "--ckpt-path", "nowhere.ckpt")


def test_nothing_runs_that_was_not_allowed(complete, capsys):
    assert "'users_module.Net' is not allowed here" in refusal(capsys, "run", complete)
    assert "users_module" not in sys.modules


def test_a_recipe_of_callbacks_alone_does_not_run(capsys):
    assert "has no `model:`" in refusal(capsys, "run", "prune")


def test_a_second_recipe_in_the_environment_is_refused(complete, capsys, monkeypatch):
    monkeypatch.setenv("LIGHTNING_COMPRESS_RECIPE", "prune")
    assert "LIGHTNING_COMPRESS_RECIPE=prune would add" in refusal(capsys, "run", complete, "--allow", "users_module.*")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "nowhere.yaml"], "There is no file 'nowhere.yaml'"),
        (
            ["run", "prun"],
            "Did you mean 'prune'? Ready ones: channels, channels_distill_int8, distill, lottery_",
        ),
        (["run", "prune", "--set", "prunin.end=3"], "Did you mean 'pruning'?"),
        (["run", "prune_mnist", "--set", "trainer.max_epoch=3"], "Did you mean 'max_epochs'?"),
        (["run"], "RECIPE"),
        (["runn", "prune"], "choose from"),
        ([], "COMMAND"),
    ],
)
def test_a_users_error_is_one_line_and_code_2(capsys, arguments, words):
    assert words in refusal(capsys, *arguments)


def test_debug_shows_the_traceback():
    with pytest.raises(FileNotFoundError):
        main(["run", "nowhere.yaml", "--debug"])
    with pytest.raises(FileNotFoundError):
        main(["--debug", "run", "nowhere.yaml"])


# recipes ------------------------------------------------------------------------------------------------------------


def test_the_ready_recipes_are_listed_with_what_they_are_for(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "channels",
        "channels_distill_int8",
        "distill",
        "lottery_ticket",
        "prune",
        "prune_2_4",
        "prune_distill",
        "prune_mnist",
        "prune_qat",
        "prune_restart",
        "qat_int4",
        "qat_int8",
        "qat_ternary",
        "tabular",
        "time_series",
        "transformer",
    ]
    assert all(len(line.split()) > 5 for line in lines)


def test_a_recipe_is_copied_and_never_over_another_file_unless_forced(tmp_path, capsys):
    assert main(["recipes", "copy", "prune"]) == 0
    copied = tmp_path / "prune.yaml"
    original = copied.read_text()
    copied.write_text("mine")
    assert "exists already" in refusal(capsys, "recipes", "copy", "prune")
    assert copied.read_text() == "mine"
    assert main(["recipes", "copy", "prune", "prune.yaml", "--force"]) == 0
    assert copied.read_text() == original
    assert main(["recipes", "copy", "prune", "other.yaml"]) == 0
    assert (tmp_path / "other.yaml").read_text() == original


def test_a_recipe_that_is_not_there_is_not_copied(capsys):
    assert "Did you mean 'prune_mnist'?" in refusal(capsys, "recipes", "copy", "prune_mnits")
    assert "No such file or directory" in refusal(capsys, "recipes", "copy", "prune", "no/folder/r.yaml")


# report -------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_reported_in_the_terminal_and_as_files(tmp_path, capsys):
    torch.save({"state_dict": {"fc.weight": torch.tensor([[0.0, 1.0], [0.0, 0.0]])}}, "m.ckpt")
    assert main(["report", "m.ckpt", "--json", "r.json", "--html", "r.html"]) == 0
    printed = capsys.readouterr().out
    assert "fc.weight" in printed
    assert "75.00 %" in printed
    assert json.loads((tmp_path / "r.json").read_text())["totals"]["nonzero"] == 1
    assert "fc.weight" in (tmp_path / "r.html").read_text()


def test_what_is_no_checkpoint_is_one_line_and_nothing_is_written(tmp_path, capsys):
    (tmp_path / "m.ckpt").write_text("hello")
    assert "not a checkpoint that can be read" in refusal(capsys, "report", "m.ckpt", "--json", "r.json")
    assert "does not exist" in refusal(capsys, "report", "no.ckpt")
    assert "ends in .json, but is r.txt" in refusal(capsys, "report", "m.ckpt", "--json", "r.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["m.ckpt"]


# timeline -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prune", "--steps", "1000"], "step 100 "),
        (["prune", "--epochs", "10", "--batches", "50"], "step 50 "),
        (["prune", "--epochs", "10"], "epoch 1 "),
        (["prune_mnist"], "epoch 1 "),
        (["prune_mnist", "--set", "trainer.limit_train_batches=50"], "step 50 "),
    ],
)
def test_a_timeline_is_shown_before_anything_runs(capsys, arguments, words):
    assert main(["timeline", *arguments]) == 0
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prune"], "give --steps N, or --epochs N"),
        (["prune", "--steps", "10", "--epochs", "1"], "Give one of them"),
        (["prune", "--batches", "3"], "give --epochs too"),
        (["prune", "--steps", "0"], "'0' is no whole number above 0"),
        (["prune", "--steps", "many"], "'many' is no whole number above 0"),
    ],
)
def test_a_length_that_is_not_told_or_told_twice_is_refused(capsys, arguments, words):
    assert words in refusal(capsys, "timeline", *arguments)


# As a program -------------------------------------------------------------------------------------------------------


def test_python_dash_m_is_the_command():
    command = [sys.executable, "-m", "lightning_compress", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ}, check=True)
    assert done.stdout.strip() == f"lightning-compress {_version.__version__}"
