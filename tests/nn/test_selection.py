import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, weight_norm
from torch.optim.swa_utils import AveragedModel

from lightning_compress.nn.selection import select, select_matching


class Mixed(nn.Module):
    """Every kind of weight that a network out there has."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.conv = nn.Conv2d(1, 4, 3)
        self.up = nn.ConvTranspose2d(4, 2, 2)
        self.norm = nn.BatchNorm2d(4)
        self.recurrent = nn.LSTM(4, 5, bidirectional=True)
        self.gru = nn.GRU(4, 5)
        self.attention = nn.MultiheadAttention(4, 2)
        self.bare = nn.Parameter(torch.ones(3, 3))
        self.bias = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(4, 10)


def names(selection):
    return {candidate.name for candidate in selection.chosen}


def test_by_default_takes_all_weights_of_two_or_more_dimensions_but_embeddings():
    selection = select(Mixed())
    assert names(selection) == {
        "bare", "conv.weight", "up.weight", "attention.in_proj_weight", "attention.out_proj.weight", "head.weight",
        "recurrent.weight_ih_l0", "recurrent.weight_hh_l0", "recurrent.weight_ih_l0_reverse",
        "recurrent.weight_hh_l0_reverse", "gru.weight_ih_l0", "gru.weight_hh_l0",
    }  # fmt: skip
    assert selection.left_out == {"embed.weight": "an embedding; name it in targets to include it"}


def test_tells_the_share_of_the_model_that_is_covered():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False))  # 6 + 2 and 4 parameters
    assert select(model, targets="0").covered == pytest.approx(6 / 12)
    assert "left out: 1.weight (not among the targets)" in str(select(model, targets="0"))


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("conv.weight", {"conv.weight"}),
        ("conv", {"conv.weight"}),
        ("Conv*", {"conv.weight", "up.weight"}),
        ("Conv2d", {"conv.weight"}),
        ("re:.*weight_ih_l0", {"recurrent.weight_ih_l0", "gru.weight_ih_l0"}),
        (nn.Linear, {"head.weight", "attention.out_proj.weight"}),
        ([nn.GRU, "head"], {"gru.weight_ih_l0", "gru.weight_hh_l0", "head.weight"}),
        ("Embedding", {"embed.weight"}),
        ("bare", {"bare"}),
        ("attention.*", {"attention.in_proj_weight", "attention.out_proj.weight"}),
        (lambda name, parameter: parameter.ndim == 4, {"conv.weight", "up.weight"}),
    ],
)
def test_targets_are_found_by_wildcard_expression_type_or_predicate(targets, expected):
    assert names(select(Mixed(), targets=targets)) == expected


def test_ignore_is_stronger_than_targets():
    selection = select(Mixed(), targets=nn.Linear, ignore="head")
    assert names(selection) == {"attention.out_proj.weight"}
    assert selection.left_out["head.weight"] == "ignored"


def test_a_tied_weight_is_taken_once_and_found_by_either_name():
    model = nn.ModuleDict({"first": nn.Linear(3, 3), "second": nn.Linear(3, 3)})
    model["second"].weight = model["first"].weight
    for targets in ("first", "second", None):
        assert names(select(model, targets=targets)) == {"first.weight"}


def test_an_output_layer_tied_to_an_embedding_is_an_embedding():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "body": nn.Linear(3, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    assert names(select(model)) == {"body.weight"}
    assert names(select(model, targets="head")) == {"embed.weight"}


def test_frozen_weights_are_left_out_in_words():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].weight.requires_grad_(False)
    assert select(model).left_out == {"0.weight": "frozen"}
    assert names(select(model, frozen=True)) == {"0.weight", "1.weight"}


def test_lazy_weights_are_refused_in_words_unless_ignored():
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3))
    with pytest.raises(ValueError, match="'0.weight' is lazy.*Run one batch"):
        select(model)
    assert names(select(model, ignore="0")) == {"1.weight"}


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, weight_norm], ids=["parametrized", "hooked"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_zeros_in_the_chosen_part_of_a_weight_norm_are_zeros_of_the_weight(norm):
    model = nn.Sequential(norm(nn.Linear(3, 3)))
    (candidate,) = select(model).chosen
    assert select(model, targets="0").chosen == select(model, targets="Linear").chosen == (candidate,)
    with torch.no_grad():
        candidate.parameter[0, 1] = 0.0
    model(torch.ones(1, 3))
    assert model[0].weight[0, 1] == 0.0
    assert model[0].weight.count_nonzero() == 8


def test_a_weight_whose_zeros_would_not_last_is_left_out_in_words():
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(3, 3)), nn.Linear(3, 3))
    selection = select(model)
    assert names(selection) == {"1.weight"}
    assert "_Orthogonal" in selection.left_out["0.parametrizations.weight.original"]


def test_names_do_not_change_when_a_submodule_is_compiled():
    model = nn.ModuleDict({"net": nn.Sequential(nn.Linear(3, 3))})
    plain = names(select(model, targets="net.0"))
    model["net"] = torch.compile(model["net"])
    assert names(select(model, targets="net.0")) == plain == {"net.0.weight"}


def test_an_average_inside_the_module_follows_and_is_not_chosen():
    net = nn.Sequential(nn.Linear(3, 3))
    model = nn.ModuleDict({"net": net, "ema": AveragedModel(copy.deepcopy(net))})
    assert names(select(model)) == {"net.0.weight"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": "haed"}, "targets: 'haed' matches no parameter. Did you mean 'head'.*There are bare, bias, embed"),
        ({"ignore": "haed"}, "ignore: 'haed' matches no parameter. Did you mean 'head'"),
        ({"targets": nn.Conv3d}, "Conv3d.*matches no parameter"),
        ({"targets": "norm"}, "No weight is left"),
        ({"targets": 3}, "3 is no pattern"),
        ({"targets": "re:("}, "no regular expression"),
        ({"ignore": "*"}, "No weight is left to work on: .*conv.weight .ignored"),
    ],
)
def test_refuses_patterns_that_mean_nothing(arguments, message):
    with pytest.raises(ValueError, match=message):
        select(Mixed(), **arguments)


def test_a_shared_list_may_ignore_kinds_that_the_model_lacks():
    assert names(select(nn.Sequential(nn.Linear(2, 2)), ignore=["Conv*", nn.LSTM])) == {"0.weight"}


def test_matching_takes_parameters_of_every_shape_frozen_ones_too():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[0].weight.requires_grad = False
    chosen = [one.name for one in select_matching(model, ["0", "*.bias"], "freeze")]
    assert chosen == [
        "0.weight",
        "0.bias",
        "1.bias",
        "2.bias",
    ]
    assert select_matching(model, (), "freeze") == []
    with pytest.raises(ValueError, match="freeze: '3' matches no parameter"):
        select_matching(model, "3", "freeze")
