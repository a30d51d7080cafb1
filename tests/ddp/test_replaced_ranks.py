"""Two real processes replace the same module by the same values, and train on with a new wrapper."""

import pytest

from tests.ddp.running import run_two_ranks

RUNS = ("once", "resumed", "random", "differing")
BEFORE = [[8, 6], [8], [3, 8], [3]]
FIRST = [[2, 6], [8, 2], [8], [3, 8], [3]]
BOTH = [[2, 6], [8, 2], [8], [2, 8], [3, 2], [3]]

pytestmark = pytest.mark.ddp


@pytest.fixture(scope="module", params=["lightning.pytorch", "pytorch_lightning"])
def two_ranks(request, tmp_path_factory):
    return run_two_ranks("replaced_ranks", request.param, tmp_path_factory.mktemp("ddp"), RUNS)[0]


@pytest.mark.parametrize("name", ["once", "random"])
def test_ranks_have_equal_shapes_weights_and_momenta_at_every_step(name, two_ranks):
    first, second = two_ranks[name, 0], two_ranks[name, 1]
    assert first["error"] == second["error"] == ""
    assert first == second
    assert first["shapes"][0] == BEFORE
    assert first["shapes"][5] == FIRST
    assert set(first["wrapped"]) == {"DistributedDataParallel"}
    after = [tuple(hashes) for hashes, shapes in zip(first["hashes"], first["shapes"], strict=True) if shapes == FIRST]
    assert len(after) > 3
    assert len(set(after)) == len(after)


def test_a_run_that_is_resumed_between_two_replacements_is_the_same_to_the_last_bit(two_ranks):
    whole, resumed = two_ranks["once", 0], two_ranks["resumed", 0]
    assert resumed["error"] == ""
    steps = len(resumed["hashes"])
    assert steps == 8
    assert whole["shapes"][-1] == BOTH
    assert resumed["hashes"] == whole["hashes"][-steps:]
    assert resumed["shapes"] == whole["shapes"][-steps:]


def test_ranks_that_would_replace_differently_are_refused_on_each_and_nothing_is_changed(two_ranks):
    for rank in (0, 1):
        seen = two_ranks["differing", rank]
        assert seen["error"].startswith("The ranks would replace modules differently: here Replacement(name='net.0'")
        assert seen["shapes"][-1] == BEFORE
