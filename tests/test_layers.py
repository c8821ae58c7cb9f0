import numpy as np
import pytest
import torch
from torch import nn
from transformers import EncodecConfig, MimiConfig
from transformers.models.encodec.modeling_encodec import EncodecConv1d
from transformers.models.mimi.modeling_mimi import MimiTransformerModel, apply_rotary_pos_emb

from codec.config import ConvBodyConfig, TransformerConfig
from codec.decoder import ScaledTanh
from codec.layers import (
    PaddedConv1d,
    PaddedConvTranspose1d,
    ResidualUnit,
    Transformer,
    WideConv1d,
    WideConvTranspose1d,
    istft_frames,
    remove_weight_norm,
    rotate,
    snake,
    stft_frames,
    windowed_attention,
)


def body(**changes) -> ConvBodyConfig:
    return ConvBodyConfig(type="conv", strides=(2,), **changes)


def plain_snake(x, alpha):
    return x + torch.sin(alpha * x) ** 2 / alpha


def test_fused_snake_has_the_value_and_both_gradients_of_the_plain_formula():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 40, requires_grad=True)
    alpha = (torch.rand(1, 5, 1) * 3 + 0.1).requires_grad_()
    weight = torch.randn(2, 5, 40)
    fused = torch.autograd.grad((snake(x, alpha) * weight).sum(), (x, alpha))
    plain = torch.autograd.grad((plain_snake(x, alpha) * weight).sum(), (x, alpha))
    torch.testing.assert_close(snake(x, alpha), plain_snake(x, alpha))
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)


def test_fused_snake_keeps_its_input_and_output_only_where_the_plain_one_keeps_more():
    x, alpha = torch.randn(1, 3, 1000, requires_grad=True), torch.ones(1, 3, 1, requires_grad=True)

    def tensors_kept(function):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t}) or t, lambda t: t):
            y = function(x, alpha)
        return [t for t in kept.values() if t.numel() == x.numel()], y

    kept, y = tensors_kept(snake)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), y.data_ptr()}
    kept, _ = tensors_kept(plain_snake)
    assert len(kept) >= 3


def test_snake_gradients_are_accurate_in_bfloat16_too():
    torch.manual_seed(0)
    x = (4 * torch.randn(2, 5, 400)).bfloat16().requires_grad_()
    alpha = (torch.rand(1, 5, 1) + 0.5).requires_grad_()
    fused = torch.autograd.grad(snake(x, alpha).float().sum(), (x, alpha))
    x32 = x.detach().float().requires_grad_()
    plain = torch.autograd.grad(plain_snake(x32, alpha).sum(), (x32, alpha))
    torch.testing.assert_close(fused[0].float(), plain[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(fused[1], plain[1], rtol=1e-3, atol=1e-2)


def test_snake_returns_bfloat16_for_bfloat16_and_is_accurate_for_large_inputs():
    x, alpha = torch.linspace(-40, 40, 999).view(1, 1, -1), torch.full((1, 1, 1), 3.0)
    y = snake(x.bfloat16(), alpha)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), plain_snake(x.bfloat16().float(), alpha), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("causal", [False, True], ids=["symmetric", "causal"])
@pytest.mark.parametrize("stride", [1, 2, 3, 4, 5, 8])
def test_strided_and_transposed_convolutions_give_exact_lengths(stride, causal):
    x = torch.randn(1, 2, 15 * stride)
    down = PaddedConv1d(2, 3, 2 * stride if stride > 1 else 7, stride, causal=causal)(x)
    assert down.shape == (1, 3, 15)
    if stride > 1:
        assert PaddedConvTranspose1d(3, 2, stride, causal)(down).shape == (1, 2, 15 * stride)


@pytest.mark.parametrize(
    "module",
    [PaddedConv1d(2, 2, 7, dilation=3, causal=True), PaddedConv1d(2, 2, 6, 3, causal=True),
     PaddedConvTranspose1d(2, 2, 3, causal=True), ResidualUnit(2, 3, body(causal=True))],
    ids=["dilated", "strided", "transposed", "unit"],
)  # fmt: skip
def test_causal_layers_do_not_look_ahead_and_symmetric_ones_do(module):
    torch.manual_seed(0)
    x = torch.randn(1, 2, 60)
    changed = x.clone()
    changed[..., 30:] += 1.0
    difference = (module(x) - module(changed)).abs().amax(1)[0]
    first_changed = int(difference.nonzero()[0])
    assert first_changed >= 30 * difference.shape[0] // 60
    symmetric = PaddedConv1d(2, 2, 7, dilation=3)
    assert (symmetric(x) - symmetric(changed))[..., :30].abs().max() > 1e-3


@pytest.mark.parametrize("n_fft, hop", [(1280, 320), (640, 320), (400, 160), (500, 200), (96, 60)])
def test_inverse_stft_restores_the_waveform(n_fft, hop):
    torch.manual_seed(0)
    wav, window = torch.randn(2, 10 * hop), torch.hann_window(n_fft)
    spectrum = stft_frames(wav, n_fft, hop, window)
    assert spectrum.shape == (2, n_fft // 2 + 1, 10)
    restored = istft_frames(spectrum, n_fft, hop, window)
    if n_fft > 1.9 * hop:
        torch.testing.assert_close(restored, wav, rtol=1e-3, atol=1e-3)
    else:  # the edges are seen by the window's foot only
        torch.testing.assert_close(restored[:, hop:-hop], wav[:, hop:-hop], rtol=1e-3, atol=1e-3)


def test_stft_frames_equal_a_numpy_computation():
    wav, window = torch.randn(1, 640), torch.hann_window(64)
    padded = np.pad(wav[0].numpy(), (24, 24))
    expected = np.stack([np.fft.rfft(padded[i * 16 : i * 16 + 64] * window.numpy()) for i in range(40)], 1)
    np.testing.assert_allclose(stft_frames(wav, 64, 16, window)[0].numpy(), expected, atol=1e-4)


def test_stft_stays_in_float32_under_half_precision_autocast():
    wav, window = torch.randn(1, 640), torch.hann_window(64)
    with torch.autocast("cpu", torch.bfloat16):
        spectrum = stft_frames(wav.bfloat16(), 64, 16, window)
    assert spectrum.dtype == torch.complex64


def test_folding_weight_norm_changes_no_output():
    torch.manual_seed(0)
    module = nn.Sequential(ResidualUnit(4, 3, body()), PaddedConvTranspose1d(4, 2, 3))
    x = torch.randn(1, 4, 30)
    before = module(x)
    n_tensors = len(module.state_dict())
    remove_weight_norm(module)
    torch.testing.assert_close(module(x), before)
    assert len(module.state_dict()) < n_tensors


def test_output_scale_starts_at_one_and_tanh_comes_after_it():
    head = ScaledTanh()
    assert head.output_scale.item() == 1.0
    x = torch.linspace(-9, 9, 50)
    torch.testing.assert_close(head(x), torch.tanh(x))
    with torch.no_grad():
        head.output_scale.fill_(3.0)
    assert head(x).abs().max() <= 1.0

    def scale_after_tanh(x, scale):  # the prescribed order that left [-1, 1] and died
        return scale * torch.tanh(x)

    assert scale_after_tanh(x, 3.0).abs().max() > 2.9


@pytest.mark.parametrize(
    "wide, plain",
    [
        (WideConv1d(3, 4, 7, dilation=3, padding=9), nn.Conv1d(3, 4, 7, dilation=3, padding=9)),
        (WideConv1d(3, 4, 6, stride=3, padding=2), nn.Conv1d(3, 4, 6, stride=3, padding=2)),
        (WideConvTranspose1d(3, 4, 6, 3, 2, 1), nn.ConvTranspose1d(3, 4, 6, 3, 2, 1)),
        (WideConvTranspose1d(3, 4, 8, 4), nn.ConvTranspose1d(3, 4, 8, 4)),
    ],
    ids=["dilated", "strided", "transposed, odd", "transposed"],
)
def test_wide_convolutions_equal_the_plain_ones_in_training_and_at_inference(wide, plain):
    plain.load_state_dict(wide.state_dict())
    x = torch.randn(2, 3, 40, requires_grad=True)
    for mode in (True, False):
        wide.train(mode)
        ours, expected = wide(x), plain(x)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        g = torch.randn_like(expected)
        torch.testing.assert_close(
            torch.autograd.grad(ours, [x, *wide.parameters()], g),
            torch.autograd.grad(expected, [x, *plain.parameters()], g), rtol=1e-4, atol=1e-4,
        )  # fmt: skip


@pytest.mark.parametrize("pad_mode, theirs", [("reflect", "reflect"), ("zeros", "constant"), ("replicate", "replicate")])
@pytest.mark.parametrize("kernel_size, stride, dilation", [(7, 1, 1), (3, 1, 2), (4, 2, 1), (10, 5, 1)])
@pytest.mark.parametrize("n_samples", [1, 3, 6, 20, 23])
def test_causal_padding_is_encodecs_at_every_length(pad_mode, theirs, kernel_size, stride, dilation, n_samples):
    reference = EncodecConv1d(EncodecConfig(pad_mode=theirs), 2, 3, kernel_size, stride, dilation)
    conv = PaddedConv1d(2, 3, kernel_size, stride, dilation, causal=True, pad_mode=pad_mode)
    conv.load_state_dict(reference.state_dict(), strict=False)
    x = torch.randn(2, 2, n_samples)
    torch.testing.assert_close(conv(x), reference(x))
    assert conv(x).shape[-1] == -(-n_samples // stride)


@pytest.mark.parametrize("n_frames", [1, 9, 10, 11, 20, 37])
def test_windowed_attention_equals_softmax_under_a_band_mask(n_frames):
    q, k, v = (torch.randn(2, 3, n_frames, 4) for _ in range(3))
    i, j = torch.arange(n_frames)[:, None], torch.arange(n_frames)
    scores = (q @ k.transpose(-1, -2) / 2).masked_fill((j > i) | (j <= i - 10), -torch.inf)
    torch.testing.assert_close(windowed_attention(q, k, v, window=10), scores.softmax(-1) @ v)
    if n_frames > 11:  # known wrong: the causal mask alone, or a window one frame too long
        causal = (q @ k.transpose(-1, -2) / 2).masked_fill(j > i, -torch.inf).softmax(-1) @ v
        assert (windowed_attention(q, k, v, window=10) - causal).abs().max() > 1e-3
        assert (windowed_attention(q, k, v, window=10) - windowed_attention(q, k, v, window=11)).abs().max() > 1e-3


def test_rotary_positions_are_those_of_mimi_and_interleaved_pairs_are_not():
    q, k = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    angle = torch.arange(9.0)[:, None] / 10000 ** (torch.arange(0, 8, 2) / 8)
    angle = torch.cat([angle, angle], -1)[None]
    expected = apply_rotary_pos_emb(q, k, angle.cos(), angle.sin())
    torch.testing.assert_close(rotate(q, 10000.0), expected[0])
    torch.testing.assert_close(rotate(k, 10000.0), expected[1])
    swap = torch.arange(8).view(2, 4).T.flatten()  # (i, i + d/2) side by side
    interleaved = rotate(q[..., swap.argsort()], 10000.0)[..., swap]
    assert (interleaved - expected[0]).abs().max() > 1e-2
    later_q, later_k = (rotate(torch.cat([x[:, :, :3], x], 2), 10000.0)[:, :, 3:] for x in (q, k))
    torch.testing.assert_close(later_q @ later_k.mT, expected[0] @ expected[1].mT, rtol=1e-4, atol=1e-4)  # only distances count


def test_transformer_equals_mimis_below_and_above_its_window():
    config = MimiConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
                        intermediate_size=24, sliding_window=10)  # fmt: skip
    config._attn_implementation = "eager"
    reference = MimiTransformerModel(config).eval()
    ours = Transformer(16, TransformerConfig(n_layers=2, n_heads=2, ff_dim=24, window=10)).eval()
    for layer, their in zip(ours.layers, reference.layers, strict=True):
        attention = their.self_attn
        qkv = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        layer.to_qkv.weight = nn.Parameter(torch.cat(qkv))
        layer.to_out, layer.expand, layer.contract = attention.o_proj, their.mlp.fc1, their.mlp.fc2
        for gain, their_gain in ((layer.scale_attention, their.self_attn_layer_scale.scale),
                                 (layer.scale_mlp, their.mlp_layer_scale.scale)):  # fmt: skip
            gain.data.uniform_(0.5, 1)
            their_gain.data.copy_(gain.data)
    for n_frames in (7, 10, 33):
        x = torch.randn(2, 16, n_frames)
        torch.testing.assert_close(ours(x), reference(x.mT).last_hidden_state.mT, rtol=1e-4, atol=1e-5)
