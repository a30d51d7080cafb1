"""Arguments that several callbacks take: what passes, and how the others are refused."""

import math

import numpy as np
import pytest
import torch

from lightning_compress.core import schedules
from lightning_compress.core.arguments import check_fraction, check_schedule
from lightning_compress.core.registry import registered


@pytest.mark.parametrize("value", [0, 0.0, 1e-9, 0.5, 0.999, np.float64(0.25)])
def test_a_fraction_comes_back_as_a_float(value):
    assert check_fraction("share", value) == value
    assert type(check_fraction("share", value)) is float or isinstance(value, np.float64)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (90, r"share is a fraction in \[0, 1\), but is 90. For 90 % write 0.9"),
        (2.5, "but is 2.5. For 2.5 % write 0.025"),
        (100, "but is 100. Something has to stay"),
        (1, r"but is 1\."),
        (1.0, r"but is 1.0\."),
        (101, "but is 101. For 90 % write 0.9"),
        (-0.1, "but is -0.1"),
        (math.nan, "but is nan"),
        (math.inf, "but is inf"),
        (-math.inf, "but is -inf"),
        ("0.9", "but is '0.9'"),
        (True, "but is True"),
        (False, "but is False"),
        (None, "but is None"),
        (torch.tensor(0.5), "but is tensor"),
        ([0.5], r"but is \[0.5\]"),
    ],
    ids=str,
)
def test_what_is_no_fraction_is_refused_with_its_name_and_value(value, message):
    with pytest.raises(ValueError, match=message):
        check_fraction("share", value)


@pytest.mark.parametrize("kind", registered(schedules).values(), ids=registered(schedules))
def test_every_schedule_of_ours_passes(kind):
    check_schedule(kind())


@pytest.mark.parametrize(
    "schedule",
    [lambda progress: progress**2, lambda progress: 1, lambda progress: 1 - abs(progress - 1) ** 0.5, round],
    ids=["square", "int", "root", "round"],
)
def test_a_function_that_returns_shares_of_the_way_passes(schedule):
    check_schedule(schedule)


def test_a_schedule_may_fall_on_its_way():
    check_schedule(lambda progress: 1.0 if progress in (0.5, 1.0) else 0.2)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (lambda progress: 2 * progress, r"returns 1.2 at progress 0.6"),
        (lambda progress: -progress, r"returns -0.1 at progress 0.1"),
        (lambda progress: progress / 2, r"ends at 1, the final value, but .* returns 0.5 at progress 1.0. Divide"),
        (lambda progress: "half", "returns 'half' at progress 0.0"),
        (lambda progress: None, "returns None at progress 0.0"),
        (lambda progress: math.nan, "returns nan at progress 0.0"),
        (lambda progress: torch.tensor(progress), r"returns tensor\(0.\) at progress 0.0"),
    ],
    ids=["too-far", "backwards", "half-way", "text", "nothing", "nan", "tensor"],
)
def test_what_is_no_share_of_the_way_is_refused_with_its_place(schedule, message):
    with pytest.raises(ValueError, match=message):
        check_schedule(schedule)
