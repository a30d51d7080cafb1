"""A recipe's `start_from`: the weights of an earlier run, and nothing else of it."""

import re

import pytest
import torch
from torch import nn

from lightning_compress import ChannelPruning, Pruning, Recipe, load_compressed
from lightning_compress.injection import callbacks_from_environment
from lightning_compress.training.initialize_from import StartFrom
from tests.conftest import sgd
from tests.contract.test_contract import same, saver


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        (tmp_path / "r.yaml").write_text(text)
        return tmp_path / "r.yaml"

    return write


@pytest.fixture
def trained(make_module, make_trainer, loader, tmp_path):
    """Trains a module, thin if that is wanted, and returns it with its checkpoint."""

    def train(*callbacks):
        module, path = make_module(sgd), tmp_path / "trained.ckpt"
        trainer = make_trainer(callbacks, max_epochs=1)
        trainer.fit(module, loader)
        trainer.save_checkpoint(path)
        return module, path

    return train


def thinning():
    return ChannelPruning(sparsity=0.5, begin=2, end=4, every=2)


@pytest.mark.parametrize("thin", [False, True], ids=["whole", "thin"])
def test_it_is_a_new_run_with_the_weights_of_the_old_one(
    thin, recipe, trained, make_module, make_trainer, loader, tmp_path
):
    old, path = trained(*([thinning()] if thin else []))
    callbacks = Recipe.load(recipe(f"start_from: {path}\ncallbacks: [Pruning: {{begin: 2, end: 6}}]")).callbacks()
    ours, by_hand = make_module(), make_module(net=lambda: old.net)
    one, other = make_trainer(callbacks, max_epochs=1), make_trainer([Pruning(begin=2, end=6)], max_epochs=1)
    one.fit(ours, loader)
    other.fit(by_hand, loader)
    assert ours.net[0].out_features == (8 if thin else 16)
    assert one.global_step == 8
    assert same(dict(ours.state_dict()), dict(by_hand.state_dict()))
    assert same(one.optimizers[0].state_dict(), other.optimizers[0].state_dict())
    one.save_checkpoint(tmp_path / "new.ckpt")
    again = load_compressed(type(ours), tmp_path / "new.ckpt")
    assert again.net[0].out_features == ours.net[0].out_features
    assert same(dict(again.state_dict()), dict(ours.state_dict()))


@pytest.mark.parametrize("thin", [False, True], ids=["whole", "thin"])
def test_a_resumed_run_keeps_its_own_weights_and_needs_the_file_no_more(
    thin, pl, trained, make_module, make_trainer, loader, tmp_path
):
    _, path = trained(*([thinning()] if thin else []))
    whole, resumed = make_module(), make_module()
    make_trainer([StartFrom(path), saver(pl, tmp_path / "epoch.ckpt", 8)], max_epochs=2).fit(whole, loader)
    path.unlink()
    make_trainer([StartFrom(path)], max_epochs=2).fit(resumed, loader, ckpt_path=tmp_path / "epoch.ckpt")
    assert same(dict(whole.state_dict()), dict(resumed.state_dict()))


def other_net():
    return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 3), nn.PReLU())


def refusal(path, module, trainer, loader):
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        trainer.fit(module, loader)
    assert same(dict(module.state_dict()), before)
    return str(caught.value).replace(str(path), "FILE")


def test_weights_of_another_module_are_refused_with_names_and_both_shapes(trained, make_module, make_trainer, loader):
    _, path = trained()
    content = torch.load(path, weights_only=True)
    content["state_dict"]["old.weight"] = torch.ones(2)
    torch.save(content, path)
    words = refusal(path, make_module(net=other_net), make_trainer([StartFrom(path)]), loader)
    assert words.startswith(
        "The weights of FILE are not those of Classifier. It lacks: net.3.weight. The module lacks: old.weight. Shapes "
        "differ: net.0.weight has (16, 8) in the file and (24, 8) in the module, net.0.bias has (16,) in the file and"
    )


def test_what_is_no_checkpoint_is_refused(trained, make_module, make_trainer, loader, tmp_path):
    missing, path = tmp_path / "none.ckpt", tmp_path / "object.ckpt"
    assert refusal(missing, make_module(), make_trainer([StartFrom(missing)]), loader) == "FILE does not exist."
    torch.save({"state_dict": {}, "module": nn.Linear(2, 2)}, path)
    words = refusal(path, make_module(), make_trainer([StartFrom(path)]), loader)
    assert "loading such objects could run code" in words


def test_a_thin_module_is_not_cut_once_more(trained, make_module, make_trainer, loader):
    _, path = trained(thinning())
    with pytest.raises(ValueError, match="'channels' would cut more of them"):
        make_trainer([StartFrom(path), thinning()], max_epochs=1).fit(make_module(), loader)


def test_it_joins_a_script_is_overridden_and_shown_as_other_sections(recipe, monkeypatch):
    path = recipe("start_from: one.ckpt\ncallbacks: [Pruning]\ntrainer: {max_steps: 10}")
    monkeypatch.setenv("LIGHTNING_COMPRESS_RECIPE", str(path))
    assert [getattr(one, "path", None) for one in callbacks_from_environment()] == ["one.ckpt", None]
    other = Recipe.load(path, overrides=["start_from=other.ckpt"])
    assert other.callbacks()[0].path == "other.ckpt"
    assert re.search(r"step 0 +start_from +takes the weights of other\.ckpt", other.timeline())
    with pytest.raises(ValueError, match=r"r\.yaml:1: start_from is the path of a checkpoint, not \['a'\]"):
        Recipe.load(recipe("start_from: [a]\ncallbacks: [Pruning]"))
