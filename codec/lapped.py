"""A lapped transform with networks beside it: the body whose training starts as a codec that works."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codec import distributed
from codec.config import LappedConfig
from codec.layers import ScaledTanh, convnext_blocks, reach_in_samples

LEAST_LEVEL = 1e-3  # of a frame, so that silence has a direction too


def lapped_window(window_length: int, hop_length: int) -> Tensor:
    """[window_length]: flat, with sine flanks where frames overlap; its squares at every hop add up to 1."""
    overlap = window_length - hop_length
    rise = torch.sin(math.pi / 2 * (torch.arange(overlap) + 0.5) / overlap)
    return torch.cat([rise, torch.ones(hop_length - overlap), rise.flip(0)])


def lapped_frames(wav: Tensor, window: Tensor, hop_length: int) -> Tensor:
    """wav [B, T], T a multiple of hop_length, to windowed frames [B, T / hop_length, window_length] centred on hops."""
    flank = (len(window) - hop_length) // 2
    return F.pad(wav, (flank, flank)).unfold(1, len(window), hop_length) * window


def overlap_add(frames: Tensor, window: Tensor, hop_length: int) -> Tensor:
    """Inverse of `lapped_frames`, [B, T', window_length] to [B, T' x hop_length]; fades the first and the last flank."""
    n_frames, flank = frames.shape[1], (len(window) - hop_length) // 2
    total = (n_frames - 1) * hop_length + len(window)
    wav = F.fold((frames * window).transpose(1, 2), (1, total), (1, len(window)), stride=(1, hop_length))[:, 0, 0]
    return wav[:, flank : total - flank]


def level(x: Tensor) -> Tensor:
    """Norm over the last dimension, kept and above 0."""
    return (x.square().sum(-1, keepdim=True) + LEAST_LEVEL**2).sqrt()


def small_linear(dim_in: int, dim_out: int) -> nn.Linear:
    """A linear layer that adds little at first and yet passes a gradient on."""
    linear = nn.Linear(dim_in, dim_out)
    nn.init.normal_(linear.weight, std=1e-3)
    nn.init.zeros_(linear.bias)
    return linear


class LappedEncoder(nn.Module):
    """A linear transform of overlapping frames, plus what ConvNeXt blocks at frame rate find to add.

    The transform is the principal components of speech (`start_transform`), and the blocks add almost nothing at first: the
    codec is then an old transform codec, at once far better than an untrained network. Latents have the root of the norm
    that the transform gives, so that quiet speech has its share of the codebooks; the blocks turn them and cannot make
    them longer. Where they could, latents grew thirtyfold within 2000 updates and left averaged weights behind.

    Source: lapped transforms, Malvar 1992; ConvNeXt in time as in Vocos (Siuzdak 2023). Joining them this way is ours.
    """

    def __init__(self, config: LappedConfig, latent_dim: int):
        super().__init__()
        self.hop_length = config.hop_length
        self.register_buffer("window", lapped_window(config.window_length, config.hop_length), persistent=False)
        self.register_buffer("components", torch.randn(config.window_length, latent_dim) / config.window_length**0.5)
        self.embed = nn.Linear(config.window_length, config.dim)
        self.blocks = convnext_blocks(config)
        self.norm = nn.LayerNorm(config.dim)
        self.to_latent = small_linear(config.dim, latent_dim)
        self.tail = nn.Sequential()

    @property
    def reach_samples(self) -> float:
        """Receptive field in samples, minus 1."""
        return len(self.window) - 1 + reach_in_samples(self.blocks) * self.hop_length

    @property
    def receptive_field_samples(self) -> float:
        """Samples that one latent frame can depend on."""
        return self.reach_samples + 1

    def forward(self, wav: Tensor) -> Tensor:
        """wav [B, 1, T], T a multiple of hop_length, to z [B, D, T / hop_length]."""
        frames = lapped_frames(wav[:, 0], self.window, self.hop_length)
        z = frames @ self.components
        x = self.norm(self.blocks(self.embed(frames / level(frames).sqrt())))
        shape = F.normalize(z / level(z) + self.to_latent(x), dim=-1)
        return (level(z).sqrt() * shape).transpose(1, 2)


class LappedDecoder(nn.Module):
    """The way back of `LappedEncoder`: a linear transform, plus what ConvNeXt blocks make of the frames around."""

    def __init__(self, config: LappedConfig, latent_dim: int):
        super().__init__()
        self.hop_length = config.hop_length
        self.register_buffer("window", lapped_window(config.window_length, config.hop_length), persistent=False)
        self.transform = nn.Linear(latent_dim, config.window_length, bias=False)
        self.embed = nn.Conv1d(latent_dim, config.dim, config.kernel_size, padding=config.kernel_size // 2)
        self.blocks = convnext_blocks(config)
        self.norm = nn.LayerNorm(config.dim)
        self.to_frames = small_linear(config.dim, config.window_length)
        self.output = ScaledTanh()
        self.head = nn.Sequential()

    @property
    def reach_frames(self) -> float:
        """Receptive field in frames, minus 1."""
        return (len(self.window) - 1) / self.hop_length + reach_in_samples(self.embed) + reach_in_samples(self.blocks)

    def forward(self, z_q: Tensor) -> Tensor:
        """z_q [B, D, T'] to wav_hat [B, 1, T' x hop_length]."""
        z = z_q.transpose(1, 2)
        x = self.norm(self.blocks(self.embed(z_q).transpose(1, 2)))
        with torch.autocast(z_q.device.type, enabled=False):  # samples need more than bf16
            z = z.float()
            frames = level(z) * (self.transform(z) + self.to_frames(x.float()))
            return self.output(overlap_add(frames, self.window, self.hop_length)[:, None])


@torch.no_grad()
def start_transform(encoder: LappedEncoder, decoder: LappedDecoder, wavs: Iterable[Tensor]) -> None:
    """Make both transforms the principal components of these sounds' frames, identical on all ranks.

    No other linear transform to so many numbers a frame loses less (Karhunen-Loève).

    Args:
        wavs: [B, 1, T] each, this rank's share.
    """
    window, covariance = encoder.window, 0
    for wav in wavs:
        frames = lapped_frames(wav[:, 0], window, encoder.hop_length).flatten(0, 1)
        covariance = covariance + frames.T @ frames
    covariance = distributed.all_reduce_sum(covariance)
    components = torch.linalg.eigh(covariance.double()).eigenvectors.flip(1)  # the strongest first
    encoder.components.copy_(components[:, : encoder.components.shape[1]])
    distributed.broadcast(encoder.components)
    decoder.transform.weight.copy_(encoder.components)
