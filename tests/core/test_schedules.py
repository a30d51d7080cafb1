"""How far a phase has gone in, the share of the way out: end points, shape and values by the formula."""

import math
from itertools import pairwise

import pytest

from lightning_compress.core import schedules
from lightning_compress.core.arguments import check_schedule
from lightning_compress.core.registry import registered


@pytest.mark.parametrize("kind", registered(schedules).values(), ids=registered(schedules))
def test_every_schedule_rises_to_one_and_stays_within(kind):
    shares = [kind()(step / 100) for step in range(101)]
    assert all(0 <= share <= 1 for share in shares)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    check_schedule(kind())


def test_the_names_of_the_field_are_there():
    assert set(registered(schedules)) == {"constant", "linear", "cubic", "cosine", "exponential", "steps", "one_cycle"}


@pytest.mark.parametrize(
    ("schedule", "progress", "expected"),
    [
        (schedules.Constant(), 0.0, 1.0),
        (schedules.Linear(), 0.0, 0.0),
        (schedules.Linear(), 0.3, 0.3),
        (schedules.Cubic(), 0.0, 0.0),
        (schedules.Cubic(), 0.5, 1 - 0.5**3),
        (schedules.Cosine(), 0.25, (1 - math.sqrt(0.5)) / 2),
        (schedules.Cosine(), 0.0, 0.0),
        (schedules.Cosine(), 0.5, 0.5),
        (schedules.Exponential(), 0.0, 0.0),
        (schedules.Exponential(rate=2.0), 0.5, (1 - math.exp(-1)) / (1 - math.exp(-2))),
        (schedules.Exponential(rate=1e-12), 0.3, 0.3),  # hardly any rate is a straight line
        (schedules.Steps(count=4), 0.0, 0.25),
        (schedules.Steps(count=4), 0.3, 0.5),
        (schedules.Steps(count=1), 0.0, 1.0),
        (schedules.OneCycle(), 0.0, (1 + math.exp(-8)) / (1 + math.exp(6))),
        (schedules.OneCycle(), 0.5, (1 + math.exp(-8)) / (1 + math.exp(-1))),
    ],
)
def test_values_are_those_of_the_formula(schedule, progress, expected):
    assert schedule(progress) == pytest.approx(expected)


def test_steps_jump_on_the_moment_however_it_was_divided():
    for count in range(1, 100):
        for step in range(count):
            assert schedules.Steps(count)(step / count) == (step + 1) / count, (step, count)


def test_exponential_prunes_the_same_share_of_what_is_left_each_time():
    share = schedules.Exponential(rate=-math.log(1 - 0.9))
    left = [1 - 0.9 * share(step / 5) for step in range(6)]
    assert [after / before for before, after in pairwise(left)] == pytest.approx([0.1**0.2] * 5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: schedules.Exponential(0),
        lambda: schedules.Exponential(-1.0),
        lambda: schedules.Exponential(math.nan),
        lambda: schedules.Steps(0),
    ],
)
def test_numbers_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match="must be"):
        make()
