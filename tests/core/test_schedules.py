import math

import pytest

from lightning_compress.core import schedules
from lightning_compress.core.checks import check_schedule
from lightning_compress.core.lookup import choices


@pytest.mark.parametrize("kind", choices(schedules).values(), ids=choices(schedules))
def test_every_schedule_rises_to_one_and_stays_within(kind):
    shares = [kind()(step / 100) for step in range(101)]
    assert all(0 <= share <= 1 for share in shares)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    check_schedule(kind())


def test_the_names_of_the_field_are_there():
    assert set(choices(schedules)) == {"constant", "linear", "cubic", "cosine", "exponential", "steps", "one_cycle"}


@pytest.mark.parametrize(
    ("schedule", "progress", "expected"),
    [
        (schedules.Constant(), 0.0, 1.0),
        (schedules.Linear(), 0.3, 0.3),
        (schedules.Cubic(), 0.5, 1 - 0.5**3),
        (schedules.Cosine(), 0.25, (1 - math.sqrt(0.5)) / 2),
        (schedules.Exponential(rate=2.0), 0.5, (1 - math.exp(-1)) / (1 - math.exp(-2))),
        (schedules.Steps(count=4), 0.3, 0.5),
        (schedules.OneCycle(), 0.5, (1 + math.exp(-8)) / (1 + math.exp(-1))),
    ],
)
def test_values_are_those_of_the_formula(schedule, progress, expected):
    assert schedule(progress) == pytest.approx(expected)


@pytest.mark.parametrize("make", [lambda: schedules.Exponential(0), lambda: schedules.Steps(0)])
def test_numbers_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match="must be"):
        make()


@pytest.mark.parametrize("wrong", [lambda p: 2 * p, lambda p: -p, lambda p: p / 2, lambda p: "half"])
def test_what_is_no_share_of_the_way_is_refused(wrong):
    with pytest.raises(ValueError, match="share of the way|ends at 1"):
        check_schedule(wrong)
