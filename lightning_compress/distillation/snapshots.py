"""Teachers that are written "self@10%": when they come to be, and when teaching can begin."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning_compress.core.phases import Duration, PhaseWindow, Run, check_order, resolve_window
from lightning_compress.distillation.objective import WeightedTeacher

SELF = re.compile(r"\s*self\s*(?:@\s*(.*?)\s*)?$")


def is_self_teacher(teacher: str) -> bool:
    """Whether a teacher is written so."""
    return SELF.match(teacher) is not None


class SelfTeachers:
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
        self.tutors: Sequence[WeightedTeacher] = ()
        self.times: list[int | None] = []

    def resolve_times(self, end: Duration, window: PhaseWindow, run: Run) -> list[int | None]:
        """The time of each teacher in the unit of the phase's window, None for one that is there already.

        Raises:
            ValueError: if a moment cannot be counted so, or does not come before `end`.
        """
        return [None if time is None else _time(time, end, window, run) for time in self.written]

    def window_when_ready(self, end: Duration, window: PhaseWindow, run: Run) -> PhaseWindow:
        """The phase's window, which begins no sooner than all teachers are there."""
        times = [one for one in self.resolve_times(end, window, run) if one is not None]
        return replace(window, begin=max([window.begin, *times]))

    def carry(self, tutors: Sequence[WeightedTeacher]) -> None:
        """One Trainer goes on with the same module: let these teachers be what those of its last fit were."""
        for before, now, time in zip(self.tutors, tutors, self.written, strict=False):
            if time is not None:
                now.teacher.load_state_dict(before.teacher.state_dict())

    def start(self, tutors: Sequence[WeightedTeacher], times: Sequence[int | None], now: int, begin: int) -> None:
        """Training begins, or goes on.

        Raises:
            ValueError: if a moment is past, and nobody has remembered what the module was.
        """
        self.tutors, self.times = tutors, list(times)
        if late := [time for time, _ in self._to_come(begin) if time < now]:
            raise ValueError(
                f"A teacher is the module as it was at moment {late[0]} of this run, which is past, but nobody has "
                f"remembered it: what is gone on from was trained without it. Write a later moment."
            )

    def snapshot_if_due(self, now: int, begin: int) -> None:
        """Let the teachers come to be whose moment has come.

        Args:
            now: the present time, in the unit of the phase.
            begin: of the phase, which takes its teachers along if it has moved up.
        """
        for time, tutor in self._to_come(begin):
            if time <= now:
                tutor.teacher.snapshot()

    def _to_come(self, begin: int) -> list[tuple[int, WeightedTeacher]]:
        pairs = zip(self.times, self.tutors, strict=True)
        return [(min(time, begin), one) for time, one in pairs if time is not None and not one.teacher.ready]


def _moment_written(teacher: str, end: Duration) -> Duration | None:
    found = SELF.match(teacher)
    if found is None:
        return None
    if not found[1]:
        raise ValueError(f"teacher={teacher!r} does not say of when. Write the moment: 'self@10%', 'self@3 epochs'.")
    try:
        check_order(found[1], end)
    except ValueError as error:
        raise ValueError(_from_then_on(found[1], error)) from error
    return found[1]


def _time(written: Duration, end: Duration, window: PhaseWindow, run: Run) -> int:
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
