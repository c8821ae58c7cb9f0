"""The loss on Whisper's hidden states, against transformers' own extractor and encoder."""

import numpy as np
import pytest
import torch
from conftest import speech_like, tiny_config
from transformers import (
    EncodecConfig,
    EncodecFeatureExtractor,
    EncodecModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from codec.config import phase_config
from codec.watch import CodebookWatch
from codec.whisper import WhisperLoss
from train_codec_gan import build, train_step


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Whisper that takes 0.8 s."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("whisper")
    config = WhisperConfig(
        d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, init_std=0.3, max_source_positions=40,
    )  # fmt: skip
    WhisperModel(config).save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    return folder


def speech(n_samples: int, rate: int, n: int = 1) -> torch.Tensor:
    return torch.stack([torch.from_numpy(speech_like(n_samples, rate, seed=i)).float() for i in range(n)])[:, None]


def tones(rate: int) -> torch.Tensor:
    t = torch.arange(round(0.8 * rate)) / rate
    return sum(torch.sin(2 * torch.pi * f * t + f) for f in (220, 470, 1330, 2900, 6100))[None, None] / 10


def test_log_mel_is_the_extractors_and_at_another_rate_nearly_so(folder):
    extractor = WhisperFeatureExtractor()
    wav = speech(12800, 16000)
    theirs = torch.from_numpy(extractor(wav[0, 0].numpy(), sampling_rate=16000)["input_features"])[..., :78]
    loss = WhisperLoss(folder, (0,), 16000)
    ours = loss.log_mel(wav)
    assert ours.shape == (1, 80, 80)
    torch.testing.assert_close((ours.maximum(ours.amax() - 8) + 4)[..., :78] / 4, theirs, atol=1e-4, rtol=0)
    at_24k, at_16k = (WhisperLoss(folder, (0,), rate).log_mel(tones(rate))[..., 2:-2] for rate in (24000, 16000))
    loud = at_16k > at_16k.amax() - 4
    assert (at_24k - at_16k)[loud].abs().max() < 0.02
    low = WhisperLoss(folder, (0,), 8000).log_mel(speech(6400, 8000))
    above = loss.filters[:101].sum(0) == 0  # bands above 4 kHz: there is nothing
    assert low.shape == (1, 80, 80) and above.sum() > 10 and (low[:, above] == -10).all() and (low[:, ~above] > -10).any()


def test_states_are_the_encoders_own(folder):
    wav = speech(12800, 16000)
    loss = WhisperLoss(folder, (0, 1, 2), 16000)
    mel = loss.log_mel(wav)
    with torch.no_grad():
        encoder = WhisperModel.from_pretrained(folder).get_encoder().eval()
        own = encoder((mel.maximum(mel.amax() - 8) + 4) / 4, output_hidden_states=True)
    ours = loss.states(mel, mel.amax())
    assert len(ours) == 3 and ours[0].shape == (1, 40, 16)
    for state, expected in zip(ours, [*own.hidden_states[:2], own.last_hidden_state]):
        torch.testing.assert_close(state, expected)


def test_a_batch_is_put_together_up_to_what_whisper_takes(folder):
    loss = WhisperLoss(folder, (2,), 16000)
    mel = loss.log_mel(speech(3200, 16000, n=6))  # 10 frames of states each: 4 would fit, 3 divide 6
    with torch.no_grad():
        (states,) = loss.states(mel, mel.amax())
        (alone,) = loss.states(torch.cat([*mel[3:]], -1)[None], mel.amax())
    assert states.shape == (2, 30, 16)
    torch.testing.assert_close(states[1:], alone)
    (long,) = loss.states(loss.log_mel(speech(32000, 16000)), mel.amax())
    assert long.shape == (1, 40, 16)  # the rest is not heard


@pytest.mark.parametrize("bf16", [False, True])
def test_distance_is_zero_for_equals_in_units_of_spread_and_its_gradient_reaches_the_output_alone(folder, bf16):
    loss = WhisperLoss(folder, (1, 2), 24000, bf16)
    wav, noise = speech(4800, 24000, n=4), 0.01 * torch.randn(4, 1, 4800)
    assert loss(wav, wav) == 0
    outputs = [(wav + scale * noise).requires_grad_() for scale in (1, 10)]
    near, far = (loss(wav, output) for output in outputs)
    assert 0 < near < far < 6
    far.backward()
    assert outputs[1].grad.isfinite().all() and outputs[1].grad.any()
    assert not any(p.requires_grad for p in loss.parameters())
    alone = WhisperLoss(folder, (1,), 24000, bf16)
    top = alone.log_mel(wav).amax()
    state, other = (alone.states(alone.log_mel(x), top)[0].flatten(0, 1).detach().numpy() for x in (wav, outputs[1]))
    by_hand = (np.abs(state - other) / state.std(0, ddof=1)).mean()
    assert alone(wav, outputs[1]).item() == pytest.approx(by_hand, rel=1e-3)


@pytest.mark.parametrize("layers", [(), (3,), (-1,)])
def test_layers_that_are_not_there_are_refused(folder, layers):
    with pytest.raises(ValueError, match=r"losses.whisper_layers=\[.*\], expected some of 0 to 2"):
        WhisperLoss(folder, layers, 16000)


def test_what_is_no_whisper_is_refused(folder, tmp_path):
    EncodecModel(EncodecConfig(num_filters=4, hidden_size=8, codebook_dim=8, codebook_size=16)).save_pretrained(tmp_path)
    EncodecFeatureExtractor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a model of type 'encodec', expected whisper"):
        WhisperLoss(str(tmp_path), (1,), 16000)
    with pytest.raises(ValueError, match="losses.whisper_model=.*cannot be loaded; .*teachers.py.*AutoModel did not load it"):
        WhisperLoss(str(tmp_path / "none"), (1,), 16000)
    with pytest.raises(ValueError, match="loss_weights.whisper without losses.whisper_model"):
        tiny_config(["loss_weights.whisper=1.0"])
    assert not tiny_config(["phases=[{name: a, steps: 1, set: {loss_weights.whisper: 0.0}}]"]).losses.whisper_model
    with pytest.raises(ValueError, match="data.segment_samples=700, loss_weights.whisper wants 0.1 s or more, 800 samples"):
        tiny_config(["loss_weights.whisper=1.0", "losses.whisper_model=x", "data.segment_samples=700"])


def test_it_trains_and_the_adversary_is_still_measured_against_the_spectra(folder):
    logs = []
    for overrides in (["loss_weights.whisper=1.0", f"losses.whisper_model={folder}", "losses.whisper_layers=[1,2]"], []):
        config = tiny_config(overrides)
        t = build(config, torch.device("cpu"))
        before = {name: p.clone() for name, p in t.codec.named_parameters()}
        logs.append(train_step(speech(2000, 8000, n=4), t, phase_config(config, 1), 0, watch=CodebookWatch()))
        assert any(not p.equal(before[name]) for name, p in t.codec.named_parameters())
    with_it, without = logs
    assert with_it["whisper"] > 0 and with_it["grad_out_whisper"] > 0 and "whisper" not in without
    assert with_it["adversary_ratio"] == without["adversary_ratio"] and with_it["grad_norm_g"] != without["grad_norm_g"]
