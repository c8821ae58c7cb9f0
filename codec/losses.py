"""Training losses that need no teacher: unweighted scalars that know no discriminator and no config.

Commitment and codebook losses live beside the quantizer in rvq.py.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codec.spectral import mel_filterbank, stft

# ---------------------------------------------------------------------- adversarial


def discriminator_loss(logits_real: list[Tensor], logits_fake: list[Tensor], kind: str) -> Tensor:
    """What the discriminator minimises, averaged over sub-discriminators.

    Args:
        logits_real: one map of any shape a sub-discriminator, for recordings.
        logits_fake: the same for reconstructions that carry no gradient to the generator.
        kind: `hinge`, `least_squares` or `bce`.
    Returns:
        Scalar. For logits that are all 0: hinge exactly 2, least squares 1, bce 2 ln 2.
    Raises:
        ValueError: unknown kind.

    Source: Lim and Ye 2017; Mao et al. 2017; Goodfellow et al. 2014. Departure: HiFi-GAN and DAC sum over
    sub-discriminators; the mean keeps one scale for every set of them.
    """
    terms = [
        _real_term(real.float(), kind) + _fake_term(fake.float(), kind)
        for real, fake in zip(logits_real, logits_fake, strict=True)
    ]
    return torch.stack(terms).mean()


def generator_adversarial_loss(logits_fake: list[Tensor], kind: str) -> Tensor:
    """What the generator minimises against the discriminators, averaged over them.

    Args:
        logits_fake: one map of any shape a sub-discriminator, with gradient to the generator.
        kind: `hinge`, `least_squares` or `bce` (the non-saturating form).
    Returns:
        Scalar. Hinge is unbounded below: it is minus the mean logit.
    Raises:
        ValueError: unknown kind.
    """
    if kind == "hinge":
        return torch.stack([-logit.float().mean() for logit in logits_fake]).mean()
    return torch.stack([_real_term(logit.float(), kind) for logit in logits_fake]).mean()


def _real_term(logit: Tensor, kind: str) -> Tensor:
    """How far a logit is from saying 'real'."""
    if kind == "hinge":
        return F.relu(1 - logit).mean()
    if kind == "least_squares":
        return (1 - logit).square().mean()
    if kind == "bce":
        return F.softplus(-logit).mean()
    raise ValueError(f"adversarial loss: got '{kind}', expected hinge, least_squares or bce")


def _fake_term(logit: Tensor, kind: str) -> Tensor:
    """How far a logit is from saying 'fake'; least squares puts that at 0, the others at -1 and below."""
    return logit.square().mean() if kind == "least_squares" else _real_term(-logit, kind)


def feature_matching_loss(
    features_real: list[list[Tensor]], features_fake: list[list[Tensor]], relative: bool = False, flat: bool = False
) -> Tensor:
    """L1 distance of discriminator activations, averaged over layers, then over sub-discriminators.

    Args:
        features_real: activations per sub-discriminator and layer, for recordings; detached here.
        features_fake: the same for reconstructions; receives gradient.
        relative: divide each layer's distance by the mean magnitude of its real activations (EnCodec).
        flat: average over the layers of all sub-discriminators alike, which is DAC's sum divided by their number.
    Returns:
        Scalar.

    Source: Kumar et al. 2019 (MelGAN); Défossez et al. 2022, eq. 2. DAC and HiFi-GAN sum where we average.
    """
    if flat:
        features_real, features_fake = ([sum(features, [])] for features in (features_real, features_fake))
    means = []
    for reals, fakes in zip(features_real, features_fake, strict=True):
        layers = []
        for real, fake in zip(reals, fakes, strict=True):
            real = real.detach().float()
            distance = F.l1_loss(fake.float(), real)
            layers.append(distance / real.abs().mean().clamp_min(1e-8) if relative else distance)
        means.append(torch.stack(layers).mean())
    return torch.stack(means).mean()


# ------------------------------------------------------------------------- waveform


def waveform_loss(wav: Tensor, wav_hat: Tensor) -> Tensor:
    """Mean absolute difference of samples.

    Args:
        wav: [B, 1, T] target.
        wav_hat: [B, 1, T] reconstruction; receives gradient.
    """
    return F.l1_loss(wav_hat.float(), wav.float())


def scale_loss(wav: Tensor, wav_hat: Tensor) -> Tensor:
    """Squared difference of the RMS level of input and output, averaged over the batch.

    Args:
        wav: [B, 1, T] target.
        wav_hat: [B, 1, T] reconstruction; receives gradient, also where it is silent.
    """
    return F.mse_loss(_rms(wav_hat), _rms(wav))


def _rms(wav: Tensor) -> Tensor:
    """[B, 1, T] -> [B, 1]; the small constant keeps the gradient of the root finite in silence."""
    return (wav.float().square().mean(dim=-1) + 1e-8).sqrt()


# ------------------------------------------------------------------------- spectrum


class MelLoss(nn.Module):
    """L1 distance of log mel spectrograms, summed over scales.

    Args:
        sample_rate: Hz.
        windows: samples, one scale each; the hop is a quarter of the window.
        n_mels: bands of each scale.
        floor: magnitudes below it count as equal. The gradient of the logarithm is 1 / magnitude, so a low floor
            spends most of the gradient on near silence; 1e-5 is below what 16 bits can hold.

    Source: Kumar et al. 2023 (DAC), with its published settings (power 1, floor 1e-5, log10, no linear term).
    """

    def __init__(self, sample_rate: int, windows: Sequence[int], n_mels: Sequence[int], floor: float = 1e-5):
        super().__init__()
        pairs = zip(windows, n_mels, strict=True)
        self.scales = nn.ModuleList(_LogMel(sample_rate, window, bands, floor) for window, bands in pairs)

    def forward(self, wav: Tensor, wav_hat: Tensor) -> Tensor:
        """Distance of wav_hat [B, 1, T], which receives gradient, from wav [B, 1, T]."""
        distances = []
        for log_mel in self.scales:
            with torch.no_grad():
                target = log_mel(wav)
            distances.append(F.l1_loss(log_mel(wav_hat), target))
        return torch.stack(distances).sum()


class _LogMel(nn.Module):
    """[B, 1, T] -> [B, T', n_mels], log10 of mel-weighted magnitudes, hop a quarter of the window."""

    def __init__(self, sample_rate: int, window: int, n_mels: int, floor: float):
        super().__init__()
        self.floor = floor
        self.register_buffer("window", torch.hann_window(window), persistent=False)
        self.register_buffer("filters", mel_filterbank(sample_rate, window, n_mels), persistent=False)

    def forward(self, wav: Tensor) -> Tensor:
        magnitude = stft(wav.squeeze(1), self.window, len(self.window) // 4, center=True).abs()
        with torch.autocast(wav.device.type, enabled=False):
            return (magnitude @ self.filters).clamp_min(self.floor).log10()


class MultiScaleSpectralLoss(nn.Module):
    """L1 on linear plus weighted L2 on log magnitude spectra, a weighted mean over scales (`msspec`).

    With S the spectrum of scale n and a = sqrt(n / 2):
    `sum_n(|S - S_hat| + a (log10 S - log10 S_hat)^2) / sum_n(1 + a)`.

    Args:
        windows: samples, one scale each; the hop is a quarter of the window.
        log_weight: of the log term: "sqrt" for that a, "one" for a = 1 (EnCodec), a tenth of it.

    Source: Zeghidour et al. 2021 (SoundStream), eq. 4. Departures, as in AudioCraft: windows of unit energy,
    the mean of squares in place of a norm per frame, 1e-5 added under the logarithm, division by the sum of
    weights. A departure from both: magnitudes are plain, since 64 mel bands are mostly empty at 64 samples.
    """

    def __init__(self, windows: Sequence[int] = (64, 128, 256, 512, 1024), log_weight: str = "sqrt"):
        super().__init__()
        self.scales = nn.ModuleList(_Spectrum(window) for window in windows)
        self.log_weights = [(window / 2) ** 0.5 if log_weight == "sqrt" else 1.0 for window in windows]

    def forward(self, wav: Tensor, wav_hat: Tensor) -> Tensor:
        """Distance of wav_hat [B, 1, T], which receives gradient, from wav [B, 1, T]."""
        distances = []
        for spectrum, log_weight in zip(self.scales, self.log_weights, strict=True):
            with torch.no_grad():
                target = spectrum(wav).abs()
            estimate = spectrum(wav_hat).abs()
            log_distance = F.mse_loss((estimate + 1e-5).log10(), (target + 1e-5).log10())
            distances.append(F.l1_loss(estimate, target) + log_weight * log_distance)
        return torch.stack(distances).sum() / sum(1 + log_weight for log_weight in self.log_weights)


class _Spectrum(nn.Module):
    """[B, 1, T] -> [B, T', F] complex, under a window of unit energy, hop a quarter of the window."""

    def __init__(self, window: int):
        super().__init__()
        hann = torch.hann_window(window)
        self.register_buffer("window", hann / hann.square().sum().sqrt(), persistent=False)

    def forward(self, wav: Tensor) -> Tensor:
        return stft(wav.squeeze(1), self.window, len(self.window) // 4, center=True)


class CompressedSpectralLoss(nn.Module):
    """L1 on spectra whose magnitudes are compressed by a power, with and without their phase (`cspec`).

    With S the spectrum of a scale and C = |S|^power e^(i angle S), where |S|² has 1e-6 added, averaged over scales:
    `(1 - phase_share) | |C| - |C_hat| | + phase_share (|Re(C - C_hat)| + |Im(C - C_hat)|)`.
    Compression lifts what is quiet, so the error follows the spectrum in place of lying beneath the loudest of it, which is
    where an L1 of samples leaves it. Unlike a logarithm it stops lifting near silence.

    Args:
        windows: samples, one scale each; the hop is a quarter of the window.
        power: of the magnitude, 0 to 1.
        phase_share: 0 hears magnitudes alone, 1 differences of complex values alone.

    Source: Ephrat et al. 2018 (power 0.3 of a complex spectrum); Braun and Tashev 2021, eq. 9, whose L2 is L1 here.
    """

    def __init__(self, windows: Sequence[int] = (512, 1024), power: float = 0.3, phase_share: float = 0.5):
        super().__init__()
        self.power, self.phase_share = power, phase_share
        self.scales = nn.ModuleList(_Spectrum(window) for window in windows)

    def forward(self, wav: Tensor, wav_hat: Tensor) -> Tensor:
        """Distance of wav_hat [B, 1, T], which receives gradient, from wav [B, 1, T]."""
        distances = []
        for spectrum in self.scales:
            with torch.no_grad():
                magnitude, compressed = self._compress(spectrum(wav))
            magnitude_hat, compressed_hat = self._compress(spectrum(wav_hat))
            of_phase = 2 * F.l1_loss(compressed_hat, compressed)  # real and imaginary part are added up
            distances.append((1 - self.phase_share) * F.l1_loss(magnitude_hat, magnitude) + self.phase_share * of_phase)
        return torch.stack(distances).mean()

    def _compress(self, spectrum: Tensor) -> tuple[Tensor, Tensor]:
        """Complex [...] to magnitude [...] and real and imaginary part [..., 2], compressed; finite gradients in silence."""
        parts = torch.view_as_real(spectrum)
        squared = parts.square().sum(-1) + 1e-6
        return squared ** (self.power / 2), parts * (squared ** ((self.power - 1) / 2)).unsqueeze(-1)


class BandLevelLoss(nn.Module):
    """L1 distance of log mel levels, of power that is averaged over neighbouring frames first, summed over scales (`bands`).

    What one short frame of a noisy sound holds is chance, and no code of few bits tells it. A decoder that is charged for
    every frame (`MelLoss`) answers with medians, 2 dB below the mean power. Averages have less chance in them, so what
    is left to lower is how loud a band is.

    Args:
        sample_rate: Hz.
        n_bands: mel bands of each scale.
        n_frames: frames that each scale averages over, one every half of them; frames are a quarter of a window apart.
        window: samples.
        floor: root of the power, under a window of unit energy, that levels begin at; white noise has its RMS.

    Source: ours; docs/speedrun.md has what it brings.
    """

    def __init__(
        self, sample_rate: int, n_bands: Sequence[int] = (40, 20), n_frames: Sequence[int] = (3, 7), window: int = 512,
        floor: float = 4.33e-3,
    ):  # fmt: skip
        super().__init__()
        self.spectrum, self.floor = _Spectrum(window), floor
        self.scales = nn.ModuleList(_Bands(sample_rate, window, *pair) for pair in zip(n_bands, n_frames, strict=True))

    def forward(self, wav: Tensor, wav_hat: Tensor) -> Tensor:
        """Distance of wav_hat [B, 1, T], which receives gradient, from wav [B, 1, T]."""
        with torch.no_grad():
            power = self._power(wav)
        power_hat, distances = self._power(wav_hat), []
        for scale in self.scales:
            target, level = ((scale(p) + self.floor**2).log10() / 2 for p in (power, power_hat))
            distances.append(F.l1_loss(level, target))
        return torch.stack(distances).sum()

    def _power(self, wav: Tensor) -> Tensor:
        """[B, 1, T] to [B, F, T']."""
        return torch.view_as_real(self.spectrum(wav)).square().sum(-1).transpose(1, 2)


class _Bands(nn.Module):
    """Power [B, F, T'] to its mean in mel bands and over n_frames, [B, n_bands, about 2 T' / n_frames]."""

    def __init__(self, sample_rate: int, window: int, n_bands: int, n_frames: int):
        super().__init__()
        self.n_frames = n_frames
        filters = mel_filterbank(sample_rate, window, n_bands)
        self.register_buffer("shares", (filters / filters.sum(0).clamp(min=1e-9)).T.contiguous(), persistent=False)

    def forward(self, power: Tensor) -> Tensor:
        with torch.autocast(power.device.type, enabled=False):
            return F.avg_pool1d(self.shares @ power, self.n_frames, max(self.n_frames // 2, 1))


# ------------------------------------------------------------------------- balancer


class Balancer:
    """Gives each loss its share of the gradient that reaches the generator's output.

    The norm of `g_i = d loss_i / d wav_hat`, per item, is averaged over the batch, ranks and updates; the
    combined gradient is `sum_i g_i / norm_i * weight_i / sum(weights) / B`. A weight is then a share,
    whatever the scale of its loss.

    Args:
        decay: of the moving average of the norms.
        mean_over_ranks: maps a vector to its mean over ranks; None in a single process.

    Source: Défossez et al. 2022 (EnCodec), section 3.4. Departure: divided by the batch B, so that the
    strength beside the quantizer's losses depends neither on the batch nor on the number of ranks; EnCodec's
    is B times larger.
    """

    def __init__(self, decay: float = 0.999, mean_over_ranks: Callable[[Tensor], Tensor] | None = None):
        self.decay = decay
        self.mean_over_ranks = mean_over_ranks
        self.sums: dict[str, float] = {}  # of norms, and of ones: the ratio has no start-up bias
        self.counts: dict[str, float] = {}

    def __call__(self, losses: dict[str, tuple[Tensor, float]], wav_hat: Tensor) -> Tensor:
        """The balanced gradient; send it back by `(wav_hat * gradient).sum().backward()`.

        Args:
            losses: name to (scalar that depends on wav_hat, weight); graphs are walked to wav_hat and kept.
            wav_hat: [B, 1, T] with gradient.
        Returns:
            [B, 1, T], this rank's gradient, without graph.
        Raises:
            ValueError: no weight is above 0.
        """
        total = sum(weight for _, weight in losses.values())
        if total <= 0:
            raise ValueError(f"balancer: got weights of sum {total}, expected more than 0; weigh a loss")
        gradients = [torch.autograd.grad(loss, wav_hat, retain_graph=True)[0] for loss, _ in losses.values()]
        norms = self._average(list(losses), [g.float().flatten(1).norm(dim=1).mean() for g in gradients])
        balanced = torch.zeros_like(wav_hat)
        for (_, weight), gradient, norm in zip(losses.values(), gradients, norms, strict=True):
            balanced += gradient * (weight / total / (norm + 1e-12) / len(wav_hat))
        return balanced

    def _average(self, names: list[str], norms: list[Tensor]) -> list[float]:
        """Moving averages of the named norms after this update; NaN and Inf pass through but are not kept."""
        current = torch.stack(norms)
        if self.mean_over_ranks is not None:
            current = self.mean_over_ranks(current)
        averages = []
        for name, norm in zip(names, current.tolist(), strict=True):
            if not math.isfinite(norm):
                averages.append(norm)
                continue
            self.sums[name] = self.decay * self.sums.get(name, 0.0) + norm
            self.counts[name] = self.decay * self.counts.get(name, 0.0) + 1
            averages.append(self.sums[name] / self.counts[name])
        return averages

    def state_dict(self) -> dict:
        """Moving averages as plain numbers, ready for JSON."""
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load_state_dict(self, state: dict) -> None:
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])
