"""Two real processes that train quantized: their data differ, their weights, ranges and learned steps do not."""

import pytest

from tests.ddp.running import run_two_ranks

CASES = ("ranges", "widening", "learned")

pytestmark = pytest.mark.ddp


@pytest.fixture(scope="module", params=["lightning.pytorch", "pytorch_lightning"])
def seen(request, tmp_path_factory):
    return run_two_ranks("quantized_ranks", request.param, tmp_path_factory.mktemp("ddp"), CASES)[0]


@pytest.mark.parametrize("name", CASES)
def test_ranks_have_equal_weights_and_equal_grids_after_every_batch(name, seen):
    first, second = seen[name, 0], seen[name, 1]
    assert first == second
    assert len(set(first["weights"])) == 8


@pytest.mark.parametrize("name", CASES)
def test_the_grids_follow_the_training(name, seen):
    assert len(set(seen[name, 0]["grids"])) >= 5
