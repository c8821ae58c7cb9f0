"""What simple probes read out of each group of codebooks, for speakers they have not heard; and the prosody swap.

A group's input at a frame is what its codes stand for: the looked-up entries, summed over the levels of one residual
(EMA quantizers; that is what the decoder gets), side by side for the groups of a pair or of all, and for levels with
spaces of their own (factorized). Frames within CONTEXT are put beside it. Entries keep their relative scale, as the
decoder gets them. Wider inputs go through one fixed random projection. The row `latent` reads z before quantization.

A figure says what a small probe reads, not what the codes hold: with few training speakers a group of more codebooks
can be read worse than a part of it, as each adds detail that the probe must learn to ignore.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codec.audio import load_audio, read_segment, save_audio
from codec.config import EMAQuantizerConfig, FactorizedQuantizerConfig
from codec.data import Utterance, read_manifest
from codec.files import write_atomically
from codec.model import Codec
from codec.pitch import log_f0
from codec.words import Transcript, character_spans, check_words, find_transcript, read_words

WIDTH = 256  # of a probe's input at one frame
CONTEXT = 2  # frames to either side
HIDDEN = 256
STEPS, BATCH_SIZE, CHECK_EVERY = 800, 256, 50
DROPOUT = 0.2  # of a probe's inputs
HELD_OUT = 10  # every tenth training utterance is kept back to tell when a probe is at its best
MAX_CHECKS = 10_000  # frames of them
N_CLASSES = 40
BLANK = ""  # the class of frames outside words
SEMITONES = 12 / math.log(2)  # in a unit of log-F0
COLUMNS = {
    "log_f0_rmse": "log-F0 RMSE",
    "f0_rmse_semitones": "semitones",
    "f0_median_semitones": "median, semitones",
    "contour_rmse_semitones": "contour, semitones",
    "voicing_error": "voicing error",
    "energy_rmse_db": "energy RMSE, dB",
    "speaker_accuracy": "speaker accuracy",
    "class_error": "class error",
    "class_error_in_words": "in words",
}


class Frames(NamedTuple):
    """The frames of some utterances, M in all, one utterance after the other."""

    codes: Tensor  # [M, N], int64
    latent: Tensor  # [M, up to WIDTH], float32
    log_f0: Tensor  # [M], of Hz; NaN where unvoiced
    energy_db: Tensor  # [M], RMS of the frame's samples
    labels: list[str | None]  # M: what is said, BLANK outside words, None without a transcript
    utterance: Tensor  # [M], counts from 0
    speakers: list[str]  # one an utterance
    n_unreadable: int = 0  # utterances left out
    n_untranscribed: int = 0  # utterances without a transcript, or with one that does not fit


# ---- groups and their inputs --------------------------------------------------------------------------------


def codebook_groups(config: EMAQuantizerConfig | FactorizedQuantizerConfig) -> dict[str, list[range]]:
    """The groups to probe: name -> one range of codebooks, or several that are put side by side.

    Semantic, prosodic, acoustic, the first two and all; of a codec without semantic codebooks 0, 1, the rest, 0+1, all.
    """
    split = config.type == "ema" and config.n_first
    names = ("semantic", "prosodic", "acoustic") if split else ("0", "1", "rest")
    first, second = (config.n_semantic, config.n_first) if split else (1, min(2, config.n_codebooks))
    ends = [0, first, second, config.n_codebooks]
    parts = {name: range(ends[i], ends[i + 1]) for i, name in enumerate(names) if ends[i] < ends[i + 1]}
    groups = {name: [part] for name, part in parts.items()}
    if len(parts) == 3:
        groups["+".join(names[:2])] = list(parts.values())[:2]
    return groups | ({"all": list(parts.values())} if len(parts) > 1 else {})


def group_inputs(codes: Tensor, codebooks: Tensor, slots: list[range]) -> Tensor:
    """What codes stand for.

    Args:
        codes: [M, N].
        codebooks: [N, K, d].
        slots: codebooks whose entries are summed; what the slots give is put side by side.
    Returns:
        [M, up to WIDTH].
    """
    d = codebooks.shape[-1]
    projection = _projection(len(slots) * d).to(codebooks).split(d)
    x = codebooks.new_zeros(len(codes), projection[0].shape[1])
    for slot, matrix in zip(slots, projection):
        for i in slot:
            x += (codebooks[i] @ matrix)[codes[:, i]]
    return x


def _projection(width: int) -> Tensor:
    """[width, up to WIDTH]: a fixed random matrix, or the identity where the width is small enough."""
    if width <= WIDTH:
        return torch.eye(width)
    return torch.randn(width, WIDTH, generator=torch.Generator().manual_seed(0)) / math.sqrt(WIDTH)


# ---- what is to be read -------------------------------------------------------------------------------------


@torch.no_grad()
def collect(
    codec: Codec, utterances: list[Utterance], transcripts: dict[str, Transcript] | None = None, unit: str = "character"
) -> Frames:
    """Codes, latents and targets of utterances, cut to whole frames; unreadable files are left out and counted.

    Raises:
        ValueError: nothing is left, or no utterance has a transcript that fits.
    """
    device, hop, rate = next(codec.parameters()).device, codec.hop_length, codec.sample_rate
    rows, labels, speakers, n_unreadable, n_untranscribed = [], [], [], 0, 0
    for utterance in utterances:
        try:
            wav = read_segment(utterance.path, 0, utterance.n_samples)
        except ValueError:
            wav = np.zeros(0, np.float32)
        if (n_frames := len(wav) // hop) == 0:
            n_unreadable += 1
            continue
        spoken = frame_labels(transcripts or {}, utterance.name, n_frames, hop / rate, unit)
        n_untranscribed += spoken[0] is None
        wav = wav[: n_frames * hop]
        wav *= codec.gain(torch.from_numpy(wav)[None, None]).item()  # and so its energy is what codes can know
        z = codec.encoder(torch.from_numpy(wav)[None, None].to(device)).float()
        latent = z[0].T @ _projection(z.shape[1]).to(device)
        pitch = torch.from_numpy(log_f0(wav, rate, hop, n_frames)).float()
        energy = 20 * np.log10(np.sqrt(np.square(wav, dtype=np.float64).reshape(n_frames, hop).mean(1)).clip(1e-4))
        number = torch.full((n_frames,), len(speakers))
        rows.append((codec.quantizer.encode(z)[0].T, latent, pitch, torch.from_numpy(energy).float(), number))
        labels += spoken
        speakers.append(utterance.speaker)
    if not rows:
        raise ValueError(f"probe: none of {len(utterances)} utterances is readable and a frame long ({hop} samples)")
    if transcripts is not None and n_untranscribed == len(speakers):
        raise ValueError(f"probe: no transcript fits any of {len(speakers)} utterances, the first is {utterances[0].name}; "
                         "give a words file made from this manifest")  # fmt: skip
    codes, latent, pitch, energy, number = (torch.cat(column).to(device) for column in zip(*rows))
    return Frames(codes, latent, pitch, energy, labels, number, speakers, n_unreadable, n_untranscribed)


def frame_labels(
    transcripts: dict[str, Transcript], name: str, n_frames: int, frame_s: float, unit: str
) -> list[str | None]:
    """The character or word at each frame's centre; BLANK outside words, None where no transcript fits."""
    transcript = find_transcript(transcripts, name)
    if transcript is None:
        return [None] * n_frames
    spans, texts = [word[1:] for word in transcript.words], [word.text for word in transcript.words]
    try:
        check_words(transcript, name, (n_frames + 1) * frame_s)
        if unit == "character":
            spans, texts = character_spans(transcript, name), transcript.text
    except ValueError:
        return [None] * n_frames
    labels: list[str | None] = [BLANK] * n_frames
    for (start_s, end_s), text in zip(spans, texts):
        if not math.isnan(start_s):
            first, end = (max(math.ceil(edge / frame_s - 0.5), 0) for edge in (start_s, end_s))
            labels[first:end] = [text.lower()] * len(labels[first:end])
    return labels


def shared_classes(train: Frames, test: Frames) -> dict[str, int]:
    """The N_CLASSES most frequent labels of train that test has too, numbered by frequency."""
    known = set(test.labels)
    counts = Counter(label for label in train.labels if label is not None and label in known)
    return {label: i for i, (label, _) in enumerate(counts.most_common(N_CLASSES))}


# ---- probes -------------------------------------------------------------------------------------------------


class Reader:
    """Trains probes on one group's inputs [M, d]: centred and scaled by train's statistics, with context."""

    def __init__(self, x_train: Tensor, x_test: Tensor, train: Frames, test: Frames):
        mean = x_train.mean(0)
        scale = (x_train - mean).square().mean().sqrt().clamp_min(1e-12)  # one, so that fine detail stays small
        self.train, self.test = ((x - mean) / scale for x in (x_train, x_test))
        self.near_train, self.near_test = (_neighbours(frames.utterance) for frames in (train, test))
        self.utterance = train.utterance

    def read(self, loss: Callable[[Tensor, Tensor], Tensor], usable: Tensor, n_out: int) -> Tensor:
        """Train a probe and give its outputs [M, n_out] for the test frames.

        Args:
            loss: (outputs [m, n_out], numbers of train frames [m]) -> scalar.
            usable: [M] of bool, the train frames that have a target; one at least.
        """
        kept_back = usable & torch.isin(self.utterance, self.utterance[usable].unique()[::HELD_OUT])
        checks, rows = kept_back.nonzero()[:, 0], (usable & ~kept_back).nonzero()[:, 0]
        rows, checks = rows if len(rows) else checks, checks[:: len(checks) // MAX_CHECKS + 1]
        generator = torch.Generator(rows.device).manual_seed(0)
        net = _network(self.near_train.shape[1] * self.train.shape[1], n_out).to(rows.device)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.05, STEPS)
        best, best_net = math.inf, net
        for step in range(1, STEPS + 1):
            picks = rows[torch.randint(len(rows), (BATCH_SIZE,), generator=generator, device=rows.device)]
            x = self.train[self.near_train[picks]].flatten(1)
            x = x * (torch.rand(x.shape, generator=generator, device=x.device) >= DROPOUT) / (1 - DROPOUT)
            optimizer.zero_grad()
            loss(net(x), picks).backward()
            optimizer.step()
            schedule.step()
            if step % CHECK_EVERY == 0:
                value = loss(_outputs(net, self.train, self.near_train[checks]), checks).item()
                if value < best:
                    best, best_net = value, copy.deepcopy(net)
        return _outputs(best_net, self.test, self.near_test)


def _network(n_in: int, n_out: int) -> nn.Module:
    """A probe, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(n_in, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, n_out))


def _neighbours(utterance: Tensor) -> Tensor:
    """[M, 2 CONTEXT + 1] numbers of the frames around each; itself where its utterance has none."""
    here = torch.arange(len(utterance), device=utterance.device)[:, None]
    wanted = here + torch.arange(-CONTEXT, CONTEXT + 1, device=here.device)
    near = wanted.clamp(0, len(utterance) - 1)
    return torch.where((near == wanted) & (utterance[near] == utterance[here]), near, here)


@torch.no_grad()
def _outputs(net: nn.Module, x: Tensor, near: Tensor) -> Tensor:
    """The probe's outputs for frames by their neighbours, in pieces."""
    return torch.cat([net(x[piece].flatten(1)) for piece in near.split(8192)])


def read_prosody(reader: Reader, train: Frames) -> tuple[Tensor, Tensor, Tensor]:
    """Log-F0, voicing logit and energy in dB, each [M], that one probe reads for the test frames."""
    voiced = train.log_f0.isfinite()
    std_f0, mean_f0 = torch.std_mean(train.log_f0[voiced])
    std_db, mean_db = torch.std_mean(train.energy_db)
    pitch, energy = ((train.log_f0 - mean_f0) / std_f0).nan_to_num(), (train.energy_db - mean_db) / std_db.clamp_min(1e-3)

    def loss(out: Tensor, rows: Tensor) -> Tensor:
        known = voiced[rows].float()
        # not squared: a few targets are an octave off
        f0 = (known * F.smooth_l1_loss(out[:, 0], pitch[rows], reduction="none")).sum() / known.sum().clamp_min(1)
        return f0 + F.binary_cross_entropy_with_logits(out[:, 1], known) + F.mse_loss(out[:, 2], energy[rows])

    pitch_hat, voicing, energy_hat = reader.read(loss, torch.ones_like(voiced), 3).T
    return pitch_hat * std_f0 + mean_f0, voicing, energy_hat * std_db.clamp_min(1e-3) + mean_db


def prosody_figures(test: Frames, pitch: Tensor, voicing: Tensor, energy_db: Tensor) -> dict[str, float]:
    """Errors of what was read for the test frames; the contour is without each utterance's mean."""
    voiced = test.log_f0.isfinite()
    error = (pitch - test.log_f0)[voiced]
    utterance, n = test.utterance[voiced], len(test.speakers)
    mean = error.new_zeros(n).index_add_(0, utterance, error) / torch.bincount(utterance, minlength=n).clamp_min(1)
    rmse, contour = error.square().mean().sqrt().item(), (error - mean[utterance]).square().mean().sqrt().item()
    return {
        "log_f0_rmse": rmse,
        "f0_rmse_semitones": SEMITONES * rmse,
        "f0_median_semitones": SEMITONES * error.abs().median().item(),
        "contour_rmse_semitones": SEMITONES * contour,
        "voicing_error": ((voicing > 0) != voiced).float().mean().item(),
        "energy_rmse_db": (energy_db - test.energy_db).square().mean().sqrt().item(),
    }


def class_figures(test: Frames, classes: dict[str, int], guess: Tensor, guess_in_words: Tensor) -> dict[str, float]:
    """Share of wrong classes [M] over the frames of a shared class; inside words by guesses that are never BLANK."""
    targets = _targets(test, classes)
    known, in_words = targets >= 0, (targets >= 0) & (targets != classes.get(BLANK, -1))
    return {
        "class_error": (guess != targets)[known].float().mean().item(),
        "class_error_in_words": (guess_in_words != targets)[in_words].float().mean().item(),
    }


def _targets(frames: Frames, classes: dict[str, int]) -> Tensor:
    """[M] class numbers, -1 for frames without a class."""
    return torch.tensor([classes.get(label, -1) for label in frames.labels], device=frames.utterance.device)


def speaker_halves(frames: Frames) -> tuple[list[int], list[int]]:
    """Every second utterance of each speaker with two or more, and the others; nothing where there is one such speaker."""
    by_speaker: dict[str, list[int]] = {}
    for i, speaker in enumerate(frames.speakers):
        by_speaker.setdefault(speaker, []).append(i)
    known = [numbers for numbers in by_speaker.values() if len(numbers) > 1]
    if len(known) < 2:
        return [], []
    return [i for numbers in known for i in numbers[::2]], [i for numbers in known for i in numbers[1::2]]


def speaker_accuracy(x: Tensor, frames: Frames) -> float:
    """Share of utterances whose speaker a ridge regression on the utterance's mean vector names; NaN for one speaker.

    Speakers who were never heard cannot be named: half of each speaker's test utterances train, the others are named.
    """
    train, test = speaker_halves(frames)
    if not train:
        return math.nan
    n = len(frames.speakers)
    means = x.new_zeros(n, x.shape[1]).index_add_(0, frames.utterance, x)
    means = (means / torch.bincount(frames.utterance, minlength=n)[:, None]).double()
    std, mean = torch.std_mean(means[train], 0)
    means = (means - mean) / std.clamp_min(1e-6)
    names = sorted(set(frames.speakers))
    target = torch.tensor([names.index(speaker) for speaker in frames.speakers], device=x.device)
    one_hot = F.one_hot(target[train], len(names)).double()
    gram = means[train].T @ means[train] + len(train) * torch.eye(x.shape[1], device=x.device)
    weights = torch.linalg.solve(gram, means[train].T @ (one_hot - one_hot.mean(0)))
    return ((means[test] @ weights + one_hot.mean(0)).argmax(1) == target[test]).float().mean().item()


# ---- the table ----------------------------------------------------------------------------------------------


def probe(
    codec: Codec,
    train_utterances: list[Utterance],
    test_utterances: list[Utterance],
    transcripts: dict[str, Transcript] | None = None,
    unit: str = "character",
) -> dict:
    """Probe every group of codebooks.

    Args:
        codec: in eval mode; its device does the work.
        train_utterances, test_utterances: probes learn from the first and are judged on the second; of other speakers.
        transcripts: by `read_words`; None for no classes.
        unit: "character", or "word": the text of each word is a class (alignments of phones).
    Returns:
        "rows": {baseline, groups, latent: {names of COLUMNS: float, None where nothing can be measured}}, with the
        counts that belong to them. The baseline is the best constant of the training frames.
    Raises:
        ValueError: too few utterances to train a probe and judge it, or no transcript fits.
    """
    train, test = (collect(codec, utterances, transcripts, unit) for utterances in (train_utterances, test_utterances))
    if len(train.speakers) < 2:
        raise ValueError(f"probe: {len(train.speakers)} training utterance, expected 2 or more; one of them stops the training")
    classes, config = shared_classes(train, test), codec.config.quantizer
    rows, groups = {"baseline": baseline(train, test, classes)}, codebook_groups(config)
    for name, parts in groups.items():
        # the levels of a factorized quantizer have a space each
        slots = parts if config.type == "ema" else [range(i, i + 1) for part in parts for i in part]
        rows[name] = read_out(*(group_inputs(frames.codes, codec.quantizer.codebooks, slots) for frames in (train, test)),
                              train, test, classes)  # fmt: skip
    rows["latent"] = read_out(train.latent, test.latent, train, test, classes)
    return {
        "rows": {name: {key: _or_none(value) for key, value in row.items()} for name, row in rows.items()},
        "codebooks": {name: [i for part in parts for i in part] for name, parts in groups.items()},
        "frame_rate_hz": codec.frame_rate_hz,
        "unit": unit,
        "n_classes": len(classes),
        "n_shared_speakers": len(set(train.speakers) & set(test.speakers)),
    } | {name: _counts(frames) for name, frames in (("train", train), ("test", test))}


def read_out(x_train: Tensor, x_test: Tensor, train: Frames, test: Frames, classes: dict[str, int]) -> dict[str, float]:
    """One row of figures, from inputs [M, d] of the train and the test frames."""
    reader = Reader(x_train, x_test, train, test)
    nothing = dict.fromkeys(COLUMNS, math.nan)
    figures = prosody_figures(test, *read_prosody(reader, train))
    figures["speaker_accuracy"] = speaker_accuracy(x_test, test)
    if len(classes) > 1:
        targets = _targets(train, classes)
        out = reader.read(lambda out, rows: F.cross_entropy(out, targets[rows]), targets >= 0, len(classes))
        guess = out.argmax(1)
        if BLANK in classes:
            out[:, classes[BLANK]] = -math.inf
        figures |= class_figures(test, classes, guess, out.argmax(1))
    return nothing | figures


def baseline(train: Frames, test: Frames, classes: dict[str, int]) -> dict[str, float]:
    """The row of the best constants: means and most frequent classes."""
    voiced = train.log_f0.isfinite()
    constants = (train.log_f0[voiced].mean(), voiced.float().mean() - 0.5, train.energy_db.mean())
    figures = prosody_figures(test, *(value.expand(len(test.utterance)) for value in constants))
    named = [test.speakers[i] for i in speaker_halves(test)[1]]
    figures["speaker_accuracy"] = max(Counter(named).values()) / len(named) if named else math.nan
    if len(classes) > 1:
        frequent = _targets(test, classes) * 0  # classes are numbered by frequency
        figures |= class_figures(test, classes, frequent, frequent + (classes.get(BLANK) == 0))
    return dict.fromkeys(COLUMNS, math.nan) | figures


def _counts(frames: Frames) -> dict[str, int]:
    """What a split held."""
    return {
        "utterances": len(frames.speakers),
        "speakers": len(set(frames.speakers)),
        "frames": len(frames.utterance),
        "unreadable": frames.n_unreadable,
        "untranscribed": frames.n_untranscribed,
    }


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON knows no NaN


def table(result: dict) -> str:
    """The rows as Markdown, without columns that nothing was measured for."""
    rows = result["rows"]
    keys = [key for key in COLUMNS if any(row[key] is not None for row in rows.values())]
    lines = ["| codebooks | " + " | ".join(COLUMNS[key] for key in keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for name, row in rows.items():
        cells = ["–" if row[key] is None else f"{row[key]:.3f}" for key in keys]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ---- prosody swap -------------------------------------------------------------------------------------------


def swap(codes_a: Tensor, codes_b: Tensor, codebooks: list[int]) -> Tensor:
    """Codes of A with some codebooks of B.

    Args:
        codes_a: [1, N, T'].
        codes_b: [1, N, T'']; stretched to T' by the nearest frame.
        codebooks: from 0.
    Returns:
        [1, N, T'].
    Raises:
        ValueError: no such codebook.
    """
    n, n_frames = codes_a.shape[1:]
    wrong = [i for i in codebooks if not 0 <= i < n]
    if wrong:
        raise ValueError(f"codebooks={wrong[0]}: the codec has {n} codebooks; give 0 to {n - 1}")
    frames = (torch.arange(n_frames, device=codes_b.device) + 0.5) * codes_b.shape[2] / n_frames
    codes = codes_a.clone()
    codes[:, codebooks] = codes_b[:, codebooks][..., frames.long()]
    return codes


# ---- the command --------------------------------------------------------------------------------------------


def add_command(commands: argparse._SubParsersAction) -> None:
    """`codec probe`."""
    about = "What each group of codebooks carries, read by small probes; or --swap the prosody of two recordings."
    command = commands.add_parser("probe", help=about, description=about)
    command.add_argument("checkpoint", help="a run, checkpoint or pretrained folder, or a hub id")
    command.add_argument("manifest", nargs="?", help="manifest.jsonl")
    command.add_argument("--words", type=Path, help="words file (.jsonl or .ctm): read characters too")
    command.add_argument("--unit", choices=("character", "word"), default="character",
                         help="what a class is; word for alignments of phones (default character)")  # fmt: skip
    command.add_argument("--train_split", default="train", help="probes learn from it (default train)")
    command.add_argument("--test_split", default="test", help="and are judged on it: other speakers (default test)")
    command.add_argument("--max_utterances", type=int, default=400, help="of a split, drawn at random (default 400)")
    command.add_argument("--out", type=Path, help="JSON file for the figures")
    command.add_argument("--swap", nargs=3, metavar=("A", "B", "OUT"), help="audio files: A with the prosody of B")
    command.add_argument("--codebooks", nargs="+", type=int, help="those that --swap takes from B (default the prosodic ones)")
    command.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    command.add_argument("--which", choices=("latest", "best"), default="latest", help="checkpoint of a run")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """What each codebook carries, or the swap of some."""
    if bool(options.manifest) == bool(options.swap):
        raise ValueError("codec probe: expected either a manifest or --swap A B OUT")
    codec = Codec.from_pretrained(options.checkpoint, options.which)
    try:
        codec.to(options.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {options.device}: {str(error).splitlines()[0]}; try cpu") from None
    (_swap_files if options.swap else _probe_manifest)(codec, options)


def _probe_manifest(codec: Codec, options: argparse.Namespace) -> None:
    """Table on stdout, figures to --out."""
    if options.train_split == options.test_split:
        raise ValueError(f"--train_split {options.train_split} is the --test_split too; figures need speakers not heard")
    train, test = (_draw(options, split, codec.sample_rate) for split in (options.train_split, options.test_split))
    result = probe(codec, train, test, read_words(options.words) if options.words else None, options.unit)
    for split in ("train", "test"):
        left_out, silent = result[split]["unreadable"], result[split]["untranscribed"] if options.words else 0
        if left_out or silent:
            print(f"probe: {split}: {left_out} unreadable or too short, {silent} without a fitting transcript", file=sys.stderr)
    if result["n_shared_speakers"]:
        print(f"probe: {result['n_shared_speakers']} test speakers are in the training split too", file=sys.stderr)
    if options.out:
        write_atomically(options.out, json.dumps({"checkpoint": str(options.checkpoint), **result}, indent=1) + "\n")
    print(table(result))


def _draw(options: argparse.Namespace, split: str, sample_rate: int) -> list[Utterance]:
    """Up to --max_utterances of a split."""
    utterances = read_manifest(options.manifest, split, sample_rate)
    if not utterances or options.max_utterances < 1:
        raise ValueError(f"{options.manifest}: {len(utterances)} utterances in split {split}, --max_utterances "
                         f"{options.max_utterances}; expected 1 or more of both")  # fmt: skip
    return random.Random(0).sample(utterances, min(options.max_utterances, len(utterances)))


@torch.no_grad()
def _swap_files(codec: Codec, options: argparse.Namespace) -> None:
    """A's codes with some of B's, decoded."""
    config, (path_a, path_b, path_out) = codec.config.quantizer, options.swap
    prosodic = range(config.n_semantic, config.n_first) if config.type == "ema" else range(0)
    codebooks = options.codebooks or list(prosodic)
    if not codebooks:
        raise ValueError(f"{options.checkpoint}: no prosodic codebooks to swap; name some: --codebooks 1")
    wavs = [load_audio(path, codec.sample_rate) for path in (path_a, path_b)]
    wavs = [wav[None].to(options.device) for wav in wavs]
    codes = swap(*(codec.encode_long(codec.gain(wav) * wav) for wav in wavs), codebooks)
    wav_hat = codec.decode_long(codes, wavs[0].shape[-1]) / codec.gain(wavs[0])
    save_audio(path_out, wav_hat[0], codec.sample_rate)
    print(f"{path_out}: {path_a} with codebooks {', '.join(map(str, codebooks))} of {path_b}")
