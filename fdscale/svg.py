"""Line charts as SVG inside a page: no script, no network, colours by the page's own variables, numbers beside them."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 40
MOST_POINTS = 400  # of a line
MOST_ROWS = 12  # of the table beside a chart

Points = list[tuple[float, float]]


class Line(NamedTuple):
    """A named line; tone: which of the page's colours, from 0."""

    name: str
    points: Points
    tone: int


def chart(identity: str, title: str, unit: str, lines: Sequence[Line], marks: Sequence[float] = ()) -> str:
    """A figure: lines over steps, and their numbers in a table that unfolds. marks: steps where a start began.

    Values that are not finite leave a gap. Empty where no line has a point.
    """
    lines = [line for line in lines if any(math.isfinite(y) for _, y in line.points)]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points if math.isfinite(y)]
    x_ticks, y_ticks = ticks(min(xs), max(xs), 6), ticks(min(ys), max(ys), 5)
    left, right = min(xs), max(max(xs), min(xs) + 1e-9)
    low, high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - (y - low) / max(high - low, 1e-300) * (HEIGHT - TOP - BOTTOM)
        return round(across, 1), round(down, 1)

    parts = []
    for value in y_ticks:
        _, down = place(left, value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down}" y2="{down}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down + 4}" text-anchor="end">{short(value)}</text>')
    for value in (value for value in x_ticks if left <= value <= right):
        across, _ = place(value, low)
        parts.append(f'<text x="{across}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{short(value)}</text>')
    for mark in marks:
        if left < mark <= right:
            across, _ = place(mark, low)
            parts.append(f'<line class="mark" x1="{across}" x2="{across}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    for line in lines:
        for run in _runs(thinned(line.points)):
            dots = " ".join(f"{x},{y}" for x, y in (place(*point) for point in run))
            if len(run) == 1:
                x, y = place(*run[0])
                parts.append(f'<circle class="dot t{line.tone}" cx="{x}" cy="{y}" r="3"/>')
            else:
                parts.append(f'<polyline class="line t{line.tone}" points="{dots}"/>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">step</text>')
    last = "; ".join(f"{line.name}: {short(line.points[-1][1])} at step {short(line.points[-1][0])}" for line in lines)
    keys = "".join(f'<span class="key"><i class="t{line.tone}"></i>{html.escape(line.name)}</span>' for line in lines)
    label = html.escape(f"{title}{f', {unit}' if unit else ''}")
    return (
        f'<figure id="{identity}"><figcaption>{label} {keys if len(lines) > 1 else ""}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{identity}-t {identity}-d">'
        f'<title id="{identity}-t">{label}</title>'
        f'<desc id="{identity}-d">{html.escape(last)}</desc>{"".join(parts)}</svg>'
        f"<details><summary>Numbers</summary>{_numbers(lines)}</details></figure>"
    )


def standalone(page: str, style: str) -> Iterable[tuple[str, str]]:
    """(name, file) of every chart in a page, drawn as there: with the page's style, title and names of lines inside."""
    pattern = r'<figure id="c-([^"]+)"><figcaption>(.*?)</figcaption><svg viewBox="[^"]*"([^>]*)>(.*?)</svg>'
    for name, caption, attributes, drawing in re.findall(pattern, page, re.S):
        title = re.sub(r"<[^>]+>.*", "", caption).strip()
        head, down = [f'<text x="{LEFT}" y="-8" font-weight="bold">{title}</text>'], TOP + 6
        for tone, line in re.findall(r'<i class="t(\d)"></i>([^<]*)', caption):
            head.append(
                f'<line class="line t{tone}" x1="{WIDTH - 190}" x2="{WIDTH - 170}" y1="{down - 4}" y2="{down - 4}"/>'
            )
            head.append(f'<text x="{WIDTH - 164}" y="{down}">{line}</text>')
            down += 16
        box = f'viewBox="0 -28 {WIDTH} {HEIGHT + 28}"'
        inside = f"<style>{html.escape(style)}</style>{drawing}{''.join(head)}"
        yield name, f'<svg xmlns="http://www.w3.org/2000/svg" {box}{attributes}>{inside}</svg>\n'


def _numbers(lines: Sequence[Line]) -> str:
    """Some of the points of each line, the first and the last among them."""
    rows = []
    for line in lines:
        chosen = sorted({round(k * (len(line.points) - 1) / (MOST_ROWS - 1)) for k in range(MOST_ROWS)})
        for place in chosen:
            x, y = line.points[place]
            rows.append(f"<tr><td>{html.escape(line.name)}</td><td>{short(x)}</td><td>{short(y)}</td></tr>")
    return (
        f"<table><thead><tr><th>line</th><th>step</th><th>value</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _runs(points: Points) -> Iterable[Points]:
    """The stretches without a gap."""
    run: Points = []
    for point in points:
        if math.isfinite(point[1]):
            run.append(point)
        elif run:
            yield run
            run = []
    if run:
        yield run


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """At most so many numbers: of each stretch the least and the largest, in their order, and a gap wherever there was
    one between two that are kept, so that neither peak nor gap is lost."""
    if len(points) <= most:
        return points
    kept: Points = []
    count = most // 3
    for k in range(count):
        some = points[k * len(points) // count : (k + 1) * len(points) // count]
        finite = [point for point in some if math.isfinite(point[1])]
        ends = {pick(finite, key=lambda point: point[1]) for pick in (min, max)} if finite else set()
        for point in some:
            if point in ends or (not math.isfinite(point[1]) and (not kept or math.isfinite(kept[-1][1]))):
                kept.append(point)
    return kept


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers that cover a range, at most about so many."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    step = 10 ** math.floor(math.log10((high - low) / most))
    step = next(step * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (step * factor) <= most)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def short(value: float) -> str:
    """A number for a person."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0 or 0.0001 <= abs(value) < 1e6:
        return f"{value:.5g}"
    return f"{value:.2e}"
