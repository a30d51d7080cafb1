"""The plan of replaced modules and cut channels: from a file and back, for parts, for several callbacks."""

import pytest
import torch
from torch import nn

from lightning_compress.nn.channel_cut import Cut
from lightning_compress.nn.module_replacement import replay
from lightning_compress.nn.replacement import Replacement, builder_path, torch_layer
from lightning_compress.nn.selection import select
from lightning_compress.nn.structure import Structure, rebuild, saved_structure, structure_prefix

KEPT = torch.tensor([0, 2])


def wider(name, order=0):
    """A Linear with 4 inputs and 3 outputs in the place of a module."""
    arguments = {"kind": "Linear", "in_features": 4, "out_features": 3}
    return Replacement(name, builder_path(torch_layer), arguments, order=order)


def cut(name):
    return Cut({f"{name}.weight": {0: KEPT}}, {name: {"out_features": 2}}, {name: {"out_features": 3}})


def network():
    return nn.ModuleDict({"net": nn.Sequential(nn.Linear(4, 3), nn.ReLU()), "head": nn.Linear(3, 3, bias=False)})


def test_it_comes_back_from_a_file_of_plain_values(tmp_path):
    entry = {"kind": "structure", **Structure((wider("net.0"),), cut("head")).state_dict()}
    torch.save({"callbacks": {"lightning_compress/a": entry, "lightning_compress/b": {"kind": None}}}, tmp_path / "x")
    found = saved_structure(torch.load(tmp_path / "x", weights_only=True), "x")
    assert found.replacements == (wider("net.0"),)
    assert torch.equal(found.cut.kept["head.weight"][0], KEPT)


@pytest.mark.parametrize("damage", [
    {"cut": None}, {"replacements": [{"name": "net"}]}, {"replacements": 3}, {"replacements": [1]},
])  # fmt: skip
def test_a_damaged_entry_is_refused(damage):
    entry = {"kind": "structure", **Structure((wider("net.0"),)).state_dict(), **damage}
    with pytest.raises(ValueError, match="last.ckpt has a damaged structure: "):
        saved_structure({"callbacks": {"lightning_compress/a": entry}}, "last.ckpt")


def test_plans_of_several_callbacks_are_one_in_the_order_of_the_run():
    first, second = Structure((wider("a", 1),), cut("c")), Structure((wider("b", 0), wider("d", 2)))
    combined = Structure.combined([first, second])
    assert [one.name for one in combined.replacements] == ["b", "a", "d"]
    assert combined.cut.kept.keys() == {"c.weight"}


def test_a_model_gets_replaced_modules_first_and_then_fewer_channels():
    model, structure = network(), Structure((wider("net.1"),), cut("net.1"))
    weights = {"net.1.weight": torch.ones(2, 4), "net.1.bias": torch.ones(3), "head.weight": torch.ones(3, 3)}
    rebuild(model, weights, structure, "x.ckpt")
    assert model["net"][1].weight.shape == (2, 4)
    assert model["net"][1].out_features == 2


def test_a_cut_of_a_module_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"x.ckpt is of a module that had lost channels of tail, which ModuleDict"):
        rebuild(network(), {}, Structure((), cut("tail")), "x.ckpt")


@pytest.mark.parametrize(("structure", "model", "prefix"), [
    (Structure((wider("net.0"),)), network(), ""),
    (Structure((wider("net.0"),)), network()["net"], "net."),
    (Structure((), cut("net.0")), network()["net"], "net."),
    (Structure(), network()["net"], ""),
])  # fmt: skip
def test_a_part_is_found_by_the_names_of_what_was_changed(structure, model, prefix):
    assert structure_prefix(structure, model) == prefix
    assert [one.name for one in structure.restricted_to(prefix).replacements] in ([], ["net.0"], ["0"])


def test_what_was_cut_of_a_module_is_left_out_once_it_is_replaced():
    both = cut("net.0").composed_with(cut("net.01"))
    left = both.without("net.0")
    assert (left.kept.keys(), left.attributes.keys(), left.before.keys()) == ({"net.01.weight"}, {"net.01"}, {"net.01"})


def test_patterns_that_mean_a_replaced_module_mean_what_took_its_place():
    model = network()
    layers = {"kind": "Bilinear", "in1_features": 2, "in2_features": 2, "out_features": 2}
    replay(model, [Replacement("net", builder_path(torch_layer), layers)])
    for pattern, found in [("net", {"net.weight"}), ("head", {"head.weight"}), ("net.weight", {"net.weight"})]:
        assert {one.name for one in select(model, pattern).chosen} == found
    model = network()
    sequence = "lightning_compress.nn.replacement.torch_layers"
    layers = {
        "layers": [["Linear", {"in_features": 4, "out_features": 2}], ["Linear", {"in_features": 2, "out_features": 3}]]
    }
    replay(model, [Replacement("net.0", sequence, layers)])
    for pattern in ("net.0", "net.0.weight", "re:net[.]0"):
        assert {one.name for one in select(model, pattern).chosen} == {"net.0.0.weight", "net.0.1.weight"}
    with pytest.raises(ValueError, match="targets: 'net' matches no parameter"):
        select(model, "net")
