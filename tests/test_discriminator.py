import math

import pytest
import torch
import torch.nn.functional as F

from codec.config import DiscriminatorsConfig, MPDConfig, MRDConfig, MSDConfig, MSSTFTConfig
from codec.discriminator import (
    Discriminators,
    MultiPeriodDiscriminator,
    MultiResolutionDiscriminator,
    MultiScaleDiscriminator,
    MultiScaleSTFTDiscriminator,
)
from codec.layers import WideConv1d
from codec.spectral import stft

LEAN = DiscriminatorsConfig(
    sets=(
        MPDConfig("mpd", periods=(2, 3), channels=(4, 8, 8)),
        MRDConfig("mrd", windows=(256, 128), channels=4),
        MSSTFTConfig("msstft", windows=(256, 128), channels=4),
    )
)


def n_parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    "build, count",
    [
        # sum(p.numel() for p in dac.model.Discriminator(fft_sizes=[]).parameters()), descript-audio-codec 1.0.0
        (MultiPeriodDiscriminator, 41_105_770),
        # the same of dac.model.Discriminator(periods=[])
        (MultiResolutionDiscriminator, 1_413_990),
        # the same of dac.model.discriminator.MSD(rate=1), the layer table of ours, three times
        (MultiScaleDiscriminator, 3 * 5_641_362),
        # the same of encodec.msstftd.MultiScaleSTFTDiscriminator(32, n_ffts=[2048, 1024, 512, 256, 128], ...),
        # encodec 0.1.1; its first layers go without weight norm (a default), ours have it: 5 x 32 gains more
        (MultiScaleSTFTDiscriminator, 472_330 + 5 * 32),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(build, count):
    assert n_parameters(build()) == count


def test_multi_scale_layers_are_those_of_the_table():
    convs = MultiScaleDiscriminator().discriminators[0].convs
    table = [(1, 16, 15, 1, 1), (16, 64, 41, 4, 4), (64, 256, 41, 4, 16), (256, 1024, 41, 4, 64),
             (1024, 1024, 41, 4, 256), (1024, 1024, 5, 1, 1)]  # fmt: skip
    assert [(c.in_channels, c.out_channels, *c.kernel_size, *c.stride, c.groups) for c in convs] == table


def period_reference(discriminator, wav):
    """The published form: [B, 1, T / p, p] through (k, 1) convolutions, with the same weights."""
    x = F.pad(wav, (0, -wav.shape[-1] % discriminator.period), mode="reflect")
    x = x.unflatten(-1, (-1, discriminator.period))
    features = []
    for conv in discriminator.convs:
        x = F.conv2d(x, conv.weight[..., None], conv.bias, (conv.stride[0], 1), (conv.padding[0], 0))
        x = F.leaky_relu(x, 0.1)
        features.append(x)
    conv = discriminator.conv_post
    return F.conv2d(x, conv.weight[..., None], conv.bias, padding=(1, 0)), features


@pytest.mark.parametrize("period", [2, 3, 5, 7, 11])
def test_a_folded_period_discriminator_gives_the_numbers_of_the_two_dimensional_one(period):
    torch.manual_seed(0)
    discriminator = MultiPeriodDiscriminator((period,), (8, 16, 512, 1024)).discriminators[0]
    wav = torch.randn(2, 1, 1000)
    logit, features = discriminator(wav)
    logit_2d, features_2d = period_reference(discriminator, wav)
    for ours, reference in zip([*features, logit], [*features_2d, logit_2d], strict=True):
        folded = reference.permute(0, 3, 1, 2).flatten(0, 1)
        torch.testing.assert_close(ours, folded, rtol=1e-4, atol=1e-5)


def test_wide_layers_give_the_numbers_and_gradients_of_a_plain_convolution():
    torch.manual_seed(0)
    layer = MultiPeriodDiscriminator((2,), (8, 512, 1024)).discriminators[0].convs[2]
    assert isinstance(layer, WideConv1d)
    x = torch.randn(3, 512, 17, requires_grad=True)
    g = torch.randn(3, 1024, 17)
    weight, bias = layer.weight.detach().requires_grad_(), layer.bias
    plain = F.conv1d(x, weight, bias, layer.stride, layer.padding)
    torch.testing.assert_close(layer(x), plain, rtol=1e-4, atol=1e-5)
    ours = torch.autograd.grad(layer(x), [x, bias], g)
    torch.testing.assert_close(ours, torch.autograd.grad(plain, [x, bias], g), rtol=1e-4, atol=1e-4)


def test_band_spectra_are_those_of_a_centred_stft_without_its_padding_frames():
    wav = torch.randn(2, 1, 1000, generator=torch.Generator().manual_seed(0))
    discriminator = MultiResolutionDiscriminator((256,), 4).discriminators[0]
    # DAC: pad to whole hops and by 3/8 of a window, transform centred, drop two frames on both sides
    padded = F.pad(wav, (96, 96 + 24), mode="reflect").squeeze(1)
    whole = torch.stft(padded, 256, 64, window=torch.hann_window(256), return_complex=True)[..., 2:-2]
    reference = torch.view_as_real(whole).permute(0, 3, 2, 1)
    torch.testing.assert_close(discriminator._spectrum(wav), reference, rtol=1e-4, atol=1e-4)


def test_bands_of_a_resolution_cover_every_bin_once():
    for discriminator in MultiResolutionDiscriminator(channels=1).discriminators:
        edges = discriminator.bands
        assert edges[0][0] == 0 and edges[-1][1] == len(discriminator.window) // 2 + 1
        assert all(high == low for (_, high), (low, _) in zip(edges, edges[1:], strict=False))


def test_multi_scale_stft_input_has_one_level_whatever_the_window():
    noise = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0))
    for discriminator in MultiScaleSTFTDiscriminator(channels=1).discriminators:
        power = stft(noise, discriminator.window, 64, center=False).abs().square().mean()
        assert math.isclose(power, 1.0, rel_tol=0.15)


def test_the_set_concatenates_and_features_hold_no_logits():
    logits, features = Discriminators(LEAN)(torch.randn(2, 1, 1000))
    assert len(logits) == len(features) == 2 + 2 + 2
    assert [len(layers) for layers in features] == [3, 3, 25, 25, 5, 5]
    assert all(layer.shape[1] > 1 for layers in features for layer in layers)
    assert all(logit.shape[1] == 1 for logit in logits)


def test_items_of_a_batch_do_not_see_each_other():
    torch.manual_seed(0)
    model = Discriminators(DiscriminatorsConfig(LEAN.sets, normalize_input=True))
    real, fake = torch.randn(2, 1, 1000), 3 * torch.randn(2, 1, 1000)
    together, _ = model(torch.cat([real, fake]))
    for logit, alone in zip(together, model(fake)[0], strict=True):
        torch.testing.assert_close(logit.chunk(2)[1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalize_input", [True, False])
def test_level_and_dc_are_hidden_only_where_input_is_normalised(normalize_input):
    torch.manual_seed(0)
    model = Discriminators(DiscriminatorsConfig(LEAN.sets, normalize_input))
    wav = 0.1 * torch.randn(1, 1, 1000)
    pairs = zip(model(wav)[0], model(3 * wav + 0.2)[0], strict=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs) == normalize_input


def test_silence_gives_finite_logits_and_gradients():
    model = Discriminators(DiscriminatorsConfig(LEAN.sets, normalize_input=True))
    wav = torch.zeros(1, 1, 1000, requires_grad=True)
    sum(logit.mean() for logit in model(wav)[0]).backward()
    assert wav.grad.isfinite().all()


def test_every_parameter_gets_a_gradient():
    sets = (*LEAN.sets, MSDConfig("msd", n_scales=1))
    model = Discriminators(DiscriminatorsConfig(sets))
    sum(logit.square().mean() for logit in model(torch.randn(1, 1, 2000))[0]).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_frozen_discriminators_pass_gradient_to_the_waveform_only():
    model = Discriminators(LEAN).requires_grad_(False)
    wav = torch.randn(1, 1, 1000, requires_grad=True)
    sum(logit.mean() for logit in model(wav)[0]).backward()
    assert wav.grad.any() and all(p.grad is None for p in model.parameters())


def test_spectra_stay_in_float32_under_autocast_where_half_precision_overflows():
    window = torch.hann_window(2048)
    wav = torch.full((1, 4096), 100.0)  # normalised features can be as large; the sum of a frame is 102400
    with torch.autocast("cpu", torch.float16):
        spectrum = stft(wav.half(), window, 512, center=False)
        wrong = (wav.half().unfold(-1, 2048, 512) * window.half()) @ torch.ones(2048, 1).half()
    assert spectrum.dtype == torch.complex64 and spectrum.isfinite().all()
    torch.testing.assert_close(spectrum, torch.fft.rfft(wav.unfold(-1, 2048, 512) * window))
    assert wrong.isinf().any()


def test_a_segment_shorter_than_a_window_is_refused_in_one_line():
    with pytest.raises(ValueError, match="stft: got 100 samples, a window of 256 needs 256; use longer") as error:
        MultiScaleSTFTDiscriminator((256,), 4)(torch.randn(1, 1, 100))
    assert "\n" not in str(error.value)
