"""Charts as SVG inside a page, which take their colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from xml.etree.ElementTree import Element, SubElement, tostring

Curve = Sequence[tuple[float, float]]
WIDTH, HEIGHT = 440, 280  # units of the drawing, about as many pixels, so that letters keep their size on a phone
LEFT, RIGHT, TOP, BOTTOM = 72, 24, 14, 44
MOST_POINTS = 300
NUM_COLOURS = 6


def line_chart(
    curves: Mapping[str, Curve],
    *,
    title: str,
    x_label: str,
    y_label: str,
    y_format: Callable[[float], str] = "{:.4g}".format,
    x_format: Callable[[float], str] = "{:.6g}".format,
    from_zero: bool = False,
    points: bool = False,
) -> str:
    """Curves over common axes, with a legend below.

    Args:
        curves: Points (x, y) by name, at least one.
        title: What the picture shows, in a sentence, for those who cannot see it.
        x_label: Names the horizontal axis.
        y_label: Names the vertical one.
        y_format: Writes the numbers at the vertical axis.
        x_format: Writes those at the horizontal one.
        from_zero: Whether the vertical axis starts at 0.
        points: Whether points are marked, and say their numbers when they are pointed at.
    """
    everything = [point for curve in curves.values() for point in curve]
    x_ticks = ticks(min(x for x, _ in everything), max(x for x, _ in everything))
    lowest = 0.0 if from_zero else min(y for _, y in everything)
    y_ticks = ticks(lowest, max(y for _, y in everything))
    place_x = _placed(x_ticks[0], x_ticks[-1], LEFT, WIDTH - RIGHT)
    place_y = _placed(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)

    legend = _legend_rows(list(curves)) if len(curves) > 1 else []
    svg = _svg(WIDTH, HEIGHT + 20 * len(legend), title)
    for value in y_ticks:
        _line(svg, LEFT, place_y(value), WIDTH - RIGHT, place_y(value), "grid")
        _text(svg, LEFT - 6, place_y(value) + 4, y_format(value), "end")
    for value in x_ticks:
        _text(svg, place_x(value), HEIGHT - BOTTOM + 17, x_format(value), "middle")
    _line(svg, LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, "axis")
    _text(svg, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, "middle", "label")
    side = _text(svg, 0, 0, y_label, "middle", "label")
    side.set("transform", f"translate(12 {(HEIGHT - BOTTOM + TOP) / 2:g}) rotate(-90)")
    for number, (name, curve) in enumerate(curves.items()):
        placed = [(place_x(x), place_y(y)) for x, y in thinned(curve)]
        colour = f"series-{number % NUM_COLOURS}"
        if len(placed) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
            SubElement(svg, "polyline", {"points": path, "class": f"curve {colour}"})
        if points or len(placed) == 1:
            for (x, y), (x_value, y_value) in zip(placed, thinned(curve), strict=True):
                place = {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "4", "class": f"point {colour}"}
                tip = SubElement(SubElement(svg, "circle", place), "title")
                tip.text = f"{name}: {y_format(y_value)} at {x_format(x_value)}"
    for row, entries in enumerate(legend):
        for number, x, name in entries:
            y = HEIGHT + 20 * row + 8
            _line(svg, x, y, x + 18, y, f"curve series-{number % NUM_COLOURS}")
            _text(svg, x + 24, y + 4, name, "start")
    return tostring(svg, encoding="unicode")


def bar_chart(rows: Sequence[tuple[str, float, float]], *, title: str, unit: str) -> str:
    """A row for each name with two bars, before and after.

    Args:
        rows: Name, value before, value after; values from 0.
        title: What the picture shows, in a sentence.
        unit: Of the numbers, at the axis.
    """
    pitch, left = 26, 12 + 7 * max(len(name) for name, _, _ in rows)
    height = TOP + pitch * len(rows) + BOTTOM
    marks = ticks(0, max(max(before, after) for _, before, after in rows))
    place = _placed(0, marks[-1], left, WIDTH - RIGHT)
    svg = _svg(WIDTH, height, title)
    for value in marks:
        _line(svg, place(value), TOP, place(value), height - BOTTOM, "grid")
        _text(svg, place(value), height - BOTTOM + 17, f"{value:g}", "middle")
    for number, (name, before, after) in enumerate(rows):
        y = TOP + pitch * number + 3
        _text(svg, left - 6, y + 14, name, "end")
        for offset, value, style in ((0, before, "before"), (10, after, "after")):
            bar = {"x": f"{left}", "y": f"{y + offset}", "width": f"{place(value) - left:.1f}", "height": "9"}
            tip = SubElement(SubElement(svg, "rect", {**bar, "class": style}), "title")
            tip.text = f"{name}: {value:.4g} {unit}"
    _text(svg, (left + WIDTH - RIGHT) / 2, height - 8, unit, "middle", "label")
    return tostring(svg, encoding="unicode")


def ticks(lowest: float, highest: float, most: int = 6) -> list[float]:
    """Round numbers, at least two, from at or below the lowest to at or above the highest."""
    span = highest - lowest
    if span <= 0:
        span = abs(highest) or 1.0
    raw = span / (most - 1)
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(lowest / step + 1e-9), math.ceil(highest / step - 1e-9)
    last = max(last, first + 1)
    return [round(number * step, 12) for number in range(first, last + 1)]


def thinned(curve: Curve) -> Curve:
    """A curve of at most `MOST_POINTS` points, the last one among them."""
    stride = math.ceil(len(curve) / MOST_POINTS)
    return curve if stride <= 1 else [*curve[:-1:stride], curve[-1]]


def _placed(first: float, last: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - first) / (last - first) * (end - start)


def _svg(width: float, height: float, title: str) -> Element:
    svg = Element("svg", {"viewBox": f"0 0 {width} {height}", "role": "img", "class": "chart", "aria-label": title})
    SubElement(svg, "title").text = title
    return svg


def _line(svg: Element, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
    places = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
    SubElement(svg, "line", {**{name: f"{value:.1f}" for name, value in places.items()}, "class": style})


def _text(svg: Element, x: float, y: float, text: str, anchor: str, style: str = "tick") -> Element:
    element = SubElement(svg, "text", {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor, "class": style})
    element.text = text
    return element


def _legend_rows(names: list[str]) -> list[list[tuple[int, float, str]]]:
    """Rows of (number, x, name), broken where they would leave the drawing."""
    rows: list[list[tuple[int, float, str]]] = [[]]
    x = float(LEFT)
    for number, name in enumerate(names):
        width = 42 + 7 * len(name)
        if x + width > WIDTH and rows[-1]:
            rows.append([])
            x = float(LEFT)
        rows[-1].append((number, x, name))
        x += width
    return rows
