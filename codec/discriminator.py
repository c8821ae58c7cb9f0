"""The four discriminators of the field and the set a config names.

Each maps `wav [B, 1, T]` to `(logits, features)`: one logit map a sub-discriminator, and per
sub-discriminator the activations of every layer before the logits. None computes a loss.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from codec.config import DiscriminatorsConfig, MPDConfig, MRDConfig, MSDConfig, MSSTFTConfig
from codec.layers import conv1d_kind
from codec.spectral import stft

Outputs = tuple[list[Tensor], list[list[Tensor]]]  # logits, features


def _conv1d(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
    return weight_norm(conv1d_kind(in_channels * out_channels // groups)(
        in_channels, out_channels, kernel, stride, kernel // 2, groups=groups
    ))  # fmt: skip


def _conv2d(
    in_channels: int, out_channels: int, kernel: tuple[int, int], stride: int = 1, dilation: int = 1
) -> nn.Module:
    """Over [time, frequency]: the stride is along frequency, the dilation along time."""
    padding = (kernel[0] // 2 * dilation, kernel[1] // 2)
    return weight_norm(nn.Conv2d(in_channels, out_channels, kernel, (1, stride), padding, (dilation, 1)))


def _activations(convs: nn.ModuleList, x: Tensor, slope: float) -> list[Tensor]:
    """LeakyReLU outputs of a stack of convolutions, layer by layer."""
    features = []
    for conv in convs:
        x = F.leaky_relu(conv(x), slope, inplace=True)
        features.append(x)
    return features


def _collect(discriminators: nn.ModuleList, wav: Tensor) -> Outputs:
    """Run sub-discriminators that return (logit, features) on one input."""
    outputs = [discriminator(wav) for discriminator in discriminators]
    return [logit for logit, _ in outputs], [features for _, features in outputs]


# ------------------------------------------------------------------------- waveform


class MultiScaleDiscriminator(nn.Module):
    """Grouped strided convolutions on the waveform at 1x, 2x, 4x ... downsampling.

    Args:
        n_scales: scales; each halves the rate of the one before by average pooling.
        channels: outputs of the six hidden layers; a grouped layer has a quarter of its inputs as groups.

    Source: Kumar et al. 2019 (MelGAN).
    """

    def __init__(self, n_scales: int = 3, channels: tuple[int, ...] = (16, 64, 256, 1024, 1024, 1024)):
        super().__init__()
        self.discriminators = nn.ModuleList(_ScaleDiscriminator(channels) for _ in range(n_scales))

    def forward(self, wav: Tensor) -> Outputs:
        """wav [B, 1, T] -> logits n_scales x [B, 1, T'], features n_scales x 6 x [B, C, T']."""
        logits, features = [], []
        for i, discriminator in enumerate(self.discriminators):
            if i > 0:
                wav = F.avg_pool1d(wav, 4, stride=2, padding=1, count_include_pad=False)
            logit, activations = discriminator(wav)
            logits.append(logit)
            features.append(activations)
        return logits, features


class _ScaleDiscriminator(nn.Module):
    """One scale of the multi-scale discriminator."""

    def __init__(self, channels: tuple[int, ...]):
        super().__init__()
        assert len(channels) == 6
        c = channels
        self.convs = nn.ModuleList(
            [_conv1d(1, c[0], 15)]
            + [_conv1d(c[i], c[i + 1], 41, stride=4, groups=c[i] // 4) for i in range(4)]
            + [_conv1d(c[4], c[5], 5)]
        )
        self.conv_post = _conv1d(c[5], 1, 3)

    def forward(self, wav: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = _activations(self.convs, wav, 0.2)
        return self.conv_post(features[-1]), features


class MultiPeriodDiscriminator(nn.Module):
    """Looks at every p-th sample, for several periods p.

    Args:
        periods: samples; primes overlap least.
        channels: outputs of the hidden layers; all but the last have stride 3.

    Source: Kong et al. 2020 (HiFi-GAN), with DAC's LeakyReLU slope (0.1). Departures: the p phases are folded
    into the batch and convolved in one dimension, which gives the numbers of the published (k, 1)
    convolutions and is faster on the CPU; DAC pads an input that already fits by a whole period, we do not.
    """

    def __init__(
        self,
        periods: tuple[int, ...] = (2, 3, 5, 7, 11),
        channels: tuple[int, ...] = (32, 128, 512, 1024, 1024),
    ):
        super().__init__()
        self.discriminators = nn.ModuleList(_PeriodDiscriminator(p, channels) for p in periods)

    def forward(self, wav: Tensor) -> Outputs:
        """wav [B, 1, T] -> one per period: logits [B * p, 1, T'], features len(channels) x [B * p, C, T']."""
        return _collect(self.discriminators, wav)


class _PeriodDiscriminator(nn.Module):
    """One period of the multi-period discriminator."""

    def __init__(self, period: int, channels: tuple[int, ...]):
        super().__init__()
        self.period = period
        widths = (1, *channels)
        last = len(channels) - 1
        self.convs = nn.ModuleList(
            _conv1d(widths[i], widths[i + 1], 5, stride=3 if i < last else 1) for i in range(len(channels))
        )
        self.conv_post = _conv1d(channels[-1], 1, 3)

    def forward(self, wav: Tensor) -> tuple[Tensor, list[Tensor]]:
        wav = F.pad(wav, (0, -wav.shape[-1] % self.period), mode="reflect")
        x = wav.reshape(len(wav), -1, self.period).transpose(1, 2).reshape(len(wav) * self.period, 1, -1)
        features = _activations(self.convs, x, 0.1)
        return self.conv_post(features[-1]), features


# ------------------------------------------------------------------------- spectrum


class MultiResolutionDiscriminator(nn.Module):
    """Complex spectra at several resolutions, cut into frequency bands with a convolution stack each.

    Args:
        windows: samples; the hop is a quarter of each.
        channels: width of every hidden layer.
        bands: (low, high) shares of the frequency axis.

    Source: Kumar et al. 2023 (DAC).
    """

    def __init__(
        self,
        windows: tuple[int, ...] = (2048, 1024, 512),
        channels: int = 32,
        bands: tuple[tuple[float, float], ...] = ((0, 0.1), (0.1, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1)),
    ):
        super().__init__()
        self.discriminators = nn.ModuleList(_ResolutionDiscriminator(w, channels, bands) for w in windows)

    def forward(self, wav: Tensor) -> Outputs:
        """wav [B, 1, T] -> one per window: logits [B, 1, T', F'], 5 * len(bands) features [B, C, T', F']."""
        return _collect(self.discriminators, wav)


class _ResolutionDiscriminator(nn.Module):
    """One window of the multi-resolution discriminator."""

    def __init__(self, window: int, channels: int, bands: tuple[tuple[float, float], ...]):
        super().__init__()
        n_bins = window // 2 + 1
        self.bands = [(int(low * n_bins), int(high * n_bins)) for low, high in bands]
        self.register_buffer("window", torch.hann_window(window), persistent=False)
        c = channels
        self.band_convs = nn.ModuleList(
            nn.ModuleList(
                [_conv2d(2, c, (3, 9))]
                + [_conv2d(c, c, (3, 9), stride=2) for _ in range(3)]
                + [_conv2d(c, c, (3, 3))]
            )
            for _ in bands
        )
        self.conv_post = _conv2d(c, 1, (3, 3))

    def forward(self, wav: Tensor) -> tuple[Tensor, list[Tensor]]:
        spectrum = self._spectrum(wav)
        stacks = [
            _activations(convs, spectrum[..., low:high], 0.1)
            for (low, high), convs in zip(self.bands, self.band_convs, strict=True)
        ]
        logit = self.conv_post(torch.cat([activations[-1] for activations in stacks], dim=-1))
        return logit, [feature for activations in stacks for feature in activations]

    def _spectrum(self, wav: Tensor) -> Tensor:
        """[B, 1, T] -> [B, 2, ceil(T / hop), W/2 + 1]: real and imaginary part as channels."""
        hop = len(self.window) // 4
        side = (len(self.window) - hop) // 2
        wav = F.pad(wav, (side, side + -wav.shape[-1] % hop), mode="reflect").squeeze(1)
        return torch.view_as_real(stft(wav, self.window, hop, center=False)).permute(0, 3, 1, 2)


class MultiScaleSTFTDiscriminator(nn.Module):
    """Complex spectra at several resolutions, convolved whole, with growing dilation along time.

    Args:
        windows: samples; the hop is a quarter of each.
        channels: width of every hidden layer.

    Source: Défossez et al. 2022 (EnCodec). Departure: the first layer has weight norm as well.
    """

    def __init__(self, windows: tuple[int, ...] = (2048, 1024, 512, 256, 128), channels: int = 32):
        super().__init__()
        self.discriminators = nn.ModuleList(_STFTDiscriminator(w, channels) for w in windows)

    def forward(self, wav: Tensor) -> Outputs:
        """wav [B, 1, T] -> one per window: logits [B, 1, T', F'], features 5 x [B, C, T', F']."""
        return _collect(self.discriminators, wav)


class _STFTDiscriminator(nn.Module):
    """One window of the multi-scale STFT discriminator."""

    def __init__(self, window: int, channels: int):
        super().__init__()
        hann = torch.hann_window(window)
        # a window of unit energy, so that the spectrum's scale does not depend on its length
        self.register_buffer("window", hann / hann.square().sum().sqrt(), persistent=False)
        c = channels
        self.convs = nn.ModuleList(
            [_conv2d(2, c, (3, 9))]
            + [_conv2d(c, c, (3, 9), stride=2, dilation=d) for d in (1, 2, 4)]
            + [_conv2d(c, c, (3, 3))]
        )
        self.conv_post = _conv2d(c, 1, (3, 3))

    def forward(self, wav: Tensor) -> tuple[Tensor, list[Tensor]]:
        spectrum = stft(wav.squeeze(1), self.window, len(self.window) // 4, center=False)
        features = _activations(self.convs, torch.view_as_real(spectrum).permute(0, 3, 1, 2), 0.2)
        return self.conv_post(features[-1]), features


# ---------------------------------------------------------------------------- the set


class Discriminators(nn.Module):
    """All discriminators that a config names, as one.

    Args:
        config: `sets`, one section a discriminator; `normalize_input` removes the mean and
            scales the peak to 0.8 first, so that neither level nor DC tells real from fake (DAC).
    """

    def __init__(self, config: DiscriminatorsConfig):
        super().__init__()
        self.normalize_input = config.normalize_input
        self.members = nn.ModuleList(_build(section) for section in config.sets)

    def forward(self, wav: Tensor) -> Outputs:
        """wav [B, 1, T] -> logits and features of all members' sub-discriminators, concatenated.

        Rows of a batch do not see each other: real and fake may be concatenated along B.
        """
        if self.normalize_input:
            wav = wav - wav.mean(dim=-1, keepdim=True)
            wav = 0.8 * wav / (wav.abs().amax(dim=-1, keepdim=True) + 1e-9)
        logits, features = [], []
        for member in self.members:
            member_logits, member_features = member(wav)
            logits += member_logits
            features += member_features
        return logits, features


def _build(section: MSDConfig | MPDConfig | MRDConfig | MSSTFTConfig) -> nn.Module:
    if isinstance(section, MSDConfig):
        return MultiScaleDiscriminator(section.n_scales, section.channels)
    if isinstance(section, MPDConfig):
        return MultiPeriodDiscriminator(section.periods, section.channels)
    if isinstance(section, MRDConfig):
        return MultiResolutionDiscriminator(section.windows, section.channels)
    return MultiScaleSTFTDiscriminator(section.windows, section.channels)
