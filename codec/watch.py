"""What the doctor needs to see of an update: sound in and out, where gradients go, and how the codebooks do."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codec import metrics
from codec.config import OptimConfig
from codec.losses import MelLoss
from codec.model import CodecOutput
from codec.rvq import FactorizedResidualVQ

SILENT_RMS = 1e-3  # of full scale, -60 dB
FLAT_TOP = 0.001  # of an item's range: samples so close to its extremes lie on a flat top, or are the few of a true peak
OF_INTERVALS = ("grad_norm_g", "grad_norm_d", "skipped_g", "skipped_d")  # what `over_interval` reads
NEUTRAL = {"hinge": 2.0, "least_squares": 0.5, "bce": 1.3863}  # loss_d of a discriminator that always says the border


@torch.no_grad()
def sound_figures(wav: Tensor, wav_hat: Tensor) -> dict[str, Tensor]:
    """Level, offset and peaks of a batch [B, 1, T] and its reconstruction; means over items, peaks over the batch.

    Returns:
        SNR and amplitude ratio; `input_clipped`, the share of samples within a thousandth of an item's extremes: below 0.001
        for speech, more where flat tops were cut, at whatever level; `input_silent`, the share of items below -60 dB; and RMS,
        mean and peak of both sides.
    """
    x, y = wav.float().flatten(1), wav_hat.float().flatten(1)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    margin = FLAT_TOP * (high - low)
    at_top = ((x >= high - margin) | (x <= low + margin)) & (high > low)
    rms_in = x.square().mean(1).sqrt()
    return {
        "snr_db": metrics.snr_db(wav, wav_hat).nanmean(), "amplitude_ratio": metrics.amplitude_ratio(wav, wav_hat).nanmean(),
        "input_rms": rms_in.mean(), "input_dc": x.mean(1).abs().mean(), "input_peak": x.abs().amax(),
        "input_clipped": at_top.float().mean(), "input_silent": (rms_in < SILENT_RMS).float().mean(),
        "output_rms": y.square().mean(1).sqrt().mean(), "output_dc": y.mean(1).abs().mean(), "output_peak": y.abs().amax(),
    }  # fmt: skip


def gradient_figures(terms: dict[str, Tensor], commit: Tensor, out: CodecOutput, quantizer: nn.Module) -> dict[str, Tensor]:
    """Where gradients go in one update, before any optimizer scales them.

    Args:
        terms: weighted losses of the signal by name; their graphs are kept.
        commit: the weighted loss of the quantizer.
        out: of the forward in training.
    Returns:
        `grad_out_NAME`: norm of d term / d wav_hat. `adversary_ratio`: that of adv and feat together over that of all terms
        that compare signals. `grad_z_signal`, `grad_z_commit`: norms at the latent. `ste_gain`: what the
        quantizer passes of the signal's gradient over what it should, 1 when right. `commit_reach`: the weakest codebook's
        commitment gradient over the strongest's, 0 where one has none (EMA).
    """
    outputs = {name: torch.autograd.grad(term, out.wav_hat, retain_graph=True)[0] for name, term in terms.items()}
    log = {f"grad_out_{name}": grad.float().norm() for name, grad in outputs.items()}
    critics = [name for name in ("adv", "feat") if name in outputs]
    if critics and outputs.keys() - {*critics, "whisper"}:
        others = sum(grad for name, grad in outputs.items() if name not in (*critics, "whisper"))
        log["adversary_ratio"] = sum(outputs[name] for name in critics).float().norm() / others.float().norm()
    if not terms or not out.z.requires_grad:  # nothing but the quantizer is trained, or a frozen encoder
        return log
    total = sum(outputs.values())
    at_z_q, at_z = torch.autograd.grad(out.wav_hat, (out.quantized.z_q, out.z), total, retain_graph=True)
    log["grad_z_signal"] = at_z.float().norm()
    if commit.requires_grad:
        log["grad_z_commit"] = torch.autograd.grad(commit, out.z, retain_graph=True)[0].float().norm()
    z = out.z.detach().float().requires_grad_(True)
    expected = torch.autograd.grad(quantizer.unrounded(z, out.quantized.active), z, at_z_q.float())[0]
    log["ste_gain"] = (at_z * expected).sum() / expected.square().sum()
    if out.quantized.distances is not None:
        config = quantizer.config
        weakened = config.n_first if config.semantic_to_encoder != 1 else 0  # these are to send less
        norms = torch.stack([torch.autograd.grad(level.sum(), out.z, retain_graph=True)[0].float().norm()
                             for level in out.quantized.distances.unbind(1)[weakened:]])  # fmt: skip
        log["commit_reach"] = norms.min() / norms.max()
    return log


class CodebookWatch:
    """How the codebooks do, from one watched update to the next; a resumed run begins anew."""

    def __init__(self) -> None:
        self.before: Tensor | None = None

    @torch.no_grad()
    def figures(self, out: CodecOutput, quantizer: nn.Module) -> dict[str, Tensor]:
        """Figures of one update.

        Returns:
            `perplexity_L` of the batch; `codebook_drift`, how far the entries that are not frozen went since the last watched
            update, relative to their norm (factorised ones: their direction, as weight decay shrinks them all the same); for
            EMA codebooks `code_norm`, RMS of the first codebook's entries in use over that of what they code, `vq_error`, the
            share of energy that all codebooks of a group leave over, and `dead_L`, the share of dead codes.
        """
        codes = out.quantized.codes
        _, perplexity = metrics.codebook_usage(codes, quantizer.config.codebook_size)
        log = {f"perplexity_{level}": value for level, value in enumerate(perplexity)}
        books = quantizer.codebooks.detach().float()[quantizer.learning]
        if isinstance(quantizer, FactorizedResidualVQ):
            books = F.normalize(books, dim=-1)
        if self.before is not None and any(quantizer.learning):
            log["codebook_drift"] = (books - self.before).norm() / self.before.norm()
        self.before = books.clone()
        if out.quantized.residuals is None:
            return log
        energy = out.quantized.residuals.float().square().mean((1, 2, 3))  # [N] of what each codebook was asked to code
        left = out.quantized.distances.detach().float().mean(0)
        log["code_norm"] = quantizer.codebooks[0][codes[:, 0]].float().square().mean().sqrt() / energy[0].sqrt()
        log["vq_error"] = left[-1] / energy[getattr(quantizer.config, "n_first", 0) % len(left)]
        threshold = quantizer.config.dead_threshold
        for level, counts in enumerate(quantizer.ema_counts):
            log[f"dead_{level}"] = (counts < threshold * counts.mean()).float().mean()
        return log


@torch.no_grad()
def mel_off(loss: MelLoss, sample_rate: int) -> float:
    """How far from their own bands pure tones sound in a mel loss, mean over tones; 0 to 1 of the mel scale.

    Right filters are off by less than half a band, a few hundredths in all; filters of noise by about a third.
    Source: Slaney's scale, written out here and not taken from the filterbank that it tests.
    """
    def mel(hz: Tensor) -> Tensor:
        return torch.where(hz < 1000, 3 * hz / 200, 15 + 27 * (hz.clamp(min=1) / 1000).log() / math.log(6.4))

    hz = torch.linspace(0.05, 0.9, 24) * sample_rate / 2
    expected = mel(hz) / mel(torch.tensor(sample_rate / 2))
    phase = 2 * torch.pi * hz[:, None] * torch.arange(8 * max(len(scale.window) for scale in loss.scales)) / sample_rate
    tones = phase.sin()[:, None].to(loss.scales[0].window.device)
    finest = max(loss.scales, key=lambda scale: scale.filters.shape[1])  # coarse ones cannot tell tones apart
    bands = finest(tones).mean(1).cpu()  # [tones, bands]
    return float((bands.argmax(1) / (bands.shape[1] - 1) - expected).abs().mean())


def over_interval(updates: list[dict[str, float]], optim: OptimConfig) -> dict[str, float]:
    """Largest gradient norms and shares of clipped and of skipped updates among some updates."""
    log = {}
    for side, limit in (("g", optim.max_grad_norm_g), ("d", optim.max_grad_norm_d)):
        norms = [values[f"grad_norm_{side}"] for values in updates if f"grad_norm_{side}" in values]
        if norms:
            log |= {f"grad_norm_{side}_max": max(norms), f"clipped_{side}": sum(norm > limit for norm in norms) / len(norms)}
    skipped = [max(values.get("skipped_g", 0), values.get("skipped_d", 0)) > 0 for values in updates]
    return log | {"skipped": sum(skipped) / len(skipped)}
