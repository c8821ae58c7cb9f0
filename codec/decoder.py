"""Decoders: z_q [B, D, T'] to wav_hat [B, 1, T' x hop_length] in (-1, 1)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codec.config import ConvDecoderConfig, LappedConfig, SpectralConfig
from codec.lapped import LappedDecoder
from codec.layers import (
    PaddedConv1d,
    PaddedConvTranspose1d,
    ResidualLSTM,
    ResidualUnit,
    ScaledTanh,
    Transformer,
    activation,
    convnext_blocks,
    istft_frames,
    reach_in_samples,
)


class ConvDecoder(nn.Module):
    """Transposed convolutions with residual units; the width halves at every stride.

    `head`, if any, sees the whole past: EnCodec's LSTM, or Mimi's transformer with a stride before it. `layers` and
    `to_wav` see a bounded stretch of frames.

    Source: as for `ConvEncoder`; the learnable scale before tanh is ours.
    """

    def __init__(self, config: ConvDecoderConfig, latent_dim: int):
        super().__init__()
        dim, causal, stride = config.decoder_dim, config.causal, config.latent_stride
        self.hop_length = config.hop_length
        same = {"causal": causal, "pad_mode": config.pad_mode, "normalize": config.weight_norm}
        up = {"causal": causal, "normalize": config.weight_norm, "output_padding": config.output_padding}
        first = [PaddedConv1d(latent_dim, dim, 7, **same)]
        resample = [PaddedConvTranspose1d(latent_dim, latent_dim, stride, causal=True, normalize=False,
                                          groups=latent_dim, bias=False)] if stride > 1 else []  # fmt: skip
        head, layers = [], []
        if config.lstm_layers:
            head = [*first, ResidualLSTM(dim, config.lstm_layers)]
        elif config.transformer:
            head, layers = [*resample, Transformer(latent_dim, config.transformer)], first
        else:
            layers = resample + first
        for stride in config.strides:
            inplace = len(layers) > 0  # what `head` gave is not ours to overwrite
            layers += [activation(config.activation, dim, inplace), PaddedConvTranspose1d(dim, dim // 2, stride, **up)]
            dim //= 2
            layers += [ResidualUnit(dim, dilation, config) for dilation in config.dilations]
        self.head = nn.Sequential(*head)
        self.layers = nn.Sequential(*layers, activation(config.activation, dim))
        output = {"scaled_tanh": ScaledTanh, "tanh": nn.Tanh, "linear": nn.Identity}[config.output]()
        self.to_wav = nn.Sequential(PaddedConv1d(dim, 1, config.last_kernel_size, **same), output)

    @property
    def reach_frames(self) -> float:
        """Receptive field of `layers` and `to_wav` in the frames they get, minus 1."""
        return reach_in_samples(self.layers, self.to_wav)

    def local(self, x: Tensor) -> Tensor:
        """What `head` gave to wav_hat: the part that sees a bounded stretch of frames."""
        x = self.layers(x)
        # samples in bf16 carry rounding noise at -54 dB, which discriminators would learn to hear
        with torch.autocast(x.device.type, enabled=False):
            return self.to_wav(x.float())

    def forward(self, z_q: Tensor) -> Tensor:
        """z_q [B, D, T'] to wav_hat [B, 1, T' x hop_length]."""
        wav_hat = self.local(self.head(z_q))
        return F.pad(wav_hat, (0, z_q.shape[-1] * self.hop_length - wav_hat.shape[-1]))  # samples without output_padding


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
        self.blocks = convnext_blocks(config)
        self.norm_out = nn.LayerNorm(config.dim)
        self.to_spectrum = nn.Linear(config.dim, config.n_fft + 2)
        self.output = ScaledTanh()
        self.head = nn.Sequential()

    @property
    def reach_frames(self) -> float:
        """Receptive field in frames, minus 1."""
        return (self.n_fft - 1) / self.hop_length + reach_in_samples(self.embed) + reach_in_samples(self.blocks)

    def forward(self, z_q: Tensor) -> Tensor:
        """z_q [B, D, T'] to wav_hat [B, 1, T' x hop_length]."""
        x = self.blocks(self.norm_in(self.embed(z_q).transpose(1, 2)))
        with torch.autocast(z_q.device.type, enabled=False):  # phases and samples need more than bf16
            log_magnitude, phase = self.to_spectrum(self.norm_out(x.float())).transpose(1, 2).chunk(2, dim=1)
            spectrum = torch.polar(log_magnitude.clamp(max=5.0).exp(), phase)
            wav_hat = istft_frames(spectrum, self.n_fft, self.hop_length, self.window)
            return self.output(wav_hat[:, None])


def build_decoder(
    config: ConvDecoderConfig | SpectralConfig | LappedConfig, latent_dim: int
) -> ConvDecoder | SpectralDecoder | LappedDecoder:
    """The decoder that `decoder.type` names."""
    return {"conv": ConvDecoder, "spectral": SpectralDecoder, "lapped": LappedDecoder}[config.type](config, latent_dim)
