"""The model in hand is the model that was trained: after a fit, in copies and parts, in checkpoints and files."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_compress import (
    QuantizationAwareTraining,
    export,
    load_compressed,
    load_packed,
    quantize,
    remove_quantizers,
)
from lightning_compress.quantization.lookup import quantized_of
from tests.quantization.watching import as_trained, equal

pytestmark = pytest.mark.parametrize("pl", ["pytorch_lightning"], indirect=True)  # hooks of torch, and dicts: one name
EVERYWHERE = {"first": "same", "last": "same", "begin": 2}
SETTINGS = {
    "8 bits": {"begin": 2},
    "8 bits whose ranges follow to the end": {"begin": 2, "freeze_ranges": None},
    "lsq": {"weights": 4, "activations": 4, **EVERYWHERE},
    "dorefa": {"weights": 3, "method": "dorefa", **EVERYWHERE},
    "ttq": {"weights": "ternary", "method": "ttq", **EVERYWHERE},
    "xnor": {"weights": "binary", **EVERYWHERE},
    "fp8": {"weights": "fp8", "activations": None, **EVERYWHERE},
}


@pytest.fixture(params=SETTINGS)
def trained(request, pl, make_module, make_trainer, loader, tmp_path):
    """A module, the loss of its last validation, and a checkpoint of it, saved while it was trained."""
    module, callback = make_module(), QuantizationAwareTraining(**SETTINGS[request.param])
    trainer = make_trainer([callback], max_epochs=2)
    trainer.fit(module, loader, loader)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    return module.eval(), float(trainer.callback_metrics["val_loss"]), tmp_path / "last.ckpt"


@torch.no_grad()
def loss_of(module, loader):
    losses = [(float(nn.functional.cross_entropy(module(x), y)), len(y)) for x, y in loader]
    return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)


def test_it_computes_what_was_validated_and_so_do_copies_parts_and_what_is_loaded(trained, make_module, loader, pl):
    module, validated, path = trained
    values = loader.dataset.tensors[0]
    wanted = module.net(values)
    assert loss_of(module.net, loader) == pytest.approx(validated, rel=1e-6)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module.net)), copy.deepcopy(module.net)):
        assert torch.equal(getattr(other, "net", other)(values), wanted)
    again = load_compressed(make_module, path).eval()
    assert torch.equal(again.net(values), wanted)
    assert equal(again, module)


def test_weights_lie_on_their_grids_in_hand_and_in_checkpoints(trained, make_module, pl):
    module, _, path = trained
    on_grid = quantized_of(module).describe().values()
    saved = torch.load(path, weights_only=True)["state_dict"]
    for name, values in on_grid.items():
        assert torch.equal(module.get_parameter(name), values)
        assert torch.equal(saved[name], values)
    assert not torch.equal(as_trained(module).get_parameter("net.0.weight"), on_grid["net.0.weight"])


def test_a_copy_and_a_part_are_exported_like_the_module_itself(trained, tmp_path, pl):
    module, _, _ = trained
    export(module, tmp_path / "own.safetensors")
    export(copy.deepcopy(module), tmp_path / "copy.safetensors")
    export(module.net, tmp_path / "part.safetensors")
    files = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("own", "copy")]
    assert files[0] == files[1]
    part = load_packed(copy.deepcopy(module.net), tmp_path / "part.safetensors")
    assert equal(part, module.net)


def test_quantizers_are_taken_off_copies_and_the_module_apart(trained, loader, pl):
    module, _, _ = trained
    values = loader.dataset.tensors[0]
    wanted, other = module.net(values), copy.deepcopy(module.net)
    remove_quantizers(other)
    assert quantized_of(other) is None
    by_hand = nn.functional.linear(values, module.net[0].weight, module.net[0].bias)
    assert torch.equal(other[0](values), by_hand)
    assert torch.equal(module.net(values), wanted)
    with pytest.raises(ValueError, match="were taken off by remove_quantizers"):
        export(other, "never.safetensors")


@pytest.mark.parametrize("kind", ["weights only", "average"])
def test_what_is_saved_in_mid_run_lies_on_grids_and_is_resumed_bit_for_bit(
    kind, pl, make_module, make_trainer, loader, tmp_path
):
    def callbacks():
        kept = [pl.callbacks.EMAWeightAveraging(decay=0.8)] if kind == "average" else []
        return [QuantizationAwareTraining(weights=4, activations=4, **EVERYWHERE), *kept]

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "mid.ckpt", weights_only=kind == "weights only")

    module = make_module()
    make_trainer([*callbacks(), Save()], max_epochs=3).fit(module, loader)
    saved = torch.load(tmp_path / "mid.ckpt", weights_only=True)
    for name in ("net.0.weight", "net.2.weight"):
        for row in saved["state_dict"][name]:
            assert len(row.unique()) <= 15  # the levels of 4 bits
    if kind == "average":
        again = make_module()
        make_trainer(callbacks(), max_epochs=3).fit(again, loader, ckpt_path=tmp_path / "mid.ckpt")
        assert equal(again, module)


def test_a_second_fit_goes_on_with_the_float_weights(make_module, make_trainer, loader, pl):
    settings = {"weights": 2, "begin": 0, "freeze_ranges": None, "first": "same", "last": "same"}
    module, once = make_module(), QuantizationAwareTraining(**settings)
    make_trainer([once], max_epochs=1).fit(module, loader)
    latent = copy.deepcopy(once.quantized.latents)
    seen = []
    module.on_train_start = lambda: seen.append(module.net[0].weight.clone())
    make_trainer([once], max_epochs=1).fit(module, loader)
    assert torch.equal(seen[0], latent["net.0.weight"])
    make_trainer([QuantizationAwareTraining(**settings)], max_epochs=1).fit(module, loader)  # another callback
    assert sum(len(part._forward_hooks) for part in module.modules()) == len(quantized_of(module).modules)


def test_what_holds_a_quantized_model_is_quantized(tmp_path, pl):
    torch.manual_seed(0)
    inner = quantize(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), [torch.randn(16, 4)])
    holder = nn.Sequential(nn.Identity(), inner, nn.Softmax(-1))
    assert list(quantized_of(holder).weights) == ["1.0.weight", "1.2.weight"]
    export(holder, tmp_path / "holder.pt2", torch.randn(3, 4))
    found = torch.export.load(tmp_path / "holder.pt2").module()(values := torch.randn(3, 4))
    assert torch.allclose(found, holder(values), atol=1e-6)
    with pytest.raises(ValueError, match=r"'2' is quantized too, but it lies outside of this Sequential"):
        export(inner[:1], "never.pt2", torch.randn(3, 4))
    with pytest.raises(ValueError, match="'0.0' and '1.0' of this Sequential were quantized apart"):
        export(nn.Sequential(inner, copy.deepcopy(inner)), "never.pt2", torch.randn(3, 4))


def test_weights_that_were_trained_on_without_us_are_put_on_grids_again(make_module, make_trainer, loader, pl):
    module = make_module()
    make_trainer([QuantizationAwareTraining(weights=4, **EVERYWHERE)], max_epochs=1).fit(module, loader)
    make_trainer(max_epochs=1).fit(module, loader)
    found = quantized_of(module.eval()).describe().values()["net.0.weight"]
    assert not torch.equal(module.net[0].weight, found)
    assert all(len(row.unique()) <= 15 for row in found)
    inputs = quantized_of(module).activations["net.0 input 0"](values := loader.dataset.tensors[0])
    bias = quantized_of(module).describe().biases["net.0"]
    assert torch.allclose(module.net[0](values), nn.functional.linear(inputs, found, bias.float()), atol=1e-5)


def test_an_exception_leaves_the_float_weights_and_no_hook(pl, make_module, make_trainer, loader):
    class Crash(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 6:
                raise RuntimeError("no more")

    module, plain = make_module(), make_module()
    with pytest.raises(RuntimeError, match="no more"):
        make_trainer([QuantizationAwareTraining(**EVERYWHERE), Crash()], max_epochs=2).fit(module, loader)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert len(module.net[0].weight[0].unique()) == plain.net[0].weight.shape[1]
