"""Kill and resume every ready recipe, and write what came of it to `docs/kill.md`: `python -m tests.kill_table`."""

import tempfile
from pathlib import Path

from tests.kills import DRAWN, Killer, all_kills
from tests.recipe.kinds import BATCHES, STEPS

PATH = Path(__file__).parents[1] / "docs" / "kill.md"
NAMES_SHOWN = 3
HEAD = f"""# Runs that are killed

Every ready recipe, in a run of {STEPS} steps on the CPU with a checkpoint after each epoch of {BATCHES} steps, is ended
by SIGKILL (`kill -9`) in the middle of a step: the callbacks have acted, the optimizer has not. A new process goes on
from the last checkpoint, or begins anew where there is none.

**Same bytes**: all weights and buffers, the states of the optimizer and of the learning-rate schedule, and what the
callbacks remember end as in a run that nobody disturbed, to the last byte.

Killed are the steps in which a phase begins or ends, those an epoch later, and {DRAWN} of each recipe that are drawn by
chance. Then follow one run that is killed at all of these, one after the other, and one in which the process dies when
half of a checkpoint is written: Lightning gives the file its name when it is whole.

The small models draw nothing by chance and read the same batches in every epoch. Lightning itself puts back neither the
random stream nor the place within an epoch: with dropout, shuffled data or checkpoints in mid-epoch a run goes on, but
on other random numbers or batches than it would have seen, with this package or without it.

This file is written by `python -m tests.kill_table`, which runs all of it; `tests/test_kills.py` runs a few rows.

| recipe | killed at step | phase | resumed from step | same bytes |
|---|---|---|---|---|
"""


def table(found):
    """The text of the file, of pairs of a kill and the names of what ended otherwise."""
    return HEAD + "".join(f"{_row(kill, different)}\n" for kill, different in found)


def _row(kill, different):
    verdict = f"no: {', '.join(different[:NAMES_SHOWN])}, {len(different)} in all" if different else "yes"
    steps, resumed_from = (", ".join(map(str, several)) for several in (kill.steps, kill.resumed_from))
    when = f"{steps}, writing its checkpoint" if kill.writing else steps
    return f"| `{kill.recipe}` | {when} | {kill.phase} | {resumed_from} | {verdict} |"


def main():
    found = []
    with tempfile.TemporaryDirectory() as folder:
        killer = Killer(folder)
        for kill in all_kills():
            found.append((kill, killer.differences(kill)))
            print(_row(*found[-1]), flush=True)
    PATH.write_text(table(found), encoding="utf-8")
    print(
        f"wrote {PATH.name}: {len(found)} rows, {sum(bool(different) for _, different in found)} of them not the same"
    )


if __name__ == "__main__":
    main()
