"""Which phases of one run get in each other's way, told before the first step; what kind they are is not known here."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING

from lightning_compress.core.phases import Run, Window

if TYPE_CHECKING:
    from lightning_compress.training.callback import CompressionCallback

Windows = Mapping[str, Window]  # by the name of the callback
NAMES_SHOWN = 12


@dataclass(frozen=True)
class Claim:
    """What one callback does to some things, and no other one may do to them at the same time.

    Attributes:
        doing: what that is, as it follows "would": "prune".
        names: of weights, or of what else it is done to.
        mend: a sentence that says what to do instead.
        stays: whether it lasts to the end of the run, past the end of the phase.
        against: what else cannot be done to these, in the words of others.
    """

    doing: str
    names: frozenset[str]
    mend: str
    stays: bool = True
    against: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Whole:
    """From which moment on shapes must stay, at the `"begin"` or the `"end"` of a phase, and why."""

    at: str
    why: str

    def since(self, window: Window) -> float:
        return window.begin if self.at == "begin" else window.end


def phase_windows(callbacks: Sequence["CompressionCallback"], run: Run) -> dict[str, Window]:
    """When each phase is. One that begins where the last cut is made begins one moment later: the cut comes first."""
    windows = {one.name: one.planned(run) for one in callbacks}
    cuts = {(windows[one.name].hand, windows[one.name].end) for one in callbacks if one.cuts()}
    for one in callbacks:
        window, whole = windows[one.name], one.whole()
        if whole is not None and whole.at == "begin" and (window.hand, window.begin) in cuts:
            windows[one.name] = replace(window, begin=window.begin + 1, end=max(window.end, window.begin + 2))
    return windows


def allowed_shift(other: "CompressionCallback", callbacks: Iterable["CompressionCallback"], since: float, by: int) -> int:
    """How much of `by` a phase may come earlier, so that cuts that began before `since` and stay come before it still.

    Args:
        other: whose window is known.
        callbacks: all of the run.
        since, by: moments on the hand of its window.
    """
    window, whole = other.window, other.whole()
    if window is None or whole is None:
        return by
    ends = [
        one.window.end
        for one in callbacks
        if one.cuts() and one.window is not None and one.window.hand == window.hand and one.window.begin < since
    ]
    return int(max(0, min([by, *(whole.since(window) - end - 1 for end in ends)])))


def refuse_outside(name: str, begin: object, window: Window, run: Run) -> None:
    """Refuse a phase that this run never comes to.

    Raises:
        ValueError: if it begins when the run is over.
    """
    total = total_length(run, window.hand)
    if total is not None and window.begin >= total:
        raise ValueError(
            f"'{name}' would do nothing: begin={begin!r} is {UNITS[window.hand]} {window.begin}, but this run has only "
            f"{total} {window.hand}. Lower `begin`, or train longer."
        )


def total_length(run: Run, hand: str) -> int | None:
    """How much there is of a hand of the clock in a whole run; None if that is not known."""
    known = run.epochs is not None and run.batches_per_epoch is not None and run.max_steps is None
    batches = run.epochs * run.batches_per_epoch if known else None  # type: ignore[operator]
    return {"steps": run.steps, "epochs": run.epochs, "batches": batches}[hand]


def refuse_late_cuts(callbacks: Sequence["CompressionCallback"], windows: Windows) -> None:
    """Refuse cuts when shapes must stay, or of which it cannot be told whether they come before.

    Raises:
        ValueError: with both names.
    """
    for mine in (one for one in callbacks if one.cuts()):
        for other in callbacks:
            whole = other.whole()
            if whole is not None and other is not mine:
                _refuse_late_cut(mine, other, whole, windows)


def _refuse_late_cut(mine: "CompressionCallback", other: "CompressionCallback", whole: Whole, windows: Windows) -> None:
    cut, window = windows[mine.name], windows[other.name]
    since = whole.since(window)
    written = f"{whole.at}={getattr(other, whole.at)!r}"
    if cut.hand != window.hand and since > 0:
        raise ValueError(
            f"It cannot be told whether '{mine.name}', which cuts until end={mine.end!r}, is done before "
            f"'{other.name}' needs shapes that stay, from {written} on: one is counted in {cut.hand}, the other in "
            f"{window.hand}. Write both in the same unit."
        )
    if cut.end >= since:
        raise ValueError(
            f"'{other.name}' needs shapes that stay from {written} on ({whole.why}), but '{mine.name}' cuts channels "
            f"until end={mine.end!r}. Let '{mine.name}' end before '{other.name}' {whole.at}s."
        )


def refuse_conflicts(
    callbacks: Sequence["CompressionCallback"], claims: Mapping[str, Iterable[Claim]], windows: Windows
) -> None:
    """Refuse two callbacks that would do to the same weights what only one can do.

    Raises:
        ValueError: with both names, and those of the weights.
    """
    for one, other in combinations(callbacks, 2):
        for mine, its in _against(claims[one.name], claims[other.name]):
            both = sorted(mine.names & its.names)
            if both and _at_one_time(windows[one.name], mine.stays, windows[other.name], its.stays):
                raise ValueError(_clash(one, mine, other, its, ", ".join(both[:NAMES_SHOWN])))


def _against(some: Iterable[Claim], others: Iterable[Claim]) -> Iterator[tuple[Claim, Claim]]:
    others = tuple(others)
    for mine in some:
        for its in others:
            if mine.doing == its.doing or mine.doing in its.against or its.doing in mine.against:
                yield mine, its


def _at_one_time(one: Window, stays: bool, other: Window, other_stays: bool) -> bool:
    if one.hand != other.hand:
        return True  # for all that can be told
    return (other_stays or one.begin < other.end) and (stays or other.begin < one.end)


def _clash(one: "CompressionCallback", mine: Claim, other: "CompressionCallback", its: Claim, names: str) -> str:
    if mine.doing != its.doing:
        mend = mine.mend if its.doing in mine.against else its.mend
        return f"'{one.name}' would {mine.doing} {names}, and '{other.name}' would {its.doing} the same. {mend}"
    if mine.stays and its.stays:
        return f"'{one.name}' and '{other.name}' would both {mine.doing} {names}. {mine.mend}"
    return (
        f"'{one.name}' ({one.begin!r} to {one.end!r}) and '{other.name}' ({other.begin!r} to {other.end!r}) would both "
        f"{mine.doing} {names} at one time. {mine.mend}"
    )


UNITS = {"steps": "step", "batches": "batch", "epochs": "epoch"}
