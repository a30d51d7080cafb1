"""Pruning in a plain training loop: what stays pruned, what comes back, and what leaves the masks as they were."""

import copy
from io import BytesIO
from itertools import accumulate, pairwise, product

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lightning_compress.core.registry import registered
from lightning_compress.pruning.functional import criteria, distributions
from lightning_compress.pruning.functional.criteria import magnitude, movement, random, taylor, wanda
from lightning_compress.pruning.functional.distributions import erk, global_, uniform
from lightning_compress.pruning.pruner import Pruner
from tests.pruning.layers_of import layers_of


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))


TOTAL = 6 * 8 + 8 * 12 + 12 * 4


def pruner_of(model, criterion=magnitude, distribution=uniform, granularity="weight", **arguments):
    return Pruner(layers_of(model, granularity), criterion, distribution, **arguments)


def masks_of(pruner):
    return {name: mask.bool() for name, mask in pruner.masked.masks.items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("criterion", registered(criteria).values(), ids=registered(criteria))
def test_a_plain_loop_trains_a_network_whose_pruned_weights_are_zero(criterion):
    model, generator = network(), torch.Generator().manual_seed(1)
    inputs, truth = torch.randn(64, 6, generator=generator), torch.randint(0, 4, (64,), generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    pruner = pruner_of(model, criterion, final_sparsity=0.75)
    pruner.statistics.remember_initial()
    pruner.statistics.listening = True
    pruner.statistics.hooks()
    losses = []
    for step in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), truth)
        loss.backward()
        pruner.statistics.add_gradients(set(model.parameters()))
        if step % 5 == 4 and step <= 30:
            pruner.update(0.75 * (step + 1) / 35 if step < 30 else 0.75, [optimizer])
        pruner.masked.apply_to_gradients()
        optimizer.step()
        pruner.masked.apply()
        losses.append(loss.item())
    pruner.update(0.75, [optimizer])
    assert pruner.masked.sparsity == 0.75
    assert sum(int((weight == 0).sum()) for weight in pruner.masked.parameters.values()) == 0.75 * TOTAL
    assert losses[-1] < losses[0]
    assert (model(inputs).argmax(1) == truth).float().mean() > 0.3  # one in four by chance


@pytest.mark.parametrize("distribution", registered(distributions).values(), ids=registered(distributions))
@pytest.mark.parametrize("granularity", ["weight", "row", "column", "block 2x2"])
@pytest.mark.parametrize("min_density", [0.0, 0.2])
def test_what_is_pruned_stays_pruned_while_the_sparsity_rises(distribution, granularity, min_density):
    for seed in range(2):
        model, generator = network(), torch.Generator().manual_seed(seed)
        pruner = pruner_of(model, lambda weight, grad: grad, distribution, granularity, min_density=min_density)
        before = {name: torch.ones_like(value, dtype=torch.bool) for name, value in pruner.masked.parameters.items()}
        for step in range(1, 13):
            for parameter in pruner.masked.parameters.values():  # the scores have nothing to do with those before
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            pruner.update(step * 0.08)
            after = masks_of(pruner)
            for name, mask in after.items():
                assert not (mask & ~before[name]).any(), (seed, step, name)
                assert mask.any()
            if granularity == "weight" and min_density == 0.0 and distribution is not uniform:
                kept = sum(int(mask.sum()) for mask in after.values())
                assert kept == TOTAL - round(step * 0.08 * TOTAL)
            before = after


def test_erk_counts_that_would_let_a_weight_back_do_not():
    # Going from 25 to 24 of 202 weights, the largest remainders alone would give the second layer one more.
    sizes = ((8, 8), (6, 2), (8, 9), (9, 6))
    model = nn.ModuleList(nn.Linear(*size) for size in sizes)
    pruner, kept = pruner_of(model, distribution=erk), []
    for left in (25, 24):
        pruner.update(1 - left / 202)
        kept.append([int(mask.sum()) for mask in pruner.masked.masks.values()])
    assert [sum(counts) for counts in kept] == [25, 24]
    assert all(after <= before for before, after in zip(*kept, strict=True))


def test_a_falling_sparsity_lets_weights_back_and_keeps_the_others():
    model = network()
    pruner = pruner_of(model)
    pruner.update(0.75)
    sparse = masks_of(pruner)
    pruner.update(0.25)
    denser = masks_of(pruner)
    assert pruner.masked.sparsity == 0.25
    assert all((denser[name] | ~mask).all() for name, mask in sparse.items())
    pruner.update(0.0)
    assert all(mask.all() for mask in masks_of(pruner).values())


def test_the_best_of_what_was_pruned_come_back():
    model = nn.Sequential(nn.Linear(4, 1))
    pruner = pruner_of(model, lambda grad: grad)
    model[0].weight.grad = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    pruner.update(0.75)
    assert pruner.masked.masks["0.weight"].tolist() == [[1.0, 0.0, 0.0, 0.0]]
    model[0].weight.grad = torch.tensor([[4.0, 1.0, 2.0, 3.0]])
    pruner.update(0.5)
    assert pruner.masked.masks["0.weight"].tolist() == [[1.0, 0.0, 0.0, 1.0]]


def test_a_weight_that_comes_back_starts_afresh():
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    pruner = pruner_of(model)
    pruner.update(0.5, [optimizer])
    pruned = ~pruner.masked.masks["0.weight"].bool()
    state = optimizer.state[model[0].weight]
    assert (state["exp_avg"][pruned] == 0).all()
    assert (state["exp_avg_sq"][pruned] == 0).all()
    assert (state["exp_avg"][~pruned] != 0).all()


def test_an_update_zeroes_averages_too():
    model = network()
    average = {name: nn.Parameter(value.detach().clone()) for name, value in model.named_parameters()}
    pruner = pruner_of(model)
    pruner.masked.averaged_copies.append(average)
    pruner.update(0.5)
    for name, mask in masks_of(pruner).items():
        assert torch.equal(average[name] != 0, mask)


@pytest.mark.parametrize("distribution", [uniform, erk, global_])
@pytest.mark.parametrize("bad", ["0.weight", "4.weight"])
def test_scores_that_are_nan_are_refused_and_the_masks_left_as_they_were(distribution, bad):
    model = network()
    pruner = pruner_of(model, taylor, distribution)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    pruner.update(0.25)
    masks, weights = masks_of(pruner), copy.deepcopy(model.state_dict())
    model.get_parameter(bad).grad[0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"Criterion taylor gave NaN for '{bad}'.*The masks were not changed"):
        pruner.update(0.75)
    assert equal(masks_of(pruner), masks)
    assert equal(model.state_dict(), weights)
    assert pruner.sparsity == 0.25


@pytest.mark.parametrize(
    ("criterion", "found"),
    [
        (lambda weight: weight.sum(0), r"\(6,\)"),
        (lambda weight: weight.t(), r"\(6, 8\)"),
        (lambda weight: weight.tolist(), "list"),
        (lambda weight: None, "NoneType"),
    ],
    ids=["row", "transposed", "list", "nothing"],
)
def test_scores_of_another_shape_are_refused(criterion, found):
    pruner = pruner_of(network(), criterion)
    with pytest.raises(ValueError, match=rf"scores of the shape \(8, 6\) of '0.weight', but returned {found}"):
        pruner.update(0.5)
    assert pruner.masked.masks == {}


@pytest.mark.parametrize("sparsity", [1.0, 90, -0.1, float("nan")])
def test_a_sparsity_that_is_none_is_refused(sparsity):
    pruner = pruner_of(network())
    with pytest.raises(ValueError, match="sparsity is a fraction"):
        pruner.update(sparsity)
    assert pruner.masked.masks == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("distribution", registered(distributions).values(), ids=registered(distributions))
def test_models_of_other_types_have_masks_of_their_type_and_exact_counts(distribution, dtype):
    model = network().to(dtype)
    pruner = pruner_of(model, distribution=distribution)
    for sparsity in (0.25, 0.5, 0.75):
        pruner.update(sparsity)
        assert pruner.masked.sparsity == sparsity
    assert {mask.dtype for mask in pruner.masked.masks.values()} == {dtype}
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_a_tied_weight_has_one_mask():
    model = nn.ModuleDict({"first": nn.Linear(6, 6), "second": nn.Linear(6, 6)}).bfloat16()
    model["second"].weight = model["first"].weight
    pruner = pruner_of(model)
    pruner.update(0.5)
    assert list(pruner.masked.masks) == ["first.weight"]
    assert (model["second"].weight == 0).sum() == 18


def test_overrides_rise_in_step_with_the_whole():
    pruner = pruner_of(network(), final_sparsity=0.8, overrides={"2.weight": 0.5})
    for sparsity in (0.2, 0.4, 0.8):
        pruner.update(sparsity)
        assert 96 - int(pruner.masked.masks["2.weight"].sum()) == round(0.5 * sparsity / 0.8 * 96)
        assert 48 - int(pruner.masked.masks["0.weight"].sum()) == round(sparsity * 48)


def test_random_masks_are_nested_and_belong_to_seed_and_layer():
    masks = {}
    for seed, sparsity in product((0, 1), (0.25, 0.5, 0.75)):
        pruner = pruner_of(nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]), random, seed=seed)
        pruner.update(sparsity)
        masks[seed, sparsity] = masks_of(pruner)
    for seed in (0, 1):
        for wider, narrower in pairwise(masks[seed, sparsity] for sparsity in (0.25, 0.5, 0.75)):
            assert all(not (narrower[name] & ~wider[name]).any() for name in wider)
    assert not torch.equal(masks[0, 0.5]["0.weight"], masks[0, 0.5]["1.weight"])
    assert not torch.equal(masks[0, 0.5]["0.weight"], masks[1, 0.5]["0.weight"])


def test_without_a_gradient_a_weight_has_the_gradient_zero():
    model = network()
    pruner = pruner_of(model, taylor, global_)
    for parameter in (model[0].weight, model[4].weight):
        parameter.grad = torch.ones_like(parameter)
    pruner.update(0.25)
    assert 96 - int(pruner.masked.masks["2.weight"].sum()) == 48


@pytest.mark.parametrize(
    ("present", "several_optimizers", "scaled", "expected"),
    [
        ((), False, False, False),
        (("0.weight",), False, False, True),
        (("0.weight",), True, False, False),
        (("0.weight", "2.weight", "4.weight"), True, False, True),
        (("0.weight", "2.weight", "4.weight"), False, True, True),
    ],
)
def test_gradients_are_waited_for(present, several_optimizers, scaled, expected):
    model = network()
    for name in present:
        model.get_parameter(name).grad = torch.ones_like(model.get_parameter(name))
    assert pruner_of(model, taylor).has_gradients(several_optimizers, scaled) is expected
    assert pruner_of(model, magnitude).has_gradients(several_optimizers, scaled)
    if scaled:
        model.get_parameter("2.weight").grad[0, 0] = float("inf")
        assert not pruner_of(model, taylor).has_gradients(scaled=True)
        assert pruner_of(model, taylor).has_gradients(scaled=False)


@pytest.mark.parametrize("criterion", [magnitude, movement, wanda, random], ids=lambda one: one.__name__)
def test_a_pruner_that_is_loaded_goes_on_like_the_saved_one(criterion):
    def step(model, pruner):
        generator = torch.Generator().manual_seed(2)
        pruner.statistics.listening = True
        model.zero_grad()
        model(torch.randn(5, 6, generator=generator)).square().sum().backward()
        pruner.statistics.add_gradients(set(model.parameters()))

    model = network()
    pruner = pruner_of(model, criterion)
    pruner.statistics.remember_initial()
    pruner.statistics.hooks()
    step(model, pruner)
    pruner.update(0.25)
    step(model, pruner)
    file = BytesIO()
    torch.save({"pruner": pruner.state_dict(), "model": model.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = network()
    again.load_state_dict(saved["model"])
    resumed = pruner_of(again, criterion)
    resumed.load_state_dict(saved["pruner"])
    resumed.statistics.hooks()
    assert resumed.sparsity == 0.25
    assert equal(masks_of(resumed), masks_of(pruner))
    for one, two in ((model, pruner), (again, resumed)):
        step(one, two)
        two.update(0.75)
    assert equal(masks_of(resumed), masks_of(pruner))
    assert equal(again.state_dict(), model.state_dict())


def test_a_checkpoint_of_fewer_or_other_weights_is_refused():
    fewer = Pruner(layers_of(network(), targets=["0", "2"]), magnitude, uniform)
    fewer.update(0.5)
    whole = pruner_of(network())
    with pytest.raises(ValueError, match=r"no mask for 4.weight, which .* its targets: they were 0.weight, 2.weight"):
        whole.load_state_dict(fewer.state_dict())
    assert whole.masked.masks == {}
    whole.update(0.5)
    whole_state = whole.state_dict()
    with pytest.raises(ValueError, match=r"mask for '0.weight', which is not pruned here"):
        Pruner(layers_of(network(), targets="4"), magnitude, uniform).load_state_dict(whole_state)
    with pytest.raises(ValueError, match="damaged: it has no gathered, sparsity"):
        whole.load_state_dict({"masks": {}})


def peak_bytes(action):
    """The most that tensors held at once, beyond what they held before, as torch's own allocator tells."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as told:
        action()
    events = [one for one in told.profiler.kineto_results.events() if one.name() == "[memory]"]
    return max(accumulate(one.nbytes() for one in sorted(events, key=lambda one: one.start_ns())))


def test_an_update_of_a_million_weights_needs_little_beside_their_masks():
    model = nn.Sequential(*(nn.Linear(200, 200, bias=False) for _ in range(25)))
    pruner = pruner_of(model, distribution=global_)
    size_bytes = sum(parameter.nbytes for parameter in model.parameters())
    first, second = (peak_bytes(lambda sparsity=sparsity: pruner.update(sparsity)) for sparsity in (0.5, 0.8))
    assert size_bytes < first < 1.3 * size_bytes  # the masks are as large as the weights
    assert second < 0.3 * size_bytes
