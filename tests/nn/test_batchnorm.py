"""Averages of BatchNorms' statistics that overlap, as those after a cut and of a phase that begins then."""

import pytest
from torch import nn

from lightning_compress.nn.batchnorm import BatchNormRecalibration


@pytest.mark.parametrize("second", [(2, 3), (2, 9), (1, 2)], ids=["later", "longer", "at once"])
def test_the_users_momentum_comes_back_when_the_last_of_two_averages_has_ended(second):
    norm, one, other, seen = nn.BatchNorm1d(2, momentum=0.3), BatchNormRecalibration(), BatchNormRecalibration(), []
    for now in range(13):
        one.update(now, 1, 3, norm)  # in batches 1, 2, 3
        other.update(now, *second, norm)
        seen.append(norm.momentum)
    last = max(4, sum(second))
    assert seen == [0.3] + [None] * (last - 1) + [0.3] * (13 - last)


def test_an_average_that_begins_again_keeps_the_other_one_going():
    norm, one, other = nn.BatchNorm1d(2, momentum=0.3), BatchNormRecalibration(), BatchNormRecalibration()
    one.update(1, 1, 3, norm), other.update(1, 1, 5, norm)
    one.restart()
    assert norm.momentum is None
    assert not one.begun
    other.end()
    assert norm.momentum == 0.3
