import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from lightning_compress.measure.macs import count_macs


def total(model, *inputs):
    return sum(layer.dense for layer in count_macs(model, tuple(inputs)).values())


def lenet5():
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(800, 500),
        nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip


def test_lenet5_layer_by_layer():
    macs = count_macs(lenet5(), torch.randn(1, 1, 28, 28))
    assert {name: one.dense for name, one in macs.items()} == {
        "0": 24 * 24 * 20 * 25,
        "2": 8 * 8 * 50 * 20 * 25,
        "5": 800 * 500,
        "7": 500 * 10,
    }
    assert sum(one.dense for one in macs.values()) == 2_293_000


# Batch, length, width, feed-forward, heads.
B, L, E, F, H = 2, 5, 8, 16, 2
ATTENTION = 2 * B * L * L * E  # scores, and weighted values


def test_attention_of_every_kind_is_counted():
    projections = B * L * E * 3 * E + B * L * E * E
    attention = nn.MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(B, L, E)
    for need_weights in (True, False):  # bmm, or CPU's own flash attention
        example = {"query": x, "key": x, "value": x, "need_weights": need_weights}
        assert sum(one.dense for one in count_macs(attention, example).values()) == projections + ATTENTION


def test_cross_attention_with_fewer_keys_is_counted():
    attention = nn.MultiheadAttention(E, H, batch_first=True)
    query, key = torch.randn(B, L, E), torch.randn(B, 3, E)
    expected = B * L * E * E * 2 + B * 3 * E * E * 2 + 2 * B * L * 3 * E
    macs = count_macs(attention, {"query": query, "key": key, "value": key, "need_weights": False})
    assert sum(one.dense for one in macs.values()) == expected


def test_an_encoder_layer_is_counted_in_eval_and_the_fast_path_comes_back():
    layer = nn.TransformerEncoderLayer(E, H, F, batch_first=True).eval()
    macs = count_macs(layer, torch.randn(B, L, E))
    assert {name: one.dense for name, one in macs.items()} == {
        "self_attn": B * L * E * 3 * E + ATTENTION,
        "self_attn.out_proj": B * L * E * E,
        "linear1": B * L * E * F,
        "linear2": B * L * F * E,
    }
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_whole_encoder_is_as_many_layers():
    layer = nn.TransformerEncoderLayer(E, H, F, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=True)
    x = torch.randn(B, L, E)
    assert total(encoder.eval(), x) == 3 * total(layer, x)
    assert total(encoder, x) == 3 * (B * L * (4 * E * E + 2 * E * F) + ATTENTION)


@pytest.mark.parametrize(
    ("model", "gates", "cells"),
    [
        (nn.LSTM(6, 7, batch_first=True), 4, [(6, 7)]),
        (nn.LSTM(6, 7, num_layers=2, bidirectional=True, batch_first=True), 4, [(6, 7)] * 2 + [(14, 7)] * 2),
        (nn.GRU(6, 7, batch_first=True), 3, [(6, 7)]),
        (nn.RNN(6, 7, batch_first=True), 1, [(6, 7)]),
    ],
    ids=["lstm", "lstm-2-layers-both-ways", "gru", "rnn"],
)
def test_a_recurrence_uses_both_matrices_at_each_step(model, gates, cells):
    expected = sum(B * L * gates * hidden * (inputs + hidden) for inputs, hidden in cells)
    assert total(model, torch.randn(B, L, 6)) == expected


def test_a_projected_lstm_is_counted():
    model = nn.LSTM(6, 7, proj_size=3, batch_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert total(model, torch.randn(B, L, 6)) == B * L * (4 * 7 * (6 + 3) + 7 * 3)


@pytest.mark.parametrize(
    ("model", "inputs", "expected"),
    [
        (nn.Linear(6, 7), [torch.randn(6)], 42),
        (nn.Linear(6, 7, bias=False), [torch.randn(2, 3, 6)], 6 * 42),
        (nn.Conv2d(4, 8, 3, groups=4, padding=1), [torch.randn(2, 4, 5, 5)], 2 * 25 * 8 * 9),
        (nn.Conv1d(4, 8, 3, stride=2), [torch.randn(2, 4, 9)], 2 * 4 * 8 * 4 * 3),
        (nn.ConvTranspose2d(3, 4, 3, stride=2), [torch.randn(2, 3, 5, 5)], 2 * 25 * 3 * 4 * 9),
        (nn.Conv3d(2, 3, 2), [torch.randn(1, 2, 4, 4, 4)], 27 * 3 * 2 * 8),
        (nn.Bilinear(5, 6, 7), [torch.randn(2, 5), torch.randn(2, 6)], 2 * 5 * 6 * 7),
        (nn.Embedding(5, 6), [torch.tensor([1, 2])], 0),
        (nn.BatchNorm2d(3), [torch.randn(2, 3, 4, 4)], 0),
    ],
)
def test_other_layers_are_counted_by_hand(model, inputs, expected):
    assert total(model, *inputs) == expected


def test_a_vector_product_is_counted():
    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix, self.vector = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3))

        def forward(self, x):
            return torch.dot(torch.addmv(self.vector, self.matrix, x), torch.mv(self.matrix, x))

    assert total(Scores(), torch.ones(4)) == 12 + 12 + 3


def test_zeros_of_each_weight_scale_its_own_products():
    model = lenet5()
    with torch.no_grad():
        model[2].weight[10:] = 0  # 10 of 50 filters are left
        model[5].weight[:, ::2] = 0
    macs = count_macs(model, torch.randn(1, 1, 28, 28))
    assert macs["0"].nonzero == macs["0"].dense
    assert macs["2"].nonzero * 5 == macs["2"].dense
    assert macs["5"].nonzero * 2 == macs["5"].dense


def test_zeros_in_attention_and_recurrence_count_but_scores_stay():
    attention = nn.MultiheadAttention(E, H, batch_first=True)
    lstm = nn.LSTM(6, 7, batch_first=True)
    with torch.no_grad():
        attention.in_proj_weight[:E] = 0  # all of the query's
        attention.out_proj.weight.zero_()
        lstm.weight_hh_l0.zero_()
    x = torch.randn(B, L, E)
    macs = count_macs(attention, (x, x, x))
    assert macs["out_proj"].nonzero == 0
    assert macs[""].nonzero == B * L * E * 2 * E + ATTENTION
    assert count_macs(lstm, torch.randn(B, L, 6))[""].nonzero == B * L * 28 * 6


def test_zeros_that_older_prune_and_parametrizations_make_are_seen():
    pruned, normed = nn.Linear(10, 10), parametrizations.weight_norm(nn.Linear(10, 10))
    prune.random_unstructured(pruned, "weight", amount=0.3)
    with torch.no_grad():
        normed.parametrizations.weight.original1[:, :4] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old = nn.utils.weight_norm(nn.Linear(10, 10))
    with torch.no_grad():
        old.weight_v[:, :2] = 0
    macs = count_macs(nn.Sequential(pruned, normed, old), torch.randn(1, 10))
    assert [one.nonzero for one in macs.values()] == [70, 60, 80]
    assert list(macs) == ["0", "1", "2"]


def test_a_tied_weight_counts_where_it_is_used():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.embedding(x))

    assert count_macs(Tied(), torch.tensor([[1, 2, 3]]))["head"].dense == 3 * 40


def test_a_layer_that_runs_twice_counts_twice():
    layer = nn.Linear(4, 4)
    assert count_macs(nn.Sequential(layer, layer), torch.randn(1, 4))["0"].dense == 32


def test_a_compiled_model_is_counted_without_compiling():
    model = torch.compile(lenet5(), backend="eager")
    assert sum(one.dense for one in count_macs(model, torch.randn(1, 1, 28, 28)).values()) == 2_293_000


def test_a_layer_called_with_a_view_of_a_parameter_is_counted_and_that_still_trained():
    class Queries(nn.Module):
        def __init__(self):
            super().__init__()
            self.queries, self.layer = nn.Parameter(torch.randn(5, 4)), nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(self.queries.expand(len(x), -1, -1)) + self.layer(x)

    model = Queries()
    model.layer.bias.requires_grad_(False)
    assert total(model, torch.randn(2, 5, 4, requires_grad=True)) == 2 * 2 * 5 * 4 * 3
    assert [one.requires_grad for one in model.parameters()] == [True, True, False]


def test_hooks_and_switches_are_put_back_after_an_exception():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(4, 4)).train()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        count_macs(model, torch.randn(1, 3))
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()
    assert model.training
    assert torch.is_grad_enabled()


def test_a_weight_that_is_laid_before_the_parameter_for_a_call_is_the_layers():
    """As quantizers do it: of 6 weights 2 are zero."""
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 1, 2], [3, 0, 4]]))
    layer.register_forward_pre_hook(lambda module, _: module.__dict__.update(weight=module._parameters["weight"] * 2))
    layer.register_forward_hook(lambda module, *_: (module.__dict__.pop("weight"), None)[1])
    (macs,) = count_macs(layer, torch.randn(1, 3)).values()
    assert (macs.dense, macs.nonzero) == (6, 4)
