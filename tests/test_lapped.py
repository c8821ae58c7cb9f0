import numpy as np
import pytest
import torch
from conftest import speech_like

from codec import metrics
from codec.config import EMAQuantizerConfig, LappedConfig, ModelConfig
from codec.lapped import lapped_frames, lapped_window, overlap_add, start_transform
from codec.model import Codec

LENGTH, HOP, N_ENVELOPE = 120, 80, 4


def model(n_waveform: int, n_fft: int = 320, n_spectra: int = 1) -> Codec:
    body = LappedConfig("lapped", LENGTH, HOP, n_fft, N_ENVELOPE, 16, 2, n_bands=20, n_spectra=n_spectra)
    torch.manual_seed(0)
    dim = n_waveform + N_ENVELOPE
    return Codec(ModelConfig(8000, dim, body, EMAQuantizerConfig("ema", 6, 64, dim), body)).requires_grad_(False)


def sounds(gain: float = 1.0) -> torch.Tensor:
    """[4, 1, T] voices with a hiss above them, which no few numbers a frame can code as a waveform."""
    voices = torch.stack([torch.from_numpy(speech_like(24_000, seed=seed)).float()[None] for seed in range(4)])
    hiss = torch.diff(torch.randn(4, 1, 24_001, generator=torch.Generator().manual_seed(1)))
    return gain * (voices + 0.2 * hiss * voices.abs())


def through_transforms(codec: Codec, wav: torch.Tensor) -> torch.Tensor:
    """Without the networks, the envelope and the quantizer; a tanh at the output would squeeze what is loud."""
    codec.encoder.to_latent.weight.zero_()
    codec.decoder.to_magnitudes.bias.fill_(-30)
    return codec.decoder(codec.encoder(wav))


@pytest.mark.parametrize("length", [82, 120, 160])
def test_overlapping_frames_add_up_to_the_sound(length):
    wav, window = torch.randn(2, 10 * HOP), lapped_window(length, HOP)
    frames = lapped_frames(wav, window, HOP)
    assert frames.shape == (2, 10, length)
    back, flank = overlap_add(frames, window, HOP), (length - HOP) // 2
    torch.testing.assert_close(back[:, flank:-flank], wav[:, flank:-flank])
    # a window applied once only, or one that does not add up, is not the inverse
    assert (overlap_add(frames, torch.ones(length), HOP) - wav)[:, flank:-flank].abs().max() > 0.05


def test_frames_are_centred_on_their_hops():
    wav = torch.zeros(1, 5 * HOP)
    wav[0, 2 * HOP + HOP // 2] = 1
    frames = lapped_frames(wav, lapped_window(LENGTH, HOP), HOP)
    assert frames.nonzero().tolist() == [[0, 2, LENGTH // 2]]


def test_a_transform_to_as_many_numbers_loses_nothing():
    codec, wav = model(LENGTH), sounds()
    start_transform(codec.encoder, codec.decoder, wav)
    inside = slice(LENGTH, -LENGTH)
    assert metrics.snr_db(wav[..., inside], through_transforms(codec, wav)[..., inside]).min() > 60


def test_transform_is_the_principal_components():
    codec, wav = model(12), sounds()
    start_transform(codec.encoder, codec.decoder, wav)
    frames = lapped_frames(wav[:, 0], lapped_window(LENGTH, HOP), HOP).flatten(0, 1).double().numpy()
    _, singular, components = np.linalg.svd(frames, full_matrices=False)
    ours = codec.encoder.components.double().numpy().T
    np.testing.assert_allclose(ours.T @ ours, components[:12].T @ components[:12], atol=1e-4)
    np.testing.assert_allclose(codec.decoder.transform.weight.numpy(), ours.T, atol=1e-6)
    lost = np.square(frames - frames @ ours.T @ ours).sum()
    np.testing.assert_allclose(lost, np.square(singular[12:]).sum(), rtol=1e-4)
    # the weakest components, which come first from eigh, would keep next to nothing
    assert lost < 0.5 * np.square(frames - frames @ components[-12:].T @ components[-12:]).sum()


@pytest.mark.parametrize("n_fft, n_spectra", [(320, 1), (80, 2)])
def test_magnitudes_start_as_the_least_squares_answer_for_what_the_transform_leaves_out(n_fft, n_spectra):
    codec, wav = model(12, n_fft, n_spectra), sounds()
    start_transform(codec.encoder, codec.decoder, wav)
    frames = lapped_frames(wav[:, 0], codec.encoder.window, HOP)
    rest = wav[:, 0] - overlap_add(frames @ codec.encoder.components @ codec.encoder.components.T, codec.encoder.window, HOP)
    hop = HOP // n_spectra
    padded = torch.nn.functional.pad(rest, 2 * ((n_fft - hop) // 2,)).double().numpy()  # each spectrum centred on its hop
    windowed = np.lib.stride_tricks.sliding_window_view(padded, n_fft, axis=1)[:, ::hop] * np.hanning(n_fft + 1)[:-1]
    wanted = np.log(np.abs(np.fft.rfft(windowed)) + 1e-2).reshape(-1, n_spectra * (n_fft // 2 + 1))
    bands = (codec.encoder.bands(wav) - codec.encoder.mean_bands).flatten(0, 1).double().numpy()
    known = np.pad(bands @ codec.encoder.envelopes.double().numpy(), ((0, 0), (0, 1)), constant_values=1.0)
    solution = np.linalg.lstsq(known, wanted, rcond=None)[0]
    np.testing.assert_allclose(codec.decoder.to_magnitudes.weight.numpy().T, solution[:-1], atol=2e-2)
    np.testing.assert_allclose(codec.decoder.to_magnitudes.bias.numpy(), solution[-1], atol=2e-2)
    # the spectrum of the sound itself would put there a second time what the transform has already
    whole = np.abs(codec.encoder.bands(wav).mean().item() - wanted.mean())
    assert whole > 0.5 and solution[-1].mean() == pytest.approx(wanted.mean(), abs=0.05)


@pytest.mark.parametrize("quarter", range(4))
def test_spectra_of_a_frame_follow_each_other(quarter):
    """A hiss of a quarter of a frame is heard by that quarter's bands and comes out where it was.

    Bands laid out before times, spectra in the wrong order, or one of 320 samples, put it elsewhere.
    """
    def of_one_quarter(n_fft: int, n_spectra: int) -> tuple[torch.Tensor, torch.Tensor]:
        codec, hiss = model(1, n_fft, n_spectra), torch.randn(4, 1, 200 * HOP, generator=torch.Generator().manual_seed(2))
        at = torch.rand(4, 1, 800, 1, generator=torch.Generator().manual_seed(3)) < 0.1
        start_transform(codec.encoder, codec.decoder, (hiss.unflatten(2, (800, -1)) * at).flatten(2))
        wav = torch.zeros(1, 1, 9 * HOP)
        there = slice(4 * HOP + quarter * HOP // 4, 4 * HOP + (quarter + 1) * HOP // 4)
        wav[..., there] = hiss[0, 0, : HOP // 4]
        return codec.encoder.bands(wav)[0, 4], codec.decoder(codec.encoder(wav))[0, 0, 4 * HOP : 5 * HOP]

    bands, heard = of_one_quarter(24, 4)
    assert bands.unflatten(0, (4, -1)).mean(1).argmax() == quarter
    shares = heard.square().unflatten(0, (4, -1)).sum(1) / heard.square().sum()
    assert shares.argmax() == quarter and shares[quarter] > 0.5
    _, smeared = of_one_quarter(320, 1)
    assert (smeared.square().unflatten(0, (4, -1)).sum(1) / smeared.square().sum())[quarter] < 0.4


def test_a_codec_works_before_it_is_trained():
    wavs = sounds()
    started, random = model(24), model(24)
    start_transform(started.encoder, started.decoder, wavs[:3])
    for codec in (started, random):
        codec.quantizer.init_codebooks(codec.encoder(wavs[:3]), 100)
    heard = [codec.eval()(wavs[3:]).wav_hat for codec in (started, random)]
    assert metrics.snr_db(wavs[3:], heard[0]).item() > 3 > 1 > metrics.snr_db(wavs[3:], heard[1]).item()
    # the hiss, which the transform cannot code, has its level from the envelope
    hiss = [torch.diff(wav, n=3).square().mean() for wav in (wavs[3:], heard[0], through_transforms(started, wavs[3:]))]
    assert 0.1 < hiss[1] / hiss[0] < 1 and 2 * hiss[2] < hiss[1]


def test_the_networks_turn_a_latent_and_leave_its_length():
    codec, wav = model(24), sounds()
    start_transform(codec.encoder, codec.decoder, wav)
    before = codec.encoder(wav)
    torch.nn.init.normal_(codec.encoder.to_latent.weight, std=0.3)
    after = codec.encoder(wav)
    torch.testing.assert_close(after[:, :24].norm(dim=1), before[:, :24].norm(dim=1))
    assert torch.cosine_similarity(after[:, :24], before[:, :24], dim=1).median() < 0.9
    assert (after - before)[:, 24:].abs().max() <= 2  # two tanh


def test_numbers_for_the_waveform_follow_the_root_of_the_level():
    codec = model(24)
    start_transform(codec.encoder, codec.decoder, sounds())
    codec.encoder.to_latent.weight.zero_()
    loud, quiet = (codec.encoder(sounds(gain))[:, :24].norm(dim=1) for gain in (0.5, 0.05))
    middle = loud > loud.median()
    torch.testing.assert_close((loud / quiet)[middle].median(), torch.tensor(10.0).sqrt(), rtol=0.05, atol=0)
    # and the decoder undoes it
    loud, quiet = (metrics.snr_db(sounds(gain), through_transforms(codec, sounds(gain))).mean().item() for gain in (1, 0.05))
    assert quiet == pytest.approx(loud, abs=0.5)
