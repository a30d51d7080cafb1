"""The plan of a replacement is plain, and only what is marked as a builder is run for it."""

import pytest
import torch
from torch import nn

from lightning_compress.nn.replacement import Replacement, builder_path, module_builder, torch_layer, torch_layers


@module_builder
class Doubled(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))


def not_marked():
    raise AssertionError("this must not run")


def test_a_plan_comes_back_from_a_file_that_holds_plain_values_only(tmp_path):
    layers = [("Conv2d", {"in_channels": 3, "out_channels": 2, "kernel_size": (1, 3), "bias": False}), ("ReLU", {})]
    plan = Replacement("net.0", builder_path(torch_layers), {"layers": layers}, {"0.weight": "weight"}, order=3)
    torch.save(plan.state_dict(), tmp_path / "plan.ckpt")
    again = Replacement.from_state_dict(torch.load(tmp_path / "plan.ckpt", weights_only=True))
    assert again == plan
    assert repr(again.build()) == repr(plan.build())
    assert again.build()[0].kernel_size == (1, 3)


def test_what_is_not_plain_is_refused_with_its_name_and_value():
    with pytest.raises(
        ValueError, match=r"torch_layer\(bias=\.\.\.\) of 'net' is tensor\(1\.\), but a checkpoint holds"
    ):
        Replacement("net", builder_path(torch_layer), {"kind": "Linear", "bias": [torch.tensor(1.0)]})


@pytest.mark.parametrize("path", [
    f"{__name__}.not_marked",
    "os.system",
    "lightning_compress.export.api.export",
    "lightning_compress.__main__.main",
    "lightning_compress.not_there.build",
    "Linear",
])  # fmt: skip
def test_only_marked_builders_run(path):
    with pytest.raises(ValueError, match=rf"'{path}' is no builder that is known here. Import the file"):
        Replacement("net", path, {}).build()


def test_a_marked_class_is_built_with_a_seed_and_no_random_stream_is_advanced():
    before = torch.get_rng_state()
    plan = Replacement("net", builder_path(Doubled), {"width": 4})
    one, same, other = plan.build(seed=1), plan.build(seed=1), plan.build(seed=2)
    assert torch.equal(one.weight, same.weight)
    assert not torch.equal(one.weight, other.weight)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("arguments", "words"), [
    ({"kind": "Linea"}, "torch.nn has no module 'Linea'. Did you mean 'Linear'?"),
    ({"kind": "Linear", "in_features": 3}, "missing 1 required positional argument: 'out_features'"),
    ({"kind": "functional"}, "torch.nn has no module 'functional'"),
])  # fmt: skip
def test_a_builder_that_fails_says_for_which_module_and_why(arguments, words):
    with pytest.raises(ValueError, match="cannot build the module for 'net.0' from") as caught:
        Replacement("net.0", builder_path(torch_layer), arguments).build()
    assert words in str(caught.value)
