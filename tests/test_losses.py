import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchaudio
from conftest import speech_like, tiny_config

from codec.config import phase_config
from codec.losses import (
    Balancer,
    BandLevelLoss,
    CompressedSpectralLoss,
    MelLoss,
    MultiScaleSpectralLoss,
    discriminator_loss,
    feature_matching_loss,
    generator_adversarial_loss,
    scale_loss,
    waveform_loss,
)
from codec.spectral import mel_filterbank, stft
from train_codec_gan import build, train_step

KINDS = ("hinge", "least_squares", "bce")


@pytest.fixture
def noise():
    generator = torch.Generator().manual_seed(0)
    return 0.1 * torch.randn(2, 1, 4000, generator=generator), 0.1 * torch.randn(2, 1, 4000, generator=generator)


# ---------------------------------------------------------------------- adversarial


@pytest.mark.parametrize("kind, value", [("hinge", 2.0), ("least_squares", 1.0), ("bce", 2 * math.log(2))])
def test_a_discriminator_that_says_nothing_has_the_loss_of_the_cheat_sheet(kind, value):
    zeros = [torch.zeros(2, 1, 10), torch.zeros(2, 1, 3, 4)]
    assert discriminator_loss(zeros, zeros, kind).item() == pytest.approx(value, abs=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pull_real_up_fake_down_and_the_generator_pulls_fake_up(kind):
    real, fake = torch.full((4,), 0.2, requires_grad=True), torch.full((4,), 0.2, requires_grad=True)
    discriminator_loss([real], [fake], kind).backward()
    assert (real.grad < 0).all() and (fake.grad > 0).all()
    fake = torch.full((4,), 0.2, requires_grad=True)
    generator_adversarial_loss([fake], kind).backward()
    assert (fake.grad < 0).all()


def test_hinge_stops_where_the_margin_is_reached_but_the_generator_goes_on():
    won = [torch.full((3,), 1.5)], [torch.full((3,), -1.5)]
    assert discriminator_loss(*won, "hinge") == 0
    assert discriminator_loss(won[1], won[0], "hinge") == 5  # sides swapped: the loss of one that is fooled
    assert generator_adversarial_loss(won[1], "hinge") == 1.5


def test_bce_is_binary_cross_entropy_and_does_not_saturate_for_the_generator():
    real, fake = torch.tensor([0.3, -2.0]), torch.tensor([1.0, -40.0])
    with_logits = F.binary_cross_entropy_with_logits
    expected = with_logits(real, torch.ones(2)) + with_logits(fake, torch.zeros(2))
    torch.testing.assert_close(discriminator_loss([real], [fake], "bce"), expected)
    lost = torch.tensor([-40.0], requires_grad=True)
    generator_adversarial_loss([lost], "bce").backward()
    assert lost.grad.item() == pytest.approx(-1)
    wrong = torch.tensor([-40.0], requires_grad=True)  # the saturating form: log(1 - sigmoid)
    F.logsigmoid(-wrong).sum().backward()
    assert abs(wrong.grad.item()) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_of_equal_discriminators_weighs_as_much_as_one(kind):
    real, fake = torch.randn(5), torch.randn(5)
    torch.testing.assert_close(
        discriminator_loss([real] * 3, [fake] * 3, kind), discriminator_loss([real], [fake], kind)
    )
    torch.testing.assert_close(
        generator_adversarial_loss([fake] * 3, kind), generator_adversarial_loss([fake], kind)
    )


def test_an_unknown_kind_is_named_with_its_alternatives():
    with pytest.raises(ValueError, match="got 'wgan', expected hinge, least_squares or bce"):
        discriminator_loss([torch.zeros(1)], [torch.zeros(1)], "wgan")
    with pytest.raises(ValueError, match="got 'wgan'"):
        generator_adversarial_loss([torch.zeros(1)], "wgan")


def test_feature_matching_averages_layers_then_discriminators():
    real = [[torch.zeros(2, 3), torch.zeros(5)], [torch.zeros(7)]]
    fake = [[torch.full((2, 3), 1.0), torch.full((5,), -3.0)], [torch.full((7,), 10.0)]]
    assert feature_matching_loss(real, fake) == ((1 + 3) / 2 + 10) / 2


def test_relative_feature_matching_does_not_change_with_the_features_scale():
    real, fake = [[torch.randn(50)]], [[torch.randn(50)]]
    scaled = [[100 * real[0][0]]], [[100 * fake[0][0]]]
    torch.testing.assert_close(
        feature_matching_loss(*scaled, relative=True), feature_matching_loss(real, fake, relative=True)
    )
    assert feature_matching_loss(*scaled) > 50 * feature_matching_loss(real, fake)


@pytest.mark.parametrize("relative", [False, True])
def test_real_features_get_no_gradient(relative):
    real, fake = torch.randn(9, requires_grad=True), torch.randn(9, requires_grad=True)
    feature_matching_loss([[real * 2]], [[fake * 2]], relative).backward()
    assert real.grad is None and fake.grad.any()
    wrong = F.l1_loss(fake * 2, real * 2)  # without detach: the discriminator is trained to blur
    assert torch.autograd.grad(wrong, real)[0].any()


# ------------------------------------------------------------------------- waveform


def test_waveform_and_scale_losses_match_numpy(noise):
    wav, wav_hat = noise
    a, b = wav.numpy(), wav_hat.numpy()
    assert waveform_loss(wav, wav_hat).item() == pytest.approx(np.abs(a - b).mean(), rel=1e-5)
    rms = [np.sqrt((x**2).mean(-1)) for x in (a, b)]
    assert scale_loss(wav, wav_hat).item() == pytest.approx(((rms[0] - rms[1]) ** 2).mean(), rel=1e-3)


def test_scale_loss_sees_level_alone_and_pulls_silence_up(noise):
    wav, _ = noise
    assert scale_loss(wav, -wav) == 0 and scale_loss(wav, 0.5 * wav) > 0
    silence = torch.zeros_like(wav).requires_grad_()
    scale_loss(wav, silence).backward()
    assert silence.grad.isfinite().all()  # a plain root has gradient NaN here
    wrong = torch.zeros_like(wav).requires_grad_()
    F.mse_loss(wrong.square().mean(-1).sqrt(), wav.square().mean(-1).sqrt()).backward()
    assert wrong.grad.isnan().any()


# ------------------------------------------------------------------------- spectrum


def mel_reference(wav, sample_rate, window, n_mels):
    """Log mel by torchaudio's own transform, as DAC sets it."""
    mel = torchaudio.transforms.MelSpectrogram(
        sample_rate, window, hop_length=window // 4, n_mels=n_mels, power=1.0, norm="slaney", mel_scale="slaney"
    )
    return mel(wav).clamp_min(1e-5).log10()


def test_mel_loss_is_the_sum_of_log_mel_distances_over_scales(noise):
    wav, wav_hat = noise
    expected = sum(
        F.l1_loss(mel_reference(wav, 16000, *scale), mel_reference(wav_hat, 16000, *scale))
        for scale in [(256, 20), (1024, 80)]
    )
    torch.testing.assert_close(MelLoss(16000, (256, 1024), (20, 80))(wav, wav_hat), expected)


@pytest.mark.parametrize(("sample_rate", "n_fft", "n_mels"), [(16000, 256, 20), (24000, 1920, 80), (44100, 2048, 150)])
def test_mel_filters_are_torchaudios(sample_rate, n_fft, n_mels):
    scale = (sample_rate / 2, n_mels, sample_rate, "slaney", "slaney")
    expected = torchaudio.functional.melscale_fbanks(n_fft // 2 + 1, 0.0, *scale)
    torch.testing.assert_close(mel_filterbank(sample_rate, n_fft, n_mels), expected, rtol=1e-3, atol=1e-6)


def peak_bands(filters, sample_rate):
    """For every band, the centre frequency of its largest weight, in Hz."""
    return filters.argmax(0) * sample_rate / 2 / (len(filters) - 1)


def looks_like_mel(filters, sample_rate):
    """Triangles in order of frequency: non-negative, narrow, wider apart toward the top."""
    centres = peak_bands(filters, sample_rate)
    steps = centres.diff()
    narrow = (filters > 0).float().mean() < 0.1
    return bool((filters >= 0).all() and (steps > 0).all() and steps[-5:].mean() > 2 * steps[:5].mean() and narrow)


def test_filters_are_mel_filters_and_random_ones_are_not():
    assert looks_like_mel(mel_filterbank(16000, 1024, 80), 16000)
    wrong = torch.randn(513, 80, generator=torch.Generator().manual_seed(0))
    assert not looks_like_mel(wrong, 16000) and not looks_like_mel(wrong.abs(), 16000)


@pytest.mark.parametrize("sample_rate", [8000, 16000, 24000])
def test_every_instance_has_filters_of_its_own_rate_window_and_bands(sample_rate):
    """A cache keyed on less than all three would hand one instance the filters of another."""
    settings = [(512, 40), (512, 20), (1024, 40)]
    losses = [MelLoss(sample_rate, (window,), (bands,)) for window, bands in settings]
    MelLoss(44100, (512,), (40,))  # one more, made between construction and use
    for loss, (window, bands) in zip(losses, settings, strict=True):
        filters = loss.scales[0].filters
        torch.testing.assert_close(filters, mel_filterbank(sample_rate, window, bands))
    wrong_cache = {}
    for rate in (44100, sample_rate):  # keyed without the rate
        wrong = wrong_cache.setdefault((512, 40), mel_filterbank(rate, 512, 40))
    assert not torch.allclose(wrong, mel_filterbank(sample_rate, 512, 40))


def test_spectral_losses_add_nothing_to_a_checkpoint():
    assert not MelLoss(16000, (256,), (20,)).state_dict() and not MultiScaleSpectralLoss().state_dict()


@pytest.mark.parametrize("log_weight", ["sqrt", "one"])
def test_msspec_matches_numpy(noise, log_weight):
    wav, wav_hat = noise
    total = weight_sum = 0.0
    for n in (64, 256):
        window = np.hanning(n + 1)[:-1]
        window = window / np.sqrt((window**2).sum())
        spectra = []
        for x in (wav, wav_hat):
            padded = np.pad(x.numpy()[:, 0].astype(np.float64), ((0, 0), (n // 2, n // 2)), mode="reflect")
            frames = np.lib.stride_tricks.sliding_window_view(padded, n, axis=1)[:, :: n // 4]
            spectra.append(np.abs(np.fft.rfft(frames * window)))
        a, weight = spectra, math.sqrt(n / 2) if log_weight == "sqrt" else 1.0
        total += np.abs(a[0] - a[1]).mean()
        total += weight * ((np.log10(a[0] + 1e-5) - np.log10(a[1] + 1e-5)) ** 2).mean()
        weight_sum += 1 + weight
    assert MultiScaleSpectralLoss((64, 256), log_weight)(wav, wav_hat).item() == pytest.approx(total / weight_sum, rel=1e-3)


def test_cspec_matches_numpy(noise):
    wav, wav_hat = noise
    total = 0.0
    for n in (64, 256):
        window = np.hanning(n + 1)[:-1]
        window = window / np.sqrt((window**2).sum())
        compressed = []
        for x in (wav, wav_hat):
            padded = np.pad(x.numpy()[:, 0].astype(np.float64), ((0, 0), (n // 2, n // 2)), mode="reflect")
            frames = np.lib.stride_tricks.sliding_window_view(padded, n, axis=1)[:, :: n // 4]
            spectrum = np.fft.rfft(frames * window)
            compressed.append(np.abs(spectrum) ** 0.4 * np.exp(1j * np.angle(spectrum)))
        a, b = compressed
        total += 0.7 * np.abs(np.abs(a) - np.abs(b)).mean()
        total += 0.3 * (np.abs((a - b).real) + np.abs((a - b).imag)).mean()
    assert CompressedSpectralLoss((64, 256), 0.4, 0.3)(wav, wav_hat).item() == pytest.approx(total / 2, rel=1e-3)


def test_compression_hears_an_error_in_the_quiet_band_that_samples_hardly_do():
    t = torch.arange(16000) / 16000
    loud, quiet = torch.sin(2 * math.pi * 200 * t), 0.01 * torch.sin(2 * math.pi * 5000 * t)
    wav = (loud + quiet)[None, None]
    without_quiet, loud_off = loud[None, None], (1.01 * loud + quiet)[None, None]  # errors of the same energy
    of_samples = waveform_loss(wav, without_quiet) / waveform_loss(wav, loud_off)
    compressed, linear = CompressedSpectralLoss(), CompressedSpectralLoss(power=1.0)
    assert of_samples == pytest.approx(1, rel=0.05)
    assert linear(wav, without_quiet) / linear(wav, loud_off) < 2  # known wrong: not compressed
    assert compressed(wav, without_quiet) / compressed(wav, loud_off) > 10


def test_bands_matches_numpy(noise):
    wav, wav_hat = noise
    window, total = np.hanning(257)[:-1], 0.0
    for n_bands, n_frames in ((20, 3), (10, 5)):
        filters = mel_filterbank(16000, 256, n_bands).double().numpy()
        levels = []
        for x in (wav, wav_hat):
            padded = np.pad(x.numpy()[:, 0].astype(np.float64), ((0, 0), (128, 128)), mode="reflect")
            frames = np.lib.stride_tricks.sliding_window_view(padded, 256, axis=1)[:, ::64]
            power = np.abs(np.fft.rfft(frames * window)) ** 2 / (window**2).sum() @ (filters / filters.sum(0))
            means = np.lib.stride_tricks.sliding_window_view(power, n_frames, axis=1)[:, :: n_frames // 2].mean(-1)
            levels.append(np.log10(np.sqrt(means + 0.01**2)))
        total += np.abs(levels[0] - levels[1]).mean()
    assert BandLevelLoss(16000, (20, 10), (3, 5), 256, 0.01)(wav, wav_hat).item() == pytest.approx(total, rel=1e-3)


def test_of_noise_bands_hears_how_loud_it_is_where_mel_hears_chance():
    """Known wrong: the logarithm before the average, which charges for what each frame happens to hold."""
    wav, other = 0.1 * torch.randn(2, 1, 1, 48000, generator=torch.Generator().manual_seed(0))
    bands, mel = BandLevelLoss(24000), MelLoss(24000, (512,), (100,), 1e-3)
    log_first = BandLevelLoss(24000, n_frames=(1, 1))
    (of_bands, of_mel, of_log_first) = (loss(wav, 0.7 * other) / loss(wav, other) for loss in (bands, mel, log_first))
    assert of_bands > 1.9 and of_mel < 1.3 and of_log_first < 1.6


LOSSES = [MelLoss(16000, (64, 1024), (10, 80)), MultiScaleSpectralLoss(), CompressedSpectralLoss(), BandLevelLoss(16000)]


@pytest.mark.parametrize("loss", LOSSES, ids=["mel", "ms", "c", "bands"])
def test_spectral_losses_are_zero_for_equal_sounds_and_grow_with_the_error(loss, noise):
    wav, other = noise
    values = [loss(wav, wav + share * other).item() for share in (0.0, 0.1, 0.3, 1.0)]
    assert values[0] == 0 and values == sorted(values)


@pytest.mark.parametrize("loss", LOSSES, ids=["mel", "ms", "c", "bands"])
def test_spectral_losses_have_finite_gradients_in_silence_and_leave_the_target_alone(loss, noise):
    target = noise[0].clone().requires_grad_()
    silence = torch.zeros_like(target).requires_grad_()
    loss(target, silence).backward()
    assert silence.grad.isfinite().all() and target.grad is None


@pytest.mark.parametrize("loss", LOSSES, ids=["mel", "ms", "c", "bands"])
def test_spectral_losses_are_the_same_under_autocast(loss, noise):
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(*noise)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, loss(*noise), rtol=1e-6, atol=0)


def test_a_complex_spectrum_of_loud_speech_does_not_fit_half_precision():
    """Why `stft` leaves autocast: one loud low note is beyond fp16 and the loss would be NaN."""
    wav = torch.sin(2 * math.pi * 100 * torch.arange(8192) / 16000)[None] * 200
    window = torch.hann_window(2048)
    spectrum = stft(wav.half(), window, 512, center=True)
    wrong = spectrum.abs().half()
    assert spectrum.isfinite().all() and wrong.isinf().any() and (wrong - wrong).isnan().any()


# ------------------------------------------------------------------------- balancer


def two_losses(wav_hat, scale=1.0):
    return {"a": (scale * wav_hat.square().sum(), 3.0), "b": (1e-3 * wav_hat.abs().sum(), 1.0)}


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_a_weight_is_the_share_of_the_gradient_whatever_the_scale_of_the_loss(scale):
    wav_hat = torch.randn(4, 1, 100, generator=torch.Generator().manual_seed(0)).requires_grad_()
    gradient = Balancer()(two_losses(wav_hat, scale), wav_hat)
    norm = (2 * wav_hat).flatten(1).norm(dim=1).mean()
    expected = (0.75 * 2 * wav_hat / norm + 0.25 * wav_hat.sign() / 10) / 4
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-4, atol=1e-6)
    assert not gradient.requires_grad
    wrong = torch.autograd.grad(sum(w * loss for loss, w in two_losses(wav_hat, scale).values()), wav_hat)[0]
    assert not torch.allclose(wrong / wrong.norm(), expected / expected.norm(), atol=1e-3)


def output_shares(t, config, wav: torch.Tensor) -> tuple[dict, dict]:
    """Of one update: the share of each loss in the gradient that reached the output, and in a plain weighted sum."""
    outputs, reached = [], []

    def listen(module, args, out):
        outputs.append(out.wav_hat)
        out.wav_hat.register_hook(reached.append)  # the last is that of the backward pass; the balancer's come before

    t.codec.register_forward_hook(listen)
    train_step(wav, t, config, 0)
    wav_hat = outputs[0].detach().requires_grad_()
    features_real, (logits, features) = t.discriminators(wav)[1], t.discriminators(wav_hat)  # as G's step met them
    losses = {
        "adv": generator_adversarial_loss(logits, "hinge"),
        "feat": feature_matching_loss(features_real, features),
        "wave": waveform_loss(wav, wav_hat),
        "mel": t.mel_loss(wav, wav_hat),
        "msspec": t.msspec_loss(wav, wav_hat),
    }
    gradients = torch.stack([torch.autograd.grad(loss, wav_hat, retain_graph=True)[0].flatten() for loss in losses.values()])
    coefficients = torch.linalg.lstsq(gradients.T.double(), reached[-1].flatten()[:, None].double()).solution.flatten()
    norms = gradients.unflatten(1, (len(wav), -1)).norm(dim=2).mean(1)  # per item
    plain = torch.tensor([getattr(config.loss_weights, name) for name in losses]) * norms
    balanced = coefficients * norms * len(wav)
    return dict(zip(losses, balanced.tolist())), dict(zip(losses, (plain / plain.sum()).tolist()))


def test_in_a_whole_update_each_loss_has_its_share_of_the_gradient_at_the_output_within_one_percent():
    weights = {"adv": 4.0, "feat": 4.0, "wave": 0.1, "mel": 1.0, "msspec": 2.0}
    config = tiny_config(["losses.balancer=true", *[f"loss_weights.{name}={weight}" for name, weight in weights.items()]])
    config = phase_config(config, 1)
    wav = torch.stack([torch.from_numpy(speech_like(2000, seed=i))[None] for i in range(4)])
    balanced, plain = output_shares(build(config, torch.device("cpu")), config, wav)
    for name, weight in weights.items():
        assert balanced[name] == pytest.approx(weight / sum(weights.values()), rel=0.01), name
    far = [name for name, weight in weights.items() if not 0.5 < plain[name] / (weight / sum(weights.values())) < 2]
    assert len(far) >= 3  # known wrong: the weighted sum, where a loss's scale decides


def test_norms_are_averaged_without_bias_over_updates():
    balancer = Balancer(decay=0.5)
    wav_hat = torch.ones(1, 1, 1, requires_grad=True)
    for slope in (1.0, 2.0, 4.0):
        gradient = balancer({"a": ((slope * wav_hat).sum(), 1.0)}, wav_hat)
    average = (0.25 * 1 + 0.5 * 2 + 4) / (0.25 + 0.5 + 1)
    assert gradient.item() == pytest.approx(4 / average, rel=1e-6)


def test_one_backward_from_the_output_equals_the_balanced_gradient():
    torch.manual_seed(0)
    generator = torch.nn.Linear(5, 100)
    wav_hat = generator(torch.randn(2, 1, 5))
    gradient = Balancer()(two_losses(wav_hat), wav_hat)
    (wav_hat * gradient).sum().backward()
    expected = gradient.flatten(0, 1).sum(0)
    torch.testing.assert_close(generator.bias.grad, expected)


def test_two_ranks_with_half_a_batch_give_the_gradient_of_one_with_all():
    wav_hat = torch.randn(4, 1, 100, generator=torch.Generator().manual_seed(0)).requires_grad_()
    whole = Balancer()(two_losses(wav_hat), wav_hat)
    halves = [half.detach().requires_grad_() for half in wav_hat.chunk(2)]
    norms = []
    for half in halves:  # what each rank would put into the all-reduce; a loss is a mean over the rank's items
        losses = {name: (2 * loss, weight) for name, (loss, weight) in two_losses(half).items()}
        grads = [torch.autograd.grad(loss, half, retain_graph=True)[0] for loss, _ in losses.values()]
        norms.append(torch.stack([g.flatten(1).norm(dim=1).mean() for g in grads]))
    mean = torch.stack(norms).mean(0)
    parts = []
    for half in halves:
        losses = {name: (2 * loss, weight) for name, (loss, weight) in two_losses(half).items()}
        parts.append(Balancer(mean_over_ranks=lambda _: mean)(losses, half) / 2)  # DDP averages over ranks
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-7)
    alone = torch.cat([Balancer()(two_losses(half), half) / 2 for half in halves])
    assert not torch.allclose(alone, whole, rtol=1e-5, atol=1e-7)  # without the mean, ranks weigh differently


def test_the_state_of_a_balancer_survives_json_to_the_bit():
    import json

    first, second = Balancer(), Balancer()
    wav_hat = torch.randn(2, 1, 50, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for _ in range(3):
        first(two_losses(wav_hat), wav_hat)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert torch.equal(first(two_losses(wav_hat, 7.0), wav_hat), second(two_losses(wav_hat, 7.0), wav_hat))


def test_a_non_finite_loss_shows_in_the_gradient_but_not_in_later_ones():
    balancer = Balancer()
    wav_hat = torch.ones(1, 1, 4, requires_grad=True)
    balancer(two_losses(wav_hat), wav_hat)
    before = balancer.state_dict()
    assert not balancer({"a": (wav_hat.sum() * math.nan, 1.0)}, wav_hat).isfinite().any()
    assert balancer.state_dict() == before


def test_weights_of_zero_are_refused():
    wav_hat = torch.ones(1, 1, 4, requires_grad=True)
    with pytest.raises(ValueError, match="balancer: got weights of sum 0"):
        Balancer()({"a": (wav_hat.sum(), 0.0)}, wav_hat)
