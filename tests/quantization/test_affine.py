"""From an interval to a grid: by hand, and against torch's own observers."""

import warnings

import pytest
import torch

from lightning_compress.quantization.functional.ranges import RangeEstimator, affine_range


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def interval(quant_min, quant_max):
    return torch.tensor(quant_min), torch.tensor(quant_max)


def test_affine_by_hand():
    scale, zero_point = affine_range(torch.tensor(-1.0), torch.tensor(4.1), 0, 255, symmetric=False)
    assert scale.item() == pytest.approx(0.02)
    assert zero_point.item() == 50
    scale, zero_point = affine_range(
        torch.tensor([[-1.4], [-0.1]]), torch.tensor([[0.7], [0.35]]), -7, 7, symmetric=True
    )
    assert torch.allclose(scale, torch.tensor([[0.2], [0.05]]))
    assert zero_point.tolist() == [[0], [0]]


@pytest.mark.parametrize("low_high", [(0, 255), (0, 15), (0, 3), (-127, 127), (-128, 127)], ids=str)
def test_affine_widens_to_zero_which_lies_on_the_grid_and_covers_the_interval(low_high):
    quant_min, quant_max = low_high
    ends = torch.sort(drawn(500, 2) * 10 ** (3 * drawn(500, 1, seed=1)), dim=1).values
    minimum, maximum = ends[:, :1], ends[:, 1:]
    scale, zero_point = affine_range(minimum, maximum, quant_min, quant_max, symmetric=False)
    assert scale.dtype == torch.float32
    assert zero_point.dtype == torch.int32
    assert ((zero_point >= quant_min) & (zero_point <= quant_max)).all()
    least, most = (quant_min - zero_point) * scale, (quant_max - zero_point) * scale
    assert ((least <= 0) & (most >= 0)).all()
    # The zero point is rounded, so that each end may lie half a step outside.
    assert (least <= minimum.clamp(max=0) + 0.501 * scale).all()
    assert (most >= maximum.clamp(min=0) - 0.501 * scale).all()
    width = maximum.clamp(min=0) - minimum.clamp(max=0)
    assert torch.allclose(scale * (quant_max - quant_min), width)


def test_non_negative_numbers_have_the_zero_point_zero():
    scale, zero_point = affine_range(torch.tensor(0.5), torch.tensor(5.1), 0, 255, symmetric=False)
    assert scale.item() == pytest.approx(0.02)
    assert zero_point.item() == 0


def test_numbers_below_zero_alone_have_the_zero_point_at_the_top():
    _, zero_point = affine_range(torch.tensor(-5.1), torch.tensor(-0.5), 0, 255, symmetric=False)
    assert zero_point.item() == 255


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_have_the_scale_one(symmetric):
    scale, zero_point = affine_range(torch.zeros(2, 1), torch.zeros(2, 1), -127 if symmetric else 0, 127, symmetric)
    assert scale.tolist() == [[1.0], [1.0]]
    assert zero_point.tolist() == [[0], [0]]


@pytest.mark.parametrize("reach", [1e-44, 1e-38, 1e-30, 1e30, 3.4e38])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_of_very_small_and_very_large_ranges_can_be_divided_by(reach, symmetric):
    scale, _ = affine_range(torch.tensor(-reach), torch.tensor(reach), -7, 7, symmetric)
    assert 0 < scale.item() < float("inf")
    assert (1 / scale).isfinite()


def test_affine_agrees_with_the_observer_of_torch():
    from torch.ao.quantization import MinMaxObserver, MovingAverageMinMaxObserver

    for seed, observer in enumerate((MinMaxObserver(), MovingAverageMinMaxObserver(averaging_constant=0.01))):
        range_ = RangeEstimator(momentum=0.01 if seed else None)
        known = None
        for batch in range(5):
            values = drawn(50, seed=10 * seed + batch) + 0.5
            observer(values)
            found = range_.estimate(values, dim=None, quant_min=0, quant_max=255)
            known = found if known is None else range_.join(known, found)
        assert torch.allclose(torch.stack(known), torch.stack([observer.min_val, observer.max_val]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scale, zero_point = observer.calculate_qparams()
        assert torch.allclose(affine_range(*known, 0, 255, symmetric=False)[0], scale)
        assert affine_range(*known, 0, 255, symmetric=False)[1] == zero_point


@pytest.mark.parametrize("end", [float("nan"), float("inf")])
def test_a_range_that_is_not_finite_is_refused(end):
    for quant_min, quant_max in ((-1.0, end), (-end, 1.0)):
        with pytest.raises(ValueError, match="not finite"):
            affine_range(*interval(quant_min, quant_max), 0, 255, symmetric=False)


def test_a_range_the_wrong_way_round_is_refused():
    with pytest.raises(ValueError, match=r"2\.0 is above 1\.0"):
        affine_range(*interval(2.0, 1.0), 0, 255, symmetric=False)


@pytest.mark.parametrize(
    ("quant_min", "quant_max", "symmetric", "mend"),
    [
        (0, 255, True, "quant_min=-255"),
        (3, 3, False, "quant_min < quant_max"),
        (-4, 0, False, "quant_max >= 1"),
        (5, 2, False, "quant_min=5"),
    ],
)
def test_a_grid_that_is_none_is_refused(quant_min, quant_max, symmetric, mend):
    with pytest.raises(ValueError, match=mend):
        affine_range(*interval(-1.0, 1.0), quant_min, quant_max, symmetric)
