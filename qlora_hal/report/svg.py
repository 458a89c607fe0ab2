"""Line charts as inline SVG: small, without scripts, colored by CSS variables so that light and dark both work.

What a pointer rests on is read by CSS alone: a chart is cut into upright bands, each with the values of its step.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

Point = tuple[float, float]
Number = Callable[[float], str]

_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 12, 34
_PIXELS_OF_A_POINT = 1.8
"""A path through points closer than this draws the same lines, and makes the page heavier."""
_READINGS = 60
_LOGARITHMIC_FROM = 2.0
"""A logarithmic scale is offered where the largest value is so many times the smallest."""


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a chart; one that stands alone needs no `name`. `style` is a CSS class: `line`, `faint`, or `marks`
    for points joined by a line; a class that begins so, such as `marks-b`, is drawn alike."""

    name: str
    points: Sequence[Point]
    style: str = "line"


def chart(
    title: str,
    curves: Sequence[Curve],
    *,
    number: Number,
    width: int = 520,
    height: int = 220,
    logarithmic: bool = False,
) -> str:
    """An SVG element, or an empty text when no curve has a point. `number` writes a value of the y axis.

    With `logarithmic` the curves are drawn twice, in groups of the classes `linear` and `logarithmic`, one of which the
    page has to hide; ask `has_logarithmic_scale` before whether all values can be drawn so.
    """
    curves = [curve for curve in (_finite(curve) for curve in curves) if curve.points]
    if not curves:
        return ""
    label = escape(f"{title} by step", quote=True)
    linear = _Scale.of(curves, width, height, logarithmic=False)
    body = _drawing(curves, linear, number)
    if logarithmic:
        by_powers = _drawing(curves, _Scale.of(curves, width, height, logarithmic=True), number)
        body = [*_group("linear", body), *_group("logarithmic", by_powers)]
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}" xmlns="http://www.w3.org/2000/svg">'
    return "\n".join([head, *body, *_readings(curves, linear, number), "</svg>"])


def has_logarithmic_scale(curves: Sequence[Curve]) -> bool:
    """Whether all values are above zero, and far enough apart that powers of ten show more."""
    values = [value for curve in curves for _, value in curve.points if math.isfinite(value)]
    return bool(values) and min(values) > 0 and max(values) / _LOGARITHMIC_FROM >= min(values)


@dataclass(frozen=True, slots=True)
class _Scale:
    x_low: float
    x_high: float
    y_low: float
    y_high: float
    width: int
    height: int
    logarithmic: bool

    @classmethod
    def of(cls, curves: Sequence[Curve], width: int, height: int, *, logarithmic: bool) -> _Scale:
        steps = [step for curve in curves for step, _ in curve.points]
        values = [value for curve in curves for _, value in curve.points]
        low, high = _range([math.log10(value) for value in values] if logarithmic else values)
        first = min(steps)
        return cls(first, max(*steps, first + 1), low, high, width, height, logarithmic)

    def x(self, step: float) -> float:
        share = (step - self.x_low) / (self.x_high - self.x_low)
        return _LEFT + share * (self.width - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        place = math.log10(value) if self.logarithmic else value
        share = (place - self.y_low) / (self.y_high - self.y_low)
        return self.height - _BOTTOM - share * (self.height - _TOP - _BOTTOM)

    def ticks(self) -> list[float]:
        if self.logarithmic:
            return _ticks_of_powers(self.y_low, self.y_high)
        return round_ticks(self.y_low, self.y_high, 5)


def _finite(curve: Curve) -> Curve:
    return Curve(curve.name, [point for point in curve.points if math.isfinite(point[1])], curve.style)


def _thinned(points: Sequence[Point], limit: int) -> Sequence[Point]:
    """At most about `limit` points, keeping the lowest and highest of each stretch so that no spike is lost."""
    if len(points) <= limit:
        return points
    stretch = math.ceil(2 * len(points) / limit)
    kept: list[Point] = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept.extend(sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}))
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        return (low - abs(low) * 0.1 - 1e-12, high + abs(high) * 0.1 + 1e-12)
    # A curve that hardly moves is drawn flat instead of as noise that fills the chart.
    margin = max((high - low) * 0.06, abs(high) * 0.03)
    return (0.0 if 0 <= low < (high - low) * 0.5 else low - margin, high + margin)


def _group(name: str, drawing: Iterable[str]) -> Iterable[str]:
    return [f'<g class="{name}">', *drawing, "</g>"]


def _drawing(curves: Sequence[Curve], scale: _Scale, number: Number) -> list[str]:
    return [*_grid(scale, number), *(_drawn(curve, scale) for curve in curves)]


def _grid(scale: _Scale, number: Number) -> Iterable[str]:
    right, bottom = scale.width - _RIGHT, scale.height - _BOTTOM
    for value in scale.ticks():
        y = scale.y(value)
        yield f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(number(value))}</text>'
    whole = [value for value in round_ticks(scale.x_low, scale.x_high, 7) if value == int(value)]
    for value in whole:
        x = scale.x(value)
        anchor = "middle" if x < right - 2 * _RIGHT else "end"  # a centered one would leave the picture there
        # The word stands beside the last number: below it, both would overlap in the large letters of a phone.
        told = f"step {int(value)}" if value == whole[-1] else int(value)
        yield f'<text class="tick" x="{x:.1f}" y="{bottom + 18}" text-anchor="{anchor}">{told}</text>'
    yield f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'


def round_ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round values (1, 2, 5 times a power of ten) inside a range, about as many as wanted."""
    raw = (high - low) / max(wanted, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.8)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def _ticks_of_powers(low: float, high: float) -> list[float]:
    """Values between 10 ** low and 10 ** high: powers of ten where these are many, else 1, 2 and 5 times those."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    if len(powers) > 6:
        return [10.0**power for power in powers if low <= power <= high][:: math.ceil(len(powers) / 6)]
    values = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    return [value for value in values if low <= math.log10(value) <= high]


def _drawn(curve: Curve, scale: _Scale) -> str:
    points = _thinned(curve.points, round(scale.width / _PIXELS_OF_A_POINT))
    places = [(scale.x(step), scale.y(value)) for step, value in points]
    path = " ".join(f"{'M' if n == 0 else 'L'}{x:.1f} {y:.1f}" for n, (x, y) in enumerate(places))
    parts = [f'<path class="{curve.style}" d="{path}"/>']
    if curve.style.startswith("marks") or len(places) == 1:
        parts.extend(f'<circle class="{curve.style}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in places)
    return "".join(parts)


def _readings(curves: Sequence[Curve], scale: _Scale, number: Number) -> Iterable[str]:
    """Upright bands side by side, each with the values at its step, or the nearest before it, as a line of text."""
    steps = sorted({step for curve in curves for step, _ in curve.points})
    told = steps[:: -math.ceil(len(steps) / _READINGS)][::-1]  # from the end, so that the last step is among them
    edges = [_LEFT, *((scale.x(a) + scale.x(b)) / 2 for a, b in pairwise(told))]
    edges.append(scale.width - _RIGHT)
    yield '<g class="readings">'
    for (left, right), step in zip(pairwise(edges), told, strict=True):
        values = [
            f"{curve.name} {number(value)}".lstrip()
            for curve in curves
            if (value := _value_at(curve, step)) is not None
        ]
        words = escape(f"step {step:g}: " + ", ".join(values))
        yield (
            f'<g><rect x="{left:.1f}" y="{_TOP}" width="{right - left:.1f}" height="{scale.height - _TOP - _BOTTOM}"/>'
            f'<text x="{scale.width - _RIGHT}" y="{_TOP + 10}">{words}</text></g>'
        )
    yield "</g>"


def _value_at(curve: Curve, step: float) -> float | None:
    """Of the point at a step, or of the last before it; nothing ahead of the first."""
    place = bisect_left(curve.points, (step, math.inf))
    return curve.points[place - 1][1] if place else None
