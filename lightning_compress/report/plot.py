"""Sparsity over steps as the points of an SVG."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, log10

from lightning_compress.report.text import count_text, percent_text

WIDTH, HEIGHT = 720.0, 240.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 20.0, 14.0, 34.0
MOST_POINTS = 1000


@dataclass(frozen=True)
class Tick:
    """A mark at `at` in SVG units."""

    at: float
    text: str


@dataclass(frozen=True)
class Plot:
    """All that the template draws; `line` and `area` are SVG path data, `label` tells the plot to who cannot see it."""

    line: str
    area: str
    across: list[Tick]
    up: list[Tick]
    end_x: float
    end_y: float
    end_text: str
    label: str
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    floor: float = HEIGHT - BOTTOM


def sparsity_plot(history: Sequence[tuple[int, float]]) -> Plot:
    """A staircase, since a mask stays between two updates; from 0 to 100 %."""
    points = _thinned(sorted(history))
    first, last = points[0][0], points[-1][0]
    span = max(last - first, 1)

    def x(step: float) -> float:
        return round(LEFT + (step - first) / span * (WIDTH - LEFT - RIGHT), 2)

    def y(sparsity: float) -> float:
        return round(HEIGHT - BOTTOM - sparsity * (HEIGHT - TOP - BOTTOM), 2)

    line = f"M{x(first)} {y(points[0][1])}" + "".join(f"H{x(step)}V{y(sparsity)}" for step, sparsity in points[1:])
    end_text = percent_text(points[-1][1])
    return Plot(
        line=line,
        area=f"{line}V{HEIGHT - BOTTOM}H{x(first)}Z",
        across=[Tick(x(step), count_text(step)) for step in _round_steps(first, last)],
        up=[Tick(y(quarter / 4), f"{quarter * 25} %") for quarter in range(5)],
        end_x=x(last),
        end_y=y(points[-1][1]),
        end_text=end_text,
        label=f"Sparsity from {percent_text(points[0][1])} at step {first} to {end_text} at step {last}",
    )


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    every = -(-len(points) // MOST_POINTS)
    return [*points[:-1:every], points[-1]]


def _round_steps(first: int, last: int, most: int = 7) -> list[int]:
    """At most `most` multiples of 1, 2 or 5 times a power of ten."""
    rough = max((last - first) / most, 1)
    power = 10 ** floor(log10(rough))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough)
    return list(range(-(-first // step) * step, last + 1, step))
