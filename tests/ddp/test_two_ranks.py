"""Two real processes: equal masks and weights on both, although their random streams differ."""

import pytest

from tests.ddp.running import run_two_ranks

CRITERIA = ("magnitude", "taylor", "wanda", "random", "by_chance")


@pytest.fixture(scope="module", params=["lightning.pytorch", "pytorch_lightning"])
def two_ranks(request, tmp_path_factory):
    return run_two_ranks("two_ranks", request.param, tmp_path_factory.mktemp("ddp"), CRITERIA)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_ranks_have_equal_masks_and_weights_at_every_step(criterion, two_ranks):
    seen, _ = two_ranks
    first, second = seen[criterion, 0], seen[criterion, 1]
    assert first == second
    assert len(first["masks"]) == 12
    assert len(set(first["masks"])) > 3
    assert first["sparsity"] == 0.75
    assert first["zeros"] == 96


def test_a_criterion_that_differs_by_rank_is_noticed(two_ranks):
    _, said = two_ranks
    assert "the ranks' masks differed" in said
