"""Pruning in a plain loop: masks, floors, overrides, what is gathered, what is saved."""

import io

import pytest
import torch
from torch import nn

from lightning_compress.core.selection import select
from lightning_compress.pruning import criteria, distributions
from lightning_compress.pruning.granularity import parse
from lightning_compress.pruning.masked import MaskedParameters, pack, unpack
from lightning_compress.pruning.plan import Layers
from lightning_compress.pruning.pruner import Pruner


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def pruner_of(
    model, criterion=criteria.magnitude, distribution=distributions.uniform, granularity="weight", **arguments
):
    layers = Layers({one.name: one for one in select(model).chosen}, parse(granularity))
    return Pruner(layers, criterion, distribution, **arguments)


def test_a_plain_loop_prunes_and_stays_pruned():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    pruner = pruner_of(model, final_sparsity=0.75)
    before = {}
    for step in range(12):
        optimizer.zero_grad()
        model(torch.ones(4, 8)).square().sum().backward()
        pruner.masked.apply_to_gradients()
        optimizer.step()
        pruner.masked.apply()
        if step % 3 == 0:
            assert pruner.update(0.25 * (step // 3), [optimizer])
            for name, mask in pruner.masked.masks.items():
                assert not (mask.bool() & ~before.get(name, mask.bool())).any()  # nothing comes back
            before = {name: mask.bool() for name, mask in pruner.masked.masks.items()}
    assert int((model[0].weight == 0).sum()) == 96
    assert not optimizer.state[model[0].weight]["momentum_buffer"][model[0].weight == 0].any()


def test_weights_come_back_if_the_sparsity_falls():
    pruner = pruner_of(network())
    pruner.update(0.75)
    assert pruner.masked.sparsity == 0.75
    pruner.update(0.25)
    assert pruner.masked.sparsity == 0.25


def test_no_layer_empties_and_the_whole_stays_exact():
    model = network()
    with torch.no_grad():
        model[2].weight.mul_(1e-6)
    pruner = pruner_of(model, distribution=distributions.global_)
    pruner.update(0.9)
    left = {name: int(mask.sum()) for name, mask in pruner.masked.masks.items()}
    assert left == {"0.weight": 17, "2.weight": 1}  # 18 of 176 stay
    higher = pruner_of(model, distribution=distributions.global_, floor=0.25)
    higher.update(0.9)
    assert {name: int(mask.sum()) for name, mask in higher.masked.masks.items()} == {"0.weight": 32, "2.weight": 12}


def test_overrides_rise_in_step_with_the_rest():
    pruner = pruner_of(network(), final_sparsity=0.8, overrides={"2.weight": 0.4})
    pruner.update(0.4)
    assert int(pruner.masked.masks["2.weight"].sum()) == 48 - round(0.2 * 48)
    pruner.update(0.8)
    assert int(pruner.masked.masks["2.weight"].sum()) == 48 - round(0.4 * 48)
    assert int(pruner.masked.masks["0.weight"].sum()) == 128 - round(0.8 * 128)


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (lambda weight: weight * float("nan"), "gave NaN for '0.weight'"),
        (lambda weight: weight[0], "scores of the shape"),
    ],
)
def test_scores_that_cannot_be_are_refused_and_masks_left_as_they_were(criterion, message):
    pruner = pruner_of(network(), criterion)
    with pytest.raises(ValueError, match=message):
        pruner.update(0.5)
    assert not pruner.masked.masks


def test_input_norms_are_those_of_what_layers_saw():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 2))
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(5, 4, 4, 4, generator=generator) for _ in range(2)]
    hidden = [model[1](model[0](batch)) for batch in batches]
    pruner = pruner_of(model, criteria.wanda)
    assert len(pruner.gathered.hooks()) == 2
    pruner.gathered.listening = True
    for batch in batches:
        model(batch)
    channels = torch.cat(batches).square().sum((0, 2, 3)).sqrt()
    scores = pruner.score("0.weight")
    for out in range(4):
        for into in range(2):
            norm = channels[(out // 2) * 2 + into]
            torch.testing.assert_close(scores[out, into], model[0].weight[out, into].abs() * norm)
    features = torch.cat(hidden).square().sum(0).sqrt()
    torch.testing.assert_close(pruner.score("2.weight"), model[2].weight.abs() * features)


def test_input_norms_that_cannot_be_seen_are_refused():
    with pytest.raises(ValueError, match="not for weight_ih_l0, weight_hh_l0"):
        pruner_of(nn.LSTM(4, 4), criteria.wanda)
    with pytest.raises(RuntimeError, match="No input of 0.weight, 2.weight was seen"):
        pruner_of(network(), criteria.wanda).update(0.5)


def test_movement_sums_weight_times_gradient():
    model = network()
    pruner = pruner_of(model, criteria.movement)
    expected = torch.zeros(16, 8)
    for scale in (1.0, -3.0):
        model.zero_grad()
        (model(torch.ones(2, 8)) * scale).sum().backward()
        pruner.gathered.add_gradients(set(model.parameters()))
        expected -= model[0].weight.detach() * model[0].weight.grad
    torch.testing.assert_close(pruner.score("0.weight"), expected)


def test_what_is_saved_is_plain_and_comes_back():
    model = network()
    pruner = pruner_of(model)
    pruner.update(0.6)
    buffer = io.BytesIO()
    torch.save(pruner.state(), buffer)
    buffer.seek(0)
    again = pruner_of(network())
    again.load(torch.load(buffer, weights_only=True))
    assert again.sparsity == 0.6
    assert all(torch.equal(mask, pruner.masked.masks[name]) for name, mask in again.masked.masks.items())


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 1000])
def test_packing_is_undone_by_unpacking(size):
    mask = torch.rand(size, generator=torch.Generator().manual_seed(size)) < 0.3
    assert pack(mask).numel() == -(-size // 8)
    assert torch.equal(unpack(pack(mask), mask.shape), mask)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"other": {"shape": [1], "bits": torch.zeros(1).byte()}}, "mask for 'other', which is not pruned here"),
        ({"w": {"shape": [2, 3], "bits": torch.zeros(1).byte()}}, r"has shape \[2, 3\] in 1 bytes"),
        ({"w": {"shape": [3, 3], "bits": torch.zeros(1).byte()}}, "is damaged"),
    ],
)
def test_masks_of_other_weights_are_refused(state, message):
    with pytest.raises(ValueError, match=message):
        MaskedParameters({"w": nn.Parameter(torch.ones(3, 3))}).load(state)


def test_half_precision_weights_are_masked_in_their_own_type():
    model = network().to(torch.bfloat16)
    pruner = pruner_of(model)
    pruner.update(0.5)
    assert model[0].weight.dtype == pruner.masked.masks["0.weight"].dtype == torch.bfloat16
    assert int((model[0].weight == 0).sum()) == 64
