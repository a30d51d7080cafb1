"""Old names of arguments and losses are refused with the new ones."""

from inspect import signature

import pytest

from lightning_compress import ChannelPruning, Distillation, FineTuning, Pruning, QuantizationAwareTraining, Recipe
from tests.contract.settings import teacher

OLD = [
    (Pruning, {"floor": 0.1}, "min_density"),
    (ChannelPruning, {"macs": 0.5, "floor": 0.1}, "min_density"),
    (QuantizationAwareTraining, {"errors": 8}, "activation_grad_bits"),
    (QuantizationAwareTraining, {"gradients": 8}, "weight_grad_bits"),
    (FineTuning, {"thaw": "net.0"}, "unfreeze"),
    (FineTuning, {"factors": {"net.0.*": 0.1}}, "lr_multipliers"),
]


@pytest.mark.parametrize(("kind", "arguments", "new"), OLD)
def test_an_old_name_of_an_argument_is_an_error_that_names_the_new_one(kind, arguments, new):
    with pytest.raises(TypeError, match=f"{kind.__name__} has no argument '{list(arguments)[-1]}': .* '{new}' now"):
        kind(**arguments)
    assert new in signature(kind).parameters


def test_so_it_is_in_a_recipe(tmp_path):
    (tmp_path / "old.yaml").write_text("callbacks:\n  - Pruning: {final_sparsity: 0.5, floor: 0.1}\n")
    with pytest.raises(ValueError, match=r"old.yaml:2: .*unknown argument 'floor'. It is called 'min_density' now"):
        Recipe.load(tmp_path / "old.yaml")


@pytest.mark.parametrize(("old", "new"), [("soft_targets", "kl_divergence"), ("squared_logits", "logit_mse")])
def test_an_old_name_of_a_loss_is_an_error_that_names_the_new_one(old, new):
    with pytest.raises(ValueError, match=f"No '{old}' .* It is called '{new}' now"):
        Distillation(teacher(), losses=old)
