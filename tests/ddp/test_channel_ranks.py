"""Two real processes lose the same channels, although each sees other batches, and train on."""

import pytest

from tests.ddp.running import run_two_ranks

RUNS = ("once", "twice", "by_rank", "other_units")

pytestmark = pytest.mark.ddp


@pytest.fixture(scope="module", params=["lightning.pytorch", "pytorch_lightning"])
def two_ranks(request, tmp_path_factory):
    return run_two_ranks("channel_ranks", request.param, tmp_path_factory.mktemp("ddp"), RUNS)[0]


@pytest.mark.parametrize("name", RUNS)
def test_ranks_have_equal_shapes_weights_and_momenta_at_every_step(name, two_ranks):
    first, second = two_ranks[name, 0], two_ranks[name, 1]
    assert first == second
    assert first["shapes"][0] == [[8, 6], [8], [3, 8], [3]]
    assert first["shapes"][-1] == [[4, 6], [4], [3, 4], [3]]
    assert set(first["wrapped"]) == {"DistributedDataParallel"}


@pytest.mark.parametrize("name", RUNS)
def test_the_weights_change_at_every_step_after_the_cut(name, two_ranks):
    steps = zip(two_ranks[name, 0]["hashes"], two_ranks[name, 0]["shapes"], strict=True)
    after = [tuple(step) for step, shapes in steps if shapes[0][0] == 4]
    assert len(after) > 3
    assert len(set(after)) == len(after)


def test_scores_are_summed_over_the_ranks(two_ranks):
    # u / 3.5 on one and (7 - u)^2 / 17.5 on the other: the sums are lowest for units 3 to 6.
    assert two_ranks["by_rank", 1]["kept"]["net.0.bias"]["0"] == [0, 1, 2, 7]


def test_where_ranks_choose_otherwise_the_first_ones_choice_counts(two_ranks):
    assert two_ranks["other_units", 1]["kept"]["net.0.bias"]["0"] == [4, 5, 6, 7]
