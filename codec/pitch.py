"""Fundamental frequency by YIN, its mean over codec frames, and as a vector that a cosine can compare."""

import numpy as np

from codec.audio import resample_array

MIN_HZ, MAX_HZ = 60.0, 500.0
RATE_HZ = 8000  # sound above 4 kHz tells nothing of the pitch and costs time
WINDOW_S = 0.025
THRESHOLD = 0.2  # of the normalised difference: dips below it are periods, frames without one are unvoiced
MIN_POWER = 1e-6  # of full scale, -60 dB: below it nothing is voiced
POINT_S = 0.01  # codec frames longer than this average several measurements
FRAMES_AT_ONCE = 2000
N_BINS = 38  # of `pitch_vectors`: a semitone each from MIN_HZ on
WIDTH = 2  # semitones, of the Gaussian over them


def yin(wav: np.ndarray, sample_rate: int, centres_s: np.ndarray) -> np.ndarray:
    """Fundamental frequency at given times.

    Args:
        wav: float [T], T > 0, full scale 1.
        sample_rate: Hz; resampled to 8 kHz where it is higher.
        centres_s: [M] seconds; each looks at some 20 ms to either side, with silence beyond the ends.
    Returns:
        float64 [M] Hz, 60 to 500; NaN where unvoiced.
    Source: de Cheveigné & Kawahara 2002, steps 2 to 5. Departures: a frame without a dip below the threshold is
    unvoiced and takes no global minimum; no search for a better estimate close by (step 6).
    """
    rate = min(sample_rate, RATE_HZ)
    wav = np.asarray(wav, np.float32)
    wav = wav - wav.mean()  # an offset would end in a step
    wav = resample_array(wav, sample_rate, rate) if rate != sample_rate else wav
    window, longest = round(WINDOW_S * rate), int(rate / MIN_HZ) + 2
    padded = np.pad(wav.astype(np.float64), window + longest)
    # for a usual period the two windows that are compared lie evenly around the centre
    starts = np.round(np.asarray(centres_s) * rate).astype(int) - (window + longest // 2) // 2 + window + longest
    segments = np.lib.stride_tricks.sliding_window_view(padded, window + longest)
    starts = starts.clip(0, len(segments) - 1)
    parts = [starts[i : i + FRAMES_AT_ONCE] for i in range(0, len(starts), FRAMES_AT_ONCE)]
    return np.concatenate([_pitch(_difference(segments[part], window), rate) for part in parts] or [np.zeros(0)])


def log_f0(wav: np.ndarray, sample_rate: int, hop_length: int, n_frames: int) -> np.ndarray:
    """log(F0 / Hz) of codec frames: the mean over a frame's voiced points.

    Args:
        wav: float [T].
        hop_length: samples of a codec frame; frame i is centred at (i + 0.5) * hop_length.
    Returns:
        float64 [n_frames]; NaN where less than half of a frame's points, one in 10 ms at least, are voiced.
    """
    n_points = int(np.ceil(hop_length / sample_rate / POINT_S))
    centres = (np.arange(n_frames * n_points) + 0.5) * hop_length / n_points / sample_rate
    points = np.log(yin(wav, sample_rate, centres)).reshape(n_frames, n_points)
    n_voiced = np.isfinite(points).sum(1)
    return np.where(2 * n_voiced >= n_points, np.nansum(points, 1) / n_voiced.clip(1), np.nan)


def pitch_vectors(f0: np.ndarray) -> np.ndarray:
    """Pitch as unit vectors whose cosine falls with distance: to 0.78 two semitones apart, 0.37 four, 0.02 eight.

    Args:
        f0: [M] Hz, NaN where unvoiced.
    Returns:
        float32 [M, 39]: bins of a semitone under a Gaussian around the pitch; unvoiced is the last.
    Source: Kim et al. 2018 (CREPE) for bins under a Gaussian; width and the unvoiced one are ours.
    """
    semitones = 12 * np.log2(f0 / MIN_HZ)
    bins = np.exp(-np.square((semitones[:, None] - np.arange(N_BINS)) / WIDTH) / 2)
    vectors = np.append(np.nan_to_num(bins), np.isnan(f0)[:, None], 1)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def _difference(segments: np.ndarray, window: int) -> np.ndarray:
    """[M, L + 1]: summed squared difference of each segment's first window from the one that lies 0 ... L later."""
    size = 1 << (segments.shape[1] - 1).bit_length()  # correlation wraps round only beyond the lags we want
    heads = np.fft.rfft(segments[:, :window], size)
    correlation = np.fft.irfft(np.fft.rfft(segments, size) * heads.conj(), size)[:, : segments.shape[1] - window + 1]
    energy = np.pad(np.square(segments).cumsum(1), ((0, 0), (1, 0)))
    energy = energy[:, window:] - energy[:, :-window]
    return np.maximum(energy[:, :1] + energy - 2 * correlation, 0)


def _pitch(difference: np.ndarray, rate: int) -> np.ndarray:
    """[M] Hz or NaN from differences [M, L + 1] by lag: the first dip that is deep enough, refined by a parabola."""
    lags, total = np.arange(difference.shape[1]), difference.cumsum(1)
    normalised = difference * lags / np.maximum(total, 1e-20)
    left, middle, right = normalised[:, :-2], normalised[:, 1:-1], normalised[:, 2:]
    dips = (middle < THRESHOLD) & (middle < left) & (middle <= right) & (lags[1:-1] >= int(rate / MAX_HZ))
    dips[total[:, -1] / lags[-1] / 2 < MIN_POWER * round(WINDOW_S * rate)] = False
    lag = dips.argmax(1) + 1
    left, middle, right = (difference[np.arange(len(lag)), lag + step] for step in (-1, 0, 1))
    curve = left + right - 2 * middle
    shift = np.divide((left - right) / 2, curve, out=np.zeros(len(lag)), where=curve > 0).clip(-0.5, 0.5)
    return np.where(dips.any(1), (rate / (lag + shift)).clip(MIN_HZ, MAX_HZ), np.nan)
