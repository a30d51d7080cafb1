"""Which phases get in each other's way: on one clock, on two, and over the same weights."""

import math
import re
from contextlib import nullcontext
from dataclasses import dataclass

import pytest

from lightning_compress.core.conflicts import (
    ExclusiveClaim,
    FixedShapes,
    phase_windows,
    refuse_conflicts,
    refuse_late_cuts,
    refuse_outside,
)
from lightning_compress.core.phases import PhaseWindow, Run, resolve_window

STEPS = Run(epochs=None, max_steps=100)
UNKNOWN = Run(epochs=10)  # a loader of unknown length: epochs count, and steps cannot be told from them


@dataclass
class Phase:
    """What a callback says of itself."""

    name: str
    begin: object
    end: object
    is_cut: bool = False
    at: str | None = None

    def restored_window(self, run):
        return resolve_window(self.begin, self.end, None, run)

    def changes_shapes(self):
        return self.is_cut

    def fixed_shapes(self):
        return None if self.at is None else FixedShapes(self.at, "so it is")


def refused(words):
    """Refused in these words, or, if they are None, not at all."""
    return nullcontext() if words is None else pytest.raises(ValueError, match=words)


def cut(begin, end):
    return Phase("cut", begin, end, is_cut=True)


def check(run, *phases):
    refuse_late_cuts(phases, phase_windows(phases, run))


@pytest.mark.parametrize(
    ("run", "cutting", "other", "message"),
    [
        (STEPS, cut(10, 50), Phase("grids", 51, 60, at="begin"), None),
        (STEPS, cut(10, 50), Phase("grids", "50%", "60%", at="begin"), None),  # it waits for a step
        (STEPS, cut(10, 50), Phase("grids", 49, 60, at="begin"), "'grids' needs shapes that stay from begin=49 on"),
        (STEPS, cut("10%", "50%"), Phase("zeros", 0, 51, at="end"), None),
        (STEPS, cut("10%", "50%"), Phase("zeros", 0, 50, at="end"), "from end=50 on (so it is), but 'cut' changes"),
        (UNKNOWN, cut("10%", "50%"), Phase("grids", "6 epochs", "100%", at="begin"), None),
        (UNKNOWN, cut("10%", "50%"), Phase("grids", "4 epochs", "100%", at="begin"), "from begin='4 epochs' on"),
        # 5 epochs and 900 steps: as numbers 5 is less, but an epoch may have a thousand steps.
        (UNKNOWN, cut("10%", "50%"), Phase("grids", 900, 1000, at="begin"), "It cannot be told whether 'cut'"),
        (UNKNOWN, cut(10, 50), Phase("grids", "6 epochs", "100%", at="begin"), "Write both in the same unit"),
        (UNKNOWN, cut("10%", "50%"), Phase("grids", 0, 1000, at="begin"), "from begin=0 on"),
        (Run(epochs=None), cut(10, "100%"), Phase("grids", 900, 1000, at="begin"), "'cut' changes shapes until"),
    ],
)
def test_cuts_come_before_shapes_must_stay(run, cutting, other, message):
    for phases in ((cutting, other), (other, cutting)):
        with refused(message and re.escape(message)):
            check(run, *phases)


def test_what_begins_at_the_last_cut_waits_for_it():
    grids = Phase("grids", 50, 51, at="begin")
    assert phase_windows([grids, cut(10, 50)], STEPS)["grids"] == PhaseWindow("steps", 51, 52)
    assert phase_windows([grids, cut(10, 49)], STEPS)["grids"] == PhaseWindow("steps", 50, 51)
    assert phase_windows([cut(10, 50), Phase("zeros", 40, 50, at="end")], STEPS)["zeros"] == PhaseWindow(
        "steps", 40, 50
    )


def clash(one, other, first=PhaseWindow("steps", 0, 10), second=PhaseWindow("steps", 10, 20)):  # noqa: B008
    phases = [Phase("one", "0%", "10%"), Phase("two", "10%", "20%")]
    refuse_conflicts(phases, {"one": [one], "two": [other]}, {"one": first, "two": second})


def masks(*names, **more):
    return ExclusiveClaim("prune", frozenset(names), "Mend it.", **more)


def test_what_stays_is_refused_twice_wherever_the_windows_lie():
    with pytest.raises(ValueError, match=r"^'one' and 'two' would both prune a, b. Mend it.$"):
        clash(masks("b", "a", "c"), masks("a", "b", "d"))
    clash(masks("a"), masks("b"))
    clash(masks("a"), ExclusiveClaim("quantize", frozenset({"a"}), "-"))


@pytest.mark.parametrize(
    ("first", "second", "clashes"),
    [
        (PhaseWindow("steps", 0, 10), PhaseWindow("steps", 10, 20), False),
        (PhaseWindow("steps", 0, 11), PhaseWindow("steps", 10, 20), True),
        (PhaseWindow("steps", 10, math.inf), PhaseWindow("steps", 0, 10), False),
        (PhaseWindow("steps", 10, math.inf), PhaseWindow("steps", 0, 11), True),
        (PhaseWindow("steps", 0, 10), PhaseWindow("epochs", 50, 60), True),  # nobody knows
    ],
)
def test_what_ends_with_its_phase_is_refused_twice_at_one_time_only(first, second, clashes):
    claims = masks("a", permanent=False), masks("a", permanent=False)
    with refused(r"'one' \('0%' to '10%'\) and 'two' .* would both prune a at one time" if clashes else None):
        clash(*claims, first, second)


@pytest.mark.parametrize("turned", [False, True])
def test_what_cannot_be_done_to_the_same_weights_is_refused_in_the_words_of_who_knows(turned):
    both = masks("a"), ExclusiveClaim("make binary", frozenset("ab"), "No zero.", conflicts_with=frozenset({"prune"}))
    with pytest.raises(ValueError, match="'one' would .* a, and 'two' would .* the same. No zero."):
        clash(*(reversed(both) if turned else both))


@pytest.mark.parametrize(
    ("window", "run", "words"),
    [
        (PhaseWindow("steps", 99, 200), STEPS, None),
        (PhaseWindow("steps", 100, 200), STEPS, "begin='late' is step 100, but this run has only 100 steps"),
        (PhaseWindow("batches", 79, 99), Run(epochs=10, batches_per_epoch=8, automatic=False), None),
        (
            PhaseWindow("batches", 80, 99),
            Run(epochs=10, batches_per_epoch=8, automatic=False),
            "batch 80, .* only 80 batches",
        ),
        (PhaseWindow("epochs", 10, 12), UNKNOWN, "epoch 10, .* only 10 epochs"),
        (PhaseWindow("steps", 10**9, math.inf), UNKNOWN, None),
    ],
)
def test_a_phase_outside_of_the_run_is_refused(window, run, words):
    with refused(words):
        refuse_outside("phase", "late", window, run)
