"""Phases on two real processes: equal weights on both, nothing that the processes miss, the result of one process."""

import pytest

from tests.ddp.running import run_two_ranks
from tests.ddp.tuned_ranks import PHASES, run


@pytest.fixture(scope="module", params=["lightning.pytorch", "pytorch_lightning"])
def ranks(request, tmp_path_factory):
    return run_two_ranks("tuned_ranks", request.param, tmp_path_factory.mktemp("ddp"), PHASES)[0]


@pytest.mark.ddp
@pytest.mark.parametrize("name", PHASES)
def test_ranks_have_equal_weights_at_every_step(name, ranks):
    assert ranks[name, 0] == ranks[name, 1]


@pytest.mark.ddp
@pytest.mark.parametrize(("name", "still"), [("frozen", range(3, 8)), ("gradual", range(1, 4))])
def test_what_is_frozen_stands_still_and_all_else_learns(name, still, ranks):
    layers = ranks[name, 0]["layers"]
    for step in range(1, 12):
        moves = [one != other for one, other in zip(layers[step - 1], layers[step], strict=True)]
        assert moves == [step not in still, True], step


@pytest.mark.ddp
@pytest.mark.parametrize("name", PHASES)
def test_one_process_with_all_the_data_comes_to_the_same(name, ranks, tmp_path):
    # Two ranks take every other sample, 8 each: together the batches of 16 in order.
    seen, _ = run(name, tmp_path, devices=1, batch_size=16)
    assert seen["last"] == pytest.approx(ranks[name, 0]["last"], abs=1e-5)
