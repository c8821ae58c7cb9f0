"""The delay of a codec, found by alignment, so that metrics of the waveform judge its sound and not its latency."""

from __future__ import annotations

import numpy as np

WAVEFORM_KEPT = 0.4  # below this correlation the codec keeps no waveform: Codec2 reaches 0.07, Opus at 6 kbps 0.85
CLEARLY = 0.9  # 1 - correlation at the peak must be below this times that at lag 0
SILENCE = 1e-6  # product of the norms of a pair
FLOOR = 0.01  # of the highest energy: below are pauses, where a vocoder makes a noise of its own
HOP, SMOOTH = 16, 32  # of envelopes: in samples, in hops


def estimate_delay(pairs: list[tuple[np.ndarray, np.ndarray]], max_samples: int) -> int:
    """One delay for a system, from a few files.

    The lag of the highest cross-correlation, normalised for each pair and averaged over the pairs. Vocoders keep no
    waveform; where the correlation stays below 0.4 the logarithms of the energy take its place, in steps of 16 samples.

    Args:
        pairs: (reference, decoded), float32 [T] and [T'] at one sample rate; silent ones count for nothing.
        max_samples: largest delay looked for, either way.
    Returns:
        Samples by which the decoded audio is late, negative where early; 0 where that is not clearly better than lag 0.
    """
    waveforms = _average_correlation(pairs, max_samples)
    if waveforms.max() >= WAVEFORM_KEPT:
        return _clear_peak(waveforms)
    envelopes = [tuple(map(_envelope, pair)) for pair in pairs if min(map(len, pair)) >= HOP]
    return HOP * _clear_peak(_average_correlation(envelopes, max_samples // HOP))


def refine_delay(wav: np.ndarray, wav_hat: np.ndarray, delay: int, reach: int) -> int:
    """The delay of one file, at most `reach` samples from its system's: Opus changes its own by a sample with its mode.

    Returns:
        `delay` where another is not clearly better, or where no waveform is kept.
    """
    moved = compensate(wav_hat, delay, len(wav))
    correlation = _average_correlation([(wav, moved)], reach)
    return delay + _clear_peak(correlation) if correlation.max() >= WAVEFORM_KEPT else delay


def compensate(wav_hat: np.ndarray, delay: int, n_samples: int) -> np.ndarray:
    """Move decoded audio earlier by its delay and bring it to a length, with zeros where there is nothing.

    Args:
        wav_hat: float32 [T'].
        delay: samples, negative to move it later.
        n_samples: of the reference.
    Returns:
        float32 [n_samples].
    """
    moved = np.zeros(n_samples, np.float32)
    kept = wav_hat[max(delay, 0) : max(delay + n_samples, 0)]
    start = min(max(-delay, 0), n_samples)
    moved[start : start + len(kept)] = kept
    return moved


def _average_correlation(pairs: list[tuple[np.ndarray, np.ndarray]], max_lag: int) -> np.ndarray:
    """Mean over the pairs of the normalised cross-correlation at lags -max_lag to max_lag: [2 * max_lag + 1]."""
    curves = [np.zeros(2 * max_lag + 1)]
    for wav, wav_hat in pairs:
        norm = np.linalg.norm(wav) * np.linalg.norm(wav_hat)
        n_fft = len(wav) + len(wav_hat) + 2 * max_lag  # nothing wraps round
        spectrum = np.conj(np.fft.rfft(wav, n_fft)) * np.fft.rfft(wav_hat, n_fft)
        if norm > SILENCE:
            curves.append(np.roll(np.fft.irfft(spectrum, n_fft), max_lag)[: 2 * max_lag + 1] / norm)
    return np.mean(curves[1:] or curves, axis=0)


def _clear_peak(correlation: np.ndarray) -> int:
    """Lag of the peak, or 0 where lag 0 is about as good."""
    max_lag = len(correlation) // 2
    peak = int(np.argmax(correlation))
    return peak - max_lag if 1 - correlation[peak] < CLEARLY * (1 - correlation[max_lag]) else 0


def _envelope(wav: np.ndarray) -> np.ndarray:
    """Logarithm of the smoothed energy, without its mean: [T // HOP]."""
    energy = np.mean(np.square(wav[: len(wav) // HOP * HOP]).reshape(-1, HOP), axis=1)
    window = np.hanning(SMOOTH + 2)[1:-1]
    smooth = np.convolve(energy, window / window.sum(), "same")[: len(energy)]
    level = np.log(smooth + FLOOR * smooth.max() + 1e-12)
    return level - level.mean()
