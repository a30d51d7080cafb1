"""Which phases of one run get in each other's way, told before the first step; what kind they are is not known here."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Protocol

from lightning_compress.core.phases import Duration, PhaseWindow, Run

Windows = Mapping[str, PhaseWindow]  # by the name of the callback
NAMES_SHOWN = 12


@dataclass(frozen=True)
class ExclusiveClaim:
    """What one callback does to some things, and no other one may do to them at the same time.

    Attributes:
        action: what that is, as it follows "would": "prune".
        names: of weights, or of what else it is done to.
        hint: a sentence that says what to do instead.
        permanent: whether it lasts to the end of the run, past the end of the phase.
        conflicts_with: actions of other callbacks that exclude this one.
    """

    action: str
    names: frozenset[str]
    hint: str
    permanent: bool = True
    conflicts_with: frozenset[str] = frozenset()


@dataclass(frozen=True)
class FixedShapes:
    """From which moment on shapes must stay, at the `"begin"` or the `"end"` of a phase, and why."""

    from_: str
    reason: str

    def since(self, window: PhaseWindow) -> float:
        return window.begin if self.from_ == "begin" else window.end


class PhaseOwner(Protocol):
    """What is asked of a callback here: when it acts, and what it does to shapes."""

    name: str
    begin: Duration
    end: Duration
    window: PhaseWindow | None

    def restored_window(self, run: Run) -> PhaseWindow: ...

    def changes_shapes(self) -> bool: ...

    def fixed_shapes(self) -> FixedShapes | None: ...


def phase_windows(callbacks: Sequence[PhaseOwner], run: Run) -> dict[str, PhaseWindow]:
    """When each phase is. One that begins where the last cut is made begins one moment later: the cut comes first."""
    windows = {one.name: one.restored_window(run) for one in callbacks}
    cuts = {(windows[one.name].unit, windows[one.name].end) for one in callbacks if one.changes_shapes()}
    for one in callbacks:
        window, fixed = windows[one.name], one.fixed_shapes()
        if fixed is not None and fixed.from_ == "begin" and (window.unit, window.begin) in cuts:
            windows[one.name] = replace(window, begin=window.begin + 1, end=max(window.end, window.begin + 2))
    return windows


def allowed_shift(other: PhaseOwner, callbacks: Iterable[PhaseOwner], since: float, by: int) -> int:
    """How much of `by` a phase may come earlier, so that cuts that began before `since` and stay come before it still.

    Args:
        other: whose window is known.
        callbacks: all of the run.
        since, by: times in the unit of its window.
    """
    window, fixed = other.window, other.fixed_shapes()
    if window is None or fixed is None:
        return by
    ends = [
        one.window.end
        for one in callbacks
        if one.changes_shapes()
        and one.window is not None
        and one.window.unit == window.unit
        and one.window.begin < since
    ]
    return int(max(0, min([by, *(fixed.since(window) - end - 1 for end in ends)])))


def refuse_outside(name: str, begin: object, window: PhaseWindow, run: Run) -> None:
    """Refuse a phase that this run never comes to.

    Raises:
        ValueError: if it begins when the run is over.
    """
    total = total_length(run, window.unit)
    if total is not None and window.begin >= total:
        raise ValueError(
            f"'{name}' would do nothing: begin={begin!r} is {UNITS[window.unit]} {window.begin}, but this run has only "
            f"{total} {window.unit}. Lower `begin`, or train longer."
        )


def total_length(run: Run, unit: str) -> int | None:
    """Length of the run in steps, batches or epochs; None if it is not known."""
    known = run.epochs is not None and run.batches_per_epoch is not None and run.max_steps is None
    batches = run.epochs * run.batches_per_epoch if known else None  # type: ignore[operator]
    return {"steps": run.steps, "epochs": run.epochs, "batches": batches}[unit]


def refuse_late_cuts(callbacks: Sequence[PhaseOwner], windows: Windows) -> None:
    """Refuse cuts when shapes must stay, or of which it cannot be told whether they come before.

    Raises:
        ValueError: with both names.
    """
    for mine in (one for one in callbacks if one.changes_shapes()):
        for other in callbacks:
            fixed = other.fixed_shapes()
            if fixed is not None and other is not mine:
                _refuse_late_cut(mine, other, fixed, windows)


def _refuse_late_cut(mine: PhaseOwner, other: PhaseOwner, fixed: FixedShapes, windows: Windows) -> None:
    cut, window = windows[mine.name], windows[other.name]
    since = fixed.since(window)
    written = f"{fixed.from_}={getattr(other, fixed.from_)!r}"
    if cut.unit != window.unit and since > 0:
        raise ValueError(
            f"It cannot be told whether '{mine.name}', which cuts until end={mine.end!r}, is done before "
            f"'{other.name}' needs shapes that stay, from {written} on: one is counted in {cut.unit}, the other in "
            f"{window.unit}. Write both in the same unit."
        )
    if cut.end >= since:
        raise ValueError(
            f"'{other.name}' needs shapes that stay from {written} on ({fixed.reason}), but '{mine.name}' changes "
            f"shapes until end={mine.end!r}. Let '{mine.name}' end before '{other.name}' {fixed.from_}s."
        )


def refuse_conflicts(
    callbacks: Sequence[PhaseOwner], claims: Mapping[str, Iterable[ExclusiveClaim]], windows: Windows
) -> None:
    """Refuse two callbacks that would do to the same weights what only one can do.

    Raises:
        ValueError: with both names, and those of the weights.
    """
    for one, other in combinations(callbacks, 2):
        for mine, its in _against(claims[one.name], claims[other.name]):
            both = sorted(mine.names & its.names)
            if both and _at_one_time(windows[one.name], mine.permanent, windows[other.name], its.permanent):
                raise ValueError(_clash(one, mine, other, its, ", ".join(both[:NAMES_SHOWN])))


def _against(
    some: Iterable[ExclusiveClaim], others: Iterable[ExclusiveClaim]
) -> Iterator[tuple[ExclusiveClaim, ExclusiveClaim]]:
    others = tuple(others)
    for mine in some:
        for its in others:
            if mine.action == its.action or mine.action in its.conflicts_with or its.action in mine.conflicts_with:
                yield mine, its


def _at_one_time(one: PhaseWindow, stays: bool, other: PhaseWindow, other_stays: bool) -> bool:
    if one.unit != other.unit:
        return True  # for all that can be told
    return (other_stays or one.begin < other.end) and (stays or other.begin < one.end)


def _clash(one: PhaseOwner, mine: ExclusiveClaim, other: PhaseOwner, its: ExclusiveClaim, names: str) -> str:
    if mine.action != its.action:
        mend = mine.hint if its.action in mine.conflicts_with else its.hint
        return f"'{one.name}' would {mine.action} {names}, and '{other.name}' would {its.action} the same. {mend}"
    if mine.permanent and its.permanent:
        return f"'{one.name}' and '{other.name}' would both {mine.action} {names}. {mine.hint}"
    return (
        f"'{one.name}' ({one.begin!r} to {one.end!r}) and '{other.name}' ({other.begin!r} to {other.end!r}) would both "
        f"{mine.action} {names} at one time. {mine.hint}"
    )


UNITS = {"steps": "step", "batches": "batch", "epochs": "epoch"}
