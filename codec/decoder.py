"""Decoders: z_q [B, D, T'] to wav_hat [B, 1, T' x hop_length] in (-1, 1)."""

import torch
from torch import Tensor, nn

from codec.config import ConvDecoderConfig, SpectralConfig
from codec.layers import (
    ConvNeXtBlock,
    PaddedConv1d,
    PaddedConvTranspose1d,
    ResidualUnit,
    Snake,
    istft_frames,
    reach_in_samples,
)


class ScaledTanh(nn.Module):
    """tanh(output_scale * x) with a learnable scalar that starts at 1.

    Started at 3, with the scale after tanh, a real run left [-1, 1], grew a DC of -1.4 and died at once.
    """

    def __init__(self):
        super().__init__()
        self.output_scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.output_scale * x)


class ConvDecoder(nn.Module):
    """Transposed convolutions with dilated residual units; the width halves at every stride.

    Source: Kumar et al. 2023 (DAC), whose layer order this follows; the learnable scale before tanh is ours.
    """

    def __init__(self, config: ConvDecoderConfig, latent_dim: int):
        super().__init__()
        dim, causal = config.decoder_dim, config.causal
        layers = [PaddedConv1d(latent_dim, dim, 7, causal=causal)]
        for stride in config.strides:
            layers += [Snake(dim), PaddedConvTranspose1d(dim, dim // 2, stride, causal)]
            dim //= 2
            layers += [ResidualUnit(dim, dilation, causal) for dilation in config.dilations]
        self.layers = nn.Sequential(*layers, Snake(dim))
        self.to_wav = nn.Sequential(PaddedConv1d(dim, 1, 7, causal=causal), ScaledTanh())

    @property
    def reach_frames(self) -> float:
        """Receptive field in frames, minus 1."""
        return reach_in_samples(self)

    def forward(self, z_q: Tensor) -> Tensor:
        """z_q [B, D, T'] to wav_hat [B, 1, T' x hop_length]."""
        x = self.layers(z_q)
        # samples in bf16 carry rounding noise at -54 dB, which discriminators would learn to hear
        with torch.autocast(x.device.type, enabled=False):
            return self.to_wav(x.float())


class SpectralDecoder(nn.Module):
    """ConvNeXt blocks at frame rate, then an inverse STFT.

    The head predicts log-magnitude and phase. Source: Vocos (Siuzdak 2023), section 3.2; here frames are
    centred on hops so that T' frames give exactly T' x hop_length samples.
    """

    def __init__(self, config: SpectralConfig, latent_dim: int):
        super().__init__()
        self.n_fft, self.hop_length = config.n_fft, config.hop_length
        self.register_buffer("window", torch.hann_window(config.n_fft), persistent=False)
        self.embed = nn.Conv1d(latent_dim, config.dim, config.kernel_size, padding=config.kernel_size // 2)
        self.norm_in = nn.LayerNorm(config.dim)
        self.blocks = nn.Sequential(
            *[ConvNeXtBlock(config.dim, config.expansion, config.kernel_size, 1 / config.n_blocks)
              for _ in range(config.n_blocks)]
        )  # fmt: skip
        self.norm_out = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.n_fft + 2)
        self.output = ScaledTanh()

    @property
    def reach_frames(self) -> float:
        """Receptive field in frames, minus 1."""
        return (self.n_fft - 1) / self.hop_length + reach_in_samples(self.embed) + reach_in_samples(self.blocks)

    def forward(self, z_q: Tensor) -> Tensor:
        """z_q [B, D, T'] to wav_hat [B, 1, T' x hop_length]."""
        x = self.blocks(self.norm_in(self.embed(z_q).transpose(1, 2)))
        with torch.autocast(z_q.device.type, enabled=False):  # phases and samples need more than bf16
            log_magnitude, phase = self.head(self.norm_out(x.float())).transpose(1, 2).chunk(2, dim=1)
            spectrum = torch.polar(log_magnitude.clamp(max=5.0).exp(), phase)
            wav_hat = istft_frames(spectrum, self.n_fft, self.hop_length, self.window)
            return self.output(wav_hat[:, None])


def build_decoder(config: ConvDecoderConfig | SpectralConfig, latent_dim: int) -> ConvDecoder | SpectralDecoder:
    """The decoder that `decoder.type` names."""
    return (ConvDecoder if config.type == "conv" else SpectralDecoder)(config, latent_dim)
