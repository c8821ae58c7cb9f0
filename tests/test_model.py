import math
from dataclasses import replace

import pytest
import torch
from conftest import speech_like, tiny_config
from safetensors.torch import load_file, save_file

from codec.checkpoint import save_checkpoint
from codec.config import (
    ConvDecoderConfig,
    ConvEncoderConfig,
    EMAQuantizerConfig,
    FactorizedQuantizerConfig,
    LappedConfig,
    ModelConfig,
    SpectralConfig,
    TransformerConfig,
    dump_config,
)
from codec.layers import remove_weight_norm
from codec.model import Codec

EMA = EMAQuantizerConfig("ema", 3, 16, 8)
LAPPED = LappedConfig("lapped", 30, 20, 80, 4, 16, 2, n_bands=10)
SHORT = replace(LAPPED, n_fft=16, n_spectra=4)
FACTORIZED = FactorizedQuantizerConfig("factorized", 3, 16, 4)
TRANSFORMER = TransformerConfig(n_layers=2, n_heads=2, ff_dim=16, window=30, layer_scale=0.5)
SEANET = {"causal": True, "activation": "elu", "dilations": (1,), "residual_kernel_size": 3, "residual_compress": 2}


def conv_model(strides, quantizer=EMA, pad_input=True, decoder=None, **both) -> ModelConfig:
    """A small convolutional model; `both` goes to encoder and decoder."""
    return ModelConfig(8000, 12, ConvEncoderConfig(type="conv", encoder_dim=4, strides=strides, **both), quantizer,
                       ConvDecoderConfig(type="conv", decoder_dim=16, strides=strides[::-1], **both | (decoder or {})),
                       pad_input)  # fmt: skip


MODELS = {
    "conv": conv_model((2, 5)),
    "conv, odd strides": conv_model((3, 5)),
    "conv, odd strides as DAC": conv_model((3, 5), decoder={"output": "tanh", "output_padding": False}),
    "conv, causal": conv_model((3, 4), causal=True, dilations=(1, 3)),
    "EnCodec": conv_model((2, 5), pad_input=False, decoder={"output": "linear"}, pad_mode="reflect", lstm_layers=2,
                          residual_conv_shortcut=True, **SEANET),
    "Mimi": conv_model((2, 5), replace(EMA, n_semantic=1), False, {"output": "linear"}, transformer=TRANSFORMER,
                       latent_stride=2, weight_norm=False, **SEANET),
    "Amy": conv_model((2, 5), replace(EMA, n_codebooks=4, n_semantic=1, n_prosodic=1, semantic_blocks=2), False,
                      {"output": "linear"}, transformer=TRANSFORMER, latent_stride=2, weight_norm=False, **SEANET),
    "semantic blocks": conv_model((2, 5), replace(EMA, n_semantic=1, semantic_blocks=1)),
    "spectral": ModelConfig(8000, 12, SpectralConfig("spectral", 80, 20, 16, 2), EMA,
                            SpectralConfig("spectral", 80, 20, 16, 2)),
    "lapped": ModelConfig(8000, 12, LAPPED, EMA, LAPPED),
    "lapped, four spectra": ModelConfig(8000, 12, SHORT, EMA, SHORT),
    "factorised": conv_model((2, 5), FACTORIZED),
}  # fmt: skip
all_models = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())


def make(config: ModelConfig) -> Codec:
    """An untrained codec whose latents vary with the input: no biases in front of the lookup, k-means codebooks.

    The encoder is in float64, so that a change of batch or chunk cannot flip a code by rounding.
    """
    torch.manual_seed(0)
    codec = Codec(config).eval().requires_grad_(False)
    codec.encoder.double()
    for name, parameter in [*codec.encoder.named_parameters(), *codec.quantizer.named_parameters()]:
        if name.endswith("bias"):
            parameter.zero_()
        elif name.endswith("layer_scale"):  # of semantic blocks, which start at 0
            parameter.fill_(0.5)
    if config.quantizer.type == "ema":
        codec.quantizer.init_codebooks(codec.encoder(speech(7920).double()).float(), 50)
    return codec


def speech(n_samples: int) -> torch.Tensor:
    return torch.from_numpy(speech_like(n_samples))[None, None].double()


@all_models
@pytest.mark.parametrize("n_samples", [1, 7, 300, 1001])
def test_any_length_comes_back_at_its_length(config, n_samples):
    codec = make(config)
    wav = speech(1001)[..., :n_samples]
    out = codec(wav)
    n_frames = -(-n_samples // codec.hop_length)
    assert out.wav_hat.shape == wav.shape and out.quantized.codes.shape == (1, codec.n_codebooks, n_frames)
    assert out.z.shape == (1, 12, n_frames) and out.wav_hat.isfinite().all()
    codes = codec.encode(wav)
    assert torch.equal(codes, out.quantized.codes)
    torch.testing.assert_close(codec.decode(codes, n_samples), out.wav_hat)


@all_models
@pytest.mark.parametrize("chunk_frames", [17, 50, 1000])
def test_codes_and_sound_do_not_depend_on_the_chunk_size(config, chunk_frames):
    codec, wav = make(config), speech(4003)
    codes = codec.encode(wav)
    assert torch.equal(codec.encode_long(wav, chunk_frames=chunk_frames), codes)
    torch.testing.assert_close(
        codec.decode_long(codes, 4003, chunk_frames), codec.decode(codes, 4003), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["EnCodec", "Mimi"])
def test_chunks_that_start_the_lstm_or_transformer_anew_give_another_latent(name):
    codec, wav = make(MODELS[name]), speech(4000)
    context = 20 * codec.hop_length * math.ceil(codec.encoder.reach_samples / (20 * codec.hop_length))
    part = codec.encoder(wav[..., 2000 - context :])[..., context // codec.hop_length :]
    assert (codec.encoder(wav)[..., 2000 // codec.hop_length :] - part).abs().max() > 1e-6


@all_models
def test_chunks_without_context_give_other_codes(config):
    codec, wav = make(config), speech(4003)
    step = 17 * codec.hop_length
    naive = torch.cat([codec.encode(wav[..., i : i + step]) for i in range(0, 4003, step)], -1)
    assert not torch.equal(naive, codec.encode(wav))


@all_models
def test_an_item_codes_the_same_alone_and_in_a_batch(config):
    codec = make(config)
    batch = torch.cat([speech(1500), speech(3000)[..., 1500:], 0.1 * speech(1500)])
    together = codec.encode(batch)
    alone = torch.cat([codec.encode(item[None]) for item in batch])
    assert torch.equal(together, alone)


@all_models
def test_receptive_field_is_what_gradients_reach(config):
    codec = make(config)
    frames = 2 * int(codec.encoder.reach_samples / codec.hop_length + codec.decoder.reach_frames) + 21
    wav = torch.randn(1, 1, frames * codec.hop_length, dtype=torch.float64, requires_grad=True)
    x = (codec.encoder.local if len(codec.encoder.tail) else codec.encoder)(wav)
    x[0, :, x.shape[-1] // 2].sum().backward()
    reached = wav.grad[0, 0].nonzero().flatten()
    reach = int(reached[-1] - reached[0])
    assert reach <= codec.encoder.reach_samples < reach + 3 * codec.hop_length
    z = codec.decoder.head(torch.randn(1, 12, frames)).detach().requires_grad_()
    wav_hat = (codec.decoder.local if len(codec.decoder.head) else codec.decoder)(z)
    wav_hat[0, 0, wav_hat.shape[-1] // 2].backward()
    reached = z.grad[0].abs().sum(0).nonzero().flatten()
    reach = int(reached[-1] - reached[0])
    assert reach - 1 <= codec.decoder.reach_frames < reach + 3


def test_receptive_field_counts_what_the_transformer_and_the_lstm_see():
    assert make(MODELS["EnCodec"]).receptive_field_samples == math.inf
    codec = make(MODELS["Mimi"])
    n_samples = 100 * codec.hop_length
    wav = torch.randn(1, 1, n_samples, dtype=torch.float64, requires_grad=True)
    codec.encoder(wav)[0, :, -1].sum().backward()
    reached = n_samples - int(wav.grad[0, 0].nonzero()[0])
    assert reached <= codec.receptive_field_samples < reached + 3 * codec.hop_length
    # the local part alone says far too little
    assert reached > codec.encoder.reach_samples + 20 * codec.hop_length


@pytest.mark.parametrize("name", ["conv, causal", "EnCodec", "Mimi"])
def test_a_causal_codec_codes_the_past_without_the_future(name):
    codec, wav = make(MODELS[name]), speech(1200)
    n_frames = 600 // codec.hop_length
    changed = wav.clone()
    changed[..., 600:] = 0.3
    assert torch.equal(codec.encode(wav)[..., :n_frames], codec.encode(changed)[..., :n_frames])
    codes = codec.encode(wav)
    other = codes.clone()
    other[..., n_frames:] = 0
    torch.testing.assert_close(codec.decode(codes)[..., :600], codec.decode(other)[..., :600])
    assert not torch.equal(make(MODELS["conv"]).encode(wav)[..., :60], make(MODELS["conv"]).encode(changed)[..., :60])


@all_models
def test_every_parameter_takes_part(config):
    torch.manual_seed(0)
    codec = Codec(config)
    for name, parameter in codec.quantizer.named_parameters():
        if name.endswith("layer_scale"):  # 0 at first: what it scales gets its gradient from the second update on
            torch.nn.init.constant_(parameter, 0.5)
    out = codec(speech(1000).float())
    (out.wav_hat.square().mean() + out.quantized.commit + out.quantized.codebook).backward()
    assert [name for name, p in codec.named_parameters() if p.grad is None or not p.grad.any()] == []


@all_models
def test_the_quantizer_runs_in_float32_under_autocast(config):
    codec = make(config)
    with torch.autocast("cpu", torch.bfloat16):
        out = codec(speech(1000))
    assert out.quantized.z_q.dtype == torch.float32 and out.wav_hat.dtype == torch.float32
    assert torch.isfinite(out.wav_hat).all()


@all_models
def test_folding_weight_norm_changes_neither_codes_nor_sound(config):
    codec, wav = make(config), speech(1000)
    before = codec(wav)
    remove_weight_norm(codec)
    after = codec(wav)
    assert torch.equal(before.quantized.codes, after.quantized.codes)
    torch.testing.assert_close(before.wav_hat, after.wav_hat, rtol=1e-4, atol=1e-6)


def test_bitrate_and_frame_rate_follow_from_the_config():
    codec = make(replace(MODELS["conv"], sample_rate=24000))
    assert codec.frame_rate_hz == 2400 and codec.bitrate_kbps == pytest.approx(2400 * 3 * 4 / 1000)


@pytest.mark.parametrize("shape", [(1, 2, 100), (100,), (1, 1, 0)])
def test_a_wrong_input_shape_is_named(shape):
    with pytest.raises(ValueError, match=r"expected \[B, 1, T\]"):
        make(MODELS["conv"]).encode(torch.zeros(shape))


def save(tmp_path, **changes):
    config = tiny_config()
    codec = Codec(config.model)
    save_checkpoint(tmp_path, 5, {"model": codec.state_dict()}, {"step": 5}, dump_config(config), best=True, keep_last=1)
    return codec.eval(), tmp_path / "checkpoints" / "step_00000005"


def test_a_saved_codec_loads_with_the_same_codes_sound_and_id(tmp_path):
    codec, folder = save(tmp_path)
    for path in (tmp_path, folder):
        loaded = Codec.from_pretrained(path)
        assert not loaded.training and loaded.model_id == codec.model_id
        assert torch.equal(loaded.encode(speech(999).float()), codec.encode(speech(999).float()))
    other = Codec(tiny_config().model)
    assert other.model_id != codec.model_id


def test_a_checkpoint_of_another_config_or_without_one_is_refused_in_one_line(tmp_path):
    _, folder = save(tmp_path)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("codebook_size: 16", "codebook_size: 32"))
    with pytest.raises(ValueError, match="codebooks") as error:
        Codec.from_pretrained(folder)
    assert "\n" not in str(error.value)
    (folder / "config.yaml").write_text(config)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("quantizer.ema_sum")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="quantizer.ema_sum"):
        Codec.from_pretrained(folder)
