"""Weights of 8 bits take the codes that no kernel of an x86 CPU saturates on, unless all codes are asked for."""

import pytest
import torch
from torch import nn

from lightning_compress import QuantizationAwareTraining, load_compressed, quantize
from lightning_compress.quantization.lookup import quantized_of
from lightning_compress.quantization.lowering.lower import lower
from tests.quantization.by_hand import randn


def codes_of(**settings):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4))
    found = lower(quantize(net, [randn(8, 3, 6, 6)], progress=False, **settings)).weights
    return torch.cat([grid.codes.flatten() for grid in found.values()])


@pytest.mark.parametrize(
    ("settings", "highest"),
    [
        ({}, 63),
        ({"reduce_range": False}, 127),
        ({"activations": None}, 127),
        ({"activations": 16, "first": "same", "last": "same"}, 127),
        ({"activations": 4, "first": "same", "last": "same"}, 127),
        ({"weights": 4, "first": "same", "last": "same"}, 7),
        ({"symmetric": False}, 63),
    ],
    ids=str,
)
def test_codes_reach_as_far_as_no_sum_of_two_products_saturates(settings, highest):
    if settings.get("activations") == 16:
        net = nn.Linear(8, 4)
        quantized = quantize(nn.Sequential(net), [randn(8, 8)], progress=False, **settings)
        assert quantized_of(quantized).weights["0.weight"].quant_max == highest
        return
    codes = codes_of(**settings)
    assert int(codes.abs().max()) == highest
    if settings.get("activations", 8) == 8 and settings.get("reduce_range", True) and settings.get("symmetric", True):
        assert 2 * 255 * int(codes.abs().max()) <= torch.iinfo(torch.int16).max


def test_a_checkpoint_keeps_all_codes_if_it_was_trained_with_them(make_module, make_trainer, loader, tmp_path):
    trained = make_module()
    trainer = make_trainer([QuantizationAwareTraining(begin=2, reduce_range=False)], max_epochs=1)
    trainer.fit(trained, loader)
    trainer.save_checkpoint(tmp_path / "all.ckpt")
    loaded = load_compressed(make_module, tmp_path / "all.ckpt")
    assert {one.quant_max for one in quantized_of(loaded).weights.values()} == {127}
    again = make_trainer([QuantizationAwareTraining(begin=2)], max_epochs=2)
    with pytest.raises(ValueError, match="weights='8'.*weights='7'.*reduce_range=False"):
        again.fit(make_module(), loader, ckpt_path=tmp_path / "all.ckpt")
