"""Which layers are quantized; what a hook computes before each forward is left out, or refused if it is asked for."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lightning_compress.quantization.layers import quantizable_layers

COMPUTED = {
    "spectral norm": (lambda layer: nn.utils.spectral_norm(layer), "weight_orig", r"remove_spectral_norm"),
    "pruned by torch": (lambda layer: prune.l1_unstructured(layer, "weight", 0.3), "weight_orig", r"prune\.remove"),
    "weight norm": (lambda layer: nn.utils.weight_norm(layer), "weight_v", r"torch\.nn\.utils\.remove_weight_norm"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("kind", COMPUTED)
def test_weights_that_a_hook_computes_are_left_out_and_if_asked_for_refused_with_the_way_out(kind):
    wrap, leaf, mend = COMPUTED[kind]
    model = nn.Sequential(nn.Linear(4, 4), wrap(nn.Linear(4, 2)))
    selection, layers = quantizable_layers(model)
    assert [layer.name for layer in layers] == ["0"]
    assert mend.replace("\\", "") in selection.left_out[f"1.{leaf}"]
    with pytest.raises(ValueError, match=f"'1.weight.*' cannot be quantized: .*{mend}"):
        quantizable_layers(model, targets="1")


def test_of_a_recurrent_layer_only_what_is_computed_is_left_out():
    with pytest.warns(FutureWarning):
        model = nn.utils.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    _, (layer,) = quantizable_layers(model)
    assert [held.leaf for held in layer.weights] == ["weight_ih_l0"]


def test_what_was_made_permanent_is_a_weight_again():
    model = nn.Sequential(prune.l1_unstructured(nn.Linear(4, 2), "weight", 0.3))
    model(torch.ones(1, 4))
    prune.remove(model[0], "weight")
    assert [layer.name for layer in quantizable_layers(model)[1]] == ["0"]
