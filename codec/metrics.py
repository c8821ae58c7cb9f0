"""Measures of a reconstruction, of codebooks and of discriminators; all in float32 and without gradient.

Measures of audio give one value per item of a batch. Where an item has none (a silent reference, say) the
value is NaN: average with `nanmean`.
"""

import warnings
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from codec.audio import resample
from codec.spectral import mel_filterbank, stft

SCALES = ((0.008, 20), (0.016, 40), (0.032, 80), (0.064, 160))  # seconds of a window, mel bands

# ---------------------------------------------------------------------------- signals


@torch.no_grad()
def snr_db(wav: Tensor, wav_hat: Tensor) -> Tensor:
    """Power of the reference over power of the error, in dB.

    Args:
        wav: [B, 1, T] reference.
        wav_hat: [B, 1, T] reconstruction.
    Returns:
        [B]; +inf where they are equal, NaN where the reference is silent. 0 for a silent reconstruction.
    """
    return _power_ratio_db(wav.float(), wav_hat.float() - wav.float(), wav.float())


@torch.no_grad()
def si_sdr_db(wav: Tensor, wav_hat: Tensor) -> Tensor:
    """As `snr_db` after removing both means and scaling the reference to fit best.

    Returns:
        [B]; NaN where either side is silent or constant.
    Source: Le Roux et al. 2019, "SDR - half-baked or well done?", eq. 3.
    """
    reference = wav.float() - wav.float().mean(-1, keepdim=True)
    estimate = wav_hat.float() - wav_hat.float().mean(-1, keepdim=True)
    scale = (reference * estimate).sum(-1, keepdim=True) / reference.square().sum(-1, keepdim=True)
    return _power_ratio_db(scale * reference, estimate - scale * reference, reference)


def _power_ratio_db(signal: Tensor, error: Tensor, reference: Tensor) -> Tensor:
    """[B] power of signal over error, NaN where the reference has none."""
    ratio = signal.square().sum((1, 2)) / error.square().sum((1, 2))
    return torch.where(reference.square().sum((1, 2)) > 0, 10 * ratio.log10(), torch.nan)


@torch.no_grad()
def speech_level_db(wav: Tensor, sample_rate: int) -> Tensor:
    """RMS of recordings [B, 1, T] without their pauses, dB relative to 1.0 [B], not below -120.

    Of blocks of 0.4 s, each 0.1 s after the one before, as ITU-R BS.1770-5 has them, those that are less than 10 dB below the
    mean of all, its gate, and less than 14 dB below the loud ones, the 95th of 100: its own lets the noise of long pauses in.
    No weighting of frequencies, as `prepare_speaker_data.py` has none either; an offset (DC) does not count.
    """
    block = min(round(0.4 * sample_rate), wav.shape[-1])
    wav = wav.float() - wav.float().mean(-1, keepdim=True)
    power = F.avg_pool1d(wav.square(), block, max(block // 4, 1), ceil_mode=True)  # or the end would not count
    loud = power >= torch.maximum(10**-1.4 * power.quantile(0.95, -1, keepdim=True), 0.1 * power.mean(-1, keepdim=True))
    return 10 * ((power * loud).sum(-1) / loud.sum(-1)).clamp(min=1e-12).log10()[:, 0]


@torch.no_grad()
def amplitude_ratio(wav: Tensor, wav_hat: Tensor) -> Tensor:
    """RMS of the output [B, 1, T] over RMS of the input: [B]; NaN where the input is silent."""
    rms_in, rms_out = wav.float().square().mean((1, 2)).sqrt(), wav_hat.float().square().mean((1, 2)).sqrt()
    return torch.where(rms_in > 0, rms_out / rms_in, torch.nan)


@torch.no_grad()
def dc_offset(wav: Tensor) -> Tensor:
    """Mean sample of each item, [B, 1, T] -> [B]."""
    return wav.float().mean((1, 2))


@torch.no_grad()
def peak(wav: Tensor) -> Tensor:
    """Largest absolute sample of each item, [B, 1, T] -> [B]."""
    return wav.float().abs().amax((1, 2))


@torch.no_grad()
def mel_distance(wav: Tensor, wav_hat: Tensor, sample_rate: int) -> Tensor:
    """Mean absolute difference of log mel spectra, in dB; fixed, whatever a run trains on.

    80 bands on Slaney's scale up to half the sample rate; Hann window of 1024 samples (2048 above 24 kHz),
    hop a quarter; magnitudes, of which a full-scale sine's is 0.5, floored at 1e-4; 20 log10.

    Args:
        wav: [B, 1, T] reference, T at least 1024 (2048).
        wav_hat: [B, 1, T] reconstruction.
        sample_rate: Hz. Figures at different rates do not compare.
    Returns:
        [B]. Silence has a value: both sides on the floor are equal.
    """
    n_fft = 1024 if sample_rate <= 24000 else 2048
    return _log_distance(wav, wav_hat, n_fft, _mel_filters(sample_rate, n_fft, 80).to(wav.device))


@torch.no_grad()
def multi_scale_mel_db(wav: Tensor, wav_hat: Tensor, sample_rate: int) -> Tensor:
    """As `mel_distance`, averaged over windows of 8, 16, 32 and 64 ms with 20, 40, 80 and 160 bands.

    Args:
        wav: [B, 1, T] reference, T more than 32 ms.
        wav_hat: [B, 1, T] reconstruction.
        sample_rate: Hz, from 8000. The windows are the same at every rate, the bands reach up to half of it.
    Returns:
        [B] dB.
    Source: after DAC's mel distance (Kumar et al. 2023), which takes log10 of magnitudes floored at 1e-5, windows of
    a fixed number of samples, and adds the distance of the plain magnitudes: its figures do not compare.
    """
    distances = []
    for window_s, n_mels in SCALES:
        n_fft = round(window_s * sample_rate)
        filters = _mel_filters(sample_rate, n_fft, n_mels).to(wav.device)
        distances.append(_log_distance(wav, wav_hat, n_fft, filters))
    return torch.stack(distances).mean(0)


@torch.no_grad()
def multi_scale_stft_db(wav: Tensor, wav_hat: Tensor, sample_rate: int) -> Tensor:
    """Mean absolute difference of log magnitude spectra in dB, over the windows of `multi_scale_mel_db`.

    Args and Returns:
        as `multi_scale_mel_db`. High frequencies, nearly all of the bins, weigh far more than with mel bands.
    Source: after the log magnitude term of the multi-resolution STFT loss (Yamamoto et al. 2020; auraloss), here in
    dB, with a floor and without the spectral convergence: figures do not compare.
    """
    distances = [_log_distance(wav, wav_hat, round(window_s * sample_rate), None) for window_s, _ in SCALES]
    return torch.stack(distances).mean(0)


def _mel_filters(sample_rate: int, n_fft: int, n_mels: int) -> Tensor:
    """[n_fft/2 + 1, n_mels] means over a band rather than sums, so that the floor is the same in every band."""
    filters = mel_filterbank(sample_rate, n_fft, n_mels)
    return filters / filters.sum(0)


def _log_distance(wav: Tensor, wav_hat: Tensor, n_fft: int, filters: Tensor | None) -> Tensor:
    """[B] mean absolute difference in dB of floored magnitudes, in bands where there are filters."""
    window = torch.hann_window(n_fft, device=wav.device)

    def log_magnitude(x: Tensor) -> Tensor:
        magnitude = stft(x.squeeze(1), window / window.sum(), n_fft // 4, center=True).abs()
        with torch.autocast(x.device.type, enabled=False):
            magnitude = magnitude if filters is None else magnitude @ filters
            return 20 * magnitude.clamp_min(1e-4).log10()

    return (log_magnitude(wav) - log_magnitude(wav_hat)).abs().mean((1, 2))


# --------------------------------------------------------------- codebooks, discriminators


@torch.no_grad()
def codebook_usage(codes: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """How much of each codebook is in use.

    Args:
        codes: [B, N, T'] indices below codebook_size.
        codebook_size: entries, K.
    Returns:
        used: [N] share of entries that occur at all, in (0, 1]; at most B * T' / K can.
        perplexity: [N] e to the entropy of the entries' frequencies, 1 (one code) to K (all alike).
    """
    levels = codes.transpose(0, 1).flatten(1)
    counts = torch.stack([torch.bincount(level, minlength=codebook_size) for level in levels]).float()
    frequencies = counts / counts.sum(1, keepdim=True)
    return (counts > 0).float().mean(1), torch.special.entr(frequencies).sum(1).exp()


def latent_dims(latents: Tensor) -> Tensor:
    """Directions in which latents vary: eigenvalues of their covariance above a thousandth of the mean one.

    Where it is far below D, a frame is fewer numbers than its bits could describe, and what is lost no codebook codes.

    Args:
        latents: [M, D] frames as the first codebook gets them.
    Returns:
        scalar, 0 (all frames alike) to D.
    """
    variances = torch.linalg.eigvalsh(torch.cov(latents.double().T).reshape(latents.shape[1], -1))
    return (variances > 1e-3 * variances.mean()).sum()


@torch.no_grad()
def discriminator_accuracy(
    logits_real: list[Tensor], logits_fake: list[Tensor], kind: str
) -> tuple[Tensor, Tensor]:
    """Shares of logits on the right side, averaged over sub-discriminators.

    Args:
        logits_real, logits_fake: one map of any shape a sub-discriminator.
        kind: `hinge`, `bce` (the border is 0) or `least_squares` (0.5). A logit on the border counts half:
            a discriminator that always says the border has accuracy 0.5.
    Returns:
        acc_real, acc_fake: scalars from 0 to 1.
    """
    border = 0.5 if kind == "least_squares" else 0.0
    real = [(torch.sign(logit.float() - border).mean() + 1) / 2 for logit in logits_real]
    fake = [(torch.sign(border - logit.float()).mean() + 1) / 2 for logit in logits_fake]
    return torch.stack(real).mean(), torch.stack(fake).mean()


# ---------------------------------------------------------------------------- perception


def pesq_wb(wav: Tensor, wav_hat: Tensor, sample_rate: int) -> Tensor | None:
    """Wide-band PESQ (ITU-T P.862.2), about 1.0 to 4.64, at 16 kHz.

    Args:
        wav: [B, 1, T] reference.
        wav_hat: [B, 1, T] reconstruction.
        sample_rate: Hz; resampled here.
    Returns:
        [B]; NaN where either side is silent or no speech is found. None without the package pesq.
    """
    try:
        import pesq
    except ImportError:
        return None
    values = []
    for reference, estimate in _pairs_16k(wav, wav_hat, sample_rate):
        try:
            audible = reference.any() and estimate.any()
            values.append(pesq.pesq(16000, reference, estimate, "wb") if audible else float("nan"))
        except pesq.PesqError:
            values.append(float("nan"))
    return torch.tensor(values)


def stoi(wav: Tensor, wav_hat: Tensor, sample_rate: int, extended: bool = False) -> Tensor | None:
    """Short-time objective intelligibility, 0 to 1, from audio at 16 kHz.

    Args and Returns:
        as `pesq_wb`; NaN where the reference is silent or has less than 0.4 s of sound; None without pystoi.
        extended: ESTOI, which also hears noise that comes and goes; lower for the same audio.
    Source: Taal et al. 2011; extended: Jensen & Taal 2016.
    """
    try:
        import pystoi
    except ImportError:
        return None
    pairs = _pairs_16k(wav, wav_hat, sample_rate)
    return torch.tensor([_stoi_of_pair(pystoi.stoi, *pair, extended) for pair in pairs])


def _stoi_of_pair(
    stoi_function: Callable[..., float], reference: np.ndarray, estimate: np.ndarray, extended: bool
) -> float:
    """STOI of one item; the package warns and returns 1e-5 where it has too little to judge."""
    if not reference.any():
        return float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return float(stoi_function(reference, estimate, 16000, extended))
        except RuntimeWarning:
            return float("nan")


@torch.no_grad()
def _pairs_16k(wav: Tensor, wav_hat: Tensor, sample_rate: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(reference, estimate) per item, each [T] at 16 kHz."""
    both = torch.cat([wav, wav_hat], dim=1).float().cpu()
    both = resample(both, sample_rate, 16000).numpy()
    return [(reference, estimate) for reference, estimate in both]
