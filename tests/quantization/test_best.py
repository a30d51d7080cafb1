"""Which epoch is best is asked among quantized ones."""

import pytest
import torch

from lightning_compress import QuantizationAwareTraining
from tests.quantization.watching import is_active


def worse_when_quantized(make_module, quantization):
    """A module whose validation says that the float weights are best."""

    class Pessimist(make_module):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", float(is_active(quantization)) + 0.001 * self.current_epoch)

    return Pessimist()


@pytest.mark.parametrize(("gated", "epoch"), [(True, 3), (False, 0)])
def test_the_best_checkpoint_is_a_quantized_one(gated, epoch, pl, make_module, make_trainer, loader, tmp_path):
    quantization = QuantizationAwareTraining(begin="50%", gate_best=gated)
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer = make_trainer([quantization, checkpoint], max_epochs=6, enable_checkpointing=True)
    trainer.fit(worse_when_quantized(make_module, quantization), loader, loader)
    best = torch.load(checkpoint.best_model_path, weights_only=True)
    assert best["epoch"] == epoch
    assert (best["callbacks"]["lightning_compress/quantization"]["model"] is not None) == gated


@pytest.mark.parametrize(("settings", "stopped"), [({}, 5), ({"initial_bits": 8, "weights": 4, "end": "70%"}, 8)])
def test_early_stopping_waits_until_all_bits_are_those_asked_for(
    settings, stopped, pl, make_module, make_trainer, loader
):
    quantization = QuantizationAwareTraining(begin="30%", **settings)
    stopping = pl.callbacks.EarlyStopping("val_loss", patience=1)
    trainer = make_trainer([quantization, stopping], max_epochs=10)
    trainer.fit(worse_when_quantized(make_module, quantization), loader, loader)
    assert trainer.current_epoch == stopped
