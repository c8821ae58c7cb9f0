"""The paths that inference takes on the CPU compute what the training paths compute, and leave their inputs alone."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config
from torch import nn

from codec.config import ConvEncoderConfig, EMAQuantizerConfig, FactorizedQuantizerConfig
from codec.layers import (
    PaddedConv1d,
    PaddedConvTranspose1d,
    ResidualUnit,
    channels_last,
    conv1d_inference,
    conv_transpose1d_inference,
    snake,
)
from codec.model import Codec
from codec.rvq import build_quantizer

BODIES = {
    "as DAC": [],
    "as EnCodec": ["causal=true", "pad_mode=reflect", "activation=elu", "residual_conv_shortcut=true",
                   "residual_compress=2", "residual_kernel_size=3", "lstm_layers=1"],
    "as Mimi": ["causal=true", "activation=elu", "latent_stride=2", "residual_kernel_size=3",
                "transformer={n_layers: 1, n_heads: 2, ff_dim: 32, window: 8}"],
}  # fmt: skip


def assert_close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_frames", [2, 5, 13, 40, 63], ids=lambda n: f"{n} frames")
@pytest.mark.parametrize("pad_mode", ["not causal", "zeros", "reflect", "replicate"])
@pytest.mark.parametrize("kernel_size, stride, dilation", [(7, 1, 1), (3, 1, 4), (1, 1, 1), (4, 2, 1), (10, 5, 1)])
@pytest.mark.parametrize("c_in, c_out", [(1, 4), (4, 6), (6, 1)])
def test_padded_convolutions_give_at_inference_what_they_give_in_training(
    c_in, c_out, kernel_size, stride, dilation, pad_mode, n_frames
):
    causal = pad_mode != "not causal"
    n_samples = n_frames if causal else -(-n_frames // stride) * stride
    layer = PaddedConv1d(c_in, c_out, kernel_size, stride, dilation, causal, pad_mode if causal else "zeros")
    x = torch.randn(2, c_in, n_samples)
    for memory in (x, channels_last(x)):
        assert_close(layer.eval()(memory), layer.train()(x))


@pytest.mark.parametrize("n_frames", [1, 3, 40], ids=lambda n: f"{n} frames")
@pytest.mark.parametrize("output_padding", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("stride", [2, 3, 5, 8])
def test_transposed_convolutions_give_at_inference_what_they_give_in_training(stride, causal, output_padding, n_frames):
    layer = PaddedConvTranspose1d(6, 4, stride, causal, output_padding=output_padding)
    x = torch.randn(2, 6, n_frames)
    for memory in (x, channels_last(x)):
        assert_close(layer.eval()(memory), layer.train()(x))


def test_halves_of_a_transposed_kernel_must_change_places():
    conv, x = nn.ConvTranspose1d(2, 3, 8, 4), torch.randn(1, 2, 20)
    assert_close(conv_transpose1d_inference(x, conv), conv(x))
    swapped = conv.weight.unflatten(2, (2, 4)).permute(3, 1, 0, 2).flatten(0, 1)  # not flipped: time runs backward
    y = F.conv1d(x, swapped, conv.bias.repeat(4), padding=1).transpose(1, 2).unflatten(2, (4, -1)).flatten(1, 2)
    assert not torch.allclose(y.transpose(1, 2), conv(x), atol=1e-2)


def test_reflection_must_be_put_right_in_the_first_frames():
    layer = PaddedConv1d(4, 4, 7, causal=True, pad_mode="reflect").eval()
    x = torch.randn(1, 4, 50)
    expected = layer.train()(x)
    assert_close(layer.eval()(x), expected)
    zeros = conv1d_inference(x, layer.conv, 6)[..., :50]  # the bulk alone, which pads with zeros
    assert_close(zeros[..., 6:], expected[..., 6:])
    assert not torch.allclose(zeros[..., :6], expected[..., :6], atol=1e-2)


def test_channels_stay_last_in_memory_from_layer_to_layer():
    x = torch.randn(2, 4, 60)
    y = conv1d_inference(x, nn.Conv1d(4, 6, 3), 1)
    assert channels_last(y).data_ptr() == y.data_ptr()  # the next layer copies nothing
    z = snake(y, torch.ones(1, 6, 1))
    assert channels_last(z).data_ptr() == z.data_ptr()


@pytest.mark.parametrize("memory", [torch.clone, channels_last], ids=["channels first", "channels last"])
def test_snake_leaves_its_input_alone(memory):
    x = memory(torch.randn(2, 6, 50))
    before, alpha = x.clone(), torch.rand(1, 6, 1) + 0.1
    torch.testing.assert_close(snake(x, alpha), x + (alpha * x).sin().square() / alpha)
    assert torch.equal(x, before)


@pytest.mark.parametrize("activation", ["snake", "elu"])
@pytest.mark.parametrize("shortcut", [True, False])
def test_a_residual_unit_leaves_its_input_alone(activation, shortcut):
    config = ConvEncoderConfig(type="conv", strides=(2,), encoder_dim=4, activation=activation, residual_conv_shortcut=shortcut)
    unit, x = ResidualUnit(4, 3, config), torch.randn(2, 4, 60)
    before, expected = x.clone(), unit.train()(x)
    with torch.inference_mode():
        assert_close(unit.eval()(x), expected)
        assert torch.equal(x, before)
        if activation == "elu":
            unit.block[0].inplace = True  # as the other activations of a body are
            unit(x)
            assert not torch.equal(x, before)


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_codec_computes_the_same_in_training_and_at_inference_with_gradients_in_both(body):
    decoder = [item for item in body if "lstm" not in item]
    overrides = [f"model.{part}.{item}" for part, items in (("encoder", body), ("decoder", decoder)) for item in items]
    codec = Codec(tiny_config(overrides).model)
    wav, results = torch.randn(2, 1, 1600), []
    for mode in (True, False):
        codec.train(mode).zero_grad()
        z = codec.encoder(wav)
        wav_hat = codec.decoder(z)
        (wav_hat.square().mean() + z.square().mean()).backward()
        results.append([z, wav_hat, *[p.grad for p in (*codec.encoder.parameters(), *codec.decoder.parameters())]])
    for trained, inferred in zip(*results):
        assert_close(inferred, trained)


@pytest.mark.parametrize(
    "config",
    [
        EMAQuantizerConfig("ema", 4, 16, 8),
        EMAQuantizerConfig("ema", 4, 16, 8, n_semantic=2),
        FactorizedQuantizerConfig("factorized", 4, 16, 4),
    ],
    ids=["EMA", "split", "factorized"],
)
def test_encode_gives_the_codes_of_forward_at_every_bitrate(config):
    quantizer, z = build_quantizer(config, 12).eval(), torch.randn(2, 12, 50)
    for n in (None, 1, 2, 3, 4):
        assert torch.equal(quantizer.encode(z, n), quantizer(z, n).codes)
