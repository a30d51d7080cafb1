"""Teachers that are written "self@10%": when they come to be, and when teaching can begin."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning_compress.core.phases import Duration, PhaseWindow, Run, check_order, resolve_window
from lightning_compress.distillation.objective import Tutor

ITSELF = re.compile(r"\s*self\s*(?:@\s*(.*?)\s*)?$")


def is_itself(teacher: str) -> bool:
    """Whether a teacher is written so."""
    return ITSELF.match(teacher) is not None


class Snapshots:
    """The moments at which a module becomes its own teacher.

    Args:
        teacher: as it was given to `Distillation`: one or several, of any kind.
        end: of the phase.

    Raises:
        ValueError: if a moment is missing, is no duration, or is seen not to come before `end`.
    """

    def __init__(self, teacher: Any, end: Duration) -> None:
        several = teacher if isinstance(teacher, list | tuple) else [teacher]
        self.written = [_moment_written(one, end) if isinstance(one, str) else None for one in several]
        self.tutors: Sequence[Tutor] = ()
        self.moments: list[int | None] = []

    def counted(self, end: Duration, window: PhaseWindow, run: Run) -> list[int | None]:
        """The moment of each teacher on the hand of the phase's window, None for one that is there already.

        Raises:
            ValueError: if a moment cannot be counted so, or does not come before `end`.
        """
        return [None if moment is None else _moment(moment, end, window, run) for moment in self.written]

    def all_there(self, end: Duration, window: PhaseWindow, run: Run) -> PhaseWindow:
        """The phase's window, which begins no sooner than all teachers are there."""
        moments = [one for one in self.counted(end, window, run) if one is not None]
        return replace(window, begin=max([window.begin, *moments]))

    def carry(self, tutors: Sequence[Tutor]) -> None:
        """One Trainer goes on with the same module: let these teachers be what those of its last fit were."""
        for before, now, moment in zip(self.tutors, tutors, self.written, strict=False):
            if moment is not None:
                now.teacher.load(before.teacher.state())

    def start(self, tutors: Sequence[Tutor], moments: Sequence[int | None], now: int, begin: int) -> None:
        """Training begins, or goes on.

        Raises:
            ValueError: if a moment is past, and nobody has remembered what the module was.
        """
        self.tutors, self.moments = tutors, list(moments)
        if late := [moment for moment, _ in self._to_come(begin) if moment < now]:
            raise ValueError(
                f"A teacher is the module as it was at moment {late[0]} of this run, which is past, but nobody has "
                f"remembered it: what is gone on from was trained without it. Write a later moment."
            )

    def remember(self, now: int, begin: int) -> None:
        """Let the teachers come to be whose moment has come.

        Args:
            now: what is done, on the hand of the phase.
            begin: of the phase, which takes its teachers along if it has moved up.
        """
        for moment, tutor in self._to_come(begin):
            if moment <= now:
                tutor.teacher.remember()

    def _to_come(self, begin: int) -> list[tuple[int, Tutor]]:
        pairs = zip(self.moments, self.tutors, strict=True)
        return [(min(moment, begin), one) for moment, one in pairs if moment is not None and not one.teacher.there]


def _moment_written(teacher: str, end: Duration) -> Duration | None:
    found = ITSELF.match(teacher)
    if found is None:
        return None
    if not found[1]:
        raise ValueError(f"teacher={teacher!r} does not say of when. Write the moment: 'self@10%', 'self@3 epochs'.")
    try:
        check_order(found[1], end)
    except ValueError as error:
        raise ValueError(_from_then_on(found[1], error)) from error
    return found[1]


def _moment(written: Duration, end: Duration, window: PhaseWindow, run: Run) -> int:
    try:
        counted = resolve_window(written, end, None, run)
    except ValueError as error:
        raise ValueError(_from_then_on(written, error)) from error
    if counted.unit != window.unit:
        raise ValueError(
            f"teacher='self@{written}' is counted in {counted.unit} here, but the phase until end={end!r} in "
            f"{window.unit}. Write all of its moments in the same unit."
        )
    return counted.begin


def _from_then_on(written: Duration, error: Exception) -> str:
    return f"teacher='self@{written}' begins to teach at that moment, or later: {error}"
