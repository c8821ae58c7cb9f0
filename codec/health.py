"""What a run's figures say: the sheet of single figures, and which known failure explains them.

Works from the log alone. `History` holds it, `diagnose` reads it; RANGES is the sheet, the functions of FAILURES are
the failures, each a few comparisons that one can read and argue with. Names of failures and their curves: docs/failures.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

TERMS = (
    "adv", "feat", "wave", "scale", "mel", "msspec", "cspec", "bands", "whisper", "commit", "codebook", "llm", "wavlm", "pitch",
)  # fmt: skip
SIGNAL_TERMS = ("mel", "msspec", "cspec", "bands", "wave")  # any of them alone teaches a codec to speak
LEVELS = range(64)  # codebooks that have names here
KNOWN = frozenset(
    [f"train/{name}" for name in (
        "loss_g", "loss_d", "adv_g", *TERMS, "vq", "recon", "snr_db", "amplitude_ratio", "acc_real", "acc_fake", "logit_real",
        "logit_fake", "grad_norm_g", "grad_norm_d", "grad_norm_g_max", "grad_norm_d_max", "clipped_g", "clipped_d", "skipped_g",
        "skipped_d", "skipped", "lr_g", "lr_d", "audio_s_per_s", "audio_hours", "input_rms", "input_peak", "input_dc",
        "input_clipped", "input_silent", "output_rms", "output_dc", "output_peak", "grad_z_signal", "grad_z_commit", "ste_gain",
        "commit_reach", "code_norm", "codebook_drift", "vq_error", "loss_d_neutral", "steps_per_epoch", "total_steps", "phase",
        "phase_start", "codebook_size", "frames_per_step", "data_copies", "mel_off",
        "from_weights", "wavlm_llm_ratio", "grad_out_balanced", "adversary_ratio",
        *[f"{teacher}_{what}" for teacher in ("llm", "wavlm", "pitch") for what in ("frames", "similarity")],
        *[f"{start}_{name}" for start in ("weight", "grad_out") for name in TERMS],
        *[f"grad_{name}_to_{i}" for name in (*TERMS, "balanced") for i in range(8)],
        *[f"pull_{a}_{b}" for a in TERMS for b in (*TERMS, "rest")],
        *[f"{name}_{level}" for name in ("perplexity", "dead") for level in LEVELS])]
    + [f"val/{name}" for name in (
        "snr_db", "si_sdr_db", "amplitude_ratio", "dc_offset", "mel", "latent_dims",
        *[f"{teacher}{what}" for teacher in ("llm", "wavlm", "pitch") for what in ("", "_gain")],
        *[f"{name}_{level}" for name in ("perplexity", "used") for level in LEVELS])]
)  # fmt: skip


class Range(NamedTuple):
    """A line of the sheet; `good` and `warning` are intervals, what lies outside both is critical."""

    name: str
    good: tuple[float, float]
    warning: tuple[tuple[float, float], ...]
    meaning: str
    own_scale: bool  # False: the figure's scale depends on the recipe, so that in a run only its trend tells


INF = math.inf
# Source: the figures that the authors of Amy judged their runs by, corrected: hinge `loss_d` is 2 for a discriminator that
# says 0 everywhere and falls as it wins. They hold for that recipe late in training.
RANGES = [
    Range("train/llm", (0, 0.1), ((0.1, 0.3),), "1 - cosine of codebook 0 and the language model", True),
    Range("train/wavlm", (0, 0.2), ((0.2, 0.5),), "1 - cosine of codebooks 0+1 and WavLM", True),
    Range("train/msspec", (0, 0.1), ((0.1, 0.5),), "distance of spectra", False),
    Range("train/feat", (0, 0.05), ((0.05, 0.2),), "distance of discriminator features", False),
    Range("train/adv_g", (0.1, 0.5), ((0.5, 1.0), (-INF, 0.1)), "generator against discriminator", False),
    Range("train/loss_d", (1.5, 2.0), ((0.5, 1.5), (2.0, 3.0)), "hinge: 2 knows nothing, 0 has won", True),
    Range("train/loss_g", (0, 3), ((3, 5),), "weighted sum of all terms", False),
    Range("train/acc_real", (0.5, 0.95), ((0.3, 0.5), (0.95, 0.99)), "real sound told as real", True),
    Range("train/acc_fake", (0.5, 0.95), ((0.3, 0.5), (0.95, 0.99)), "fake sound told as fake", True),
    Range("val/amplitude_ratio", (0.95, 1.05), ((0.5, 0.95), (1.05, 1.5)), "level of the output over the input's", True),
]  # fmt: skip
TOLD = {"train/mel": "distance of mel spectra, the loss", "train/cspec": "distance of compressed spectra",
        "train/bands": "distance of levels, averaged in time",
        "train/whisper": "distance of what a recogniser hears",
        "val/mel": "distance of mel spectra, dB: the fixed measure",
        "val/snr_db": "power over error; bounded by the bitrate", "train/recon": "reconstruction",
        "train/vq": "quantizer: commitment and codebook",
        "train/commit": "latent to code: the encoder's side",
        "train/adversary_ratio": "at the output, discriminators' gradient over that of all comparisons",
        "train/grad_norm_g": "generator's gradient", "train/grad_norm_d": "discriminator's gradient",
        "val/perplexity_0": "entries of the first codebook in use",
        "val/latent_dims": "directions in which the latent varies", "val/wavlm_gain": "0 a constant answer, 1 perfect",
        "val/llm_gain": "0 a constant answer, 1 perfect"}  # fmt: skip

NOT_YET = 100  # updates below which nothing found means nothing
SETTLED = 60  # updates that a phase or an adversary has to have run before its figures count


class Reading(NamedTuple):
    name: str
    value: float
    trend: str  # rising, falling, flat, or nothing where too few points tell
    good: str  # the range as text
    verdict: str  # good, warning, critical; of a run good or watch; nothing where only the trend tells
    meaning: str


class Finding(NamedTuple):
    number: int  # of docs/failures.md; 0 for none of them
    title: str
    level: str  # warning or critical
    confidence: float  # 0 to 1
    evidence: str
    mend: str


class Diagnosis(NamedTuple):
    step: int
    verdict: str  # healthy, warning, critical, or not yet
    readings: list[Reading]
    findings: list[Finding]  # the likeliest cause first
    unknown: list[str]  # names of the log that nobody here reads


# -------------------------------------------------------------------------------- the log


@dataclass(frozen=True)
class History:
    """Figures of a run by name, without `_step`; "epoch/..." for means over epochs.

    Args:
        figures: name -> (steps [n], values [n]), ordered by step; NaN where the log says null.
    """

    figures: dict[str, tuple[np.ndarray, np.ndarray]]

    @classmethod
    def from_rows(cls, rows: list[dict], until: int | None = None) -> History:
        """Lines of metrics.jsonl, oldest first; of two lines of a step, as an old resume leaves them, the later counts.

        Args:
            until: leave out what came after this step.
        """
        columns: dict[str, dict[int, float]] = {}
        for row in rows:
            step = row["step"]
            if until is not None and step > until:
                continue
            for key, value in row.items():
                if key in ("step", "time", "nonfinite"):
                    continue
                is_mean = key.endswith("_epoch") or key == "epoch"
                name = f"epoch/{key.removesuffix('_epoch')}" if is_mean else key.removesuffix("_step")
                if value is None or isinstance(value, int | float):
                    columns.setdefault(name, {})[step] = math.nan if value is None else float(value)
        return cls({name: tuple(np.array(part) for part in zip(*sorted(column.items()))) for name, column in columns.items()})

    @property
    def step(self) -> int:
        """The last one."""
        return int(max((steps[-1] for steps, _ in self.figures.values()), default=0))

    @property
    def typed(self) -> bool:
        """Whether these are values that a person typed in, not a run."""
        return self.step < 50 and "train/lr_g" not in self.figures

    @property
    def phase_start(self) -> float:
        """Updates before the present phase; in logs that do not tell, before an adversary came."""
        steps, values = self.series("train/loss_d")
        came = steps[np.isfinite(values)]
        return self.last("train/phase_start", float(came[0]) - 1 if len(came) else -1.0)

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps [n] and values [n]; empty for a name that is not there."""
        return self.figures.get(name, (np.zeros(0, int), np.zeros(0)))

    def values(self, name: str, since: int = -1) -> np.ndarray:
        """Finite values after step `since`."""
        steps, values = self.series(name)
        return values[(steps > since) & np.isfinite(values)]

    def last(self, name: str, default: float = math.nan) -> float:
        """The latest finite value."""
        values = self.values(name)
        return float(values[-1]) if len(values) else default

    def recent(self, name: str, n: int = 5, since: int = -1) -> float:
        """Median of the last n finite values after `since`; NaN without any."""
        values = self.values(name, since)[-n:]
        return float(np.median(values)) if len(values) else math.nan


def ratio(a: float, b: float) -> float:
    """a / b; NaN where b is 0 or either is unknown."""
    return a / b if b and math.isfinite(a) and math.isfinite(b) else math.nan


def trend(values: np.ndarray) -> str:
    """Whether a series rises or falls by more than its own noise: thirds compared by medians; "" below 6 values."""
    if len(values) < 6:
        return ""
    third = len(values) // 3
    change = np.median(values[-third:]) - np.median(values[:third])
    noise = np.median(np.abs(np.diff(values)))
    if abs(change) <= max(1.5 * noise, 0.01 * np.abs(np.median(values))):
        return "flat"
    return "rising" if change > 0 else "falling"


# ---------------------------------------------------------------------------- the failures

TITLES = {
    0: ("discriminator is being fooled", "optim.lr_d higher, or loss_weights.adv lower"),  # not a failure yet
    1: ("VQ loss outweighs reconstruction",
        "loss_weights.commit to a tenth; wave 5, scale 20 and mel 1 as in configs/quickstart.yaml"),
    2: ("output scale too large",
        "start the decoder's output scale at 1, with tanh after the scale; loss_weights.scale holds the level"),
    3: ("codebooks do not learn", "factorized: loss_weights.codebook: 1; EMA: call update_codebooks once an update"),
    4: ("wrong straight-through gradient",
        "one straight-through step an input; subtract codes without their gradient, see codec/rvq.py"),
    5: ("discriminator learns nothing", "not msd alone: mpd and mrd; optim.lr_d 1e-4 to 3e-4; see that its optimizer steps"),
    6: ("discriminator overpowers the generator", "optim.lr_d to a third; more reconstruction first; loss_weights.adv lower"),
    7: ("discriminator gradients unclipped", "optim.max_grad_norm_d: 10; optim.lr_d lower"),
    8: ("codebook collapse", "k-means start, revival (dead_threshold 0.1), commit 0.25; see that the encoder's output varies"),
    9: ("distillation stuck",
        "raise loss_weights.wavlm (2 to 5 and more), an MLP head (distill.wavlm.head: mlp), keep the reconstruction losses "
        "(not adversarial only); best, a pathway of its own: docs/distillation.md"),
    10: ("adversarial only, too early", "a phase of reconstruction before it; in TensorBoard, listen to reconstruction/*"),
    11: ("an epoch of a few steps",
         "data.segments_per_epoch in thousands; count a run in updates (phases.*.steps), not in epochs"),
    12: ("NaN or Inf", "look at the audio by --preflight; train.precision: fp32; lower optim.lr_g"),
    13: ("learning rate too high", "optim.lr_g to a tenth; warmup_steps 1000; max_grad_norm_g lower"),
    14: ("broken training audio", "leave clipped recordings and copies out; prepare_speaker_data.py drops silence and offsets"),
    15: ("a mel loss that does not hear", "test its filterbank: triangles on the mel scale"),
}  # fmt: skip
# Of each a function of the log. In FAILURES, at their end, a cause stands before what it brings about: codebooks collapse where
# the data are broken, but the data are what to mend.


def found(number: int, evidence: str, confidence: float, level: str = "critical") -> Finding:
    title, mend = TITLES[number]
    return Finding(number, title, level, confidence, evidence, mend)


def nonfinite(h: History) -> Finding | None:
    shares = h.values("train/skipped") if len(h.values("train/skipped")) else h.values("train/skipped_g")
    share = float(shares[-10:].mean()) if len(shares) else 0.0
    now = max((steps[-1] for name, (steps, _) in h.figures.items() if name.startswith("train/")), default=0)
    gone = [name for name, (steps, values) in h.figures.items()
            if name.startswith("train/loss_") and steps[-1] == now and np.isnan(values[-2:]).all()]  # fmt: skip
    if share < 0.01 and not gone:
        return None
    evidence = f"{100 * share:.0f} % of the last updates left out as not finite" + "".join(f"; {name} is NaN" for name in gone)
    return found(12, evidence, 0.99, "critical" if share >= 0.05 or gone else "warning")


def tiny_epoch(h: History) -> Finding | None:
    steps, total = h.last("train/steps_per_epoch"), h.last("train/total_steps")
    if not steps < 100:
        return None
    whole = f", the whole run {total:.0f}" + "; published codecs took 250,000 and more" * (total < 20000) if total > 0 else ""
    level = "warning" if steps >= 20 or total >= 20000 else "critical"  # a long run is only badly logged
    return found(11, f"an epoch is {steps:.0f} updates{whole}", 0.95, level)


def bad_audio(h: History) -> Finding | None:
    clipped, silent = h.recent("train/input_clipped", 10), h.recent("train/input_silent", 10)
    offset = ratio(h.recent("train/input_dc", 10), h.recent("train/input_rms", 10))
    seen = [f"{100 * clipped:.1f} % of the samples lie on flat tops: clipped"] if clipped > 0.01 else []
    seen += [f"{100 * silent:.0f} % of the segments are silent"] if silent > 0.25 else []
    copied = h.last("train/data_copies")
    seen += [f"{100 * copied:.0f} % of the training utterances are copies of others"] if copied > 0.1 else []
    seen += [f"a constant offset of {100 * offset:.0f} % of the RMS"] if offset > 0.1 else []
    return found(14, "; ".join(seen), 0.95) if seen else None


def wrong_gradient(h: History) -> Finding | None:
    gain, reach = h.recent("train/ste_gain", 3), h.recent("train/commit_reach", 3)
    if gain > 1.5 or gain < 0.67:
        return found(4, f"the quantizer passes {gain:.2f} times the gradient it should", 0.97)
    return found(4, "some codebooks' commitment sends no gradient to the encoder", 0.97) if reach < 1e-4 else None


def frozen_codebooks(h: History) -> Finding | None:
    drift, rate = h.values("train/codebook_drift")[-3:], h.values("train/lr_g")
    if not len(drift) or drift.max() > 1e-6 or (len(rate) and rate[-1] < 0.01 * rate.max()):  # the end of a schedule
        return None
    return found(3, f"between two looks they moved by {drift.max():.1g} of their norm", 0.97)


def too_loud(h: History) -> Finding | None:
    level, heard = h.recent("train/input_rms"), h.recent("val/amplitude_ratio", 1)
    loud = heard if math.isfinite(heard) else h.recent("train/amplitude_ratio")
    steps, peaks = h.series("train/output_peak")
    n_first = max((steps <= NOT_YET).sum(), 1)
    peak, offset = max(peaks[:n_first], default=math.nan), h.recent("train/output_dc")
    young = not h.typed and h.step < NOT_YET  # nothing is expected of a codec's first sounds
    beyond = peak > 0.98 or math.isnan(peak)  # an offset below that is how narrow convolutions begin, and passes
    if young or not beyond or not (loud > 2 or offset > 0.5 * level):
        return None
    figures = (("first peak", peak), ("offset", offset))
    others = "".join(f", {name} {value:.2g}" for name, value in figures if math.isfinite(value))
    return found(2, f"output {loud:.1f} times as loud as the input{others}", 0.9)


def drowned_by_vq(h: History) -> Finding | None:
    name = "val/amplitude_ratio" if len(h.values("val/amplitude_ratio")) else "train/amplitude_ratio"
    amplitude = h.values(name)[-10:]
    share = ratio(h.recent("train/grad_z_commit"), h.recent("train/grad_z_signal"))
    losses = ratio(h.last("train/vq"), h.last("train/recon"))
    if len(amplitude) < (1 if h.typed else 2) or np.median(amplitude) > 0.6 or not (share > 3 or losses > 5):
        return None
    seen = f"{share:.0f} times the gradient of the signal's" if share > 3 else f"{losses:.0f} times the reconstruction loss"
    return found(1, f"the quantizer's loss: {seen}; the output is at {100 * amplitude[-1]:.0f} % of the input's level", 0.95)


def adversary(h: History) -> tuple[int, bool, float]:
    """First logged step with a discriminator in this phase, -1 without; whether it ran long enough; its neutral loss."""
    steps, values = h.series("train/loss_d")
    steps = steps[(steps > h.phase_start) & np.isfinite(values)]
    when, adv = h.series("train/adv_g")
    if len(when):  # before the generator hears of them, discriminators are warmed up alone
        steps = np.intersect1d(steps, when[np.isfinite(adv)])
    start = int(steps[0]) if len(steps) else -1
    return start, start >= 0 and (h.typed or h.step - start >= SETTLED), h.last("train/loss_d_neutral", 2.0)


def spikes(h: History) -> Finding | None:
    start, settled, _ = adversary(h)
    largest, typical = h.values("train/grad_norm_d_max", start)[-20:], h.values("train/grad_norm_d", start)[-40:]
    if not settled or len(largest) < 3 or h.values("train/clipped_d", start)[-20:].any():
        return None
    times = ratio(largest.max(), np.median(typical))
    evidence = f"the largest norm is {largest.max():.3g}, {times:.0f} times the usual one, and none was clipped"
    return found(7, evidence, 0.85) if times > 10 and largest.max() > 20 else None


def discriminator_wins(h: History) -> Finding | None:
    start, settled, neutral = adversary(h)
    loss, real, fake = (h.recent(f"train/{name}", 5, start - 1) for name in ("loss_d", "acc_real", "acc_fake"))
    if not settled or not loss < 0.25 * neutral or min(real, fake) < 0.85:
        return None
    adv = trend(h.values("train/adv_g", start - 1)[-30:])
    seen = f", accuracies {real:.2f} and {fake:.2f}" if real > 0 else ""
    return found(6, f"loss_d {loss:.2g}, where {neutral:g} knows nothing and 0 has won{seen}{', adv_g ' * bool(adv)}{adv}", 0.9)


def discriminator_learns_nothing(h: History) -> Finding | None:
    """Its loss does not move and its logits do not tell; or it moves, but guesses, and the output gets no better."""
    start, settled, neutral = adversary(h)
    loss, feat = h.values("train/loss_d", start - 1)[-10:], h.recent("train/feat")
    if not settled:
        return None
    apart = abs(h.recent("train/logit_real", 10, start - 1) - h.recent("train/logit_fake", 10, start - 1))
    flat = np.abs(loss - np.median(loss)).max() <= 0.01 * neutral
    moves = np.ptp(h.values("train/logit_real", start - 1)[-10:] if apart >= 0 else [0]) > 0.005
    moves = moves or trend(h.values("train/grad_norm_d", start - 1)[-30:]) == "rising"
    moves = moves and h.step - start < 500  # then it has had its time
    blind = apart <= 0.03 if apart >= 0 else abs(np.median(loss) - neutral) <= 0.01 * neutral and feat < 0.02
    stuck = flat and blind and not moves
    told = np.concatenate([h.values(f"train/{name}", start - 1)[-30:] for name in ("acc_real", "acc_fake")])
    loss, heard = np.median(h.values("train/loss_d", start - 1)[-30:]), h.values("val/mel", start - 1)
    guesses = len(told) >= 40 and told.mean() < 0.56 and abs(ratio(loss, neutral) - 0.95) < 0.1
    guesses = guesses and len(heard) >= 2 and heard[-1] > 0.97 * heard[0] and h.recent("val/snr_db", 3, start - 1) < 0
    if not stuck and not guesses:
        return None
    guessed = f"; it is right {100 * told.mean():.0f} % of the time, and the output gets no better" if guesses else ""
    telling = f"logits {apart:.2g} apart" if apart >= 0 else f"feat {feat:.2g}"
    return found(5, f"loss_d stays at {loss:.3f}, where {neutral:g} knows nothing; {telling}{guessed}", 0.9)


def discriminator_fooled(h: History) -> Finding | None:
    start, settled, neutral = adversary(h)
    loss = h.recent("train/loss_d", 10, start - 1)
    nothing = max(neutral, 1.0)  # what a discriminator gets that says 0: least squares 1, where 0.5 says neither
    return found(0, f"loss_d {loss:.2g}, far above the {nothing:.2g} of one that says 0", 0.7) if (
        settled and loss > 1.5 * nothing) else None  # fmt: skip


def nothing_heard(h: History) -> Finding | None:
    """Fatal from scratch; a codec that speaks already may be tuned so, and is watched."""
    weights = {name: h.last(f"train/weight_{name}") for name in TERMS}
    if not (weights["adv"] > 0 or weights["feat"] > 0) or any(weights[name] > 0 for name in SIGNAL_TERMS):
        return None
    mel = h.values("val/mel", h.phase_start)
    fresh = not h.last("train/phase", 0) and not h.last("train/from_weights", 0)
    if len(mel) < 2:
        return None
    rises, stays = len(mel) >= 3 and mel[-3:].min() > 1.1 * mel.min(), fresh and mel[-1] > max(8, 0.9 * mel[0])
    if not (rises or stays or mel[-1] > 10):
        return None
    evidence = f"no reconstruction loss has a weight; mel distance {mel[-1]:.1f} dB, the best in this phase {mel.min():.1f}"
    return found(10, evidence, 0.9 if fresh else 0.6, "critical" if fresh or mel[-1] > 10 else "warning")


def stuck_teacher(h: History) -> Finding | None:
    loss, gains = h.values("train/wavlm"), h.values("val/wavlm_gain")
    if h.typed:
        return found(9, f"wavlm {loss[-1]:.3g}: alignment of codebooks 0+1 fails, similarity {1 - loss[-1]:.2f}", 0.8) if (
            len(loss) and loss[-1] > 0.5) else None  # fmt: skip
    asked = h.recent("train/grad_wavlm_to_1")
    heard = (*SIGNAL_TERMS, "scale", "whisper", "adv", "feat", "balanced")
    others = [h.recent(f"train/grad_{name}_to_1") for name in heard]
    share = ratio(float(np.nansum(others)), asked)
    if len(gains) >= 3 and gains[-1] < 0.2 and gains[-1] - gains[len(gains) // 2] < 0.02 and share > 10:
        return found(9, f"wavlm is {100 * gains[-1]:.0f} % of the way from a constant answer to perfect and no longer moves; "
                     f"reconstruction sends {share:.0f} times its gradient into the codebooks", 0.85)  # fmt: skip
    alone = not len(gains) and len(loss) >= 30 and trend(loss[-60:]) == "flat" and np.median(loss[-10:]) > 0.5
    if alone and trend(h.values("train/llm")[-60:]) == "falling":
        return found(9, f"wavlm stays at {np.median(loss[-10:]):.2f} while llm falls", 0.6)
    return None


def windows(values: np.ndarray) -> np.ndarray:
    """Medians over stretches of a quarter of a series, of 30 values at most: single batches are noise. At least 3 values."""
    width = max(min(30, len(values) // 4), 1)
    return np.median(values[len(values) % width :].reshape(-1, width), axis=1)


def false_mel(h: History) -> Finding | None:
    """By pure tones where the log has them; else by a loss that falls while nothing gets better."""
    off = h.last("train/mel_off")
    if off >= 0:
        return found(15, f"pure tones sound in its bands {100 * off:.0f} % of the scale away from their own", 0.97) if (
            off > 0.1) else None  # fmt: skip
    loss, heard, snr_db = (h.values(name, h.phase_start) for name in ("train/mel", "val/mel", "val/snr_db"))
    if len(loss) < 12 or len(heard) < 3:
        return None
    loss = windows(loss)
    falls, better = 1 - ratio(loss[-1], loss[0]), 1 - ratio(heard.min(), heard[0])
    speaks = heard[-1] < 7 or (len(snr_db) and snr_db[-1] > 1)
    evidence = f"the mel loss fell by {100 * falls:.0f} %, the fixed mel distance from {heard[0]:.1f} to {heard[-1]:.1f} dB"
    return found(15, evidence, 0.8) if falls > 0.15 and better < 0.4 * falls and not speaks else None


def diverges(h: History) -> Finding | None:
    """By what compares signals; by loss_g where no adversary moves it."""
    adversarial = len(h.values("train/adv_g", h.phase_start))
    for name in (*["train/loss_g"] * (not adversarial), *(f"train/{term}" for term in SIGNAL_TERMS)):
        loss, heard = h.values(name, h.phase_start), h.values("val/mel", h.phase_start)
        if len(loss) < 9:
            continue
        late, best = windows(loss)[-1], windows(loss).min()
        worse = len(heard) >= 5 and heard[-3:].min() > 1.1 * heard.min()
        if late > 3 * best or (late > 1.5 * best and worse):
            norm = h.values("train/grad_norm_g_max", h.phase_start)
            norms = f"; gradient norms from {np.median(norm[:3]):.3g} to {np.median(norm[-3:]):.3g}" if len(norm) >= 6 else ""
            return found(13, f"{name.removeprefix('train/')} is {late:.3g}, its best was {best:.3g}{norms}", 0.8)
    return None


def stalls(h: History) -> Finding | None:
    """A run from scratch in which nothing is learnt."""
    heard, snr_db, rate = h.values("val/mel"), h.values("val/snr_db"), h.last("train/lr_g")
    if min(len(heard), len(snr_db)) < 4 or h.step < 2 * NOT_YET or h.last("train/from_weights", 0):
        return None
    if heard[-2:].min() < max(8, 0.95 * heard[0]) or snr_db[-2:].max() > min(0.5, snr_db[0] + 1):
        return None
    evidence = f"mel distance {heard[0]:.1f} dB at first, {heard[-1]:.1f} now, SNR {snr_db[-1]:.1f} dB" + (
        f"; lr_g is {rate:.2g}" if rate > 0 else "")
    if rate > 3e-3:
        return found(13, evidence, 0.7)
    mend = "optim.lr_g 1e-4 to 1e-3; mel 1, wave 5 and scale 20 as in configs/quickstart.yaml; look at the data by --preflight"
    return Finding(0, "nothing is learnt", "warning", 0.6, evidence, mend)


def left_behind(h: History) -> Finding | None:
    """Validation falls apart while training stands: averaged weights that no longer fit together, or learning by heart."""
    heard, level, training = h.values("val/snr_db"), h.last("val/amplitude_ratio"), h.values("train/snr_db")
    if len(heard) < 2 or len(training) < 20:
        return None
    fell, stands = heard.max() - heard[-1], np.median(training[-10:])
    if fell < 5 or stands < heard[-1] + 5 or stands < np.median(training[:-10]) - 2:
        return None
    evidence = (f"val/snr_db was {heard.max():.1f} dB and is {heard[-1]:.1f}, amplitude {level:.2f}, while train/snr_db "
                f"stands at {stands:.1f}")  # fmt: skip
    mend = ("look at train/commit and train/code_norm: where latents grow, optim.ema_decay averages weights of unlike scales; "
            "loss_weights.commit higher, optim.lr_g lower, or ema_decay 0.99")  # fmt: skip
    return Finding(0, "validation left behind", "warning", 0.7, evidence, mend)


def collapse(h: History) -> Finding | None:
    """Fatal where every codebook has one entry left, or one fell that was in use; a young encoder hardly varies yet."""
    size = h.last("train/codebook_size", 1024)
    limit = max(2.5, 0.02 * min(size, h.last("train/frames_per_step", 1024)))
    perplexity = {level: h.values(f"val/perplexity_{level}") for level in LEVELS}
    perplexity = {level: values for level, values in perplexity.items() if len(values) >= 2}
    low = [level for level, values in perplexity.items() if values[-2:].max() < limit]
    if not low:
        return None
    single = all(values[-2:].max() < 1.03 for values in perplexity.values())
    fell = [level for level in low if perplexity[level].max() > 5 * limit]
    figures = ", ".join(f"{perplexity[i][-1]:.1f} in codebook {i}" for i in (fell or low)[:4])
    evidence = f"perplexity {figures}, of {size:.0f} entries"
    if single or fell or h.step > 5000:
        return found(8, evidence, 0.85)
    return Finding(0, "few codes in use yet", "warning", 0.5, evidence, "nothing, if it grows within some thousand updates")


FAILURES = (
    nonfinite, tiny_epoch, bad_audio, wrong_gradient, frozen_codebooks, too_loud, spikes, discriminator_wins,
    discriminator_learns_nothing, nothing_heard, diverges, drowned_by_vq, stuck_teacher, false_mel, collapse,
    discriminator_fooled, stalls, left_behind,
)  # fmt: skip


# ------------------------------------------------------------------------------ the verdict


def diagnose(h: History) -> Diagnosis:
    """Read the sheet and look for every failure."""
    findings = [finding for failure in FAILURES if (finding := failure(h))]
    findings.sort(key=lambda finding: finding.level != "critical")  # else the order of FAILURES: causes first
    readings = read_sheet(h)
    graded = {reading.verdict for reading in readings} | {finding.level for finding in findings}  # of a run, findings alone
    verdict = next((level for level in ("critical", "warning") if level in graded), "healthy")
    if verdict == "healthy" and not (readings and (h.typed or h.step >= NOT_YET)):
        verdict = "not yet"
    unknown = sorted(name for name in h.figures if not name.startswith("epoch/") and name not in KNOWN)
    return Diagnosis(h.step, verdict, readings, findings, unknown)


def read_sheet(h: History) -> list[Reading]:
    """The lines of the sheet that the log has figures for."""
    lines = []
    for line in RANGES:
        if len(h.values(line.name)):
            value = h.last(line.name) if h.typed else h.recent(line.name)
            scale = ratio(2, h.last("train/loss_d_neutral", 2.0)) if line.name == "train/loss_d" else 1  # not hinge
            verdict = judge(scale * value, line) if line.own_scale or h.typed else ""
            if not h.typed and verdict in ("warning", "critical"):
                verdict = "watch"  # a young run is off most ranges
            lines.append(Reading(line.name, value, trend(h.values(line.name)[-60:]), text_of(line.good), verdict, line.meaning))
    return lines + [Reading(name, h.last(name) if h.typed else h.recent(name), trend(h.values(name)[-60:]), "", "", meaning)
                    for name, meaning in TOLD.items() if len(h.values(name))]  # fmt: skip


def judge(value: float, line: Range) -> str:
    """good, warning or critical."""
    if line.good[0] <= value <= line.good[1]:
        return "good"
    return "warning" if any(low <= value <= high for low, high in line.warning) else "critical"


def text_of(interval: tuple[float, float]) -> str:
    """As a person writes it."""
    low, high = interval
    return f"< {high:g}" if low <= 0 else f"{low:g} to {high:g}"
