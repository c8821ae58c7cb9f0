"""Before a run: what it will cost, and what is wrong with its data, its arithmetic and its config.

The first check of every area is its headline; they make the summary of the brief form.
"""

import bisect
import math
import os
import resource
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from codec import distributed
from codec.audio import read_segment, rms, rms_db
from codec.config import Config, phase_config
from codec.data import Utterance
from codec.model import Codec

PIECE_S = 3.0  # of the pieces in which audio is looked at
COMPARED_S = 0.05  # from the middle of utterances of equal length, to find copies
SILENT_DB = -40.0  # relative to the median level of the pieces
SILENT_FRAME_S = 0.02
LEVEL_OFF_DB = 4.0  # from model.level_db; 6 dB below it PESQ-WB of the package's model is 2.14, not 2.33
DC_SHIFT, DC_SHIFT_OF_RMS = 1e-3, 0.05  # as in prepare_speaker_data.py
CLIPPED_SHARE = 1e-4
QUIET = 0.01  # peaks below this are flat from being rounded to 16 bits
FEW = 0.05  # of the pieces may be shifted or narrow: short ones of clean recordings are
BAND_DB = -60.0  # what lies above the bandwidth holds less than this, relative to the whole
NARROW = 0.6  # a bandwidth below this share of half the sample rate comes from a source of a lower rate
ENVELOPE_S, ENVELOPE_HZ = 0.032, 280.0  # frames and smoothing of the spectra that bound the SNR
ENOUGH_STEPS = 100_000  # of a run from scratch on a GPU
WARMUP_STEPS = 2  # of a phase: kernels are chosen, memory is reserved
READ_AHEAD = 4  # batches a worker of the loader holds ready, at the first of which no step waits
TIMED_S, TIMED_STEPS = 5.0, 50  # steps are timed for so long, or so many of them
# scale pulls by the level's error alone; new discriminators know nothing yet
AT_STEP_0 = ("wave", "mel", "msspec", "cspec", "bands", "whisper", "feat")


class Published(NamedTuple):
    name: str
    steps: int  # generator updates
    batch_size: int
    segment_s: float

    @property
    def hours(self) -> float:
        return self.steps * self.batch_size * self.segment_s / 3600


PUBLISHED = (
    Published("DAC", 400_000, 72, 0.38),  # conf/final/24khz.yml of descript-audio-codec
    Published("EnCodec", 600_000, 64, 1.0),  # Défossez et al. 2022: 300 epochs of 2000 updates
    Published("BigCodec", 600_000, 8, 1.0),  # its config/train and config/dataset, per GPU; their 1.2M count both optimizers
    Published("Mimi", 4_000_000, 128, 12.0),  # Défossez et al. 2024 (Moshi), section 3.3
)


class Check(NamedTuple):
    area: str  # "data", "arithmetic", "resources" or "config"
    level: str  # "ok", "warning" or "stop"
    message: str
    mend: str = ""


class Cost(NamedTuple):
    step_s: list[float]  # seconds an update, per phase; 0 for a phase without steps
    validation_s: float
    peak_bytes: int  # of the card on CUDA, else of this process
    save_s: float = 0.0  # a checkpoint


def judge(area: str, bad: bool, message: str, mend: str, level: str = "warning") -> Check:
    """A check with its mend where it is bad, else ok without."""
    return Check(area, level, message, mend) if bad else Check(area, "ok", message)


# ------------------------------------------------------------------------------- data


def check_data(
    train: list[Utterance], val: list[Utterance], test: list[Utterance], sample_rate: int, max_seconds_read: float,
    level_db: float | None = None,
) -> list[Check]:
    """Amount, signal, copies and leakage of the data.

    Args:
        train, val, test: the splits of a manifest; val and test may be empty.
        sample_rate: Hz, of all of them.
        max_seconds_read: of audio, half of it to look at the signal and half to find copies; what looks like one is
            then compared over a second more.
        level_db: `model.level_db`, to which recordings will be brought before they are coded.
    Returns:
        The headline first. An unreadable file is a check, not an error.
    """
    hours = [sum(u.n_samples for u in split) / sample_rate / 3600 for split in (train, val, test)]
    speakers = {u.speaker for u in train}
    if not train:
        return [Check("data", "stop", "no training utterances", "prepare_speaker_data.py DATA_DIR OUT_DIR makes a manifest")]
    checks = [Check("data", "ok", f"{hours[0]:.2f} h to train on, {len(train):,} utterances, {len(speakers)} speakers; "
                                  f"{hours[1]:.2f} h to validate, {hours[2]:.2f} h to test")]  # fmt: skip
    if hours[0] < 1:
        checks.append(Check("data", "warning", f"{60 * hours[0]:.0f} minutes are learnt by heart before a codec is good",
                            "add recordings: 10 h make a codec for one voice, 100 h and more one for any; or start from "
                            "published weights by train.init_from"))  # fmt: skip
    if len(speakers) < 5:
        checks.append(Check("data", "warning", f"{len(speakers)} speakers: other voices will come out worse, or as these",
                            "add speakers (first folder under DATA_DIR), unless it shall code these alone; "
                            "without teachers, data.speeds=[0.84,0.92,1.0,1.08,1.17] lets few pass for more"))  # fmt: skip
    if not val:
        checks.append(Check("data", "warning", "no val split: val/ figures will be of training data",
                            "prepare_speaker_data.py with --val 0.05"))  # fmt: skip
    pieces, trouble = read_pieces(train, sample_rate, max_seconds_read / 2)
    if trouble:
        checks.append(Check("data", "warning" if len(trouble) < len(pieces) / 100 else "stop",
                            f"{len(trouble)} of {len(pieces) + len(trouble)} places cannot be read: {trouble[0]}",
                            "prepare the data again; training puts silence in their place"))  # fmt: skip
    return checks + check_signal(pieces, sample_rate, level_db) + check_copies(
        train, val, test, sample_rate, max_seconds_read / 2)  # fmt: skip


def read_pieces(
    utterances: list[Utterance], sample_rate: int, max_seconds: float
) -> tuple[list[tuple[Utterance, np.ndarray]], list[str]]:
    """A bounded sample of the audio, evenly spread over its seconds.

    Args:
        utterances: at least one; files are read by seeking.
        max_seconds: of audio that are read.
    Returns:
        Pieces of up to 3 s, float32 [T], with where they are from; and what was wrong with places that could not be read.
    """
    ends = np.cumsum([u.n_samples for u in utterances])
    piece_samples = round(PIECE_S * sample_rate)
    n_pieces = max(1, min(int(max_seconds / PIECE_S), math.ceil(ends[-1] / piece_samples)))
    places = {}  # short utterances are met twice, but read once
    for middle in ((np.arange(n_pieces) + 0.5) * ends[-1] / n_pieces).astype(int):
        index = int(np.searchsorted(ends, middle, side="right"))
        u = utterances[index]
        within = middle - (ends[index] - u.n_samples) - piece_samples // 2
        places[index, max(0, min(int(within), u.n_samples - piece_samples))] = u
    pieces, trouble = [], []
    for (_, start), u in places.items():
        expected = min(piece_samples, u.n_samples)
        try:
            wav = read_segment(u.path, start, expected)
        except ValueError as error:
            trouble.append(str(error))
            continue
        pieces += [(u, wav)] if len(wav) else []
        if len(wav) < expected:
            trouble.append(f"{u.path}: ends at sample {start + len(wav)}, the manifest says {u.n_samples}")
    return pieces, trouble


def check_signal(pieces: list[tuple[Utterance, np.ndarray]], sample_rate: int, level_db: float | None) -> list[Check]:
    """Level, silence, DC, clipping and bandwidth of a sample of the audio."""
    levels = np.array([rms_db(wav) for _, wav in pieces])
    if not pieces or np.median(levels) < -90:
        return [Check("data", "stop", "the audio is silent, or none could be read", "look at the recordings")]
    median = float(np.median(levels))
    silent = np.concatenate([frame_levels_db(wav, sample_rate) for _, wav in pieces]) < median + SILENT_DB
    heard = [(u, wav) for (u, wav), level in zip(pieces, levels) if level > median + SILENT_DB]
    low, high = np.percentile([rms_db(wav) for _, wav in heard], [5, 95])
    shifts = [abs(float(wav.mean())) for _, wav in heard]
    shifted = [(shift, u) for shift, (u, wav) in zip(shifts, heard) if shift > max(DC_SHIFT, DC_SHIFT_OF_RMS * rms(wav))]
    flat = [(flat_samples(wav), u) for u, wav in heard]
    clipped = sum(n for n, _ in flat) / sum(len(wav) for _, wav in heard)
    widths = [(bandwidth_hz(wav, sample_rate), u) for u, wav in heard]
    narrow = [item for item in widths if item[0] < NARROW * sample_rate / 2]
    usual_khz = float(np.median([width for width, _ in widths])) / 1000
    again = "prepare_speaker_data.py "
    level = f"level {median:.1f} dB RMS, 9 of 10 pieces from {low:.1f} to {high:.1f}"
    off = not -30 < median < -8 if level_db is None else abs(median - level_db) > LEVEL_OFF_DB
    if level_db is not None:
        level += f"; what is to be coded will be brought to model.level_db={level_db:g}"
    mend = f"{again}brings every utterance to --target_db {-16 if level_db is None else level_db:g}"
    return [
        judge("data", off or high - low > 20, level, mend + "; or set model.level_db" * (level_db is not None)),
        judge("data", silent.mean() > 0.4, f"silent {share(silent.mean())} of the time ({-SILENT_DB:.0f} dB below the level)",
              again + "cuts silence out"),
        judge("data", len(shifted) > FEW * len(heard), f"DC offset in {share(len(shifted) / len(heard))} of the pieces, "
              f"at most {max(shifts):.4f}{named(shifted, max)}", again + "removes it"),
        judge("data", clipped > CLIPPED_SHARE, f"clipped: {share(clipped)} of the samples lie on flat tops"
              f"{named([item for item in flat if item[0]], max)}",
              "leave these recordings out: a lower level does not mend them, and the codec learns to clip"),
        judge("data", len(narrow) > FEW * len(heard), f"bandwidth {usual_khz:.1f} kHz of {sample_rate / 2000:.1f}; "
              f"{share(len(narrow) / len(heard))} of the pieces end below {NARROW * sample_rate / 2000:.1f} kHz"
              f"{named(narrow, min)}",
              "they were recorded at a lower rate: leave them out, or train at that rate (" + again + "--sample_rate)"),
    ]  # fmt: skip


def frame_levels_db(wav: np.ndarray, sample_rate: int) -> np.ndarray:
    """RMS of each 20 ms of [T], without its own mean, in dB; at least one frame."""
    n = min(round(SILENT_FRAME_S * sample_rate), len(wav))
    frames = wav[: len(wav) // n * n].reshape(-1, n).astype(np.float64)
    return 10 * np.log10(frames.var(1) + 1e-12)


def flat_samples(wav: np.ndarray) -> int:
    """Samples of [T] at the peak of their side, where three or more in a row are equal: clipped, at whatever level since."""
    n_flat = 0
    for side in (wav, -wav):
        top = side >= 0.999 * side.max()
        flat = (side[2:] == side[1:-1]) & (side[1:-1] == side[:-2]) & top[2:]
        n_flat += int(top.sum()) if side.max() > QUIET and flat.any() else 0
    return n_flat


def bandwidth_hz(wav: np.ndarray, sample_rate: int) -> float:
    """Frequency above which [T] has less than a millionth (-60 dB) of its power."""
    n_fft = 1024
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(wav, (0, max(0, n_fft - len(wav)))), n_fft)[:: n_fft // 2]
    power = (np.abs(np.fft.rfft(frames * np.hanning(n_fft))) ** 2).sum(0)
    above = np.cumsum(power[::-1])[::-1]
    return float((above > above[0] * 10 ** (BAND_DB / 10)).sum() * sample_rate / n_fft)


def share(x: float) -> str:
    return f"{100 * x:.0f} %" if x >= 0.1 else f"{100 * x:.2g} %"


def named(found: list[tuple[float, Utterance]], worst: Callable) -> str:
    """', worst in PATH', or nothing where nothing was found."""
    return f", worst in {worst(found, key=lambda item: item[0])[1].path.name}" if found else ""


def check_copies(
    train: list[Utterance], val: list[Utterance], test: list[Utterance], sample_rate: int, max_seconds: float
) -> list[Check]:
    """The same audio under two names: within the training split, and on both sides of a split."""
    splits = {"train": train, "val": val, "test": test}
    copies, n_left = find_copies(splits, sample_rate, max_seconds)
    twice = [group for group in copies if sum(split == "train" for split, _ in group) > 1]
    n_twice = sum(sum(split == "train" for split, _ in group) - 1 for group in twice)
    leaks = [group for group in copies if len({split for split, _ in group}) > 1]
    leaked = sum(split != "train" for group in leaks for split, _ in group) / max(len(val) + len(test), 1)
    rest = f" ({n_left:,} utterances not compared)" if n_left else ""
    return [
        judge("data", n_twice > 0, f"{n_twice} training utterances are copies of others{pair(twice)}{rest}",
              "drop them from the manifest; prepare_speaker_data.py drops copies of whole recordings"),
        judge("data", bool(leaks), f"{share(leaked)} of the held-out utterances stand in another split too{pair(leaks)}{rest}",
              "drop them from the manifest, or prepare again: as it is, val/ figures are of training data",
              "stop" if leaked > 0.05 else "warning"),
    ]  # fmt: skip


def copied_share(utterances: list[Utterance], sample_rate: int, max_seconds: float) -> float:
    """Share of utterances that are copies of others, as far as so many seconds of audio tell; 0 without any."""
    copies, n_left = find_copies({"train": utterances}, sample_rate, max_seconds)
    return sum(len(group) - 1 for group in copies) / max(len(utterances) - n_left, 1)


def pair(groups: list[list[tuple[str, Utterance]]]) -> str:
    """', such as A and B' of the first group, from two splits where it has them."""
    if not groups:
        return ""
    (_, first), *others = groups[0]
    other = next((u for split, u in others if split != groups[0][0][0]), others[0][1])
    return f", such as {first.path.name} and {other.path.name}"


def find_copies(
    splits: dict[str, list[Utterance]], sample_rate: int, max_seconds: float
) -> tuple[list[list[tuple[str, Utterance]]], int]:
    """Groups of utterances with the same samples.

    Args:
        splits: name -> utterances.
        max_seconds: of audio read to compare those of equal length; groups with held-out ones come first.
    Returns:
        Groups of (split, utterance); and how many of equal length were left uncompared.
    """
    groups = grouped([(split, u) for split in splits for u in splits[split]], lambda u: u.n_samples)
    groups.sort(key=lambda group: all(split == "train" for split, _ in group))
    budget, n_left, compared = max_seconds / COMPARED_S, 0, []
    for group in groups:
        part = group[: max(int(budget), 0)]
        budget -= len(part)
        compared += [part] if len(part) > 1 else []
        n_left += len(group) - len(part)
    short = round(COMPARED_S * sample_rate)
    alike = [same for group in compared for same in grouped(group, lambda u: samples(u, u.n_samples // 2, short))]
    return [same for group in alike for same in grouped(group, lambda u: samples(u, 0, sample_rate))], n_left


def grouped(items: list[tuple[str, Utterance]], key: Callable) -> list[list[tuple[str, Utterance]]]:
    """Items whose utterances have the same key, where there are two or more of them."""
    groups = defaultdict(list)
    for split, u in items:
        groups[key(u)].append((split, u))
    return [group for group in groups.values() if len(group) > 1]


def samples(u: Utterance, start: int, n_samples: int) -> bytes:
    """What to compare a part of a file by; unreadable ones are like no other, and so is digital silence."""
    try:
        wav = read_segment(u.path, start, n_samples)
    except ValueError:
        return str(u.path).encode()
    return wav.tobytes() if wav.any() else str(u.path).encode()


# ------------------------------------------------------------------------- arithmetic


def check_arithmetic(config: Config, train: list[Utterance], wavs: list[np.ndarray]) -> list[Check]:
    """Steps, audio seen, frames against codebooks, receptive field, bitrate and what it can carry.

    Args:
        train: files need not exist.
        wavs: float32 [T] each, a sample of the data for the bound on the SNR; may be empty.
    """
    data, model, total = config.data, config.model, config.total_steps
    with torch.device("meta"):  # shapes alone: no memory, no time
        codec = Codec(model)
    segment_s = data.segment_samples / model.sample_rate
    hours_seen = total * data.batch_size * segment_s / 3600
    hours = sum(u.n_samples for u in train) / model.sample_rate / 3600
    per_epoch = data.segments_per_epoch / data.batch_size  # the log's epochs are of whole steps
    epochs = f"{total / per_epoch:,.{0 if total > 10 * per_epoch else 1}f}"
    more_steps = f" and phases of {ENOUGH_STEPS:,} steps and more in all" if total < 1000 else ""
    frames = data.batch_size * data.segment_samples // codec.hop_length
    bitrate = f"{codec.bitrate_kbps:.2f} kbps: {codec.frame_rate_hz:g} frames a second, {codec.n_codebooks} codebooks of " \
              f"{codec.codebook_size}"  # fmt: skip
    checks = [
        Check("arithmetic", "ok", f"{total:,} steps of {data.batch_size} x {segment_s:.2f} s see {hours_seen:,.2f} h of audio, "
              f"{hours_seen / max(hours, 1e-9):.2g} times over the data"),
        judge("arithmetic", per_epoch < 100,
              f"an epoch of {data.segments_per_epoch:,} segments in batches of {data.batch_size} is {per_epoch:.4g} steps "
              f"({per_epoch * data.batch_size * segment_s / 3600:.2g} h): {epochs} epochs are about "
              f"{float(f'{total:.2g}'):,.0f} steps",
              f"an epoch is what you call one, steps are what teaches: data.segments_per_epoch={1000 * data.batch_size} "
              f"(1000 steps){more_steps}"),
        judge("arithmetic", total < 1000 and not config.train.init_from, "published: " + "; ".join(
              f"{p.name} {p.steps:,} steps, {p.hours:,.0f} h seen" for p in PUBLISHED),
              f"{total:,} steps from scratch are too few to learn anything: set phases.*.steps, or train.init_from"),
        judge("arithmetic", frames < codec.codebook_size and "quantizer" not in config.train.freeze,
              f"{frames:,} latent frames an update for {codec.codebook_size:,} entries of a codebook"
              + (": most get no frame at all" if frames < codec.codebook_size / 4 else ""),
              f"data.batch_size={-(-codec.codebook_size * codec.hop_length // data.segment_samples)} or longer segments "
              "give each its frame; fewer revive codes more often and make them noisy"),
        receptive_field(codec, data.segment_samples),
        Check("arithmetic", "ok", bitrate),
    ]  # fmt: skip
    if any(wav.any() for wav in wavs):
        bound = snr_bound_db(wavs, model.sample_rate, codec.bitrate_kbps)
        checks.append(Check("arithmetic", "ok", f"at that bitrate this data allows an SNR of about {bound:.0f} dB, if the "
                            "spectral envelope came free (reverse water-filling); codecs reach a third to a half of it, and "
                            "purely adversarial ones sit near 0 dB while they sound well"))  # fmt: skip
    return checks


def receptive_field(codec: Codec, segment_samples: int) -> Check:
    """Convolutions ought to see no more than a segment; what remembers longer is said."""
    local, whole = codec.encoder.reach_samples + 1, codec.receptive_field_samples
    message = f"receptive field {local / codec.sample_rate:.2f} s of a segment of {segment_samples / codec.sample_rate:.2f} s"
    if math.isinf(whole):
        message += ", and an LSTM without limit: longer memory than a segment is never trained"
    elif len(codec.encoder.tail):
        message += f", and a transformer up to {whole / codec.sample_rate:.1f} s: more than a segment is never trained"
    return judge("arithmetic", local > segment_samples, message,
                 f"data.segment_samples={-(-2 * local // codec.hop_length) * codec.hop_length:.0f}, or fewer dilations; "
                 "as it is, every frame sees padding")  # fmt: skip


def snr_bound_db(wavs: list[np.ndarray], sample_rate: int, kbps: float) -> float:
    """`snr_bounds_db` of one bitrate."""
    return snr_bounds_db(wavs, sample_rate, [kbps])[0]


def snr_bounds_db(wavs: list[np.ndarray], sample_rate: int, kbps: list[float]) -> list[float]:
    """Highest SNR that each bitrate allows on Gaussian components with the variances of this audio.

    The spectral envelope is given away free, and the bits are spent where they help most in time and frequency.
    The pitch is not: a codec that predicts it well could come above the bound.

    Args:
        wavs: float32 [T] each, together not silent; minutes suffice.
        sample_rate: Hz.
        kbps: bits spent per second, each on average over all of `wavs`.

    Source: Cover & Thomas 2006, section 10.3.3.
    """
    variances = np.sort(np.concatenate([envelope(wav, sample_rate) for wav in wavs]))[::-1]
    variances = np.maximum(variances, 1e-12 * variances[0]).astype(np.float64)
    logs, n = np.cumsum(np.log2(variances)), np.arange(1, len(variances) + 1)
    n_bits_down_to = 0.5 * (logs - n * np.log2(variances))  # what it takes to bring all larger ones down to this one
    bounds = []
    for rate in kbps:
        n_bits = 1000 * rate * len(variances) / sample_rate  # as many components as samples
        n_above = int(np.searchsorted(n_bits_down_to, n_bits, side="right"))
        water = 2 ** ((logs[n_above - 1] - 2 * n_bits) / n_above)
        bounds.append(float(10 * np.log10(variances.sum() / (n_above * water + variances[n_above:].sum()))))
    return bounds


def envelope(wav: np.ndarray, sample_rate: int) -> np.ndarray:
    """[T] to variances of as many components: power spectra of half-overlapping frames, smoothed over frequency."""
    n = 2 * round(ENVELOPE_S * sample_rate / 2)
    width = max(1, round(ENVELOPE_HZ * n / sample_rate))
    wav = np.pad(wav, (0, max(0, n - len(wav))))
    frames = np.lib.stride_tricks.sliding_window_view(wav, n)[:: n // 2] * np.hanning(n + 1)[:-1]
    power = np.abs(np.fft.rfft(frames)[:, 1:]) ** 2  # without DC: n / 2 bins for n / 2 new samples
    padded = np.pad(power, ((0, 0), (width // 2, width - 1 - width // 2)), mode="symmetric")
    return np.lib.stride_tricks.sliding_window_view(padded, width, axis=1).mean(-1).ravel()


def check_precision(precision: str, device: torch.device) -> list[Check]:
    """bf16 on a CPU without instructions for it, which then takes number by number; none where all is well."""
    cpu = getattr(torch.cpu, "get_capabilities", dict)()
    without = cpu.get("architecture") == "x86_64" and not (cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
    if precision != "bf16" or device.type != "cpu" or not without:
        return []
    return [Check("arithmetic", "warning", "this CPU has no instructions for train.precision=bf16: on a Zen 3 updates take "
                  "28 times as long", "train.precision=fp32")]  # fmt: skip


# ----------------------------------------------------------------------------- config


def check_config(config: Config, grads: dict[str, float], phase: int = 0) -> list[Check]:
    """Weights that will be drowned, and settings that have ended runs.

    Args:
        grads: norm of the gradient that each weighted term sends into the output at step 0, by the term's name, and
            z_signal, z_commit: those of all signal terms and of the commitment at the encoder's output. May be empty.
        phase: index of the phase that `grads` were measured in, whose settings are judged.
    """
    fresh = phase == 0 and not config.train.init_from
    config = phase_config(config, phase)
    name, weights, optim = config.phases[phase].name, config.loss_weights, config.optim
    factorized = config.model.quantizer.type == "factorized"
    checks = [Check("config", "ok", f"phase {name}: gradients at the output " + (", ".join(
                    f"{key} {value:.2g}" for key, value in grads.items() if not key.startswith("z_")) or "not measured"))]
    broken = [key for key, value in grads.items() if not math.isfinite(value)]
    if broken:
        checks.append(Check("config", "stop", f"the gradient of {', '.join(broken)} is not finite at step 0",
                            "leave these terms out, or train.precision=fp32"))
    elif not config.losses.balancer:
        checks += drowned(grads, {key: getattr(weights, key) for key in AT_STEP_0})
    if grads.get("z_commit", 0) > 3 * grads.get("z_signal", math.inf):
        checks.append(Check("config", "warning",
            f"commitment pulls {grads['z_commit'] / max(grads['z_signal'], 1e-12):.2g} times as hard at the latents as all "
            "signal terms: output fades to silence that is easy to code",
            f"loss_weights.commit={weights.commit * grads['z_signal'] / grads['z_commit']:.2g}"))
    if fresh and weights.adversarial and not any((weights.mel, weights.msspec, weights.cspec, weights.bands, weights.wave)):
        checks.append(Check("config", "warning", "adversarial from the first step without mel, msspec, cspec, bands or wave: "
                            "nothing for a long time (Mimi took 4M updates)",
                            "a first phase with loss_weights.mel or msspec, or train.init_from"))
    if factorized and not weights.codebook and not config.train.freeze:
        checks.append(Check("config", "stop", "loss_weights.codebook=0: factorized codebooks would never learn",
                            "loss_weights.codebook four times loss_weights.commit, as in DAC"))
    if not weights.commit and not config.train.freeze:
        checks.append(Check("config", "warning", "loss_weights.commit=0: latents may run away from their codes",
                            "loss_weights.commit=0.25"))
    if optim.lr_g > 3e-3:
        checks.append(Check("config", "warning", f"optim.lr_g={optim.lr_g:g} is higher than codecs survive", "1e-4 to 1e-3"))
    if weights.adversarial and optim.max_grad_norm_d > 1000:
        checks.append(Check("config", "warning", f"optim.max_grad_norm_d={optim.max_grad_norm_d:g} clips nothing: "
                            "one spike can end the discriminators", "optim.max_grad_norm_d=10"))
    return checks  # fmt: skip


def drowned(grads: dict[str, float], weights: dict[str, float]) -> list[Check]:
    """Terms with a weight whose gradient is below a hundredth of the largest term's."""
    sizes = {key: grads[key] for key in weights if weights[key] and key in grads}
    if not sizes:
        return []
    largest = max(sizes, key=sizes.get)
    return [Check("config", "warning", f"{key} will be drowned: its gradient is {share(size / sizes[largest])} of {largest}'s",
                  f"loss_weights.{key}={weights[key] * 0.1 * sizes[largest] / size:.2g} makes it a tenth" if size else
                  "it sends none: leave it out")
            for key, size in sizes.items() if size < 0.01 * sizes[largest]]  # fmt: skip


# -------------------------------------------------------------------------- resources


def measure(
    config: Config, take_step: Callable[[int], dict], take_validation: Callable[[], None], take_save: Callable[[], None],
    n_steps: int = 6,
) -> Cost:
    """Time and memory of real steps and a real validation.

    Args:
        take_step: runs one update with the real loader in the phase of that index.
        take_validation: runs one whole validation.
        take_save: saves one checkpoint.
        n_steps: updates that are timed in every phase, at least.
    Returns:
        Mean time of an update in every phase, after what the loader had read ahead is used up.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    step_s, workers = [], config.data.n_workers
    ahead = READ_AHEAD * workers
    for index, phase in enumerate(config.phases):
        times = []
        for _ in range(WARMUP_STEPS + ahead if phase.steps else 0):
            take_step(index)
        while phase.steps and (len(times) < n_steps or sum(times) < TIMED_S and len(times) < TIMED_STEPS
                               or len(times) % max(workers, 1)):  # fmt: skip
            times.append(seconds(lambda index=index: take_step(index)))
        # Not the median: where the loader is slow, its workers are done together and one step waits for all of them.
        step_s.append(float(np.mean(times)) if times else 0.0)
        ahead = 0 if phase.steps else ahead
    take_validation()  # the first one compiles, and reserves memory
    validation_s, save_s = seconds(take_validation), seconds(take_save)
    peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Cost(step_s, validation_s, torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_bytes, save_s)


def seconds(action: Callable[[], object]) -> float:
    """Wall time of an action, with what it left running on the card; the slowest process's, so that all count alike."""
    started = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    taken = torch.tensor(time.perf_counter() - started, device="cuda" if torch.cuda.is_available() else "cpu")
    return distributed.all_reduce_max(taken).item()


def check_resources(config: Config, cost: Cost, n_parameters: int, price_per_hour: float = 0.0) -> list[Check]:
    """Time, price and memory of the whole run.

    Args:
        n_parameters: of the codec.
        price_per_hour: of the machine, in any currency; 0: not said.
    """
    total, limit_s = config.total_steps, 60 * config.train.max_minutes
    hours = seconds_until(config, cost, total) / 3600
    last = total
    if limit_s:
        last = min(total, bisect.bisect_left(range(total + 1), limit_s, key=lambda step: seconds_until(config, cost, step)))
    taken = min(hours, limit_s / 3600) if limit_s else hours
    price = f", {taken * price_per_hour:,.2f} at {price_per_hour:g} an hour" if price_per_hour else ""
    refit = config.train.refit_frames
    before = f"; fitting codebooks to {refit:,} latents before them is not counted" if refit else ""
    each = ", ".join(f"{phase.name} {s:.3g} s a step" for phase, s in zip(config.phases, cost.step_s))
    on_card = torch.cuda.is_available()
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if on_card:
        room = torch.cuda.get_device_properties(0).total_memory
    return [
        Check("resources", "ok", f"{duration(taken)} for {last:,} steps{price}{before}"),
        Check("resources", "ok", f"{n_parameters / 1e6:.2f}M parameters; {each}; a validation {cost.validation_s:.3g} s"),
        judge("resources", last < total, f"train.max_minutes={config.train.max_minutes:g}" + (
              f" ends the run at step {last:,} of {total:,}, which would take {duration(hours)}" if last < total else
              " is enough" if limit_s else ": no limit"),
              f"train.max_minutes={math.ceil(66 * hours)}, or phases.*.steps that fit"),
        judge("resources", cost.peak_bytes > 0.9 * room,
              f"memory: {cost.peak_bytes / 2**30:.2f} GiB of {room / 2**30:.0f} ({'card' if on_card else 'machine'})",
              "a smaller data.batch_size or segment, or train.precision=bf16"),
    ]  # fmt: skip


def seconds_until(config: Config, cost: Cost, step: int) -> float:
    """Forecast of the time that the first `step` updates take, their validations included."""
    n_validations, left = step // config.train.val_every, step
    n_saves = step // config.train.checkpoint_every + n_validations / 2  # half of them are a new best, which is saved too
    total_s = n_validations * cost.validation_s + n_saves * cost.save_s
    if step == config.total_steps and step % config.train.val_every:
        total_s += cost.validation_s  # the last step is always followed by one
    for phase, step_s in zip(config.phases, cost.step_s):
        total_s += min(left, phase.steps) * step_s
        left -= min(left, phase.steps)
    return total_s


def duration(hours: float) -> str:
    return f"{60 * hours:.1f} min" if hours < 1 else f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


# ----------------------------------------------------------------------------- report


def render(checks: list[Check], brief: bool) -> str:
    """The checks as lines of at most 120 columns: all by area, or in brief a summary, then warnings and stops."""
    shown = {area: [check for check in checks if check.area == area] for area in dict.fromkeys(c.area for c in checks)}
    if brief:
        summary = "; ".join(found[0].message for area, found in shown.items() if area != "config")
        return "\n".join([wrap("preflight: ", summary), *(line_of(check) for check in checks if check.level != "ok")])
    return "\n".join(line for area in shown for line in (area, *map(line_of, shown[area])))


def line_of(check: Check) -> str:
    level = "STOP" if check.level == "stop" else check.level
    return wrap(f"  {level:<9}", check.message + (f" -> {check.mend}" if check.mend else ""))


def wrap(start: str, text: str) -> str:
    return textwrap.fill(text, 120, initial_indent=start, subsequent_indent=11 * " ", break_long_words=False,
                         break_on_hyphens=False)  # fmt: skip
