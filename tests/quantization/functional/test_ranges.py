"""Which interval a grid covers: by hand and by brute force."""

import time

import pytest
import torch

from lightning_compress.quantization.functional.ranges import (
    RangeEstimator,
    affine_range,
    exponential_average,
    min_max,
    mse,
    percentile,
    union,
)

ESTIMATORS = [min_max, percentile, mse]


def estimate(estimator, values, dim):
    return RangeEstimator(estimator).estimate(values, dim=dim, quant_min=-7, quant_max=7)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def interval(quant_min, quant_max):
    return torch.tensor(quant_min), torch.tensor(quant_max)


# Estimators ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_one_interval_has_no_dimension_and_those_of_rows_are_a_column(estimator, dtype):
    values = drawn(5, 40).to(dtype).requires_grad_()
    before = values.detach().clone()
    for dim, shape in ((None, ()), (1, (5, 1))):
        for end in estimate(estimator, values, dim):
            assert end.shape == shape
            assert end.dtype == torch.float32
            assert not end.requires_grad
    assert torch.equal(values, before)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_interval_of_a_row_does_not_depend_on_the_others(estimator):
    values = drawn(5, 40) * torch.tensor([[1.0], [10.0], [0.1], [3.0], [1e-4]])
    whole = torch.cat(estimate(estimator, values, 1), dim=1)
    alone = [torch.stack(estimate(estimator, row, None)) for row in values]
    assert torch.equal(whole, torch.stack(alone))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_activations_of_any_shape_have_one_interval(estimator):
    values = drawn(2, 3, 4, 5)
    folded = estimate(estimator, values.permute(0, 2, 3, 1), None)
    assert [end.shape for end in folded] == [(), ()]
    assert torch.equal(
        torch.stack(folded), torch.stack(estimate(estimator, values.permute(0, 2, 3, 1).flatten(), None))
    )


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dim", [None, 1])
def test_what_is_no_number_reaches_the_refusal(estimator, dim):
    values = drawn(4, 30)
    values[2, 3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        affine_range(*estimate(estimator, values, dim), -7, 7, symmetric=True)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_numbers_have_no_range(estimator):
    with pytest.raises(ValueError, match=r"shape \(0, 3\) hold no numbers"):
        estimate(estimator, torch.zeros(0, 3), None)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("shape", "dim"), [((2, 3, 4), 1), ((4,), 1), ((2, 3), 0)], ids=str)
def test_only_the_rows_of_a_matrix_have_intervals_of_their_own(estimator, shape, dim):
    with pytest.raises(ValueError, match=f"is {dim} for shape"):
        estimate(estimator, torch.ones(shape), dim)


def test_min_max_by_hand():
    values = torch.tensor([[1.0, -2.0, 0.5], [3.0, 4.0, 5.0]])
    assert [end.tolist() for end in min_max(values, 1)] == [[[-2.0], [3.0]], [[1.0], [5.0]]]
    assert [end.item() for end in min_max(values)] == [-2.0, 5.0]


@pytest.mark.parametrize("share", [1.0, 0.999, 0.99, 0.9, 0.75, 0.56])
@pytest.mark.parametrize("count", [1, 2, 10, 100, 1000])
def test_percentile_leaves_out_as_many_of_the_sorted_values_as_it_may(share, count):
    values = drawn(3, count)
    quant_min, quant_max = percentile(values, 1, share)
    for row, least, most in zip(values.tolist(), quant_min, quant_max, strict=True):
        left_out = int(count * (1 - share) + 1e-6)
        assert sum(one > most.item() for one in row) == left_out
        assert sum(one < least.item() for one in row) == left_out
        assert {least.item(), most.item()} <= set(row)


def test_what_is_no_number_is_not_left_out_as_an_outlier():
    values = torch.linspace(-1, 1, 10_000)
    values[3] = torch.nan
    assert all(end.isnan() for end in percentile(values, share=0.9))


def test_a_sample_of_many_values_reaches_from_the_first_to_the_last():
    quant_min, quant_max = percentile(torch.linspace(0, 1, 2**20), share=0.99)
    assert (quant_min.item(), quant_max.item()) == (pytest.approx(0.01, abs=1e-3), pytest.approx(0.99, abs=1e-3))


def test_percentile_is_not_moved_by_an_outlier():
    values = torch.cat([torch.linspace(-1, 1, 9999), torch.tensor([1e6])])
    quant_min, quant_max = percentile(values, share=0.999)
    assert -1.0 <= quant_min < -0.99
    assert 0.99 < quant_max <= 1.0


def test_percentile_of_very_many_values_is_quick_always_the_same_and_near_the_truth():
    # More than the 2 ** 24 values that torch.quantile takes.
    values = drawn(2**24 + 5)
    began = time.process_time()
    quant_min, quant_max = percentile(values, share=0.99)
    assert time.process_time() - began < 5
    assert (quant_min, quant_max) == percentile(values, share=0.99)
    # The quantile of the normal distribution, give or take what 2 ** 18 draws leave open.
    assert -quant_min.item() == pytest.approx(2.3263, abs=0.05)
    assert quant_max.item() == pytest.approx(2.3263, abs=0.05)


@pytest.mark.parametrize("period", [2, 3, 7, 16, 49, 64, 196, 1024])
def test_a_sample_of_many_values_meets_all_channels_however_they_follow_each_other(period):
    count = 2**20 // period * period
    values = torch.arange(count) % period
    quant_min, quant_max = percentile(values.float(), share=0.99)
    assert quant_min.item() == pytest.approx(0.01 * period, abs=0.01 * period + 1)
    assert quant_max.item() == pytest.approx(0.99 * period, abs=0.01 * period + 1)
    mean_square = torch.stack(mse(values.float(), None, 0, 255))
    assert mean_square[1] > 0.9 * (period - 1)


@pytest.mark.parametrize("share", [0.5, 0.0, -1.0, 1.5, 99.9, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match=str(share)):
        percentile(torch.ones(3), share=share)


@pytest.mark.parametrize(
    ("quant_min", "quant_max"), [(-1, 1), (-3, 3), (-7, 7), (-127, 127), (0, 3), (0, 15), (0, 255)]
)
@pytest.mark.parametrize("kind", ["normal", "heavy tail", "non-negative"])
def test_mse_finds_nearly_the_best_of_a_thousand_ranges(quant_min, quant_max, kind):
    values = {"normal": drawn(2000), "heavy tail": drawn(2000) ** 3, "non-negative": drawn(2000).relu()}[kind].double()
    least, most = values.min().item(), values.max().item()

    def error(share):
        if quant_min < 0:
            scale, zero = share * max(-least, most) / quant_max, 0
        else:
            scale = share * (max(most, 0) - min(least, 0)) / quant_max
            zero = round(-share * min(least, 0) / scale)
        levels = torch.arange(quant_min - zero, quant_max - zero + 1).double() * scale
        nearest = torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)
        return (levels[nearest] - values).square().sum().item()

    best = min(error(step / 1000) for step in range(10, 1001))
    found = mse(values, None, quant_min, quant_max)[1].item() / most
    assert error(found) <= 1.02 * best
    assert error(found) <= error(1.0)


def test_mse_of_zeros_is_zero():
    assert [end.tolist() for end in mse(torch.zeros(2, 3), 1, -7, 7)] == [[[0.0], [0.0]]] * 2


# Batches ------------------------------------------------------------------------------------------------------------


def test_widened_holds_both():
    assert union(interval(-1.0, 2.0), interval(-3.0, 1.0)) == (-3.0, 2.0)


def test_averaged_by_hand():
    quant_min, quant_max = exponential_average(interval(-1.0, 2.0), interval(-3.0, 1.0), momentum=0.25)
    assert (quant_min.item(), quant_max.item()) == (-1.5, 1.75)
    quant_min, _ = exponential_average(interval(-1.0, 2.0), interval(-3.0, 1.0))
    assert quant_min.item() == pytest.approx(-1.02)


def test_a_range_joins_by_widening_or_by_its_momentum():
    old, new = interval(-1.0, 2.0), interval(-3.0, 1.0)
    assert RangeEstimator(momentum=None).join(old, new) == (-3.0, 2.0)
    assert [end.item() for end in RangeEstimator(momentum=0.5).join(old, new)] == [-2.0, 1.5]
    assert RangeEstimator(momentum=None).widens
    assert not RangeEstimator().widens


@pytest.mark.parametrize("momentum", [0, -0.1, 1.5, float("nan")])
def test_a_momentum_that_is_none_is_refused(momentum):
    with pytest.raises(ValueError, match=str(momentum)):
        RangeEstimator(momentum=momentum)


def test_a_range_hands_its_estimator_what_that_asks_for():
    seen = {}

    def own(values, quant_max):
        seen.update(values=values, quant_max=quant_max)
        return interval(0.0, 1.0)

    assert RangeEstimator(own).estimate(torch.ones(2), dim=None, quant_min=0, quant_max=15) == (0.0, 1.0)
    assert seen["quant_max"] == 15
