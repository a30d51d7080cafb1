"""When: begin, end and pace of a phase, written as a share of the run, in epochs or in optimizer steps."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

Duration = int | float | str


@dataclass(frozen=True)
class ParsedDuration:
    """A parsed duration: `value` in `unit`, one of "fraction" (of the whole run), "epochs" and "steps"."""

    value: float
    unit: str

    def __str__(self) -> str:
        return f"{self.value:.12g} of the run" if self.unit == "fraction" else f"{self.value:.12g} {self.unit}"


@dataclass(frozen=True)
class Run:
    """What is known of a run's length before its first step; None where it is not.

    Args:
        epochs: `max_epochs`; None if endless.
        max_steps: as `Trainer(max_steps=...)` counts them; None if unlimited.
        batches_per_epoch: training batches; None for a loader of unknown length.
        accumulate: batches per optimizer step.
        automatic: False under manual optimization, where only the user's code knows how many steps a batch takes.
        max_time: whether a time limit may end the run.
        dry_run: whether it is a few batches of a longer run, to try the code: a phase may lie past its end.
    """

    epochs: int | None
    max_steps: int | None = None
    batches_per_epoch: int | None = None
    accumulate: int = 1
    automatic: bool = True
    max_time: bool = False
    dry_run: bool = False

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps of one epoch: the last, shorter accumulation window of an epoch makes a step too."""
        if not self.automatic or self.batches_per_epoch is None:
            return None
        return math.ceil(self.batches_per_epoch / self.accumulate)

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the whole run."""
        if self.epochs is None:
            return self.max_steps
        if self.steps_per_epoch is None:
            # With both limits and no length to compare them by, nobody knows which one ends the run.
            return self.max_steps if self.automatic else None
        return min(self.epochs * self.steps_per_epoch, self.max_steps or math.inf)  # type: ignore[return-value]


@dataclass(frozen=True)
class PhaseWindow:
    """A phase resolved to whole numbers of one `unit`: "steps", "batches" or "epochs".

    Moments count what is *done*: at moment 500 of "steps", 500 optimizer steps are complete. `end` may be infinite.
    Where moments have no pace, `after` has their distances from `begin`, all but that of `end`.
    """

    unit: str
    begin: int
    end: float
    every: int = 1
    offsets: tuple[int, ...] = field(default=(), repr=False)

    def last_time(self, now: int) -> int | None:
        """The latest scheduled moment that `now` has reached, None before the first.

        >>> window = PhaseWindow("steps", begin=10, end=25, every=10)
        >>> [window.last_time(now) for now in (9, 10, 19, 20, 24, 25, 99)]
        [None, 10, 10, 20, 20, 25, 25]
        """
        if now < self.begin:
            return None
        if now >= self.end:
            return int(self.end)
        if self.offsets:
            return self.begin + max(one for one in self.offsets if one <= now - self.begin)
        return self.begin + (now - self.begin) // self.every * self.every

    def progress(self, now: float) -> float:
        """How far the phase has come: 0.0 up to `begin`, 1.0 from `end` on."""
        if now >= self.end:
            return 1.0
        return max(0.0, (now - self.begin) / (self.end - self.begin))

    def times(self) -> list[int]:
        """Every scheduled moment, in order."""
        paced = range(self.begin, math.ceil(self.end), self.every)
        return [*((self.begin + one for one in self.offsets) if self.offsets else paced), int(self.end)]


def parse_duration(duration: Duration) -> ParsedDuration:
    """Read a duration: an int counts optimizer steps, a float in [0, 1] is a fraction of the run, a string has a unit.

    Raises:
        ValueError: for anything else.

    >>> [str(parse_duration(value)) for value in (500, 0.2, "20%", "3 epochs", "500 steps")]
    ['500 steps', '0.2 of the run', '0.2 of the run', '3 epochs', '500 steps']
    """
    if isinstance(duration, bool):
        raise ValueError(_no_duration(duration))
    if isinstance(duration, int):
        return _checked(duration, ParsedDuration(duration, "steps"))
    if isinstance(duration, float):
        return _checked(duration, ParsedDuration(duration, "fraction"))
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|epochs?|steps?)\s*", str(duration))
    if match is None:
        raise ValueError(_no_duration(duration))
    value, unit = float(match[1]), match[2][0]
    return _checked(
        duration, ParsedDuration(value / 100, "fraction") if unit == "%" else ParsedDuration(value, _UNITS[unit])
    )


def check_order(begin: Duration, end: Duration, every: Duration | None = None) -> None:
    """Refuse what can be seen to be wrong before a run's length is known.

    Raises:
        ValueError: if a duration cannot be read, `begin` is not before `end` in one unit, or `every` is zero.
    """
    first, last = parse_duration(begin), parse_duration(end)
    if (first.unit == last.unit and first.value >= last.value) or last.value == 0:
        raise ValueError(f"begin={begin!r} is not before end={end!r}: a phase needs a length, such as '10%' to '70%'.")
    if every is not None and parse_duration(every).value == 0:
        raise ValueError(f"every={every!r} never goes on. Write at least 1 step, such as every='100 steps'.")


def resolve_window(begin: Duration, end: Duration, every: Duration | None, run: Run) -> PhaseWindow:
    """Put a phase on the clock of a run, in optimizer steps wherever these can be known.

    Under manual optimization fractions and epochs count batches; with a loader of unknown length, whole epochs. A phase
    that has no pace (`every=None`) has one moment after another, on whatever hand begin and end are counted.

    Raises:
        ValueError: if the run's length does not tell when a duration is over, or `begin` is not before `end`.
    """
    check_order(begin, end, every)
    lengths = {"begin": parse_duration(begin), "end": parse_duration(end)} | (
        {} if every is None else {"every": parse_duration(every)}
    )
    for unit, convert in _CLOCKS.items():
        values = {name: 0.0 if length.value == 0 else convert(length, run) for name, length in lengths.items()}
        if values["end"] is None and lengths["end"] == ParsedDuration(1.0, "fraction"):
            values["end"] = math.inf
        if all(value is not None for value in values.values()):
            return _window(unit, values, begin, end, run)  # type: ignore[arg-type]
    raise ValueError(_unknown(begin, end, every, run))


def window_from_milestones(milestones: Sequence[Duration], run: Run) -> PhaseWindow:
    """A phase from the first to the last of several moments, each where a phase would begin that is written so.

    Raises:
        ValueError: if they cannot be counted alike, or one comes before another that stands in front of it.

    >>> window_from_milestones(["20%", "40%", "60%"], Run(epochs=None, max_steps=24)).times()
    [4, 9, 14]
    """
    windows = [resolve_window(one, "100%", None, run) for one in milestones]
    begins = [window.begin for window in windows]
    if len({window.unit for window in windows}) > 1 or begins != sorted(begins):
        counted = ", ".join(
            f"{one!r} is {window.begin} {window.unit}" for one, window in zip(milestones, windows, strict=True)
        )
        raise ValueError(f"Rounds come one after the other, counted alike, but here {counted}. Write them in order.")
    return replace(windows[0], end=begins[-1], offsets=tuple(one - begins[0] for one in begins[:-1]))


def clip_to(window: PhaseWindow, end: Duration, run: Run) -> PhaseWindow:
    """The window with the end where another one that begins at `end` would begin: no moment is in both.

    In a run of few steps it may have no moment at all.

    >>> run = Run(epochs=None, max_steps=24)
    >>> clip_to(resolve_window("60%", "80%", None, run), "80%", run), resolve_window("80%", "100%", None, run)
    (PhaseWindow(unit='steps', begin=14, end=19, every=1), PhaseWindow(unit='steps', begin=19, end=24, every=1))
    """
    value = _CLOCKS[window.unit](parse_duration(end), run)
    return window if value is None else replace(window, end=math.floor(round(value, 6)))


def shift_window(window: PhaseWindow, since: float, by: int, to_the_end: bool) -> PhaseWindow:
    """The window when a phase that was to end at `since` has ended `by` moments before, and what follows moves up.

    Args:
        window: left as it is if it begins before `since`, but for rounds that come from then on.
        since, by: times in the window's unit.
        to_the_end: whether it lasts to the end of the run, wherever it begins.

    >>> shift_window(PhaseWindow("steps", begin=20, end=30), since=20, by=5, to_the_end=False)
    PhaseWindow(unit='steps', begin=15, end=25, every=1)
    >>> rounds = PhaseWindow("steps", begin=10, end=40, offsets=(0, 10, 20))
    >>> shift_window(rounds, since=30, by=5, to_the_end=False).times()
    [10, 20, 25, 35]
    """
    if window.begin < since:
        if not window.offsets:
            return window
        moved = tuple(one - (by if window.begin + one >= since else 0) for one in window.offsets)
        return replace(window, offsets=moved, end=window.end - (by if window.end >= since else 0))
    return replace(window, begin=window.begin - by, end=window.end - (0 if to_the_end else by))


def _window(unit: str, values: dict[str, float], begin: Duration, end: Duration, run: Run) -> PhaseWindow:
    # Half-way between two whole numbers a phase begins early and ends late, so that a run of one step has one too;
    # rounding first keeps 0.7 * 10 from becoming 8.
    first = math.floor(round(values["begin"], 6))
    last = values["end"] if math.isinf(values["end"]) else math.ceil(round(values["end"], 6))
    if unit == "epochs" and not math.isinf(last):
        # The last moment that training sees on this hand is the start of its last epoch.
        last = max(math.floor(round(values["end"], 6)), first + 1)
        if run.epochs is not None and first + 1 > run.epochs - 1 and not run.dry_run:
            raise ValueError(
                f"begin={begin!r} to end={end!r} has no room in {run.epochs} epochs of unknown length. Write durations "
                f"in steps, or give the Trainer max_steps or limit_train_batches."
            )
    if first >= last and run.dry_run:
        last = first + 1
    if first >= last:
        raise ValueError(
            f"begin={begin!r} is moment {first} and end={end!r} is moment {last} of this run, counted in {unit}: begin "
            f"must come before end."
        )
    return PhaseWindow(unit, first, last, max(1, round(values.get("every", 1))))


def _in_steps(length: ParsedDuration, run: Run) -> float | None:
    return _product(length, {"steps": 1, "epochs": run.steps_per_epoch, "fraction": run.steps})


def _in_batches(length: ParsedDuration, run: Run) -> float | None:
    if run.epochs is None or run.batches_per_epoch is None or run.max_steps is not None:
        fixed = None
    else:
        fixed = run.epochs * run.batches_per_epoch
    return _product(length, {"epochs": run.batches_per_epoch, "fraction": fixed})


def _in_epochs(length: ParsedDuration, run: Run) -> float | None:
    return _product(length, {"epochs": 1, "fraction": run.epochs if run.max_steps is None else None})


def _product(length: ParsedDuration, per_unit: dict[str, int | None]) -> float | None:
    factor = per_unit.get(length.unit)
    return None if factor is None else length.value * factor


_CLOCKS: dict[str, Callable[[ParsedDuration, Run], float | None]] = {
    "steps": _in_steps,
    "batches": _in_batches,
    "epochs": _in_epochs,
}
_UNITS = {"e": "epochs", "s": "steps"}


def _checked(written: Duration, length: ParsedDuration) -> ParsedDuration:
    if length.value < 0 or not math.isfinite(length.value):
        raise ValueError(f"{written!r} is no duration: it must not be negative or infinite.")
    if length.unit == "fraction" and length.value > 1:
        raise ValueError(
            f"{written!r} is more than the whole run: a fraction lies in [0, 1]. For 20 % write '20%' or 0.2; for 20 "
            f"optimizer steps write 20 or '20 steps'."
        )
    return length


def _no_duration(written: object) -> str:
    return (
        f"{written!r} is no duration. Write a share of the run ('20%' or 0.2), epochs ('3 epochs') or optimizer steps "
        f"('500 steps' or 500)."
    )


def _unknown(begin: Duration, end: Duration, every: Duration | None, run: Run) -> str:
    if run.epochs is None and run.max_steps is None:
        limit = "only max_time ends this run" if run.max_time else "this run has no end"
        why = f"{limit}, so a fraction of it cannot be known. Give the Trainer max_epochs or max_steps, or"
    elif not run.automatic:
        why = (
            "under manual optimization your code decides how many optimizer steps a batch takes, so steps cannot be "
            "compared with epochs or with fractions of them. Write all of these in the same unit, or"
        )
    else:
        why = "the training loader's length is unknown. Give the Trainer max_steps or limit_train_batches (an int), or"
    pace = "" if every is None else f", every={every!r}"
    return (
        f"begin={begin!r}, end={end!r}{pace} cannot be resolved: {why} write durations that need no length, "
        f"such as begin='500 steps', end='5000 steps', every='100 steps'."
    )
