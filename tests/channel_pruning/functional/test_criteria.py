"""What makes a unit important, by hand, by brute force and by other libraries."""

import numpy as np
import pytest
import torch

from lightning_compress.channel_pruning.functional import criteria
from lightning_compress.core.registry import call_with_supported_args, check_signature, registered, required_args

UNITS = 6
every_criterion = pytest.mark.parametrize("criterion", registered(criteria).values(), ids=registered(criteria))


def offered(dtype=torch.float32, make=torch.randn):
    """Something for each name that a criterion may ask for."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shapes = {
            "weight": (UNITS, 9),
            "grad": (UNITS, 9),
            "gamma": (UNITS,),
            "gamma_grad": (UNITS,),
            "activations": (20, UNITS, 4, 5),
            "activation_grads": (20, UNITS, 4, 5),
            "feature_maps": (20, UNITS, 4, 5),
            "patches": (40, UNITS, 3),
            "consumer_weight": (UNITS, 3, 4),
        }
        given = {name: make(shape).to(dtype) for name, shape in shapes.items()}
    return {**given, "generator": torch.Generator().manual_seed(1)}


def test_the_choices_are_the_methods():
    assert set(registered(criteria)) == {
        "l1", "l2", "random", "fpgm", "slimming", "taylor", "taylor_activations", "hrank", "entropy", "apoz", "lasso",
        "thinet",
    }  # fmt: skip


@every_criterion
def test_every_criterion_asks_only_for_what_is_offered(criterion):
    assert required_args(check_signature(criterion, criteria.OFFERED))


@every_criterion
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_criterion_gives_a_score_for_each_unit_in_float32_and_keeps_its_inputs(criterion, dtype):
    given = offered(dtype)
    before = {name: value.clone() for name, value in given.items() if isinstance(value, torch.Tensor)}
    scores = call_with_supported_args(criterion, **given)
    assert scores.shape == (UNITS,)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    for name, value in before.items():
        assert torch.equal(given[name], value), name
        assert scores.data_ptr() != given[name].data_ptr(), f"scores share the memory of {name}"


@every_criterion
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_criterion_computes_half_precision_in_float32(criterion, dtype):
    half = offered(dtype)
    wide = {name: value.float() if isinstance(value, torch.Tensor) else value for name, value in offered(dtype).items()}
    assert torch.equal(call_with_supported_args(criterion, **half), call_with_supported_args(criterion, **wide))


@every_criterion
@pytest.mark.parametrize("make", [torch.zeros, torch.ones])
def test_every_criterion_is_finite_where_all_is_zero_or_constant(criterion, make):
    assert call_with_supported_args(criterion, **offered(make=make)).isfinite().all()


@every_criterion
def test_scores_move_with_the_units_and_forget_the_order_of_the_samples(criterion):
    if criterion is criteria.random:
        pytest.skip("its scores are by place")
    given = offered()
    units, axes = torch.tensor([3, 0, 5, 1, 4, 2]), {"activations": 1, "activation_grads": 1, "patches": 1}
    moved = {name: given[name].index_select(axes.get(name, 0), units) for name in given if name != "generator"}
    for name in axes:
        moved[name] = moved[name].flip(0)
    assert torch.allclose(
        call_with_supported_args(criterion, **moved), call_with_supported_args(criterion, **given)[units]
    )


@every_criterion
def test_no_criterion_touches_the_users_random_stream(criterion):
    before = torch.get_rng_state()
    call_with_supported_args(criterion, **offered())
    assert torch.equal(torch.get_rng_state(), before)


@every_criterion
def test_what_is_missing_empty_or_not_finite_is_said(criterion):
    for name in required_args(criterion):
        with pytest.raises(ValueError, match=f"{name} .*missing"):
            call_with_supported_args(criterion, **{**offered(), name: None})
        if name == "generator":
            continue
        with pytest.raises(ValueError, match=f"{name} .*empty"):
            call_with_supported_args(criterion, **{**offered(), name: offered()[name][:0]})
        with pytest.raises(ValueError, match=f"{name} .*infinite"):
            call_with_supported_args(criterion, **{**offered(), name: offered()[name] / 0})


def test_shapes_that_do_not_fit_are_said():
    with pytest.raises(ValueError, match=r"\(units, elements\), but is \(2, 3, 3\)"):
        criteria.l1(torch.zeros(2, 3, 3))
    with pytest.raises(ValueError, match="Shapes differ"):
        criteria.taylor(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="the same layer"):
        criteria.thinet(torch.zeros(9, 2, 3), torch.zeros(2, 4, 5))
    with pytest.raises(ValueError, match="height, width"):
        criteria.hrank(torch.zeros(9, 2))


def test_norms_and_scales_by_hand():
    weight = torch.tensor([[3.0, -4.0], [0.0, 0.5]])
    assert criteria.l1(weight).tolist() == [7.0, 0.5]
    assert criteria.l2(weight).tolist() == [5.0, 0.5]
    assert criteria.slimming(torch.tensor([-0.5, 0.25])).tolist() == [0.5, 0.25]


def test_random_is_the_same_at_each_update():
    weight = torch.randn(20, 3)
    first, second, other = (criteria.random(weight, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert ((first >= 0) & (first < 1)).all()


def test_fpgm_by_brute_force_and_exactly_0_for_copies():
    weight = offered()["weight"]
    expected = [sum(np.linalg.norm(one - other) for other in weight.numpy()) for one in weight.numpy()]
    assert criteria.fpgm(weight).tolist() == pytest.approx(expected, rel=1e-5)
    assert not criteria.fpgm(torch.randn(1, 90, generator=torch.Generator().manual_seed(0)).repeat(40, 1)).any()


def test_taylor_is_the_squared_change_of_a_linear_loss_when_a_unit_is_removed():
    weight, grad = offered()["weight"], offered()["grad"]
    for unit, score in enumerate(criteria.taylor(weight, grad)):
        without = weight.clone()
        without[unit] = 0.0
        change = ((without - weight).double() * grad.double()).sum()
        assert score.item() == pytest.approx(change.item() ** 2, rel=1e-4)


def test_taylor_of_activations_is_absolute_by_sample_and_not_by_position():
    activations = torch.tensor([[[1.0, 2.0]], [[3.0, -1.0]]])  # 2 samples, 1 unit, 2 positions
    grads = torch.tensor([[[4.0, -1.0]], [[-1.0, 1.0]]])
    # Means over positions (4 - 2) / 2 = 1 and (-3 - 1) / 2 = -2, of which the absolute values average 1.5.
    assert criteria.taylor_activations(activations, grads).tolist() == [1.5]
    flat = torch.tensor([[2.0], [-2.0]])
    assert criteria.taylor_activations(flat, torch.ones(2, 1)).tolist() == [2.0]


def test_hrank_is_numpys_rank():
    maps = torch.randn(7, 3, 5, 4, generator=torch.Generator().manual_seed(0)).relu()
    maps[:4, 1, 1:] = maps[:4, 1, :1]  # rank 1 in 4 of 7 samples
    maps[:, 2] = 0.0
    expected = np.linalg.matrix_rank(maps.numpy()).mean(0)
    assert criteria.hrank(maps).tolist() == pytest.approx(expected.tolist())
    assert expected[1] < 3
    assert expected[2] == 0


def test_entropy_is_that_of_numpys_histogram():
    activations = torch.randn(300, 4, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    activations[:, 1] = activations[:, 1].exp()
    activations[:, 2] = 0.7
    expected = []
    for unit in activations.mean((2, 3)).T.numpy():
        share = np.histogram(unit, bins=100)[0] / 300
        expected.append(-sum(one * np.log(one) for one in share if one))
    scores = criteria.entropy(activations)
    assert scores.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert scores[2] == 0
    every_bin = torch.arange(100.0).unsqueeze(1)
    assert criteria.entropy(every_bin).item() == pytest.approx(np.log(100))
    two_values = torch.tensor([[0.0], [8.0], [8.0], [0.0]])
    assert criteria.entropy(two_values).item() == pytest.approx(np.log(2))


def test_apoz_counts_what_is_not_zero():
    activations = torch.tensor([[[0.0, 1.0], [0.0, 0.0]], [[2.0, -3.0], [0.0, 1.0]]])
    assert criteria.apoz(activations).tolist() == [0.75, 0.25]
    assert criteria.apoz(torch.tensor([[0.0, 1.0], [0.0, 0.0]])).tolist() == [0.0, 0.5]


def regression(patches, weight):
    """What each unit adds, as columns, over samples and outputs."""
    return torch.einsum("nut,uto->nou", patches.double(), weight.double()).flatten(0, 1).numpy()


@pytest.mark.parametrize("seed", range(5))
def test_lasso_keeps_what_sklearns_keeps_at_every_penalty(seed):
    linear_model = pytest.importorskip("sklearn.linear_model")
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(30, 12, 2, generator=generator) @ torch.randn(2, 2, generator=generator)
    patches = (patches + 0.7 * torch.randn(30, 1, 2, generator=generator)).relu()
    weight = torch.randn(12, 2, 5, generator=generator)
    columns = regression(patches, weight)
    wanted = columns.sum(1)
    penalties = np.geomspace(1, 1e-4, 400) * np.abs(columns.T @ wanted).max() / len(columns)
    _, path, _ = linear_model.lasso_path(columns, wanted, alphas=penalties, tol=1e-9, max_iter=100_000)
    entered = np.where((path != 0).any(1), (path != 0).argmax(1), 400)
    scores = criteria.lasso(patches, weight).numpy()
    for one in range(12):
        for other in range(12):
            if entered[one] < entered[other]:
                assert scores[one] > scores[other]


def test_lasso_never_takes_zeros_and_copies_and_has_the_share_that_leaves_before():
    patches = torch.eye(4).unsqueeze(2)  # orthogonal: each unit leaves at the square of what it adds
    weight = torch.tensor([3.0, 1.0, 0.0, -2.0]).view(4, 1, 1)
    assert criteria.lasso(patches, weight).tolist() == [0.75, 0.25, 0.0, 0.5]
    assert criteria.lasso(patches[:, [0, 0, 3]], weight[[0, 0, 3]]).sort().values.tolist() == pytest.approx(
        [0, 1 / 3, 2 / 3]
    )


def test_thinet_removes_what_changes_the_output_least_each_time():
    given = offered()
    columns = regression(given["patches"], given["consumer_weight"])
    removed = []
    while len(removed) < UNITS:
        change = {
            unit: (columns[:, [*removed, unit]].sum(1) ** 2).sum() for unit in range(UNITS) if unit not in removed
        }
        removed.append(min(change, key=change.get))
    scores = criteria.thinet(given["patches"], given["consumer_weight"])
    assert scores.argsort().tolist() == removed
    assert sorted(scores.tolist()) == pytest.approx([unit / UNITS for unit in range(UNITS)])


def test_many_units_are_added_up_in_blocks():
    generator = torch.Generator().manual_seed(0)
    patches, weight = torch.randn(30, 200, 4, generator=generator), torch.randn(200, 4, 3, generator=generator)
    columns = regression(patches, weight)
    assert np.allclose(criteria._contributions(patches, weight).numpy(), columns.T @ columns)
