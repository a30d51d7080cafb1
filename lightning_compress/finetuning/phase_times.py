"""The moments of a phase beside its begin and end, on the same hand of the run's clock."""

from dataclasses import dataclass

from lightning_compress.core.phases import Duration, PhaseWindow, Run, resolve_window


@dataclass(frozen=True)
class WrittenTimes:
    """Durations as they were written, None for what was not asked for.

    Args:
        begin, end: of the phase.
        warmup: how long the learning rates rise.
        weights_from, rates_from: moments to go back to.
        calibrated_for: how long statistics are averaged.
    """

    begin: Duration
    end: Duration
    warmup: Duration | None = None
    weights_from: Duration | None = None
    rates_from: Duration | None = None
    calibrated_for: Duration | None = None


@dataclass(frozen=True)
class PhaseTimes:
    """The same times, in units of the phase."""

    warmup: int = 0
    weights_from: int | None = None
    rates_from: int | None = None
    calibrated_for: int = 0


def resolve_times(written: WrittenTimes, window: PhaseWindow, run: Run) -> PhaseTimes:
    """Put all on the clock of a run.

    Raises:
        ValueError: if one cannot be counted as the phase is, the warm-up is longer than the phase, or a moment to go
            back to comes after its beginning.
    """
    warmup = _length("warmup", written.warmup, written, window, run)
    if warmup > window.end - window.begin:
        raise ValueError(
            f"warmup={written.warmup!r} is {warmup} {window.unit}, but the phase from begin={written.begin!r} to end="
            f"{written.end!r} has only {int(window.end) - window.begin}. Shorten the warmup, or lengthen the phase."
        )
    return PhaseTimes(
        warmup,
        _earlier("rewind", written.weights_from, written, window, run),
        _earlier("learning_rate's rewind", written.rates_from, written, window, run),
        _length("recalibrate_over", written.calibrated_for, written, window, run),
    )


def _length(name: str, length: Duration | None, written: WrittenTimes, window: PhaseWindow, run: Run) -> int:
    if length is None:
        return 0
    counted = resolve_window(written.begin, written.end, length, run)
    _refuse_other_hand(name, length, counted, written, window)
    return counted.every


def _earlier(name: str, time: Duration | None, written: WrittenTimes, window: PhaseWindow, run: Run) -> int | None:
    if time is None:
        return None
    counted = resolve_window(time, written.end, None, run)
    _refuse_other_hand(name, time, counted, written, window)
    if counted.begin > window.begin:
        raise ValueError(
            f"{name}={time!r} is moment {counted.begin} and begin={written.begin!r} is moment {window.begin} of this "
            f"run, counted in {window.unit}: what is rewound goes back to a moment before begin."
        )
    return counted.begin


def _refuse_other_hand(
    name: str, value: Duration, counted: PhaseWindow, written: WrittenTimes, window: PhaseWindow
) -> None:
    if counted.unit != window.unit:
        raise ValueError(
            f"{name}={value!r} is counted in {counted.unit} here, but begin={written.begin!r} and end={written.end!r} "
            f"in {window.unit}. Write all of them in the same unit."
        )
