"""Short-time spectra, shared by discriminators, losses and metrics; always in float32."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def stft(wav: Tensor, window: Tensor, hop_length: int, center: bool) -> Tensor:
    """Complex spectrum of every frame; frames that do not fit are left out.

    Args:
        wav: [B, T] samples of any float type; computed in float32, outside autocast: under fp16 it overflows.
        window: [W] float32; the transform has its length.
        hop_length: samples from frame to frame.
        center: reflect-pad by W/2 on both sides first, so that frame i is centred on sample i * hop_length.
    Returns:
        [B, T', W/2 + 1] complex64, T' = 1 + (T - W) // hop_length (T + W in place of T where centred).
    Raises:
        ValueError: the input is too short for one frame, or for its reflection.
    """
    n_fft = window.shape[0]
    shortest = n_fft // 2 + 1 if center else n_fft
    if wav.shape[-1] < shortest:
        raise ValueError(f"stft: got {wav.shape[-1]} samples, a window of {n_fft} needs {shortest}; "
                         "use longer segments or shorter windows")  # fmt: skip
    with torch.autocast(wav.device.type, enabled=False):
        wav = wav.float()
        if center:
            wav = F.pad(wav.unsqueeze(1), (n_fft // 2, n_fft // 2), mode="reflect").squeeze(1)
        return torch.fft.rfft(wav.unfold(-1, n_fft, hop_length) * window)


def mel_filterbank(sample_rate: int, n_fft: int, n_mels: int) -> Tensor:
    """Triangular mel filters from 0 Hz to half the sample rate, as a matrix for `magnitude @ filters`.

    Returns:
        [n_fft/2 + 1, n_mels], Slaney's scale, each filter of unit area (librosa's default).
    Source: Slaney 1998, Auditory Toolbox.
    """
    def to_mel(hz: float) -> float:  # linear below 1 kHz, 27 steps to 6.4 times the frequency above
        return hz * 3 / 200 if hz < 1000 else 15 + math.log(hz / 1000) * 27 / math.log(6.4)

    mel = torch.linspace(0, to_mel(sample_rate / 2), n_mels + 2, dtype=torch.float64)
    hz = torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp((mel - 15) * math.log(6.4) / 27))
    bins = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64)[:, None]
    rising, falling = (bins - hz[:-2]) / hz.diff()[:-1], (hz[2:] - bins) / hz.diff()[1:]
    return (torch.minimum(rising, falling).clamp(min=0) * 2 / (hz[2:] - hz[:-2])).float()
