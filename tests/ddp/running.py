"""Run a file of this folder as two ranks, and read what each of them wrote."""

import json

import pytest

from tests import warm


def run_two_ranks(script, lightning, folder, names):
    """What each rank wrote by (name, rank), and all that was said on the way."""
    pytest.importorskip(lightning)
    # As torchrun starts them.
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(warm.free_port()), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    ranks = [
        warm.Started("-m", f"tests.ddp.{script}", lightning, folder, LOCAL_RANK=str(rank), **group) for rank in (0, 1)
    ]
    ended = [rank.done() for rank in ranks]
    said = "".join(one.stdout + one.stderr for one in ended)
    assert [one.returncode for one in ended] == [0, 0], said
    files = {(name, rank): folder / f"{name}-{rank}.json" for name in names for rank in (0, 1)}
    return {key: json.loads(path.read_text()) for key, path in files.items()}, said
