"""Pictures of the report, inside the page: curves as SVG in the page's own colours, spectrograms as small WebP."""

from __future__ import annotations

import base64
import io
import math
from html import escape
from typing import NamedTuple

import numpy as np
import soundfile as sf
from PIL import Image

from codec.audio import to_int16
from codec.runlog import COLOURS, FLOOR_DB

SERIES = 8  # colours --c0 to --c7 of the page
MARKS = ("M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z", "M-4-4h8v8h-8z", "M0-5.5L5.5 0L0 5.5L-5.5 0z", "M0-5.5L5 4H-5z")
KBPS_TICKS = (0.1, 0.2, 0.5, 1, 2, 3, 6, 12, 24, 48, 96, 192, 384)
PICTURE_WIDTH, PICTURE_HEIGHT = 420, 140  # pixels
PICTURE_BYTES = 15_000  # a report of four utterances by twelve systems has a hundred pictures
DIFFERENCE_DB = 20.0  # where the colours of a difference end
# blue where the decoded sound lacks energy, red where it has too much
DIVERGING = np.array([(5, 48, 97), (67, 147, 195), (247, 247, 247), (214, 96, 77), (103, 0, 31)], np.float32)


class Point(NamedTuple):
    name: str  # of the system, as readers see it
    kbps: float
    mean: float
    low: float
    high: float
    words: str  # the value and its interval, for tooltips and screen readers


class Frame(NamedTuple):
    """Where kbps (logarithmic) and a value lie in a picture; room is left for the numbers of the axes."""

    width: int
    height: int
    x_ticks: list[float]
    y_ticks: list[float]

    def x(self, kbps: float) -> float:
        low, high = math.log(self.x_ticks[0]), math.log(self.x_ticks[-1])
        return 48 + (math.log(kbps) - low) / (high - low) * (self.width - 62)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return self.height - 34 - (min(max(value, low), high) - low) / (high - low) * (self.height - 46)

    def axes(self) -> list[str]:
        left, right, bottom = self.x(self.x_ticks[0]), self.x(self.x_ticks[-1]), self.height - 34
        parts = []
        for tick in self.y_ticks:
            y = self.y(tick)
            parts.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/><text x="{left - 6}" y="{y + 4:.1f}" '
                         f'text-anchor="end">{_tick(tick)}</text>')  # fmt: skip
        for tick in self.x_ticks:
            x = self.x(tick)
            parts.append(f'<path class="tick" d="M{x:.1f} {bottom}v4"/><text x="{x:.1f}" y="{bottom + 17}" '
                         f'text-anchor="middle">{_tick(tick)}</text>')  # fmt: skip
        return [*parts, f'<text x="{right}" y="{self.height - 3}" text-anchor="end">kbps</text>']


def curve_panel(label: str, curves: dict[str, list[Point]], uncoded: float | None) -> str:
    """One metric over the bitrate.

    Args:
        label: what screen readers hear.
        curves: points by family, the same families in the same order for every panel: the order gives the colours.
        uncoded: value of the uncoded audio, a dashed line; None: no line.
    Returns:
        SVG in the page's colours. Points take the focus and carry their words in aria-label and a tooltip.
    """
    points = [point for line in curves.values() for point in line]
    values = [value for point in points for value in (point.low, point.mean, point.high)]
    frame = Frame(300, 210, kbps_ticks([point.kbps for point in points]),
                  value_ticks(values + ([] if uncoded is None else [uncoded])))  # fmt: skip
    parts = frame.axes()
    if uncoded is not None:
        parts.append(_level(frame, uncoded, "uncoded"))
    for index, line in enumerate(curves.values()):
        parts += _curve(frame, index, sorted(line, key=lambda point: point.kbps))
    return _svg(frame, label, parts)


def bound_chart(label: str, kbps: list[float], bound_db: list[float], points: dict[str, list[Point]]) -> str:
    """Signal-to-noise ratio over the bitrate: the bound, the systems below it, and 30 dB.

    Args:
        label: what screen readers hear.
        kbps, bound_db: the bound, at rising rates.
        points: systems by family; the order gives the colours.
    Returns:
        SVG, as `curve_panel`.
    """
    systems = [point for line in points.values() for point in line]
    rates = [point.kbps for point in systems] + [rate for rate, bound in zip(kbps, bound_db) if bound < 36 or rate <= 6]
    levels = [point.mean for point in systems] + [0.0, 32.0]
    frame = Frame(440, 300, kbps_ticks([*rates, 6.0]), value_ticks([max(level, -10.0) for level in levels]))
    top, bottom = frame.y_ticks[-1], frame.y_ticks[0]
    inside = [(rate, bound) for rate, bound in zip(kbps, bound_db)
              if bound <= top and frame.x_ticks[0] <= rate <= frame.x_ticks[-1]]  # fmt: skip
    path = "L".join(f"{frame.x(rate):.1f} {frame.y(bound):.1f}" for rate, bound in inside)
    six = (f'<path class="dash" d="M{frame.x(6):.1f} {frame.y(top):.1f}V{frame.y(bottom):.1f}"/>'
           f'<text x="{frame.x(6) + 4:.1f}" y="{frame.y(bottom) - 5:.1f}">6 kbps</text>')  # fmt: skip
    parts = [*frame.axes(), _level(frame, 30.0, "30 dB"), six]
    if path:
        parts.append(f'<path class="line bound" d="M{path}"/>')
    for index, line in enumerate(points.values()):
        parts += _curve(frame, index, sorted(line, key=lambda point: point.kbps))
    return _svg(frame, label, parts)


def mark(index: int) -> str:
    """The sign of family number `index`, for legends."""
    return f'<svg width="14" height="14" viewBox="-7 -7 14 14" aria-hidden="true" class="{_class(index)}">' \
           f'<path class="mark" d="{MARKS[index % len(MARKS)]}"/></svg>'  # fmt: skip


def kbps_ticks(rates: list[float]) -> list[float]:
    """At most seven round rates that enclose the given ones."""
    low, high = min(rates), max(rates)
    first = max((tick for tick in KBPS_TICKS if tick <= low), default=low)
    last = min((tick for tick in KBPS_TICKS if tick >= max(high, 2 * first)), default=max(high, 2 * first))
    inner = [tick for tick in KBPS_TICKS if first < tick < last]
    return [first, *inner[:: -(-len(inner) // 5) or 1], last]


def value_ticks(values: list[float]) -> list[float]:
    """Three to six round numbers that enclose the values."""
    low, high = min(values), max(values)
    span = max(high - low, 1e-3 * max(abs(high), 1.0))
    unit = 10.0 ** math.floor(math.log10(span / 3))
    step = next(unit * factor for factor in (1, 2, 5, 10) if span / (unit * factor) <= 4)
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [round(index * step, 9) for index in range(first, last + 1)]


def _curve(frame: Frame, index: int, line: list[Point]) -> list[str]:
    """A family's line, intervals and marks."""
    parts = []
    if len(line) > 1:
        path = "L".join(f"{frame.x(point.kbps):.1f} {frame.y(point.mean):.1f}" for point in line)
        parts.append(f'<path class="line" d="M{path}"/>')
    for point in line:
        x, words = frame.x(point.kbps), escape(f"{point.name}: {point.words} at {point.kbps:.3g} kbps")
        parts.append(f'<path class="bar" d="M{x:.1f} {frame.y(point.low):.1f}V{frame.y(point.high):.1f}"/>'
                     f'<path class="mark" role="img" tabindex="-1" aria-label="{words}" '
                     f'transform="translate({x:.1f} {frame.y(point.mean):.1f})" d="{MARKS[index % len(MARKS)]}">'
                     f"<title>{words}</title></path>")  # fmt: skip
    return [f'<g class="{_class(index)}">', *parts, "</g>"]


def _level(frame: Frame, value: float, words: str) -> str:
    """A dashed line across, with its name above the left end."""
    left, right, y = frame.x(frame.x_ticks[0]), frame.x(frame.x_ticks[-1]), frame.y(value)
    return f'<path class="dash" d="M{left} {y:.1f}H{right}"/><text x="{left + 4}" y="{max(y - 4, 10):.1f}">{words}</text>'


def _svg(frame: Frame, label: str, parts: list[str]) -> str:
    return f'<svg viewBox="0 0 {frame.width} {frame.height}" role="group" tabindex="0" aria-label="{escape(label)}">' \
           f"{''.join(parts)}</svg>"  # fmt: skip


def _class(index: int) -> str:
    return f"c{index % SERIES}"


def _tick(value: float) -> str:
    return f"{value:.4g}".replace("-", "−")


# ---- spectrograms, codes, sound ---------------------------------------------------------------------------


def log_spectrogram(wav: np.ndarray, sample_rate: int) -> np.ndarray:
    """Levels of short-time spectra (Hann windows of about 40 ms), about PICTURE_WIDTH of them.

    Args:
        wav: float32 [T].
        sample_rate: Hz.
    Returns:
        [F, W] dB relative to a full-scale sine, 0 Hz first; not below -100.
    """
    n_fft = max(64, 2 ** round(math.log2(0.043 * sample_rate)))
    padded = np.pad(np.nan_to_num(wav), (n_fft // 2, n_fft))
    starts = np.linspace(0, len(wav), PICTURE_WIDTH, endpoint=False).astype(int)
    window = np.hanning(n_fft + 1)[:-1]
    frames = np.stack([padded[start : start + n_fft] for start in starts]) * window
    magnitude = np.abs(np.fft.rfft(frames)).T * 2 / window.sum()
    return 20 * np.log10(np.maximum(magnitude, 1e-5))


def spectrogram_picture(spectrogram: np.ndarray, top_db: float) -> str:
    """Levels from `top_db` down to 80 dB below, dark to bright; low frequencies at the bottom. A data: address."""
    return _picture(_paint(1 - (spectrogram - top_db) / FLOOR_DB, COLOURS))


def difference_picture(spectrogram: np.ndarray, reference: np.ndarray, top_db: float) -> str:
    """Levels minus the reference's: white where alike, red too loud, blue too weak, full at 20 dB. A data: address.

    What lies more than 80 dB below `top_db` counts as that level: nobody hears or sees it.
    """
    difference = np.maximum(spectrogram, top_db + FLOOR_DB) - np.maximum(reference, top_db + FLOOR_DB)
    return _picture(_paint(0.5 + difference / (2 * DIFFERENCE_DB), DIVERGING))


def codes_picture(counts: np.ndarray) -> str:
    """Use of codes, one row a level, codes sorted by use: bright is 100 times an even share, black 1/100 or none.

    Args:
        counts: [N, K] how often each code occurred.
    Returns:
        data: address of a picture with N rows of 16 pixels.
    """
    shares = -np.sort(-counts, axis=1) / np.maximum(counts.sum(1, keepdims=True), 1)
    level = np.log10(np.maximum(shares * counts.shape[1], 1e-2)) / 4 + 0.5
    rows = Image.fromarray(_paint(level, COLOURS)).resize((PICTURE_WIDTH, 16 * len(counts)), Image.Resampling.NEAREST)
    return _data_address("image/webp", _webp(rows))


def sound(wav: np.ndarray, sample_rate: int) -> str:
    """Audio [T] as 16-bit FLAC in a data: address; values beyond [-1, 1] are clipped, non-finite ones silenced."""
    contents = io.BytesIO()
    sf.write(contents, to_int16(np.nan_to_num(wav, posinf=0.0, neginf=0.0)), sample_rate, format="FLAC", subtype="PCM_16")
    return _data_address("audio/flac", contents.getvalue())


def _paint(level: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """[H, W] in [0, 1], clipped, to uint8 [H, W, 3]."""
    stops = np.linspace(0, 1, len(colours))
    channels = [np.interp(level, stops, colours[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _picture(pixels: np.ndarray) -> str:
    picture = Image.fromarray(pixels[::-1]).resize((PICTURE_WIDTH, PICTURE_HEIGHT), Image.Resampling.BOX)
    return _data_address("image/webp", _webp(picture))


def _webp(picture: Image.Image) -> bytes:
    """At the best quality that fits; the difference of two noises is hard to compress."""
    for quality in (70, 40, 15):
        contents = io.BytesIO()
        picture.save(contents, "WEBP", quality=quality)
        if contents.tell() <= PICTURE_BYTES:
            break
    return contents.getvalue()


def _data_address(kind: str, contents: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(contents).decode()}"
