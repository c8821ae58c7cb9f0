import numpy as np
import pytest
import torch
from conftest import speech_like

from codec import metrics
from codec.config import EMAQuantizerConfig, LappedConfig, ModelConfig
from codec.lapped import lapped_frames, lapped_window, overlap_add, start_transform
from codec.model import Codec

LENGTH, HOP = 120, 80


def model(latent_dim: int) -> Codec:
    body = LappedConfig("lapped", LENGTH, HOP, 16, 2)
    torch.manual_seed(0)
    return Codec(ModelConfig(8000, latent_dim, body, EMAQuantizerConfig("ema", 6, 64, latent_dim), body)).requires_grad_(False)


def sounds() -> list[torch.Tensor]:
    return [torch.from_numpy(speech_like(24_000, seed=seed)).float()[None, None] for seed in range(4)]


def through_transforms(codec: Codec, wav: torch.Tensor) -> torch.Tensor:
    """Without the networks, the quantizer and tanh."""
    codec.encoder.to_latent.weight.zero_()
    codec.decoder.to_frames.weight.zero_()
    codec.decoder.output = torch.nn.Identity()
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
    codec, wav = model(LENGTH), sounds()[0]
    start_transform(codec.encoder, codec.decoder, [wav])
    assert metrics.snr_db(wav[..., 40:-40], through_transforms(codec, wav)[..., 40:-40]).item() > 60


def test_transform_is_the_principal_components():
    codec = model(12)
    start_transform(codec.encoder, codec.decoder, sounds())
    frames = torch.cat([lapped_frames(wav[:, 0], lapped_window(LENGTH, HOP), HOP)[0] for wav in sounds()]).double().numpy()
    _, singular, components = np.linalg.svd(frames, full_matrices=False)
    ours = codec.encoder.components.double().numpy().T
    np.testing.assert_allclose(ours.T @ ours, components[:12].T @ components[:12], atol=1e-4)
    np.testing.assert_allclose(codec.decoder.transform.weight.numpy(), ours.T, atol=1e-6)
    lost = np.square(frames - frames @ ours.T @ ours).sum()
    np.testing.assert_allclose(lost, np.square(singular[12:]).sum(), rtol=1e-4)
    # the weakest components, which come first from eigh, would keep next to nothing
    assert lost < 0.1 * np.square(frames - frames @ components[-12:].T @ components[-12:]).sum()


def test_a_codec_works_before_it_is_trained():
    wavs = sounds()
    held_out = torch.from_numpy(speech_like(24_000, seed=9)).float()[None, None]
    started, random = model(24), model(24)
    start_transform(started.encoder, started.decoder, wavs)
    for codec in (started, random):
        codec.quantizer.init_codebooks(torch.cat([codec.encoder(wav) for wav in wavs]), 100)
    # the networks' first additions are small: the sound is nearly the transform's and the codebooks' alone
    assert metrics.snr_db(held_out, started.eval()(held_out).wav_hat).item() > 5
    assert metrics.snr_db(held_out, random.eval()(held_out).wav_hat).item() < 1


def test_the_networks_turn_a_latent_and_leave_its_length():
    codec, wav = model(24), sounds()[0]
    start_transform(codec.encoder, codec.decoder, [wav])
    before = codec.encoder(wav)
    torch.nn.init.normal_(codec.encoder.to_latent.weight, std=0.3)
    after = codec.encoder(wav)
    torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1))
    assert torch.cosine_similarity(after, before, dim=1).median() < 0.9


def test_latents_follow_the_root_of_the_level():
    codec, wav = model(24), sounds()[0]
    start_transform(codec.encoder, codec.decoder, [wav])
    loud, quiet = (codec.encoder(gain * wav).norm(dim=1) for gain in (0.5, 0.05))
    middle = loud > loud.median()
    torch.testing.assert_close((loud / quiet)[middle].median(), torch.tensor(10.0).sqrt(), rtol=0.05, atol=0)
    # and the decoder undoes it
    loud, quiet = (metrics.snr_db(gain * wav, through_transforms(codec, gain * wav)).item() for gain in (1, 0.05))
    assert quiet == pytest.approx(loud, abs=0.5)
