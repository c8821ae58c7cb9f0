"""Turns a folder of recordings into utterances, a manifest and statistics.

    python prepare_speaker_data.py DATA_DIR OUT_DIR

Each recording is decoded twice, in blocks: once to measure it, once to cut it. What was learnt goes to
OUT_DIR/parts/<id>.json when the recording is finished, so a second run continues an interrupted one. The
merge reads all parts, drops duplicates, splits, balances, and writes manifest.jsonl and stats.json.
"""

from __future__ import annotations

import os

# One recording is one process; set before NumPy loads, and inherited by the workers.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import csv
import hashlib
import json
import math
import multiprocessing
import re
import shutil
import signal
import statistics
import sys
import wave
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from codec.audio import (
    AUDIO_EXTENSIONS,
    StreamResampler,
    needs_ffmpeg,
    probe,
    read_blocks,
    rms,
    rms_db,
    to_int16,
    to_mono,
    true_peak,
)
from codec.files import write_atomically

SPLITS = ("train", "val", "test")
FRAMES_PER_S = 100  # of the level curve that decides where to cut
BLOCK_FRAMES = 500  # read at a time
SMOOTH_FRAMES = 5
MIN_SOUND_FRAMES = 8  # a shorter sound between two pauses is a click
PAUSE_FRAMES = 20  # shorter gaps are stop consonants and breaths inside a phrase
LONG_PAUSE_FRAMES = 50  # cut here,
LONGEST_PAUSE_FRAMES = 100  # unless a phrase is too short by itself and the next is nearer than this
MARGIN_FRAMES = 10  # silence kept on both sides of an utterance
DIGITAL_SILENCE_DB = -90.0
SILENT_RECORDING_DB = -60.0  # level of the loudest frames
MIN_DYNAMIC_RANGE_DB = 8.0  # below it the recording has no pauses to be told from its noise
TRUE_PEAK_CEILING_DB = -1.0
CLIPPED_LEVEL = 0.999
CLIPPED_SHARE = 1e-4  # of the samples, in runs of three or more at full scale
DC_SHIFT = 1e-3  # of full scale, and
DC_SHIFT_OF_RMS = 0.05
SPLIT_BY_SPEAKER_FROM = 10  # speakers; fewer are split by recording


@dataclass(frozen=True)
class Settings:
    """What decides the contents of a part; a part made with other settings is made again."""
    sample_rate: int
    target_db: float
    min_s: float
    max_s: float
    version: int = 1


class Recording(NamedTuple):
    path: Path
    source: str  # relative to DATA_DIR
    speaker: str
    split: str  # "" where the metadata does not say
    size: int
    mtime_ns: int


class Measurement(NamedTuple):
    seconds: float
    sample_rate: int
    channels: int
    content_hash: str
    mean: float
    rms: float
    clipped_share: float
    frame_samples: int
    frame_power: np.ndarray  # [F], without the frame's own mean


# ---- which recordings -------------------------------------------------------------------------------------

def find_recordings(data_dir: Path, metadata: Path | None) -> tuple[list[Recording], dict[str, str]]:
    """All audio under a folder, sorted by path.

    Args:
        data_dir: the speaker is the first folder under it, "default" for files directly inside.
        metadata: .csv or .tsv with the header path,speaker[,split]; only the files it lists are used.
    Returns:
        Recordings, and {source: reason} for those left out.
    Raises:
        ValueError: no audio, or the metadata is malformed.
    """
    if not data_dir.is_dir():
        raise ValueError(f"{data_dir}: no such folder; pass the folder that holds the recordings")
    paths = {
        (Path(folder) / name).relative_to(data_dir).as_posix(): Path(folder) / name
        for folder, _, names in os.walk(data_dir, followlinks=True) for name in names
        if Path(name).suffix.lower() in AUDIO_EXTENSIONS and not name.startswith(".")
    }
    if not paths:
        raise ValueError(f"{data_dir}: no audio at any depth; expected {' '.join(AUDIO_EXTENSIONS)}")
    rows = read_metadata(metadata) if metadata else {
        source: (source.split("/")[0] if "/" in source else "default", "") for source in paths
    }
    left_out = {source: "in the metadata, but missing" for source in rows if source not in paths}
    left_out |= {source: "not in the metadata" for source in paths if source not in rows}
    recordings = []
    for source in sorted(paths.keys() & rows.keys()):
        if source.encode(errors="ignore").decode() != source:
            left_out[source.encode(errors="replace").decode()] = "its name is not UTF-8; rename it"
            continue
        try:
            stat = paths[source].stat()
        except OSError as error:
            left_out[source] = f"unreadable: {error.strerror}"
            continue
        recordings.append(Recording(paths[source], source, *rows[source], stat.st_size, stat.st_mtime_ns))
    return recordings, left_out


def read_metadata(path: Path) -> dict[str, tuple[str, str]]:
    """{source: (speaker, split or "")} from a .csv or .tsv file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read the metadata: {error}") from None
    reader = csv.DictReader(text.splitlines(), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    if not {"path", "speaker"} <= set(reader.fieldnames or []):
        raise ValueError(f"{path}: header is {reader.fieldnames}, expected path,speaker[,split]; "
                         "name a tab-separated file .tsv")
    rows = {}
    for line, row in enumerate(reader, start=2):
        source, speaker, split = row["path"], row["speaker"], row.get("split") or ""
        if not source or not speaker or split not in ("", *SPLITS):
            raise ValueError(f"{path}: line {line} is {list(row.values())}, expected a path, a speaker and a "
                             "split of train, val, test or nothing")
        rows[Path(source).as_posix()] = (speaker, split)
    return rows


# ---- one recording ----------------------------------------------------------------------------------------

def measure(path: Path) -> Measurement:
    """First pass: hash, level, clipping, DC and the power of each 10 ms frame."""
    info = probe(path)
    frame_samples = round(info.sample_rate / FRAMES_PER_S)
    content_hash = hashlib.sha1(str(info.sample_rate).encode())
    total, total_square, n_samples, n_clipped, powers = 0.0, 0.0, 0, 0, []
    for block in read_blocks(path, BLOCK_FRAMES * frame_samples):
        wav = to_mono(block)
        content_hash.update(np.ascontiguousarray(wav))
        n_clipped += count_clipped(block)
        n_samples += len(wav)
        total += float(wav.sum(dtype=np.float64))
        total_square += float(np.dot(wav, wav))
        frames = wav[:len(wav) - len(wav) % frame_samples].reshape(-1, frame_samples)
        frames = frames - frames.mean(axis=1, keepdims=True)
        powers.append(np.einsum("fn,fn->f", frames, frames) / frame_samples)
    mean = total / n_samples
    return Measurement(
        n_samples / info.sample_rate, info.sample_rate, info.channels, content_hash.hexdigest(), mean,
        math.sqrt(max(0.0, total_square / n_samples - mean**2)), n_clipped / n_samples, frame_samples,
        np.concatenate(powers),
    )


def count_clipped(block: np.ndarray) -> int:
    """Samples [n, channels] that begin three in a row at full scale, in any channel."""
    if max(block.max(), -block.min()) < CLIPPED_LEVEL:
        return 0
    full = (np.abs(block) >= CLIPPED_LEVEL).any(axis=1)
    return int(np.count_nonzero(full[2:] & full[1:-1] & full[:-2]))


def cut(recording: Recording, measured: Measurement, spans: np.ndarray, out_dir: Path, settings: Settings
        ) -> list[dict]:
    """Second pass: resample, and write each span of frames as one normalised WAV.

    Returns:
        Per utterance {path, start_s, n_samples, rms_db, source_db, peak_limited}.
    """
    folder, stem = wav_folder(recording), wav_stem(recording)
    (out_dir / folder).mkdir(parents=True, exist_ok=True)
    for leftover in (out_dir / folder).glob(f"{stem}_*.wav"):
        leftover.unlink()
    # Frames are counted at the recording's own rate: 10 ms is not a whole number of samples at every rate.
    frame_s = measured.frame_samples / measured.sample_rate
    todo = [(start * frame_s, end * frame_s) for start, end in spans.tolist()]
    utterances, buffer, buffer_start = [], np.zeros(0, np.float32), 0
    for block in resampled_blocks(recording.path, measured, settings.sample_rate):
        buffer = np.concatenate([buffer, block])
        while todo and buffer_start + len(buffer) >= round(todo[0][1] * settings.sample_rate):
            start_s, end_s = todo.pop(0)
            start, end = (round(s * settings.sample_rate) - buffer_start for s in (start_s, end_s))
            path = f"{folder}/{stem}_{round(start_s * 1000):08d}.wav"
            facts = write_utterance(out_dir / path, buffer[start:end] - np.float32(measured.mean), settings)
            utterances.append({"path": path, "start_s": round(start_s, 3), **facts})
        keep_from = round(todo[0][0] * settings.sample_rate) if todo else buffer_start + len(buffer)
        n_drop = min(max(0, keep_from - buffer_start), len(buffer))
        buffer, buffer_start = buffer[n_drop:], buffer_start + n_drop
        if not todo:
            break
    return utterances


def resampled_blocks(path: Path, measured: Measurement, sample_rate: int):
    """Mono float32 blocks of the whole recording at `sample_rate`."""
    resampler = StreamResampler(measured.sample_rate, sample_rate)
    for block in read_blocks(path, BLOCK_FRAMES * measured.frame_samples):
        yield resampler.push(to_mono(block))
    yield resampler.finish()


def write_utterance(path: Path, wav: np.ndarray, settings: Settings) -> dict:
    """RMS to the target unless the true peak would pass the ceiling; never louder than either."""
    gain = 10 ** (settings.target_db / 20) / max(rms(wav), 1e-9)
    highest_gain = 10 ** (TRUE_PEAK_CEILING_DB / 20) / max(true_peak(wav), 1e-9)
    samples = to_int16(wav * np.float32(min(gain, highest_gain)))
    with wave.open(str(path), "wb") as file:  # libsndfile would wait for the disk at each close
        file.setparams((1, 2, settings.sample_rate, len(samples), "NONE", ""))
        file.writeframes(samples.astype("<i2").tobytes())
    return {
        "n_samples": len(samples), "rms_db": round(rms_db(samples / 32768), 2),
        "source_db": round(rms_db(wav), 2), "peak_limited": highest_gain < gain,
    }


def prepare_recording(recording: Recording, out_dir: Path, settings: Settings) -> None:
    """Measure, cut, write the part, which also tells why a recording was skipped."""
    part = identity(recording, settings) | {"skipped": "", "utterances": []}
    try:
        measured = measure(recording.path)
        if measured.seconds < settings.min_s:
            raise ValueError("shorter than min_s")
        spans, short = find_utterances(
            measured.frame_power, round(settings.min_s * FRAMES_PER_S), round(settings.max_s * FRAMES_PER_S)
        )
        part |= describe(measured, short)
        if len(spans):
            part["utterances"] = cut(recording, measured, spans, out_dir, settings)
        else:
            part["skipped"] = "shorter than min_s" if len(short) else "silent"
    except ValueError as error:
        part["skipped"] = str(error).removeprefix(f"{recording.path}: ")
        part["wants_ffmpeg"] = needs_ffmpeg(recording.path) and shutil.which("ffmpeg") is None
    # No fsync, which would cost more than a short recording: a part lost with the power is made again.
    path = part_path(out_dir, recording)
    path.with_suffix(".tmp").write_text(json.dumps(part, ensure_ascii=False), encoding="utf-8")
    os.replace(path.with_suffix(".tmp"), path)


def describe(measured: Measurement, short: np.ndarray) -> dict:
    """The facts about a recording that the statistics need."""
    dc_shifted = abs(measured.mean) > max(DC_SHIFT, DC_SHIFT_OF_RMS * measured.rms)
    return {
        "seconds": round(measured.seconds, 3),
        "sample_rate": measured.sample_rate,
        "channels": measured.channels,
        "content_hash": measured.content_hash,
        "clipped_share": measured.clipped_share if measured.clipped_share > CLIPPED_SHARE else 0.0,
        "dc_offset": round(measured.mean, 5) if dc_shifted else 0.0,
        "n_short": len(short),
        "short_s": round(float((short[:, 1] - short[:, 0]).sum()) / FRAMES_PER_S, 2) if len(short) else 0.0,
    }


def identity(recording: Recording, settings: Settings) -> dict:
    """What must be unchanged for a part to be kept."""
    return {
        "source": recording.source, "speaker": recording.speaker, "size": recording.size,
        "mtime_ns": recording.mtime_ns, "settings": asdict(settings),
    }


def load_part(recording: Recording, out_dir: Path, settings: Settings) -> dict | None:
    """The part of a finished and unchanged recording, else None."""
    try:
        part = json.loads(part_path(out_dir, recording).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = identity(recording, settings).items() <= part.items()
    if not same or (part.get("wants_ffmpeg") and shutil.which("ffmpeg")):
        return None
    return part if all((out_dir / u["path"]).exists() for u in part["utterances"]) else None


def part_path(out_dir: Path, recording: Recording) -> Path:
    return out_dir / "parts" / f"{short_hash(recording.source, 16)}.json"


def wav_folder(recording: Recording) -> str:
    name = safe_name(recording.speaker)
    return f"wav/{name}" if name == recording.speaker else f"wav/{name}-{short_hash(recording.speaker)}"


def wav_stem(recording: Recording) -> str:
    """The hash keeps apart recordings of one name in several folders."""
    return f"{safe_name(Path(recording.source).stem)}-{short_hash(recording.source)}"


def safe_name(name: str) -> str:
    """Letters that every file system takes, at most 60."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:60] or "_"


def short_hash(text: str, length: int = 8) -> str:
    return hashlib.sha1(text.encode()).hexdigest()[:length]


# ---- where to cut -----------------------------------------------------------------------------------------

def find_utterances(frame_power: np.ndarray, min_frames: int, max_frames: int
                    ) -> tuple[np.ndarray, np.ndarray]:
    """Cut a recording at its silences.

    Sounds are separated by pauses of 0.2 s. Pauses of 0.5 s cut, of 1 s next to a phrase that is too short;
    what is still too long is halved at its longest pause, again and again, and where it has none, cut at its
    quietest frame. 100 ms of silence stay on both sides, and more where an utterance would be too short.

    Args:
        frame_power: [F] mean square of each 10 ms frame.
        min_frames: shortest utterance.
        max_frames: longest, at least twice min_frames.
    Returns:
        [N, 2] first frame and end of each utterance, and [M, 2] of the sounds that stay shorter than the
        minimum.
    """
    power = np.convolve(frame_power, np.full(SMOOTH_FRAMES, 1 / SMOOTH_FRAMES), "same")[:len(frame_power)]
    level_db = 10 * np.log10(power + 1e-12)
    starts, ends = runs(level_db > silence_threshold_db(level_db))
    starts, ends = close_gaps(starts, ends, PAUSE_FRAMES)
    sounds = ends - starts >= MIN_SOUND_FRAMES
    starts, ends = starts[sounds], ends[sounds]
    pauses = np.stack([ends[:-1], starts[1:]], axis=1)
    longest = max_frames - 2 * MARGIN_FRAMES
    starts, ends = close_gaps(starts, ends, LONG_PAUSE_FRAMES)
    spans = [
        span for start, end in join_short(starts, ends, min_frames - 2 * MARGIN_FRAMES, longest)
        for span in split_phrase(start, end, pauses, level_db, min_frames, longest)
    ]
    widened = widen(np.array(spans, dtype=np.int64).reshape(-1, 2), len(frame_power), min_frames)
    long_enough = widened[:, 1] - widened[:, 0] >= min_frames
    return widened[long_enough], widened[~long_enough]


def silence_threshold_db(level_db: np.ndarray) -> float:
    """Between the noise floor and the speech level of this recording; infinite if it has no sound."""
    sounding = level_db[level_db > DIGITAL_SILENCE_DB]
    if not sounding.size:
        return math.inf
    noise_db, speech_db = np.percentile(sounding, [5, 95])
    if speech_db < SILENT_RECORDING_DB:
        return math.inf
    if speech_db - noise_db < MIN_DYNAMIC_RANGE_DB:
        return DIGITAL_SILENCE_DB
    return noise_db + max(4.0, 0.3 * (speech_db - noise_db))


def runs(active: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of the stretches of True."""
    edges = np.diff(np.concatenate([[0], active.astype(np.int8), [0]]))
    return np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)


def close_gaps(starts: np.ndarray, ends: np.ndarray, gap: int) -> tuple[np.ndarray, np.ndarray]:
    """Join stretches that are less than `gap` frames apart."""
    if not len(starts):
        return starts, ends
    apart = starts[1:] - ends[:-1] >= gap
    return starts[np.concatenate([[True], apart])], ends[np.concatenate([apart, [True]])]


def join_short(starts: np.ndarray, ends: np.ndarray, min_frames: int, max_frames: int
               ) -> list[tuple[int, int]]:
    """Join a phrase and the next if one of them is too short and the pause between them below the longest."""
    phrases = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        if phrases:
            last_start, last_end = phrases[-1]
            short = min(end - start, last_end - last_start) < min_frames
            if short and start - last_end < LONGEST_PAUSE_FRAMES and end - last_start <= max_frames:
                phrases[-1] = (last_start, end)
                continue
        phrases.append((start, end))
    return phrases


def split_phrase(start: int, end: int, pauses: np.ndarray, level_db: np.ndarray, min_frames: int,
                 max_frames: int) -> list[tuple[int, int]]:
    """Halve at the longest pause that leaves both sides long enough, until nothing is too long."""
    todo, done = [(start, end)], []
    while todo:
        start, end = todo.pop()
        if end - start <= max_frames:
            done.append((start, end))
            continue
        inside = pauses[(pauses[:, 0] >= start + min_frames) & (pauses[:, 1] <= end - min_frames)]
        if len(inside):
            left_end, right_start = inside[np.argmax(inside[:, 1] - inside[:, 0])].tolist()
        else:
            first = start + min_frames
            last = max(first, min(start + max_frames, end - min_frames))
            left_end = right_start = first + int(np.argmin(level_db[first:last + 1]))
        todo += [(right_start, end), (start, left_end)]
    return done


def widen(spans: np.ndarray, n_frames: int, min_frames: int) -> np.ndarray:
    """Add silence on both sides: the margin, or what the minimum wants, at most half of a pause."""
    if not len(spans):
        return spans
    middles = (spans[:-1, 1] + spans[1:, 0]) // 2
    left_room = spans[:, 0] - np.concatenate([[0], middles])
    right_room = np.concatenate([middles, [n_frames]]) - spans[:, 1]
    left, right = np.minimum(left_room, MARGIN_FRAMES), np.minimum(right_room, MARGIN_FRAMES)
    missing = np.maximum(0, min_frames - (spans[:, 1] - spans[:, 0] + left + right))
    more_left = np.minimum(missing // 2, left_room - left)
    more_right = np.minimum(missing - more_left, right_room - right)
    more_left = np.minimum(missing - more_right, left_room - left)
    return np.stack([spans[:, 0] - left - more_left, spans[:, 1] + right + more_right], axis=1)


# ---- the merge --------------------------------------------------------------------------------------------

def drop_duplicates(parts: list[dict]) -> tuple[list[dict], dict[str, str]]:
    """Of recordings with the same samples the first path stays; {dropped source: source that stays}."""
    first, duplicates, kept = {}, {}, []
    for part in parts:
        stays = first.setdefault(part["content_hash"], part["source"])
        if stays == part["source"]:
            kept.append(part)
        else:
            duplicates[part["source"]] = stays
    return kept, duplicates


def assign_splits(parts: list[dict], given: dict[str, str], val: float, test: float, seed: int
                  ) -> tuple[dict[str, str], list[str]]:
    """Split by seconds of speech; a recording, and with 10 speakers or more a speaker, stays on one side.

    Args:
        parts: recordings with utterances.
        given: {source: split} from the metadata; these win. Others of the same speaker follow the first of
            them when the split is by speaker.
        val, test: shares of the seconds.
        seed: of the order in which speakers or recordings are drawn; it depends on nothing else.
    Returns:
        {source: split}, and warnings.
    """
    speakers = {part["speaker"] for part in parts}
    by = "speaker" if len(speakers) >= SPLIT_BY_SPEAKER_FROM else "source"
    units = defaultdict(list)
    for part in parts:
        units[part[by]].append(part)
    seconds = {unit: sum(part_seconds(part) for part in members) for unit, members in units.items()}
    split_of = {}
    for unit, members in units.items():
        if wishes := [given[part["source"]] for part in members if given.get(part["source"])]:
            split_of[unit] = wishes[0]
    warnings = draw_held_out(split_of, seconds, {"test": test, "val": val}, seed)
    by_source = {part["source"]: split_of.get(part[by], "train") for part in parts}
    return by_source | {source: split for source, split in given.items() if split}, warnings


def draw_held_out(split_of: dict[str, str], seconds: dict[str, float], shares: dict[str, float], seed: int
                  ) -> list[str]:
    """Extend {unit: split} in place by the units that are held out; returns warnings."""
    free = sorted(seconds.keys() - split_of.keys(), key=lambda unit: short_hash(f"{seed}:{unit}"))
    total, warnings = sum(seconds.values()), []
    for split in sorted(shares, key=lambda name: name != "val"):  # val first: training cannot do without it
        wanted = shares[split] * total
        got = sum(seconds[unit] for unit, given in split_of.items() if given == split)
        drawn = set()
        for unit in free:
            # draw what brings the share nearer to its size, and leave one for training
            if seconds[unit] < 2 * (wanted - got) and len(free) - len(drawn) > 1:
                got += seconds[unit]
                drawn.add(unit)
        if wanted and not got and len(free) > 1:  # all are far larger than the share: take the smallest
            drawn = {min(free, key=seconds.__getitem__)}
            got = sum(seconds[unit] for unit in drawn)
        split_of |= dict.fromkeys(drawn, split)
        free = [unit for unit in free if unit not in drawn]
        if wanted and not got:
            warnings.append(f"{split} is empty: a recording stays on one side of the split and there "
                            "are too few; add recordings, or cut one into several files")
        elif got > 2 * wanted > 0 or 0 < got < wanted / 2:
            warnings.append(f"{split} has {got / total:.0%} of the speech instead of {shares[split]:.0%}: "
                            "there are few recordings and each stays on one side")
    return warnings


def balance(utterances: list[dict], max_speaker_s: float | None, seed: int
            ) -> tuple[list[dict], dict[str, float]]:
    """Cap the training seconds of each speaker by dropping whole utterances; val and test stay as they are.

    Args:
        utterances: rows of the manifest.
        max_speaker_s: None for the median of the speakers' training seconds.
        seed: decides which utterances go.
    Returns:
        Rows that stay, and {speaker: seconds dropped}.
    """
    by_speaker = by_value([row for row in utterances if row["split"] == "train"], "speaker")
    totals = {speaker: sum(map(row_seconds, rows)) for speaker, rows in by_speaker.items()}
    cap = statistics.median(totals.values()) if max_speaker_s is None and totals else max_speaker_s
    dropped, dropped_s = set(), {}
    for speaker, rows in by_speaker.items():
        left = totals[speaker]
        for row in sorted(rows, key=lambda row: short_hash(f"{seed}:{row['path']}"))[1:]:
            if left <= cap:
                break
            left -= row_seconds(row)
            dropped.add(row["path"])
        if left < totals[speaker]:
            dropped_s[speaker] = round(totals[speaker] - left, 1)
    return [row for row in utterances if row["path"] not in dropped], dropped_s


def part_seconds(part: dict) -> float:
    return sum(u["n_samples"] for u in part["utterances"]) / part["settings"]["sample_rate"]


def row_seconds(row: dict) -> float:
    return row["n_samples"] / row["sample_rate"]


def merge(recordings: list[Recording], left_out: dict[str, str], args: argparse.Namespace, settings: Settings
          ) -> dict:
    """Read all parts; write manifest.jsonl and stats.json; return the statistics.

    Raises:
        ValueError: no recording gave an utterance.
    """
    parts = [load_part(recording, args.out_dir, settings) for recording in recordings]
    skipped = dict(left_out) | {part["source"]: part["skipped"] for part in parts if part["skipped"]}
    usable, duplicates = drop_duplicates([part for part in parts if part["utterances"]])
    if not usable:
        raise ValueError(f"{args.data_dir}: no utterance in {len(recordings) + len(left_out)} files "
                         f"({reasons_text(skipped)})")
    given = {recording.source: recording.split for recording in recordings}
    split_of, warnings = assign_splits(usable, given, args.val, args.test, args.seed)
    rows = [manifest_row(part, utterance, split_of) for part in usable for utterance in part["utterances"]]
    rows, balanced_s = (rows, {}) if args.no_balance else balance(rows, args.max_speaker_s, args.seed)
    rows.sort(key=lambda row: row["path"])
    flags = {name: getattr(args, name) for name in ("val", "test", "seed", "no_balance", "max_speaker_s")}
    stats = {
        **count_rows(rows),
        "splits": {split: count_rows(by_value(rows, "split")[split]) for split in SPLITS},
        "speakers": {name: count_rows(chosen) for name, chosen in sorted(by_value(rows, "speaker").items())},
        "skipped": dict(sorted(skipped.items())),
        "skipped_reasons": dict(reason_counts(skipped)),
        "duplicates": duplicates,
        **recording_facts(usable),
        "level_db": level_histogram([row["rms_db"] for row in rows]),
        "balanced_s": balanced_s,
        "warnings": warnings,
        "settings": asdict(settings) | flags,
    }
    write_atomically(args.out_dir / "stats.json", json.dumps(stats, indent=1, ensure_ascii=False) + "\n")
    write_atomically(args.out_dir / "manifest.jsonl",
                     "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return stats


def recording_facts(parts: list[dict]) -> dict:
    """Statistics that need more than the rows of the manifest."""
    utterances = [utterance for part in parts for utterance in part["utterances"]]
    too_short_s = sum(part["short_s"] for part in parts)
    return {
        "recorded_hours": round(sum(part["seconds"] for part in parts) / 3600, 4),
        "too_short": {"n": sum(part["n_short"] for part in parts), "seconds": round(too_short_s, 1)},
        "clipped": {part["source"]: part["clipped_share"] for part in parts if part["clipped_share"]},
        "dc_shifted": {part["source"]: part["dc_offset"] for part in parts if part["dc_offset"]},
        "n_peak_limited": sum(utterance["peak_limited"] for utterance in utterances),
        "source_level_db": level_histogram([utterance["source_db"] for utterance in utterances]),
    }


def manifest_row(part: dict, utterance: dict, split_of: dict[str, str]) -> dict:
    return {
        "path": utterance["path"], "speaker": part["speaker"], "split": split_of[part["source"]],
        "sample_rate": part["settings"]["sample_rate"], "n_samples": utterance["n_samples"],
        "rms_db": utterance["rms_db"], "source": part["source"], "start_s": utterance["start_s"],
    }


def by_value(rows: list[dict], key: str) -> defaultdict[str, list[dict]]:
    groups = defaultdict(list)
    for row in rows:
        groups[row[key]].append(row)
    return groups


def count_rows(rows: list[dict]) -> dict:
    return {
        "hours": round(sum(map(row_seconds, rows)) / 3600, 4),
        "n_utterances": len(rows),
        "n_recordings": len({row["source"] for row in rows}),
        "n_speakers": len({row["speaker"] for row in rows}),
    }


def level_histogram(levels_db: list[float]) -> dict[str, int]:
    """{"-25..-20": utterances}, in steps of 5 dB."""
    counts = Counter(5 * math.floor(level / 5) for level in levels_db)
    return {f"{low}..{low + 5}": counts[low] for low in sorted(counts)}


def reason_counts(skipped: dict[str, str]) -> list[tuple[str, int]]:
    """Reasons without their particulars, the most frequent first."""
    counts = Counter(re.sub(r"( at sample|[:;(]).*", "", reason).strip() for reason in skipped.values())
    return counts.most_common()


def reasons_text(skipped: dict[str, str]) -> str:
    return "; ".join(f"{count} {reason}" for reason, count in reason_counts(skipped)) or "all silent"


# ---- the command ------------------------------------------------------------------------------------------

def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Flags, checked against one another."""
    parser = argparse.ArgumentParser(description="Cut, level and split recordings for codec training.")
    parser.add_argument("data_dir", type=Path, help="recordings at any depth; first folder = speaker")
    parser.add_argument("out_dir", type=Path, help="receives wav/, parts/, manifest.jsonl and stats.json")
    parser.add_argument("--metadata", type=Path, help=".csv or .tsv with the header path,speaker[,split]")
    parser.add_argument("--sample_rate", type=int, default=24000, help="Hz (24000)")
    parser.add_argument("--target_db", type=float, default=-16.0, help="RMS of an utterance (-16)")
    parser.add_argument("--min_s", type=float, default=1.0, help="shortest utterance (1.0)")
    parser.add_argument("--max_s", type=float, default=20.0, help="longest utterance (20)")
    parser.add_argument("--val", type=float, default=0.05, help="share of the seconds (0.05)")
    parser.add_argument("--test", type=float, default=0.05, help="share of the seconds (0.05)")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the balancing (0)")
    parser.add_argument("--no_balance", action="store_true", help="keep all training seconds")
    parser.add_argument("--max_speaker_s", type=float,
                        help="training seconds a speaker keeps when balancing (the median over speakers)")
    parser.add_argument("--jobs", type=int, default=n_cores(), help="worker processes (the number of cores)")
    parser.add_argument("--shard", default="", help="i/n: only this share of the recordings, and no manifest")
    args = parser.parse_args(argv)
    check_args(args)
    return args


def n_cores() -> int:
    """Cores this process may use: a cluster may grant fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_args(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that do not fit together."""
    shard = re.fullmatch(r"(\d+)/(\d+)", args.shard or "0/1")
    if not shard or int(shard[1]) >= int(shard[2]):
        raise ValueError(f"--shard: got {args.shard}, expected i/n with i from 0 to n-1, such as 0/4")
    args.shard_index, args.n_shards = int(shard[1]), int(shard[2])
    out_dir, data_dir = args.out_dir.resolve(), args.data_dir.resolve()
    if out_dir == data_dir or data_dir in out_dir.parents:
        raise ValueError(f"OUT_DIR: {args.out_dir} lies inside DATA_DIR {args.data_dir}, where its "
                         "utterances would be found as recordings; choose a folder outside")
    if not 0.1 <= args.min_s <= args.max_s / 2:
        raise ValueError(f"--min_s: got {args.min_s:g} with --max_s {args.max_s:g}, expected at least 0.1 "
                         "and at most half of max_s")
    if args.val < 0 or args.test < 0 or args.val + args.test >= 1:
        raise ValueError(f"--val, --test: got {args.val:g} and {args.test:g}, expected shares that leave "
                         "some for training, such as 0.05 each")
    if not 4000 <= args.sample_rate <= 192000:
        raise ValueError(f"--sample_rate: got {args.sample_rate}, expected Hz from 4000 to 192000")
    if not -60 <= args.target_db <= -3:
        raise ValueError(f"--target_db: got {args.target_db:g}, expected dB from -60 to -3")
    if args.jobs < 1:
        raise ValueError(f"--jobs: got {args.jobs}, expected 1 or more")
    if args.max_speaker_s is not None and args.max_speaker_s <= 0:
        raise ValueError(f"--max_speaker_s: got {args.max_speaker_s:g}, expected seconds above 0")


def prepare_all(todo: list[Recording], args: argparse.Namespace, settings: Settings) -> None:
    """Prepare recordings in the given order, in worker processes if there are several jobs."""
    with tqdm(total=len(todo), unit="recording", disable=None) as bar:
        if args.jobs == 1 or len(todo) == 1:
            for recording in todo:
                prepare_recording(recording, args.out_dir, settings)
                bar.update()
            return
        # spawn: a forked copy of a process with threads may deadlock
        with ProcessPoolExecutor(min(args.jobs, len(todo)), multiprocessing.get_context("spawn"),
                                 initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
            try:
                futures = [pool.submit(prepare_recording, item, args.out_dir, settings) for item in todo]
                for future in as_completed(futures):
                    future.result()
                    bar.update()
            except BaseException:  # the workers would go on for the rest of their recordings
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():
                    process.terminate()
                raise


def summary(stats: dict, out_dir: Path) -> str:
    """What a person wants to know at the end."""
    lines = [
        f"{stats['hours']:.2f} h in {stats['n_utterances']} utterances of {stats['n_speakers']} speakers, "
        f"from {stats['n_recordings']} recordings of {stats['recorded_hours']:.2f} h"
    ]
    for split, counts in stats["splits"].items():
        lines.append(f"  {split:5} {counts['hours']:8.2f} h {counts['n_utterances']:7} utterances "
                     f"{counts['n_recordings']:6} recordings {counts['n_speakers']:5} speakers")
    if stats["balanced_s"]:
        lines.append(f"balanced: {sum(stats['balanced_s'].values()) / 3600:.2f} h of "
                     f"{len(stats['balanced_s'])} speakers left out of training; --no_balance keeps them")
    if stats["skipped"]:
        lines.append(f"skipped {len(stats['skipped'])} files: {reasons_text(stats['skipped'])}")
    if stats["too_short"]["n"]:
        lines.append(f"skipped {stats['too_short']['n']} sounds shorter than min_s, together "
                     f"{stats['too_short']['seconds']:g} s")
    for name in ("duplicates", "clipped", "dc_shifted"):
        if stats[name]:
            lines.append(f"{name}: {len(stats[name])} recordings, such as {next(iter(stats[name]))}")
    lines += [f"warning: {warning}" for warning in stats["warnings"]]
    return "\n".join([*lines, f"wrote {out_dir / 'manifest.jsonl'} and {out_dir / 'stats.json'}"])


def run(args: argparse.Namespace) -> None:
    """Prepare what is not done yet, then merge, unless this is a shard."""
    settings = Settings(args.sample_rate, args.target_db, args.min_s, args.max_s)
    recordings, left_out = find_recordings(args.data_dir, args.metadata)
    (args.out_dir / "parts").mkdir(parents=True, exist_ok=True)
    largest_first = sorted(recordings, key=lambda recording: (-recording.size, recording.source))
    share = largest_first[args.shard_index::args.n_shards]
    todo = [recording for recording in share if load_part(recording, args.out_dir, settings) is None]
    print(f"{len(recordings)} recordings; {len(share) - len(todo)} of {len(share)} done before", flush=True)
    if todo:
        prepare_all(todo, args, settings)
    if args.shard:
        print(f"shard {args.shard} is done; after all shards run the same command without --shard")
        return
    print(summary(merge(recordings, left_out, args, settings), args.out_dir))


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for what the user can mend, 130 when interrupted."""
    try:
        run(parse_args(argv))
    except BrokenProcessPool:
        print("prepare_speaker_data: a worker was killed, out of memory perhaps; finished recordings "
              "are kept; run again with fewer --jobs", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"prepare_speaker_data: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: finished recordings are kept; run the same command to continue", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
