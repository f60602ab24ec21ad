"""Charts as SVG within a page, whose style sheet gives them their colors."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 42
"""Margins in pixels, which hold the axes."""

Point = tuple[float, float]


class Axis(NamedTuple):
    """What runs along a side of a chart."""

    title: str
    low: float
    high: float

    def at(self, value: float) -> float:
        """Where a value is, in 0..1."""
        return (value - self.low) / ((self.high - self.low) or 1.0)

    def marks(self) -> list[float]:
        """About five round values."""
        step = _round_step((self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        count = math.floor(self.high / step + 1e-9) - first + 1
        return [(first + number) * step for number in range(count)]


class Line(NamedTuple):
    """A line of a chart."""

    name: str
    points: Sequence[Point]
    style: str
    """Class of the style sheet."""


def chart(x: Axis, y: Axis, lines: Sequence[Line], bars: Sequence[tuple[float, float, float]] = ()) -> Markup:
    """A chart.

    Args:
        x: the axis below.
        y: the axis at the left.
        lines: their names are shown where the pointer rests, and wherever the page tells them.
        bars: left and right ends on the axis below, and the height, of bars behind the lines.
    """
    parts = [_frame(x, y)]
    for left, right, height in bars:
        (start, top), (end, bottom) = _place(x, y, (left, height)), _place(x, y, (right, y.low))
        parts.append(
            Markup('<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
                start + 1, top, max(0.0, end - start - 2), max(0.0, bottom - top)
            )
        )
    for line in lines:
        path = " ".join("{:.1f},{:.1f}".format(*_place(x, y, point)) for point in line.points)
        drawn = Markup('<polyline class="line {}" points="{}"><title>{}</title></polyline>')
        parts.append(drawn.format(line.style, path, line.name))
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img">{}</svg>').format(
        WIDTH, HEIGHT, Markup("").join(parts)
    )


def sparkline(values: Sequence[float]) -> Markup:
    """Values in 0..1 at even distances, as a small area without axes."""
    width, height = 88, 22
    step = width / max(1, len(values) - 1)
    path = " ".join(f"{index * step:.1f},{height - value * height:.1f}" for index, value in enumerate(values))
    return Markup(
        '<svg class="spark" viewBox="0 0 {0} {1}" width="{0}" height="{1}"><polygon points="0,{1} {2} {0},{1}"/></svg>'
    ).format(width, height, path)


def whisker(value: float, lower: float, upper: float, axis: Axis) -> Markup:
    """A value with its interval on an axis, and where 0 is if that is within it."""
    width, height = 180, 14
    low, middle, high = (width * min(1.0, max(0.0, axis.at(number))) for number in (lower, value, upper))
    zero = Markup('<line class="zero" x1="{0:.1f}" x2="{0:.1f}" y1="0" y2="{1}"/>').format(width * axis.at(0.0), height)
    return Markup(
        '<svg class="whisker" viewBox="0 0 {0} {1}" width="{0}" height="{1}">'
        '<line class="base" x2="{0}" y1="7" y2="7"/>'
        '{2}<line class="reach" x1="{3:.1f}" x2="{4:.1f}" y1="7" y2="7"/><circle cx="{5:.1f}" cy="7" r="3.5"/></svg>'
    ).format(width, height, zero if axis.low < 0 < axis.high else "", low, high, middle)


def _place(x: Axis, y: Axis, point: Point) -> Point:
    """Where a point is, in pixels of the chart."""
    across, up = x.at(point[0]), y.at(point[1])
    return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def _frame(x: Axis, y: Axis) -> Markup:
    left, bottom = _place(x, y, (x.low, y.low))
    right, top = _place(x, y, (x.high, y.high))
    parts = []
    for value in y.marks():
        height = _place(x, y, (x.low, value))[1]
        parts.append(
            Markup('<line class="grid" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(
                left, right, height, height
            )
        )
        parts.append(_text(left - 8, height + 4, "end", f"{value:g}"))
    parts += [_text(_place(x, y, (value, y.low))[0], bottom + 18, "middle", f"{value:g}") for value in x.marks()]
    parts.append(_text((left + right) / 2, HEIGHT - 4, "middle", x.title, "title"))
    turned = Markup('<text class="title" text-anchor="middle" transform="translate(12 {:.1f}) rotate(-90)">{}</text>')
    parts.append(turned.format((top + bottom) / 2, y.title))
    return Markup("").join(parts)


def _text(x: float, y: float, anchor: str, text: str, style: str = "mark") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(style, x, y, anchor, text)


def _round_step(least: float) -> float:
    """The next of 1, 2, 5, 10, 20, 50, ... (or 0.5, 0.2, ...)."""
    power = 10.0 ** math.floor(math.log10(least)) if least > 0 else 1.0
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9))
