"""Values over steps, and the phases of a run, as the points of an SVG."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

from lightning_compress.reporting.render.text import count_text, percent_text
from lightning_compress.reporting.run_history import Boundary, Phase

WIDTH, HEIGHT = 720.0, 240.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 20.0, 14.0, 34.0
MOST_POINTS = 1000
FRACTIONS = ("sparsity", "macs", "parameters", "frozen")  # what is shown in percent
ROW = 26.0  # height of a phase's band


@dataclass(frozen=True)
class Tick:
    """A mark at `at` in SVG units."""

    at: float
    text: str


@dataclass(frozen=True)
class Plot:
    """All that the template draws; `line` and `area` are SVG path data, `label` tells the plot to who cannot see it.

    At `marks` phases begin or end.
    """

    name: str
    line: str
    area: str
    across: list[Tick]
    up: list[Tick]
    end_x: float
    end_y: float
    end_text: str
    label: str
    marks: list[float]
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    floor: float = HEIGHT - BOTTOM


@dataclass(frozen=True)
class Band:
    """When a phase was, one row for each; `anchor` says from which end of the band its text is written."""

    text: str
    x: float
    width: float
    y: float
    text_x: float
    anchor: str


@dataclass(frozen=True)
class Bands:
    """The phases of a run, above one another, over the same steps as its plots."""

    bands: list[Band]
    across: list[Tick]
    marks: list[float]
    label: str
    height: float
    width: float = WIDTH
    row: float = ROW


def band_plot(phases: Sequence[Phase], boundaries: Sequence[Boundary], last: int) -> Bands:
    """A band for each phase, in a run of `last` steps."""
    x = _across(0, last)
    bands = []
    for place, phase in enumerate(phases):
        begin, end = x(phase.begin), x(last if phase.end is None else phase.end)
        to_the_right = begin < (LEFT + WIDTH) / 2
        text_x = begin + 8 if to_the_right else end - 8
        text = f"{phase.name} ({phase.type})"
        bands.append(Band(text, begin, round(end - begin, 2), place * ROW, text_x, "start" if to_the_right else "end"))
    descriptions = [f"{one.name} from step {one.begin} to {last if one.end is None else one.end}" for one in phases]
    return Bands(
        bands=bands,
        across=[Tick(x(step), count_text(int(step))) for step in _round(0, last, integers=True)],
        marks=_marks(boundaries, x),
        label="; ".join(descriptions),
        height=len(phases) * ROW + BOTTOM,
    )


def curve_plot(
    name: str,
    points: Sequence[tuple[int, float]],
    over: tuple[int, int] | None = None,
    boundaries: Sequence[Boundary] = (),
) -> Plot:
    """A staircase, since a value stays between two steps; `FRACTIONS` from 0 to 100 %, others over their range.

    Args:
        name: of the value.
        points: step and value.
        over: the first and the last step that are drawn; None: those of the points.
        boundaries: of the phases, to be marked.
    """
    points = _thinned(sorted(points))
    first, last = points[0][0], points[-1][0]
    x = _across(*(over or (first, last)))
    scale = _scale(name, [value for _, value in points])

    def y(value: float) -> float:
        share = (value - scale.low) / (scale.high - scale.low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 2)

    line = f"M{x(first)} {y(points[0][1])}" + "".join(f"H{x(step)}V{y(value)}" for step, value in points[1:])
    begins, ends = scale.text(points[0][1]), scale.text(points[-1][1])
    return Plot(
        name=name,
        line=line,
        area=f"{line}V{HEIGHT - BOTTOM}H{x(first)}Z",
        across=[Tick(x(step), count_text(int(step))) for step in _round(*(over or (first, last)), integers=True)],
        up=[Tick(y(value), scale.mark(value)) for value in scale.ticks()],
        end_x=x(last),
        end_y=y(points[-1][1]),
        end_text=ends,
        label=f"{name} from {begins} at step {first} to {ends} at step {last}",
        marks=_marks(boundaries, x),
    )


def _across(first: int, last: int) -> Callable[[float], float]:
    """Where a step is drawn."""
    span = max(last - first, 1)
    return lambda step: round(LEFT + (step - first) / span * (WIDTH - LEFT - RIGHT), 2)


def _marks(boundaries: Sequence[Boundary], x: Callable[[float], float]) -> list[float]:
    return [x(one.step) for one in boundaries]


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    as_percent: bool

    def text(self, value: float) -> str:
        return percent_text(value) if self.as_percent else f"{value:.4g}"

    def mark(self, value: float) -> str:
        return f"{100 * value:g} %" if self.as_percent else f"{value:g}"

    def ticks(self) -> list[float]:
        return [quarter / 4 for quarter in range(5)] if self.as_percent else _round(self.low, self.high)


def _scale(name: str, values: Sequence[float]) -> _Scale:
    low, high = min(values), max(values)
    if name.rpartition("/")[2].lower() in FRACTIONS and low >= 0 and high <= 1:
        return _Scale(0.0, 1.0, as_percent=True)
    low = min(low, 0.0)
    return _Scale(low, max(high, low + 1e-9), as_percent=False)


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    every = -(-len(points) // MOST_POINTS)
    return [*points[:-1:every], points[-1]]


def _round(first: float, last: float, most: int = 7, integers: bool = False) -> list[float]:
    """At most `most` multiples of 1, 2 or 5 times a power of ten."""
    rough = max((last - first) / most, 1 if integers else 1e-12)
    power = 10.0 ** floor(log10(rough))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough * (1 - 1e-9))
    return [number * step for number in range(ceil(first / step - 1e-9), floor(last / step + 1e-9) + 1)]
