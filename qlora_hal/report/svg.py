"""Line charts as inline SVG: small, without scripts, coloured by CSS variables so that light and dark both work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 12, 34
_POINT_LIMIT = 600


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a chart. `style` is a CSS class: `line`, `faint`, or `marks` for points joined by a line; a name that
    begins so, such as `marks-b`, is drawn alike."""

    name: str
    points: Sequence[Point]
    style: str = "line"


def chart(
    title: str, curves: Sequence[Curve], *, number: Callable[[float], str], width: int = 520, height: int = 220
) -> str:
    """An SVG element, or an empty text when no curve has a point. `number` writes a value of the y axis."""
    curves = [_drawable(curve) for curve in curves]
    points = [point for curve in curves for point in curve.points]
    if not points:
        return ""
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = _range([y for _, y in points])
    scale = _Scale(x_low, max(x_high, x_low + 1), y_low, y_high, width, height)
    body = [
        *_grid(scale, number),
        *(_drawn(curve, scale) for curve in curves if curve.points),
    ]
    label = escape(f"{title} by step", quote=True)
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}" xmlns="http://www.w3.org/2000/svg">'
    return "\n".join([head, *body, "</svg>"])


@dataclass(frozen=True, slots=True)
class _Scale:
    x_low: float
    x_high: float
    y_low: float
    y_high: float
    width: int
    height: int

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return _LEFT + share * (self.width - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return self.height - _BOTTOM - share * (self.height - _TOP - _BOTTOM)


def _drawable(curve: Curve) -> Curve:
    return Curve(curve.name, _thinned([point for point in curve.points if math.isfinite(point[1])]), curve.style)


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    """At most some hundred points, keeping the lowest and highest of each stretch so that no spike is lost."""
    if len(points) <= _POINT_LIMIT:
        return points
    stretch = math.ceil(2 * len(points) / _POINT_LIMIT)
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


def _grid(scale: _Scale, number: Callable[[float], str]) -> Iterable[str]:
    right, bottom = scale.width - _RIGHT, scale.height - _BOTTOM
    for value in round_ticks(scale.y_low, scale.y_high, 5):
        y = scale.y(value)
        yield f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(number(value))}</text>'
    for value in round_ticks(scale.x_low, scale.x_high, 7):
        if value == int(value):
            x = scale.x(value)
            yield f'<text class="tick" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{int(value)}</text>'
    yield f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
    yield f'<text class="tick" x="{right}" y="{scale.height - 2}" text-anchor="end">step</text>'


def round_ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round values (1, 2, 5 times a power of ten) inside a range, about as many as wanted."""
    raw = (high - low) / max(wanted, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.8)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def _drawn(curve: Curve, scale: _Scale) -> str:
    places = [(scale.x(x), scale.y(y)) for x, y in curve.points]
    path = " ".join(f"{'M' if n == 0 else 'L'}{x:.1f} {y:.1f}" for n, (x, y) in enumerate(places))
    parts = [f'<path class="{curve.style}" d="{path}"><title>{escape(curve.name)}</title></path>']
    if curve.style.startswith("marks") or len(places) == 1:
        parts.extend(
            f'<circle class="{curve.style}" cx="{x:.1f}" cy="{y:.1f}" r="4">'
            f"<title>{escape(curve.name)} at step {step:g}: {value:.6g}</title></circle>"
            for (x, y), (step, value) in zip(places, curve.points, strict=True)
        )
    return "".join(parts)
