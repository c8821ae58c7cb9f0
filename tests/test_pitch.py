import numpy as np
import pytest
from conftest import speech_like

from codec.pitch import _difference, log_f0, pitch_vectors, yin


def tone(pitch_hz: np.ndarray, sample_rate: int, harmonics=range(1, 8)) -> np.ndarray:
    phase = 2 * np.pi * np.cumsum(pitch_hz) / sample_rate
    return 0.2 * sum(np.sin(k * phase + k) / k for k in harmonics if k * pitch_hz.max() < sample_rate / 2)


@pytest.mark.parametrize("sample_rate", [8000, 16000, 24000, 44100])
def test_the_pitch_of_a_steady_tone_is_right_within_one_percent(sample_rate):
    centres_s = np.arange(0.1, 0.9, 0.01)
    for pitch in (61.0, 80.0, 147.3, 200.0, 333.3, 495.0):
        measured = yin(tone(np.full(sample_rate, pitch), sample_rate), sample_rate, centres_s)
        np.testing.assert_allclose(measured, pitch, rtol=0.01)


def test_a_missing_fundamental_is_heard_all_the_same():
    measured = yin(tone(np.full(16000, 150.0), 16000, range(2, 8)), 16000, np.arange(0.1, 0.9, 0.01))
    np.testing.assert_allclose(measured, 150, rtol=0.01)


def test_silence_offset_noise_and_what_nobody_hears_are_unvoiced():
    noise = np.random.default_rng(0).standard_normal(16000)
    quiet = 1e-3 * tone(np.full(16000, 150.0), 16000)
    for wav in (np.zeros(16000), np.full(16000, 0.3), 0.1 * noise, quiet):
        assert np.isnan(log_f0(wav, 16000, 320, 50)).all()


def test_no_frame_of_a_moving_voice_is_an_octave_off_where_the_deepest_dip_alone_often_is():
    for seed in range(3):
        rng, t = np.random.default_rng(seed), np.arange(16000) / 8000
        truth = 120 + 30 * rng.random() + 20 * np.sin(2 * np.pi * 0.7 * t + rng.random())  # as speech_like draws it
        wav, centres = speech_like(16000, seed=seed), np.arange(400, 15600, 80)
        measured = yin(wav, 8000, centres / 8000)
        voiced = np.isfinite(measured)
        assert voiced.mean() > 0.3
        assert np.abs(measured / truth[centres] - 1)[voiced].max() < 0.05

    steady = tone(np.full(16000, 320.0), 16000) + 0.003 * rng.standard_normal(16000)
    centres_s = np.arange(0.1, 0.9, 0.01)
    np.testing.assert_allclose(yin(steady, 16000, centres_s), 320, rtol=0.01)
    segments = np.stack([steady[round(16000 * c) :][: 400 + 267] for c in centres_s])
    deepest = 16000 / (_difference(segments, 400)[:, 32:].argmin(1) + 32)
    assert (np.abs(deepest / 320 - 1) > 0.3).mean() > 0.3


def test_the_difference_function_is_that_of_the_paper():
    segments, window = np.random.default_rng(1).standard_normal((3, 50)), 20
    expected = [[np.sum((x[:window] - x[lag : lag + window]) ** 2) for lag in range(31)] for x in segments]
    np.testing.assert_allclose(_difference(segments, window), expected, atol=1e-9)


@pytest.mark.parametrize("hop_length", [320, 640, 1280])
def test_frames_tell_the_pitch_at_their_centre(hop_length):
    t = np.arange(32000) / 16000
    pitch = 100 + 50 * t
    measured = np.exp(log_f0(tone(pitch, 16000), 16000, hop_length, 32000 // hop_length))
    inner = slice(2, -2)
    expected = 100 + 50 * (np.arange(len(measured)) + 0.5) * hop_length / 16000
    np.testing.assert_allclose(measured[inner], expected[inner], rtol=0.005)
    if hop_length == 1280:
        late = 100 + 50 * (np.arange(len(measured)) + 1) * hop_length / 16000  # counted to the frames' ends
        assert np.abs(measured / late - 1)[inner].min() > 0.005


def test_a_frame_is_voiced_where_half_of_it_is():
    wav = tone(np.full(16000, 150.0), 16000)
    wav[: 1280 * 6] = 0
    measured = log_f0(wav, 16000, 1280, 12)
    assert np.isnan(measured[:5]).all() and np.isfinite(measured[7:]).all()
    np.testing.assert_allclose(np.exp(measured[8:11]), 150, rtol=0.01)


def test_nothing_asked_is_nothing_measured_and_times_beyond_the_end_are_silent():
    assert log_f0(np.zeros(10), 16000, 320, 0).shape == (0,)
    assert np.isnan(yin(tone(np.full(8000, 150.0), 8000), 8000, np.array([-1.0, 5.0]))).all()


def test_the_cosine_of_pitch_vectors_tells_how_far_apart_two_pitches_are():
    f0 = np.array([100, 100 * 2 ** (2 / 12), 100 * 2 ** (4 / 12), 200, np.nan])
    vectors = pitch_vectors(f0)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(vectors @ vectors[0], [1, np.exp(-4 / 16), np.exp(-1), 0, 0], atol=0.02)
    assert vectors[4] @ vectors[4] == 1 and not vectors[:4, -1].any()
