"""Encoders: wav [B, 1, T] to latent z [B, D, T / hop_length]. They neither pad, trim nor quantize."""

import math

import torch
from torch import Tensor, nn

from codec.config import ConvEncoderConfig, LappedConfig, SpectralConfig
from codec.lapped import LappedEncoder
from codec.layers import (
    PaddedConv1d,
    ResidualLSTM,
    ResidualUnit,
    Transformer,
    activation,
    convnext_blocks,
    reach_in_samples,
    stft_frames,
)


class ConvEncoder(nn.Module):
    """Strided convolutions with residual units; the width doubles at every stride.

    `local` is what sees a bounded stretch of samples; `tail`, if any, sees the whole past: EnCodec's LSTM, or Mimi's
    transformer with the last stride behind it.

    Source: Kumar et al. 2023 (DAC), Défossez et al. 2022 (EnCodec) and 2024 (Mimi), whose layer orders these are.
    """

    def __init__(self, config: ConvEncoderConfig, latent_dim: int):
        super().__init__()
        self.config = config
        dim = config.encoder_dim
        same = {"causal": config.causal, "pad_mode": config.pad_mode, "normalize": config.weight_norm}
        layers = [PaddedConv1d(1, dim, 7, **same)]
        for stride in config.strides:
            layers += [ResidualUnit(dim, dilation, config) for dilation in config.dilations]
            layers += [activation(config.activation, dim), PaddedConv1d(dim, 2 * dim, 2 * stride, stride, **same)]
            dim *= 2
        last = [activation(config.activation, dim), PaddedConv1d(dim, latent_dim, config.last_kernel_size, **same)]
        stride = config.latent_stride
        resample = [PaddedConv1d(latent_dim, latent_dim, 2 * stride, stride, causal=True, pad_mode="replicate",
                                 normalize=False, bias=False)] if stride > 1 else []  # fmt: skip
        tail = []
        if config.lstm_layers:
            tail = [ResidualLSTM(dim, config.lstm_layers), *last]
        elif config.transformer:
            layers, tail = layers + last, [Transformer(latent_dim, config.transformer), *resample]
        else:
            layers += last + resample
        self.local, self.tail = nn.Sequential(*layers), nn.Sequential(*tail)

    @property
    def reach_samples(self) -> float:
        """Receptive field of `local` in samples, minus 1."""
        return reach_in_samples(self.local)

    @property
    def receptive_field_samples(self) -> float:
        """Samples that one latent frame can depend on; infinite where an LSTM remembers the whole past."""
        if self.config.lstm_layers:
            return math.inf
        transformer, hop = self.config.transformer, self.config.hop_length // self.config.latent_stride
        seen = transformer.n_layers * (transformer.window - 1) if transformer else 0
        return self.reach_samples + 1 + hop * (seen + reach_in_samples(self.tail))

    def forward(self, wav: Tensor) -> Tensor:
        """wav [B, 1, T] to z [B, D, ceil(T / hop_length)]; T a multiple of hop_length unless causal."""
        return self.tail(self.local(wav))


class SpectralEncoder(nn.Module):
    """Complex STFT in, ConvNeXt blocks at frame rate: a small fraction of a convolutional encoder's work.

    The spectrum enters as real and imaginary part, its magnitude compressed by a square root.
    """

    def __init__(self, config: SpectralConfig, latent_dim: int):
        super().__init__()
        self.n_fft, self.hop_length = config.n_fft, config.hop_length
        self.register_buffer("window", torch.hann_window(config.n_fft), persistent=False)
        self.embed = nn.Linear(config.n_fft + 2, config.dim)
        self.norm_in = nn.LayerNorm(config.dim)
        self.blocks = convnext_blocks(config)
        self.norm_out = nn.LayerNorm(config.dim)
        self.to_latent = nn.Linear(config.dim, latent_dim)
        self.tail = nn.Sequential()

    @property
    def reach_samples(self) -> float:
        """Receptive field in samples, minus 1."""
        return self.n_fft - 1 + reach_in_samples(self.blocks) * self.hop_length

    @property
    def receptive_field_samples(self) -> float:
        """Samples that one latent frame can depend on."""
        return self.reach_samples + 1

    def forward(self, wav: Tensor) -> Tensor:
        """wav [B, 1, T], T a multiple of hop_length, to z [B, D, T / hop_length]."""
        spectrum = stft_frames(wav[:, 0], self.n_fft, self.hop_length, self.window)
        compressed = spectrum * (spectrum.abs() + 1e-5).rsqrt()
        x = torch.cat([compressed.real, compressed.imag], dim=1).transpose(1, 2)  # [B, T', n_fft + 2]
        x = self.blocks(self.norm_in(self.embed(x)))
        return self.to_latent(self.norm_out(x)).transpose(1, 2)


def build_encoder(
    config: ConvEncoderConfig | SpectralConfig | LappedConfig, latent_dim: int, sample_rate: int
) -> ConvEncoder | SpectralEncoder | LappedEncoder:
    """The encoder that `encoder.type` names."""
    if config.type == "lapped":
        return LappedEncoder(config, latent_dim, sample_rate)
    return (ConvEncoder if config.type == "conv" else SpectralEncoder)(config, latent_dim)
