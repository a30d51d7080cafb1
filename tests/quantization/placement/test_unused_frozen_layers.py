"""Layers that the user has frozen are quantized as they will be deployed, whenever that happened; they do not move."""

import pytest
import torch
from torch import nn

from lightning_compress import QuantizationAwareTraining, load_compressed
from lightning_compress.nn.dataflow import trace_dataflow
from lightning_compress.quantization.layers import quantizable_layers
from lightning_compress.quantization.placement.unused_frozen_layers import unused_frozen_layers
from tests.conftest import adamw
from tests.quantization.by_hand import randn, seeded
from tests.quantization.watching import as_trained, equal

LSQ = {"weights": 4, "activations": 4, "first": "same", "last": "same"}
SETTINGS = [{}, LSQ, {"weights": "binary", "method": "binary_connect"}, {"weights": 3, "damping": 0.1}]
every_setting = pytest.mark.parametrize("settings", SETTINGS, ids=str)


def quantizing(**settings):
    return QuantizationAwareTraining(**{"begin": 2, "freeze_bn": None, "freeze_ranges": None, **settings})


def test_what_stands_apart_is_neither_fed_by_what_is_trained_nor_feeds_it():
    model = nn.ModuleDict({name: nn.Linear(3, 3) for name in ("backbone", "head", "critic", "teacher", "unused")})
    for name in ("backbone", "critic", "teacher", "unused"):
        model[name].requires_grad_(False)
    values = randn(2, 3)
    with trace_dataflow(model) as flow:
        with torch.no_grad():
            given, wanted = model["backbone"](values), model["teacher"](values)
        found = model["head"](given)
        (model["critic"](found).mean() + (found - wanted).square().mean()).backward()
    assert unused_frozen_layers(flow, model, quantizable_layers(model)[1]) == ["teacher", "unused"]


def test_a_run_of_nothing_but_what_stands_apart_is_refused():
    model = nn.Sequential(nn.Linear(3, 3)).requires_grad_(False)
    with trace_dataflow(model) as flow:
        model(randn(2, 3))
    with pytest.raises(ValueError, match=r"All layers .* are frozen, .*: 0\. Thaw some"):
        unused_frozen_layers(flow, model, quantizable_layers(model)[1])


@every_setting
def test_a_frozen_layer_is_quantized_and_keeps_its_weights_bit_for_bit(settings, make_module, make_trainer, loader):
    module = make_module()
    module.net[0].requires_grad_(False)
    before, quantization = module.net[0].weight.clone(), quantizing(**settings)
    make_trainer([quantization], max_epochs=2).fit(module, loader)
    assert list(quantization.quantized.weights) == ["net.0.weight", "net.2.weight"]
    assert not torch.equal(module.net[0].weight, before)
    assert torch.equal(as_trained(module).net[0].weight, before)
    assert not module.net[0].weight.requires_grad


def test_what_is_learned_for_a_frozen_layer_is_trained_only_if_an_optimizer_has_the_layer(
    make_module, make_trainer, loader
):
    def steps(optimizer):
        module, quantization = make_module(optimizer), quantizing(**LSQ)
        module.net[0].requires_grad_(False)
        make_trainer([quantization], max_epochs=1).fit(module, loader)
        learned = quantization.quantized.learned()
        first = 2 * as_trained(module).net[0].weight.abs().mean(1, keepdim=True) / 7**0.5
        return {name.split("/")[1]: one for name, one in learned.items() if name.startswith("weights")}, first

    learned, first = steps(lambda parameters: adamw([one for one in parameters if one.requires_grad]))
    assert torch.allclose(learned["net.0.weight"], first)
    assert learned["net.0.weight"].grad is None
    assert learned["net.2.weight"].grad is not None
    learned, first = steps(adamw)
    assert not torch.allclose(learned["net.0.weight"], first)


@pytest.mark.parametrize("frozen", ["net.0", "net"])
def test_what_is_frozen_after_the_training_is_evaluated_and_loaded_as_it_was_trained(
    frozen, make_module, make_trainer, loader, tmp_path
):
    module, quantization = make_module(), quantizing()
    trainer = make_trainer([quantization], max_epochs=1)
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    wanted = trainer.test(module, loader, verbose=False)
    module.get_submodule(frozen).requires_grad_(False)
    assert trainer.test(module, loader, verbose=False) == wanted

    class Frozen(make_module):
        def __init__(self):
            super().__init__()
            self.get_submodule(frozen).requires_grad_(False)

    assert make_trainer([quantizing()]).test(Frozen(), loader, tmp_path / "end.ckpt", verbose=False) == wanted
    loaded = load_compressed(Frozen, tmp_path / "end.ckpt")
    assert make_trainer().test(loaded, loader, verbose=False) == wanted


def test_a_teacher_within_the_module_stays_in_floating_point_in_evaluation_and_a_resumed_run_too(
    pl, make_module, make_trainer, loader, tmp_path
):
    class Taught(make_module):
        def __init__(self):
            super().__init__()
            self.teacher = seeded(lambda: nn.Linear(8, 3)).requires_grad_(False)

        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                wanted = self.teacher(batch[0])
            return nn.functional.mse_loss(self(batch[0]), wanted)

    saver = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole, quantization = Taught(), quantizing()
    trainer = make_trainer([quantization, saver], max_epochs=2, enable_checkpointing=True)
    trainer.fit(whole, loader)
    assert list(quantization.quantized.layers) == ["net.0", "net.2"]
    wanted = trainer.test(whole, loader, verbose=False)
    resumed = Taught()
    make_trainer([quantizing()], max_epochs=2).fit(resumed, loader, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert equal(whole, resumed)
    assert make_trainer([quantizing()]).test(resumed, loader, tmp_path / "epoch=1.ckpt", verbose=False) == wanted


# With Lightning's own freezing --------------------------------------------------------------------------------------


@pytest.fixture
def thawing(pl, make_module):
    """A classifier, and a callback of Lightning's kind that trains its first layer from an epoch on."""

    class HeadFirst(make_module):
        def configure_optimizers(self):
            return adamw(self.net[2].parameters())

    class Thaw(pl.callbacks.BaseFinetuning):
        def __init__(self, epoch, freezing):
            super().__init__()
            self.epoch, self.freezing = epoch, freezing

        def freeze_before_training(self, pl_module):
            if self.freezing:
                self.freeze(pl_module.net[0])

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == self.epoch:
                self.make_trainable(pl_module.net[0])
                optimizer.add_param_group({"params": list(pl_module.net[0].parameters()), "lr": 1e-3})

    return HeadFirst, Thaw


@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
@pytest.mark.parametrize("settings", [{}, LSQ], ids=str)
@pytest.mark.parametrize("begin", [1, 2])
@pytest.mark.parametrize("freezing", [False, True], ids=["", "freezing"])
def test_a_layer_that_lightning_thaws_before_or_after_the_beginning_is_trained_tested_and_resumed(
    freezing, begin, settings, turned, thawing, pl, make_trainer, loader, tmp_path
):
    def callbacks():
        both = [quantizing(begin=f"{begin} epochs", **settings), thawing[1](2 if begin == 1 else 1, freezing)]
        return both[::-1] if turned else both

    saver = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    ours, whole, resumed = callbacks(), thawing[0](), thawing[0]()
    trainer = make_trainer([*ours, saver], max_epochs=4, enable_checkpointing=True)
    trainer.fit(whole, loader)
    again = make_trainer(callbacks(), max_epochs=4)
    again.fit(resumed, loader, ckpt_path=tmp_path / "epoch=2.ckpt")
    # Lightning freezes when a run begins, and does not thaw again when it is resumed.
    assert equal(whole, resumed) or freezing
    wanted = trainer.test(whole, loader, verbose=False)
    assert set(ours[int(turned)].quantized.weights) == {"net.0.weight", "net.2.weight"}
    assert make_trainer(callbacks()).test(thawing[0](), loader, tmp_path / "epoch=3.ckpt", verbose=False) == wanted
