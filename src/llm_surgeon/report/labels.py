"""Labels with the numbers at the points of a curve, placed so that they cover nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llm_surgeon.report.plots import Axes

Point = tuple[float, float]
# Edges of a box: left, bottom, right, top, in points of type.
Box = tuple[float, float, float, float]

# Largest number of points with a label; longer curves have labels at their ends only.
MOST = 11
_MARKER, _LINE, _STEP = 5.5, 1.5, 4.0
# Places of a label around its point, above and below first: the offset in points, and the edges of the label there.
_PLACES = (
    *((0, 7, "center", "bottom"), (0, -7, "center", "top")),
    *((-7, 4, "right", "bottom"), (-7, -4, "right", "top"), (7, 4, "left", "bottom"), (7, -4, "left", "top")),
    *((0, 16, "center", "bottom"), (0, -16, "center", "top")),
)


def write_values(axes: Axes, points: Sequence[Point], others: Iterable[Point] = (), size: float = 10.0) -> None:
    """Write the value at each point of a curve, or only at its ends if it has many points.

    A number that would cover a marker, the line or another number is left out. The ends of the curve go first.

    Args:
        axes: Axes with the curve, whose limits are set already.
        points: Points of the curve, in order.
        others: Further markers that must not be covered.
        size: Size of the type, in points.
    """
    places = [_place(axes, point) for point in points]
    taken = [_around(place) for place in (*places, *(_place(axes, other) for other in others))]
    for start, end in pairwise(places):
        taken += _along(start, end)
    width, height = _extent(axes)
    order = [len(points) - 1, 0] + (list(range(1, len(points) - 1)) if len(points) <= MOST else [])
    written = {}
    for number in dict.fromkeys(order):
        text = f"{points[number][1]:.4g}"
        for dx, dy, side, edge in _PLACES:
            box = _box(places[number], (dx, dy, side, edge), text, size)
            if box[0] >= 0 and box[1] >= 0 and box[2] <= width and box[3] <= height and not _hits(box, taken):
                taken.append(box)
                written[number] = (text, dx, dy, side, edge)
                break
    for number, (text, dx, dy, side, edge) in sorted(written.items()):
        axes.annotate(text, points[number], (dx, dy), textcoords="offset points", ha=side, va=edge, fontsize=size)


def _extent(axes: Axes) -> tuple[float, float]:
    """Width and height of the axes in points, before the layout fits them exactly."""
    scale = 72 / axes.figure.dpi
    return scale * axes.bbox.width, scale * axes.bbox.height


def _place(axes: Axes, point: Point) -> Point:
    """Place of a point of the data, in points of type from the lower left corner of the axes."""
    x, y = (axes.transScale + axes.transLimits).transform(point)
    width, height = _extent(axes)
    return float(x) * width, float(y) * height


def _around(place: Point) -> Box:
    x, y = place
    return x - _MARKER, y - _MARKER, x + _MARKER, y + _MARKER


def _along(start: Point, end: Point) -> list[Box]:
    """Small boxes along a line."""
    steps = max(1, math.ceil(math.dist(start, end) / _STEP))
    centres = [[a + (b - a) * step / steps for a, b in zip(start, end, strict=True)] for step in range(steps + 1)]
    return [(x - _LINE, y - _LINE, x + _LINE, y + _LINE) for x, y in centres]


def _box(place: Point, at: tuple[float, float, str, str], text: str, size: float) -> Box:
    """Box of a number, a little larger than its digits."""
    dx, dy, side, edge = at
    width, height = 0.66 * size * len(text), 1.1 * size
    left = place[0] + dx - width * {"left": 0, "center": 0.5, "right": 1}[side]
    bottom = place[1] + dy - height * {"bottom": 0, "top": 1}[edge]
    return left, bottom, left + width, bottom + height


def _hits(box: Box, taken: Sequence[Box]) -> bool:
    return any(box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3] for other in taken)
