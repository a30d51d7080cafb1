"""A recipe named by an environment variable joins the Trainers of a script that nobody edited."""

import os
import subprocess
import sys

import pytest

from lightning_compress import Pruning
from lightning_compress.injection import callbacks_from_environment, for_lightning, for_pytorch_lightning

UNTOUCHED_SCRIPT = """
import sys
from importlib import import_module

import torch
from torch.utils.data import DataLoader, TensorDataset

pl = import_module(sys.argv[1])


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(10, 2)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


torch.manual_seed(0)
loader = DataLoader(TensorDataset(torch.randn(64, 10), torch.randint(0, 2, (64,))), batch_size=8)
for _ in range(2):
    net = Net()
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(net, loader)
    print("zeros", int((net.layer.weight == 0).sum()))
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Writes a recipe and names it in the environment."""

    def write(text):
        path = tmp_path / "r.yaml"
        path.write_text(text)
        monkeypatch.setenv("LIGHTNING_COMPRESS_RECIPE", str(path))
        return path

    return write


def train(tmp_path, lightning, **environment):
    (tmp_path / "train.py").write_text(UNTOUCHED_SCRIPT)
    return subprocess.run(
        [sys.executable, "train.py", lightning],
        cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("lightning", ["pytorch_lightning", "lightning.pytorch"])
def test_an_untouched_script_is_pruned_in_every_fit(tmp_path, recipe, lightning):
    pytest.importorskip(lightning)
    recipe("callbacks: [Pruning: {final_sparsity: 0.75, end: 50%}]\ntrainer: {max_epochs: 9}\n")
    done = train(tmp_path, lightning)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("zeros 15") == 2
    assert done.stderr.count("Its trainer stay unused") == 1


@pytest.mark.slow
def test_a_mistake_in_the_recipe_stops_the_script_in_words(tmp_path, recipe):
    recipe("callbacks:\n- Prunin\n")
    done = train(tmp_path, "pytorch_lightning")
    assert done.returncode != 0
    assert "r.yaml:2: callbacks[0].Prunin: unknown class 'Prunin'. Did you mean 'Pruning'?" in done.stderr
    assert "zeros" not in done.stdout


@pytest.mark.parametrize("value", [None, "", "  "])
def test_without_the_variable_nothing_joins(monkeypatch, value):
    monkeypatch.delenv("LIGHTNING_COMPRESS_RECIPE", raising=False)
    if value is not None:
        monkeypatch.setenv("LIGHTNING_COMPRESS_RECIPE", value)
    assert callbacks_from_environment() == []


def test_each_trainer_gets_callbacks_of_its_own(pl, recipe, make_trainer):
    recipe("callbacks: [Pruning: {final_sparsity: 0.5}]")
    first, second = (
        [one for one in make_trainer().callbacks if isinstance(one, Pruning)] or callbacks_from_environment()
        for _ in range(2)
    )
    assert first[0] is not second[0]
    assert first[0].final_sparsity == 0.5


def test_a_name_that_is_no_file_is_that_of_a_ready_recipe(monkeypatch):
    monkeypatch.setenv("LIGHTNING_COMPRESS_RECIPE", "prune_2_4")
    assert callbacks_from_environment()[0].granularity == "2:4"


def test_a_missing_file_is_refused_with_the_ready_names(monkeypatch):
    monkeypatch.setenv("LIGHTNING_COMPRESS_RECIPE", "prun.yaml")
    with pytest.raises(FileNotFoundError, match=r"LIGHTNING_COMPRESS_RECIPE=prun\.yaml: .*Did you mean 'prune'"):
        callbacks_from_environment()


def test_what_a_constructor_refuses_has_the_variable_and_the_place_in_front(recipe):
    path = recipe("callbacks: [Pruning: {final_sparsity: 90}]")
    with pytest.raises(ValueError, match=rf"^LIGHTNING_COMPRESS_RECIPE={path}: .*r\.yaml:1: .* write 0.9"):
        callbacks_from_environment()


def test_of_a_complete_recipe_only_the_callbacks_are_read(recipe):
    recipe("callbacks: [Pruning]\nmodel: not_installed.Net\ntrainer: {max_epochs: 3}\n")
    assert len(callbacks_from_environment()) == 1


@pytest.mark.parametrize("factory", [for_pytorch_lightning, for_lightning])
def test_lightnings_own_callbacks_are_those_of_the_lightning_that_asks(recipe, factory):
    lightning = {"for_lightning": "lightning.pytorch"}.get(factory.__name__, "pytorch_lightning")
    pl = pytest.importorskip(lightning)
    recipe("callbacks: [Pruning, ModelCheckpoint: {monitor: val_loss}]")
    assert type(factory()[1]) is pl.callbacks.ModelCheckpoint


def test_a_recipe_in_the_environment_is_changed_by_settings_in_the_environment(recipe, monkeypatch):
    recipe("callbacks: [Pruning: {final_sparsity: 0.5}]")
    monkeypatch.setenv(
        "LIGHTNING_COMPRESS_SET", "pruning.final_sparsity=0.95; pruning.targets=[a, b];\npruning.end=50%\n"
    )
    (pruning,) = callbacks_from_environment()
    assert (pruning.final_sparsity, pruning.targets, pruning.end) == (0.95, ["a", "b"], "50%")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("pruning.final_sparsty=0.9", "Did you mean 'final_sparsity'"),
        ("trainer.max_epochs=3", "has its own `trainer`, so this would change nothing"),
    ],
)
def test_settings_that_change_nothing_are_refused(recipe, monkeypatch, settings, words):
    recipe("{callbacks: [Pruning], trainer: {max_epochs: 9}}")
    monkeypatch.setenv("LIGHTNING_COMPRESS_SET", settings)
    with pytest.raises(ValueError, match=words):
        callbacks_from_environment()
    monkeypatch.delenv("LIGHTNING_COMPRESS_RECIPE")
    with pytest.raises(ValueError, match="changes a recipe: name it by LIGHTNING_COMPRESS_RECIPE"):
        callbacks_from_environment()
