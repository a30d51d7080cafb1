"""Optimizers that cannot train what grids learn are refused before training; where nothing is learned they work."""

import pytest
import torch
from torch import nn

from lightning_compress import QuantizationAwareTraining
from lightning_compress.quantization.config import QuantizationConfig
from lightning_compress.quantization.layers import quantizable_layers
from lightning_compress.quantization.optimizer_support import check_optimizers_supported

LSQ = {"weights": 4, "activations": 4, "first": "same", "last": "same"}
OPTIMIZERS = {
    "LBFGS": lambda parameters: torch.optim.LBFGS(parameters, lr=0.01),
    "Muon": lambda parameters: torch.optim.Muon([one for one in parameters if one.ndim == 2]),
}
every_optimizer = pytest.mark.parametrize("kind", [kind for kind in OPTIMIZERS if hasattr(torch.optim, kind)])


@every_optimizer
def test_before_training_it_is_named_with_the_layer_and_the_way_out(kind, make_module, make_trainer, loader):
    module = make_module(OPTIMIZERS[kind])
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = make_trainer([QuantizationAwareTraining(begin=2, **LSQ)], max_epochs=1)
    with pytest.raises(ValueError, match=rf"A step would be learned .* 'net\.0', but {kind}, .*method='mse'"):
        trainer.fit(module, loader)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@every_optimizer
def test_it_trains_where_nothing_is_learned(kind, make_module, make_trainer, loader):
    module, quantization = make_module(OPTIMIZERS[kind]), QuantizationAwareTraining(begin=2, method="mse", **LSQ)
    make_trainer([quantization], max_epochs=1).fit(module, loader)
    assert len(quantization.quantized.weights) == 2


def test_layers_that_another_optimizer_or_group_trains_are_fine():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    first, second = ([one.weight] for one in model)

    class OfTwoKinds(torch.optim.SGD):
        """A Muon with groups for Adam, which says of each which it is for."""

    OfTwoKinds.__name__ = "MuonWithAuxAdam"
    groups = [{"params": first, "use_muon": True}, {"params": second, "use_muon": False}]
    optimizer, layers = OfTwoKinds(groups, lr=0.1), quantizable_layers(model)[1]
    check_optimizers_supported([optimizer], layers, QuantizationConfig(overrides={"1": LSQ_ALONE}))
    with pytest.raises(ValueError, match="of '0', but MuonWithAuxAdam"):
        check_optimizers_supported([optimizer], layers, QuantizationConfig(overrides={"0": LSQ_ALONE}))


LSQ_ALONE = {"weights": 4, "activations": 4, "method": "lsq"}
