import builtins
import math

import numpy as np
import pytest
import torch

from codec import metrics
from codec.spectral import mel_filterbank


@pytest.fixture
def wav():
    return 0.1 * torch.randn(3, 1, 16000, generator=torch.Generator().manual_seed(0))


def speech_like(n_samples, sample_rate):
    """Harmonics with syllables: enough for PESQ and STOI to find speech."""
    t = np.arange(n_samples) / sample_rate
    voice = sum(np.sin(2 * np.pi * 130 * k * t) / k for k in range(1, 20))
    wav = 0.1 * voice * np.clip(np.sin(2 * np.pi * 3 * t), 0, None)
    noise = np.random.default_rng(0).standard_normal(n_samples)
    return torch.tensor(wav + 1e-3 * noise, dtype=torch.float32)[None, None]


def test_snr_is_that_of_the_noise_added(wav):
    noise = torch.randn_like(wav)
    noise *= wav.norm() / noise.norm() / 10  # 20 dB down
    torch.testing.assert_close(metrics.snr_db(wav, wav + noise), torch.full((3,), 20.0), rtol=0, atol=0.3)
    torch.testing.assert_close(metrics.snr_db(wav, torch.zeros_like(wav)), torch.zeros(3))
    assert (metrics.snr_db(wav, wav) == torch.inf).all()


def test_si_sdr_ignores_level_and_dc_where_snr_does_not(wav):
    worse = wav + 0.01 * torch.randn_like(wav)
    torch.testing.assert_close(
        metrics.si_sdr_db(wav, 0.3 * worse + 0.2), metrics.si_sdr_db(wav, worse), rtol=0, atol=0.01
    )
    assert (metrics.snr_db(wav, 0.3 * worse) < 5).all() and (metrics.si_sdr_db(wav, worse) > 19).all()


def test_si_sdr_matches_a_projection_in_numpy(wav):
    estimate = wav + 0.05 * torch.randn_like(wav)
    for i in range(3):
        a, b = wav[i, 0].double().numpy(), estimate[i, 0].double().numpy()
        a, b = a - a.mean(), b - b.mean()
        target = a * (a @ b) / (a @ a)
        expected = 10 * math.log10((target @ target) / ((b - target) @ (b - target)))
        assert metrics.si_sdr_db(wav, estimate)[i].item() == pytest.approx(expected, abs=1e-3)


def test_amplitude_dc_and_peak_are_plain_arithmetic(wav):
    torch.testing.assert_close(metrics.amplitude_ratio(wav, 0.28 * wav), torch.full((3,), 0.28))
    torch.testing.assert_close(metrics.dc_offset(wav - wav.mean(-1, keepdim=True) - 0.4), torch.full((3,), -0.4))
    assert metrics.peak(-wav)[1] == wav[1].abs().max()


def test_the_level_of_speech_leaves_pauses_out_and_follows_a_gain(wav):
    rate, second = 16000, wav[:1, :, :16000]
    plain = metrics.speech_level_db(second, rate)
    blocks = [second.numpy()[0, 0, start : start + 6400] for start in range(0, 16000 - 6399, 1600)]
    power = np.array([np.square(block, dtype=np.float64).mean() for block in blocks])
    loud = power >= max(10**-1.4 * np.quantile(power, 0.95), 0.1 * power.mean())
    assert plain.item() == pytest.approx(10 * np.log10(power[loud].mean()), abs=1e-3)
    both = torch.cat([second, torch.zeros(1, 1, 3 * rate)], -1)
    assert (metrics.speech_level_db(both, rate) - plain).abs() < 1.0  # of the mean over all it would be 6 dB
    torch.testing.assert_close(metrics.speech_level_db(both / 100, rate), metrics.speech_level_db(both, rate) - 40)
    levels = metrics.speech_level_db(torch.cat([second, second / 10, 0 * second]), rate)
    torch.testing.assert_close(levels, torch.stack([plain[0], plain[0] - 20, torch.tensor(-120.0)]))
    few = 0.1 * torch.tensor([[[1.0, -1, 1, -1, 1, -1]]])
    assert metrics.speech_level_db(few, rate).item() == pytest.approx(-20)  # shorter than a block


def test_noise_between_words_an_offset_and_a_late_beginning_do_not_change_the_level_of_speech():
    rate, rng = 16000, np.random.default_rng(0)
    speech, noise = 0.1 * rng.standard_normal(rate), 0.1 * 10 ** (-15 / 20) * rng.standard_normal(9 * rate)
    level = {name: metrics.speech_level_db(torch.from_numpy(wav).float()[None, None], rate).item() for name, wav in {
        "noisy": np.concatenate([noise[: 4 * rate], speech, noise[4 * rate :]]),  # a gate below the mean says -28.9
        "sparse": np.concatenate([0.01 * noise, 0.01 * noise, 0.01 * noise, speech]),  # the 95th block is a pause: -34.7
        "offset": speech + 0.3,
        "late": np.concatenate([np.zeros(6400), speech[:1500]]),  # whole blocks alone end before it begins: -120
    }.items()}  # fmt: skip
    assert level["noisy"] == pytest.approx(-20, abs=2.5) and level["offset"] == pytest.approx(-20, abs=0.2)
    assert level["sparse"] == pytest.approx(-20, abs=1.5) and -30 < level["late"] < -20


def test_a_silent_reference_has_no_ratio_and_nanmean_leaves_it_out(wav):
    reference = torch.cat([torch.zeros(1, 1, 16000), wav[:1]])
    estimate = torch.cat([wav[1:2], 0.5 * wav[:1]])
    for metric in (metrics.snr_db, metrics.si_sdr_db, metrics.amplitude_ratio):
        values = metric(reference, estimate)
        assert values[0].isnan() and not values[1].isnan()
        assert values.nanmean() == values[1]


def test_metrics_keep_no_graph_and_compute_in_float32(wav):
    estimate = (0.5 * wav).bfloat16().requires_grad_()
    for metric in (metrics.snr_db, metrics.si_sdr_db, metrics.amplitude_ratio):
        value = metric(wav, estimate)
        assert value.dtype == torch.float32 and not value.requires_grad


@pytest.mark.parametrize("sample_rate", [16000, 24000, 44100])
def test_mel_distance_is_zero_for_equals_and_reads_decibels(wav, sample_rate):
    assert (metrics.mel_distance(wav, wav, sample_rate) == 0).all()
    half = metrics.mel_distance(wav, wav / 2, sample_rate)
    torch.testing.assert_close(half, torch.full((3,), 20 * math.log10(2)), rtol=1e-3, atol=0)


def test_mel_distance_stays_finite_in_silence(wav):
    silence = torch.zeros_like(wav)
    assert (metrics.mel_distance(silence, silence, 16000) == 0).all()
    assert metrics.mel_distance(wav, silence, 16000).isfinite().all()


@pytest.mark.parametrize("metric", [metrics.multi_scale_mel_db, metrics.multi_scale_stft_db])
@pytest.mark.parametrize("sample_rate", [8000, 16000, 22050, 48000])
def test_multi_scale_distances_read_decibels_at_every_rate_and_in_silence(wav, metric, sample_rate):
    assert (metric(wav, wav, sample_rate) == 0).all()
    torch.testing.assert_close(metric(wav, wav / 2, sample_rate), torch.full((3,), 20 * math.log10(2)), rtol=0, atol=0.02)
    silence = torch.zeros_like(wav)
    assert (metric(silence, silence, sample_rate) == 0).all() and metric(wav, silence, sample_rate).isfinite().all()


def test_multi_scale_distances_match_a_loop_over_frames_in_numpy(wav):
    estimate = wav + 0.02 * torch.randn_like(wav)
    pair = [x[0, 0].double().numpy()[:4000] for x in (wav, estimate)]
    expected = {"mel": [], "stft": [], "no floor": []}
    for n_fft, n_mels in ((128, 20), (256, 40), (512, 80), (1024, 160)):  # 8, 16, 32, 64 ms at 16 kHz
        window = np.hanning(n_fft + 1)[:-1]
        filters = mel_filterbank(16000, n_fft, n_mels).double().numpy()
        spectra = []
        for x in pair:
            padded = np.pad(x, n_fft // 2, mode="reflect")
            starts = range(0, len(padded) - n_fft + 1, n_fft // 4)
            spectra.append(np.array([np.abs(np.fft.rfft(padded[i : i + n_fft] * window)) / window.sum() for i in starts]))
        for name, floor, matrix in (("stft", 1e-4, np.eye(n_fft // 2 + 1)), ("mel", 1e-4, filters / filters.sum(0)),
                                    ("no floor", 1e-12, np.eye(n_fft // 2 + 1))):  # fmt: skip
            a, b = (20 * np.log10(np.maximum(spectrum @ matrix, floor)) for spectrum in spectra)
            expected[name].append(np.abs(a - b).mean())
    pair = [torch.tensor(x, dtype=torch.float32)[None, None] for x in pair]
    measured = metrics.multi_scale_stft_db(*pair, 16000).item()
    assert measured == pytest.approx(np.mean(expected["stft"]), rel=1e-3)
    assert measured != pytest.approx(np.mean(expected["no floor"]), rel=1e-3)
    assert metrics.multi_scale_mel_db(*pair, 16000).item() == pytest.approx(np.mean(expected["mel"]), rel=1e-3)


def test_codebook_usage_knows_a_collapsed_and_a_uniform_codebook():
    collapsed, uniform = torch.full((2, 32), 5), torch.arange(64).view(2, 32) % 8
    used, perplexity = metrics.codebook_usage(torch.stack([collapsed, uniform], dim=1), codebook_size=16)
    torch.testing.assert_close(used, torch.tensor([1 / 16, 0.5]))
    torch.testing.assert_close(perplexity, torch.tensor([1.0, 8.0]))


def test_perplexity_matches_numpy():
    codes = torch.randint(0, 7, (2, 3, 50), generator=torch.Generator().manual_seed(0))
    _, perplexity = metrics.codebook_usage(codes, 16)
    for level in range(3):
        p = np.unique(codes[:, level].numpy(), return_counts=True)[1] / 100
        assert perplexity[level].item() == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-5)


@pytest.mark.parametrize("kind, border", [("hinge", 0.0), ("bce", 0.0), ("least_squares", 0.5)])
def test_accuracy_counts_the_right_side_of_each_kinds_border(kind, border):
    above, below = torch.tensor([border + 0.1] * 3 + [border - 0.1]), torch.full((2, 2), border - 0.1)
    acc_real, acc_fake = metrics.discriminator_accuracy([above], [below], kind)
    assert (acc_real, acc_fake) == (0.75, 1.0)
    undecided = torch.full((5,), border)
    assert metrics.discriminator_accuracy([undecided], [undecided], kind) == (0.5, 0.5)


def test_pesq_and_stoi_prefer_the_better_sound():
    pytest.importorskip("pesq")
    pytest.importorskip("pystoi")
    wav = speech_like(24000 * 2, 24000)
    noise = torch.randn(wav.shape, generator=torch.Generator().manual_seed(0))
    batch, worse = torch.cat([wav, wav]), torch.cat([wav + 0.001 * noise, wav + 0.1 * noise])
    for metric in (metrics.pesq_wb, metrics.stoi):
        near, far = metric(batch, worse, 24000)
        assert near > far + 0.1


def test_estoi_is_one_for_equals_and_stricter_than_stoi_on_noise():
    pytest.importorskip("pystoi")
    wav = speech_like(32000, 16000)
    noisy = wav + 0.02 * torch.randn(wav.shape, generator=torch.Generator().manual_seed(0))
    assert metrics.stoi(wav, wav, 16000, extended=True).item() == pytest.approx(1, abs=1e-3)
    assert metrics.stoi(wav, noisy, 16000, extended=True) < metrics.stoi(wav, noisy, 16000) - 0.02


def test_pesq_and_stoi_of_silence_or_of_a_moment_are_nan():
    pytest.importorskip("pesq")
    pytest.importorskip("pystoi")
    wav = speech_like(16000, 16000)
    for metric in (metrics.pesq_wb, metrics.stoi):
        assert metric(torch.zeros_like(wav), wav, 16000).isnan().all()
        assert metric(wav[..., :1600], wav[..., :1600], 16000).isnan().all()


@pytest.mark.parametrize("metric, package", [(metrics.pesq_wb, "pesq"), (metrics.stoi, "pystoi")])
def test_a_package_that_is_not_installed_gives_none(monkeypatch, metric, package):
    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name == package:
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert metric(torch.zeros(1, 1, 16000), torch.zeros(1, 1, 16000), 16000) is None


def test_latent_dims_counts_directions_not_axes():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(16, 16)).Q
    latents = torch.randn(500, 5) @ basis[:5] + 3 * basis[9]  # five directions around an offset, along no axis
    assert metrics.latent_dims(latents) == 5
    assert (latents.var(0) > 1e-3 * latents.var(0).mean()).sum() == 16  # what counting axes would say
    assert metrics.latent_dims(torch.randn(500, 16)) == 16
    assert metrics.latent_dims(torch.ones(500, 16)) == 0
    assert metrics.latent_dims(torch.randn(500, 1)) == 1
