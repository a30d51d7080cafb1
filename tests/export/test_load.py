import pytest
import torch
from torch import nn

from lightning_compress import Pruning, load_compressed


class Net(nn.Sequential):
    def __init__(self, width=16):
        super().__init__(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 3))


@pytest.fixture
def checkpoint(make_module, make_trainer, loader, tmp_path):
    trainer = make_trainer([Pruning(0.5)], max_epochs=2)
    module = make_module()
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    return module, tmp_path / "last.ckpt"


def test_a_module_comes_back_with_its_zeros(checkpoint, make_module):
    module, path = checkpoint
    again = load_compressed(make_module, path)
    assert type(again) is make_module
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), module.parameters(), strict=True))


def test_a_submodule_can_be_taken_out_alone(checkpoint):
    module, path = checkpoint
    net = load_compressed(Net, path)
    assert (net[0].weight == 0).sum() == 64
    assert torch.equal(net(torch.ones(1, 8)), module(torch.ones(1, 8)))


def test_weights_that_drifted_are_zeroed_by_their_masks(checkpoint, make_module):
    _, path = checkpoint
    content = torch.load(path, weights_only=True)
    content["state_dict"]["net.0.weight"] += 1.0
    torch.save(content, path)
    assert (load_compressed(make_module, path).net[0].weight == 0).sum() == 64


def test_what_does_not_fit_is_refused_in_words(checkpoint, tmp_path):
    _, path = checkpoint
    with pytest.raises(ValueError, match=r"does not fit Net: .*shape"):
        load_compressed(Net, path, width=5)
    with pytest.raises(ValueError, match=r"cannot be built: .*Give its arguments"):
        load_compressed(Net, path, depth=5)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_compressed(Net, tmp_path / "nowhere.ckpt")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="is not a checkpoint that can be read"):
        load_compressed(Net, path)
