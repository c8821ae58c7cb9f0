"""The body whose training starts as a codec that works: a lapped transform and an envelope, with networks beside them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codec import distributed
from codec.config import LappedConfig
from codec.layers import Gain, convnext_blocks, istft_frames, reach_in_samples, stft_frames
from codec.spectral import mel_filterbank

LEAST_LEVEL = 1e-3  # of a frame, so that silence has a direction too
LEAST_BAND = 0.1  # magnitude of a band that counts as silent: some -40 dB of a loud one in spectra of 480 samples
LEAST_BIN = 1e-2  # likewise of one frequency
ENVELOPE_POWER = 1 / 32  # mean power a number for the envelope; those for the waveform have about 2 together


class LappedEncoder(nn.Module):
    """Overlapping frames to numbers for the waveform and for the spectral envelope, which ConvNeXt blocks then improve.

    Both kinds are principal components (`start_transform`), of a frame's samples and of its log-mel spectra, one after the
    other, and the blocks change next to nothing at first. So the codec works before its first update: its bits carry the
    strongest of the waveform, mostly below 1 kHz, and how loud it is everywhere else.

    The numbers for the waveform have the root of the norm that the transform gives, so that quiet speech has its share of the
    codebooks. The blocks turn them and cannot make them longer: where they could, latents grew thirtyfold within 2000 updates
    and left averaged weights behind.

    Source: lapped transforms, Malvar 1992; envelope beside a waveform that is coded low down, as spectral band replication
    (Dietz et al. 2002); ConvNeXt in time as in Vocos (Siuzdak 2023). Joining them this way is ours.
    """

    def __init__(self, config: LappedConfig, latent_dim: int, sample_rate: int):
        super().__init__()
        self.n_fft, self.hop_length, self.n_envelope = config.n_fft, config.hop_length, config.n_envelope
        self.n_spectra, n_bands = config.n_spectra, config.n_spectra * config.n_bands
        n_waveform = latent_dim - config.n_envelope
        filters = mel_filterbank(sample_rate, config.n_fft, config.n_bands)
        self.register_buffer("filters", filters / filters.sum(0).clamp(min=1e-9), persistent=False)
        self.register_buffer("window", lapped_window(config.window_length, config.hop_length), persistent=False)
        self.register_buffer("long_window", torch.hann_window(config.n_fft), persistent=False)
        self.register_buffer("components", torch.randn(config.window_length, n_waveform) / config.window_length**0.5)
        self.register_buffer("mean_bands", torch.zeros(n_bands))
        self.register_buffer("envelopes", torch.randn(n_bands, config.n_envelope) / n_bands)
        self.embed = nn.Linear(config.window_length + n_bands, config.dim)
        self.blocks = convnext_blocks(config)
        self.norm = nn.LayerNorm(config.dim)
        self.to_latent = nn.Linear(config.dim, latent_dim)
        nn.init.normal_(self.to_latent.weight, std=1e-3)  # little, and yet a gradient passes
        nn.init.zeros_(self.to_latent.bias)
        self.tail = nn.Sequential()

    @property
    def reach_samples(self) -> float:
        """Receptive field in samples, minus 1."""
        return frame_span(self) - 1 + reach_in_samples(self.blocks) * self.hop_length

    @property
    def receptive_field_samples(self) -> float:
        """Samples that one latent frame can depend on."""
        return self.reach_samples + 1

    def forward(self, wav: Tensor) -> Tensor:
        """wav [B, 1, T], T a multiple of hop_length, to z [B, D, T / hop_length]; the envelope's numbers come last."""
        frames = lapped_frames(wav[:, 0], self.window, self.hop_length)
        bands = self.bands(wav) - self.mean_bands
        x = self.blocks(self.embed(torch.cat([frames / level(frames).sqrt(), bands], -1)))
        z = frames @ self.components
        turn, bend = self.to_latent(self.norm(x)).split([z.shape[-1], self.n_envelope], -1)
        waveform = level(z).sqrt() * F.normalize(z / level(z) + turn, dim=-1)
        envelope = bands @ self.envelopes + bend.tanh()
        return torch.cat([waveform, envelope], -1).transpose(1, 2)

    def bands(self, wav: Tensor) -> Tensor:
        """wav [B, 1, T] to the logarithm of mean magnitudes in mel bands [B, T', n_spectra x n_bands]."""
        magnitudes = stft_frames(wav[:, 0], self.n_fft, self.hop_length // self.n_spectra, self.long_window).abs()
        bands = (magnitudes.transpose(1, 2) @ self.filters + LEAST_BAND).log()
        return bands.unflatten(1, (-1, self.n_spectra)).flatten(2)


class LappedDecoder(nn.Module):
    """The way back of `LappedEncoder`: its transform inverted, plus an inverse STFT for all that the transform leaves out.

    The envelope's numbers give the magnitudes to begin with (`to_magnitudes`, started by least squares); ConvNeXt blocks give
    the phases, and what is to change about the magnitudes. Magnitude and phase as in Vocos (Siuzdak 2023), section 3.2.
    """

    def __init__(self, config: LappedConfig, latent_dim: int):
        super().__init__()
        self.n_fft, self.hop_length, self.n_envelope = config.n_fft, config.hop_length, config.n_envelope
        self.n_spectra = config.n_spectra
        self.register_buffer("window", lapped_window(config.window_length, config.hop_length), persistent=False)
        self.register_buffer("long_window", torch.hann_window(config.n_fft), persistent=False)
        self.transform = nn.Linear(latent_dim - config.n_envelope, config.window_length, bias=False)
        self.to_magnitudes = nn.Linear(config.n_envelope, config.n_spectra * (config.n_fft // 2 + 1))
        self.embed = nn.Conv1d(latent_dim, config.dim, config.kernel_size, padding=config.kernel_size // 2)
        self.blocks = convnext_blocks(config)
        self.norm = nn.LayerNorm(config.dim)
        self.to_spectrum = nn.Linear(config.dim, config.n_spectra * (config.n_fft + 2))
        self.output = Gain()  # a codec from the start needs no tanh, which takes 3 % of the level of loud speech
        self.head = nn.Sequential()

    @property
    def reach_frames(self) -> float:
        """Receptive field in frames, minus 1."""
        return (frame_span(self) - 1) / self.hop_length + reach_in_samples(self.embed) + reach_in_samples(self.blocks)

    def forward(self, z_q: Tensor) -> Tensor:
        """z_q [B, D, T'] to wav_hat [B, 1, T' x hop_length]."""
        x = self.norm(self.blocks(self.embed(z_q).transpose(1, 2)))
        with torch.autocast(z_q.device.type, enabled=False):  # phases and samples need more than bf16
            z = z_q.float().transpose(1, 2)
            z, envelope = z.split([z.shape[-1] - self.n_envelope, self.n_envelope], -1)
            wav_hat = overlap_add(level(z) * self.transform(z), self.window, self.hop_length)
            change, phase = self.to_spectrum(x.float()).chunk(2, dim=-1)
            log_magnitude = (self.to_magnitudes(envelope) + change).clamp(max=5.0)
            spectra = torch.polar(log_magnitude.exp(), phase).unflatten(2, (self.n_spectra, -1)).flatten(1, 2).transpose(1, 2)
            wav_hat = wav_hat + istft_frames(spectra, self.n_fft, self.hop_length // self.n_spectra, self.long_window)
            return self.output(wav_hat[:, None])


# ------------------------------------------------------------------------------ the start


@torch.no_grad()
def start_transform(encoder: LappedEncoder, decoder: LappedDecoder, wav: Tensor) -> None:
    """Make a new encoder and decoder a codec, from sounds [B, 1, T] that are the same on every rank.

    No other linear transform to so many numbers a frame loses less than the principal components (Karhunen-Loève).
    """
    frames = lapped_frames(wav[:, 0], encoder.window, encoder.hop_length)
    components = strongest_directions(frames.flatten(0, 1), encoder.components.shape[1])
    bands = encoder.bands(wav).flatten(0, 1)
    mean = bands.mean(0)
    envelopes = strongest_directions(bands - mean, encoder.n_envelope)
    envelopes *= (ENVELOPE_POWER * encoder.n_envelope / ((bands - mean) @ envelopes).square().sum(1).mean()).sqrt()

    # Least squares from the envelope's numbers to the log-magnitudes of what the transform leaves out
    rest = wav[:, 0] - overlap_add(frames @ components @ components.T, encoder.window, encoder.hop_length)
    spectra = stft_frames(rest, encoder.n_fft, encoder.hop_length // encoder.n_spectra, encoder.long_window).abs()
    spectra = spectra.transpose(1, 2).unflatten(1, (-1, encoder.n_spectra)).flatten(2)
    known = F.pad((bands - mean) @ envelopes, (0, 1), value=1.0)
    wanted = (spectra + LEAST_BIN).log().flatten(0, 1)
    solution = torch.linalg.solve(known.T @ known, known.T @ wanted)

    starts = ((encoder.components, components), (encoder.mean_bands, mean), (encoder.envelopes, envelopes),
              (decoder.transform.weight, components), (decoder.to_magnitudes.weight, solution[:-1].T),
              (decoder.to_magnitudes.bias, solution[-1]))  # fmt: skip
    for target, value in starts:
        target.copy_(distributed.broadcast(value.contiguous()))  # a GPU's eigenvectors may differ from rank to rank


def strongest_directions(x: Tensor, n: int) -> Tensor:
    """x [M, D] to the n orthonormal directions [D, n] that hold most of its power, strongest first."""
    x = x.double()
    return torch.linalg.eigh(x.T @ x).eigenvectors.flip(1)[:, :n].to(torch.float32)


# ------------------------------------------------------------------------------ frames


def lapped_window(window_length: int, hop_length: int) -> Tensor:
    """[window_length]: flat, with sine flanks where frames overlap; its squares at every hop add up to 1."""
    overlap = window_length - hop_length
    rise = torch.sin(math.pi / 2 * (torch.arange(overlap) + 0.5) / overlap)
    return torch.cat([rise, torch.ones(hop_length - overlap), rise.flip(0)])


def lapped_frames(wav: Tensor, window: Tensor, hop_length: int) -> Tensor:
    """wav [B, T], T a multiple of hop_length, to windowed frames [B, T / hop_length, window_length] centred on hops."""
    flank = (len(window) - hop_length) // 2
    return F.pad(wav, (flank, flank)).unfold(1, len(window), hop_length) * window


def frame_span(body: LappedEncoder | LappedDecoder) -> int:
    """Samples from the first to the last that one frame covers, the transform's or the spectra's."""
    return max(len(body.window), body.n_fft + body.hop_length - body.hop_length // body.n_spectra)


def overlap_add(frames: Tensor, window: Tensor, hop_length: int) -> Tensor:
    """Inverse of `lapped_frames`, [B, T', window_length] to [B, T' x hop_length]; fades the first and the last flank."""
    n_frames, flank = frames.shape[1], (len(window) - hop_length) // 2
    total = (n_frames - 1) * hop_length + len(window)
    wav = F.fold((frames * window).transpose(1, 2), (1, total), (1, len(window)), stride=(1, hop_length))[:, 0, 0]
    return wav[:, flank : total - flank]


def level(x: Tensor) -> Tensor:
    """Norm over the last dimension, kept and above 0."""
    return (x.square().sum(-1, keepdim=True) + LEAST_LEVEL**2).sqrt()
