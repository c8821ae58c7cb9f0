"""Curves as SVG, written by hand: panels side by side, a failing run in colour, a healthy one in grey."""

from __future__ import annotations

import math
from html import escape

import numpy as np

Curve = tuple[np.ndarray, np.ndarray]  # steps, values
PANEL_WIDTH, PANEL_HEIGHT, LEFT, TOP, GAP = 210, 150, 52, 62, 62
COLOURS = ("#d1242f", "#0b5fc0", "#9a6700")
GREY, INK, PALE = "#9aa0a6", "#1f2328", "#d0d7de"


def draw(panels: dict[str, dict[str, Curve]], title: str, marks: list[tuple[float, str]]) -> str:
    """One picture of several panels that share their horizontal axis, the training step.

    Args:
        panels: title of a panel to its curves by label; a label that starts with "healthy" is drawn in grey, below the others.
            A panel whose values are positive and span more than two decades has a logarithmic axis.
        marks: step and words of vertical lines, through all panels.
    Returns:
        SVG text, on white.
    """
    last = max((curve[0][-1] for curves in panels.values() for curve in curves.values() if len(curve[0])), default=1)
    width, height = LEFT + len(panels) * (PANEL_WIDTH + GAP) - GAP + 14, TOP + PANEL_HEIGHT + 40
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
             'font-family="sans-serif" font-size="11">', f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
             _text(LEFT, 18, title, size=13)]  # fmt: skip
    labels = list(dict.fromkeys(label for curves in panels.values() for label in curves))
    x = LEFT
    for label in labels:
        parts.append(_text(x, 36, label, colour=_colour(label, labels)))
        x += 7 * len(label) + 22
    if marks:
        parts.append(_text(x, 36, "dashes: " + "; ".join(f"{words} at step {step:g}" for step, words in marks)))
    for index, (name, curves) in enumerate(panels.items()):
        parts += _panel(LEFT + index * (PANEL_WIDTH + GAP), name, curves, labels, last, [step for step, _ in marks])
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(left: float, name: str, curves: dict[str, Curve], labels: list[str], last: float, marks: list[float]) -> list[str]:
    """Frame, ticks and curves of one panel, its left edge at `left`."""
    values = np.concatenate([np.zeros(0), *(values[np.isfinite(values)] for _, values in curves.values())])
    log = bool(len(values)) and values.min() > 0 and values.max() > 100 * values.min()
    ticks = _ticks(values, log)
    low, high = (math.log10(x) if log else x for x in (ticks[0], ticks[-1]))
    bottom = TOP + PANEL_HEIGHT

    def place(step: float, value: float) -> tuple[float, float]:
        height = ((math.log10(value) if log else value) - low) / (high - low)
        return left + step / last * PANEL_WIDTH, bottom - min(max(height, 0), 1) * PANEL_HEIGHT

    parts = [_text(left, TOP - 8, name)]
    for tick in ticks:
        y = place(0, tick)[1]
        parts += [_line([(left, y), (left + PANEL_WIDTH, y)], PALE), _text(left - 5, y + 4, f"{tick:.4g}", anchor="end")]
    for step in (0, last / 2, last):
        parts.append(_text(left + step / last * PANEL_WIDTH, bottom + 15, f"{step:g}", anchor="middle"))
    parts.append(_text(left + PANEL_WIDTH / 2, bottom + 31, "step", anchor="middle"))
    for step in marks:
        x = left + step / last * PANEL_WIDTH
        parts.append(_line([(x, TOP), (x, bottom)], INK, dashes=' stroke-dasharray="3 3"'))
    for label in sorted(curves, key=lambda label: not label.startswith("healthy")):
        for stretch in _finite_stretches(*curves[label]):
            parts.append(_line([place(*point) for point in stretch], _colour(label, labels), 1.8))
    return parts


def _ticks(values: np.ndarray, log: bool) -> list[float]:
    """Three to six round numbers that enclose the values; decades on a logarithmic axis."""
    if not len(values):
        return [0.0, 1.0]
    low, high = float(values.min()), float(values.max())
    if log:
        first, end = math.floor(math.log10(low)), math.ceil(math.log10(high))
        every = -(-(end - first) // 5)
        return [10.0**power for power in range(first, end + every, every)]
    span = max(high - low, 1e-3 * max(abs(high), 1e-3))
    unit = 10 ** math.floor(math.log10(span / 3))
    step = next(unit * factor for factor in (1, 2, 5, 10) if span / (unit * factor) <= 4)
    first, end = math.floor(low / step), math.ceil((low + span) / step)
    return [round(index * step, 9) for index in range(first, end + 1)]


def _finite_stretches(steps: np.ndarray, values: np.ndarray) -> list[list[tuple[float, float]]]:
    """Runs of finite points: a curve has a gap where a value was NaN."""
    stretches: list[list[tuple[float, float]]] = [[]]
    for step, value in zip(steps.tolist(), values.tolist()):
        if math.isfinite(value):
            stretches[-1].append((step, value))
        elif stretches[-1]:
            stretches.append([])
    return [stretch for stretch in stretches if stretch]


def _colour(label: str, labels: list[str]) -> str:
    others = [other for other in labels if not other.startswith("healthy")]
    return GREY if label.startswith("healthy") else COLOURS[others.index(label) % len(COLOURS)]


def _text(x: float, y: float, text: str, size: int = 11, anchor: str = "start", colour: str = INK) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'


def _line(points: list[tuple[float, float]], colour: str, width: float = 1.0, dashes: str = "") -> str:
    """A polyline; a single point is a dot."""
    if len(points) == 1:
        return f'<circle cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="2" fill="{colour}"/>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width:g}"{dashes}/>'
