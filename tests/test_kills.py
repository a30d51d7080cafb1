"""A run that SIGKILL ends, gone on with from its last checkpoint, ends in the bytes of one that nobody disturbed."""

import torch

from lightning_compress.recipe.builtin import builtin_recipes
from tests.kill_table import PATH, table
from tests.kills import Kill, Killer, all_kills, bytes_of, kills, unlike

ROWS = [
    Kill("channels_distill_int8", (19, 34), "between two cuts, and with grids"),
    Kill("lottery_ticket", (19, 36), "in two rounds"),
    Kill("prune_distill", (21,), "writing", writing=True),
]


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path):
    killer = Killer(tmp_path)  # one for all: it costs an import of torch and Lightning
    assert {kill.recipe: killer.differences(kill) for kill in ROWS} == {kill.recipe: [] for kill in ROWS}


def test_the_table_for_readers_is_of_every_ready_recipe_and_all_of_it_went_well():
    found = [(kill, []) for kill in all_kills()]
    assert {kill.recipe for kill, _ in found} == set(builtin_recipes())
    assert PATH.read_text(encoding="utf-8") == table(found), "write it anew: python -m tests.kill_table"


def test_runs_are_killed_where_phases_begin_and_end_and_an_epoch_later():
    told = {kill.steps: (kill.phase, kill.resumed_from) for kill in kills("tabular") if not kill.writing}
    assert (
        told.items()
        >= {
            (4,): ("channels begins", (3,)),  # 10 % of 42 steps, cut off
            (7,): ("channels", (6,)),
            (17,): ("channels ends", (15,)),  # 40 %, rounded up
            (20,): ("between phases", (18,)),
            (25,): ("quantization begins", (24,)),  # 60 %
            (28,): ("quantization", (27,)),
            (42,): ("quantization ends", (39,)),
        }.items()
    )


def test_one_bit_is_seen():
    one, other = ({"state": [torch.zeros(2), {"step": 1.0}]} for _ in range(2))
    assert unlike(one, other) == set()
    other["state"][0][1] = -0.0
    assert bytes_of(one["state"][0]) != bytes_of(other["state"][0])
    assert unlike(one, other) == {"/state/0"}
    assert unlike(one, {"state": [torch.zeros(2), {"step": 2.0, "more": 1}]}) == {"/state/1/step", "/state/1/more"}
