"""Two real processes that distil: equal weights on both, and equal to the loss written by hand."""

import pytest

from tests.ddp.running import run_two_ranks

CASES = ("by_hand", "distilled", "cached", "learned", "averaged", "own_past", "peer")

pytestmark = pytest.mark.ddp


@pytest.fixture(scope="module", params=["lightning.pytorch", "pytorch_lightning"])
def seen(request, tmp_path_factory):
    return run_two_ranks("distilled_ranks", request.param, tmp_path_factory.mktemp("ddp"), CASES)[0]


@pytest.mark.parametrize("name", CASES)
def test_ranks_have_equal_weights_at_every_step(name, seen):
    first, second = seen[name, 0], seen[name, 1]
    assert first == second
    assert len(first["weights"]) == 8
    assert len(set(first["weights"])) == 8
    assert first["keys"] == seen["by_hand", 0]["keys"]


def test_it_equals_the_loss_written_by_hand(seen):
    assert seen["distilled", 0]["weights"] == seen["by_hand", 0]["weights"]


@pytest.mark.parametrize("name", ["learned", "peer"])
def test_what_trains_beside_the_model_is_equal_too_and_learns(name, seen):
    beside = seen[name, 0]["beside"]
    assert beside == seen[name, 1]["beside"]
    assert len(set(beside)) == len(beside)


def test_epoch_metrics_are_of_all_ranks(seen):
    first, second = seen["distilled", 0]["metrics"], seen["distilled", 1]["metrics"]
    assert first == second
    assert {"compress/distillation/agreement_epoch", "compress/distillation/teacher_accuracy_epoch"} <= first.keys()
