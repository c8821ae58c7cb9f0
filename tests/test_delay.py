import numpy as np
import pytest
from conftest import speech_like

from codec.delay import compensate, estimate_delay


def shifted(wav: np.ndarray, delay: int) -> np.ndarray:
    """The same sound `delay` samples later, or earlier; of the same length."""
    late = np.concatenate([np.zeros(max(delay, 0), np.float32), wav[max(-delay, 0) :]])
    return np.pad(late, (0, max(0, len(wav) - len(late))))[: len(wav)]


def noisy(wav: np.ndarray, seed: int, scale: float = 0.05) -> np.ndarray:
    return (wav + scale * np.random.default_rng(seed).standard_normal(len(wav))).astype(np.float32)


def delayed_pairs(delay: int, n: int = 3) -> list[tuple[np.ndarray, np.ndarray]]:
    wavs = [speech_like(8000 + 1111 * i, seed=i) for i in range(n)]
    return [(wav, noisy(shifted(wav, delay), seed=i)) for i, wav in enumerate(wavs)]


def brute_force(pairs: list[tuple[np.ndarray, np.ndarray]], lags: range) -> int:
    """Lag of the highest mean correlation, by a loop."""

    def correlation(wav: np.ndarray, wav_hat: np.ndarray, lag: int) -> float:
        inner = sum(a * b for a, b in zip(wav[max(-lag, 0) :], wav_hat[max(lag, 0) :]))
        return inner / np.linalg.norm(wav) / np.linalg.norm(wav_hat)

    return max(lags, key=lambda lag: np.mean([correlation(*pair, lag) for pair in pairs]))


@pytest.mark.parametrize("delay", [37, -20, 1, -1, 300])
def test_a_known_delay_is_found_exactly_either_way(delay):
    assert estimate_delay(delayed_pairs(delay), 800) == delay


def test_the_delay_is_that_of_a_plain_loop_which_fails_when_it_looks_one_way_or_the_wrong_way():
    pairs = [(wav[2000:3500], wav_hat[2000:3500]) for wav, wav_hat in delayed_pairs(-20)]
    assert estimate_delay(pairs, 40) == brute_force(pairs, range(-40, 41)) == -20
    assert brute_force(pairs, range(41)) != -20
    assert brute_force([(wav_hat, wav) for wav, wav_hat in pairs], range(-40, 41)) == 20


@pytest.mark.parametrize("scale", [0.0, 0.05, 0.1])
def test_a_codec_without_delay_has_none_however_noisy(scale):
    wavs = [speech_like(16000, seed=i) for i in range(3)]
    assert estimate_delay([(wav, noisy(wav, i, scale)) for i, wav in enumerate(wavs)], 800) == 0


def test_a_filter_that_moves_the_peak_a_little_is_no_delay():
    wavs = [speech_like(16000, seed=i) for i in range(3)]
    pairs = [(wav, noisy(wav + 1.1 * shifted(wav, 1), i, 0.03)) for i, wav in enumerate(wavs)]
    assert brute_force([(wav[:2000], wav_hat[:2000]) for wav, wav_hat in pairs], range(-3, 4)) == 1
    assert estimate_delay(pairs, 800) == 0


def vocoded(n_samples: int, delay: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two noises that share nothing but the loudness, one of them late, each with a hum of its own in the pauses."""
    rng = np.random.default_rng(seed)
    steps = np.repeat(rng.choice([0.1, 0.3, 1.0], n_samples // 800 + 1), 800)[:n_samples]
    steps[:800] = steps[-800:] = 0
    loudness = np.convolve(steps, np.ones(200) / 200, "same").astype(np.float32)
    noise, noise_hat, hum, hum_hat = rng.standard_normal((4, n_samples), np.float32)
    return 0.3 * loudness * noise + 1e-3 * hum, 0.3 * shifted(loudness, delay) * noise_hat + 3e-4 * hum_hat


@pytest.mark.parametrize("delay", [320, -160])
def test_a_vocoder_that_keeps_no_waveform_is_aligned_by_its_loudness(delay, monkeypatch):
    pairs = [vocoded(16000, delay, seed) for seed in range(3)]
    assert abs(estimate_delay(pairs, 1600) - delay) <= 16
    assert abs(brute_force([(wav[:2400], wav_hat[:2400]) for wav, wav_hat in pairs], range(-400, 401, 8)) - delay) > 16
    monkeypatch.setattr("codec.delay.FLOOR", 0)  # the pauses then pull toward 0
    assert abs(estimate_delay(pairs, 1600) - delay) > 32


def test_silence_counts_for_nothing_and_alone_gives_no_delay():
    silence = np.zeros(8000, np.float32)
    assert estimate_delay([(silence, silence), *delayed_pairs(37, 1), (speech_like(8000), silence)], 800) == 37
    assert estimate_delay([(silence, silence)], 800) == 0
    assert estimate_delay([(speech_like(8000), silence)], 800) == 0
    assert estimate_delay([(speech_like(8000), silence[:0])], 800) == 0
    assert estimate_delay([], 800) == 0


def test_a_loud_file_does_not_outvote_the_others():
    quiet = [(0.01 * wav, 0.01 * wav_hat) for wav, wav_hat in delayed_pairs(37)]
    loud = speech_like(8000, seed=9)
    pairs = [*quiet, (loud, shifted(loud, -200))]
    assert estimate_delay(pairs, 800) == 37
    unnormalised = [sum(float(a[max(-lag, 0) :][:7000] @ b[max(lag, 0) :][:7000]) for a, b in pairs) for lag in (37, -200)]
    assert unnormalised[0] < unnormalised[1]


def test_clips_shorter_than_the_largest_delay_are_no_trouble():
    wavs = speech_like(4000)[1000:1400], speech_like(4000, seed=1)[1000:1500]
    assert estimate_delay([(wav, shifted(wav, 25)) for wav in wavs], 2000) == 25


@pytest.mark.parametrize(
    ("delay", "n_samples", "expected"),
    [
        (0, 3, [1, 2, 3]),
        (2, 4, [3, 4, 5, 0]),
        (-2, 4, [0, 0, 1, 2]),
        (0, 7, [1, 2, 3, 4, 5, 0, 0]),
        (9, 2, [0, 0]),
        (-9, 3, [0, 0, 0]),
    ],
)
def test_compensation_shifts_and_fits_the_length(delay, n_samples, expected):
    moved = compensate(np.arange(1, 6, dtype=np.float32), delay, n_samples)
    assert moved.dtype == np.float32 and moved.tolist() == expected


@pytest.mark.parametrize("delay", [37, -20])
def test_compensation_undoes_the_delay_that_was_estimated(delay):
    wav = speech_like(8000)
    wav_hat = shifted(wav, delay)
    restored = compensate(wav_hat, estimate_delay([(wav, wav_hat)], 800), len(wav))
    assert np.array_equal(restored[50:-50], wav[50:-50])
    wrong = compensate(wav_hat, -delay, len(wav))
    assert not np.allclose(wrong[50:-50], wav[50:-50], atol=0.01)
