"""The recordings that an evaluation judges: chosen from a manifest, checked, with what was said where that is known."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile as sf

from codec.data import read_entries
from codec.judges import Clip
from codec.words import find_transcript, get_value, read_objects

MIN_SECONDS = 0.5  # shorter than this PESQ and STOI find nothing to judge


class Recording(NamedTuple):
    clip: Clip  # name, text, language
    path: Path
    speaker: str
    seconds: float
    key: str  # changes with the file: names what is cached of it


class Recordings(NamedTuple):
    recordings: list[Recording]  # in order of their names
    sample_rate: int  # Hz, of all of them
    split: str
    skipped: list[dict[str, str]]  # "file", "why"
    notes: list[str]  # what a reader must know about them


def read_test_set(
    manifest: str | Path,
    split: str = "",
    n_files: int = 0,
    seed: int = 0,
    transcripts: str | None = None,
    language: str | None = None,
) -> Recordings:
    """Recordings of one split of a manifest.

    Args:
        manifest: as `prepare_speaker_data.py` writes it; a line may also name its "language".
        split: default: the first of test, val and train that has recordings.
        n_files: a seeded choice of so many; 0: all.
        transcripts: JSONL of {"path", "text"[, "language"]}.
        language: of all recordings; default: that of the transcripts, then of the manifest, then unknown.
    Raises:
        ValueError: no such manifest, several sample rates, or nothing left to judge.
    """
    lines = list(read_entries(manifest))
    found = {entry["split"] for entry in lines}
    split = split or next((name for name in ("test", "val", "train") if name in found), "test")
    entries = sorted((entry for entry in lines if entry["split"] == split), key=lambda entry: entry["path"])
    rates = sorted({entry["sample_rate"] for entry in entries})
    if not entries:
        raise ValueError(f"{manifest}: no recordings of split {split!r}; it has {', '.join(sorted(found)) or 'none at all'}")
    if len(rates) > 1:
        raise ValueError(f"{manifest}: sample rates {rates} in split {split!r}, expected one; prepare the data again")
    chosen = random.Random(seed).sample(entries, min(n_files or len(entries), len(entries)))
    texts = _read_texts(transcripts) if transcripts else {}
    recordings, skipped = [], []
    for entry in sorted(chosen, key=lambda entry: entry["path"]):
        path = Path(manifest).parent / entry["path"]
        why = _why_not(path, rates[0])
        if why:
            skipped.append({"file": entry["path"], "why": why})
            continue
        text, spoken = find_transcript(texts, entry["path"]) or (None, None)
        clip = Clip(entry["path"], text, language or spoken or entry.get("language"))
        recordings.append(Recording(clip, path, entry["speaker"], sf.info(path).duration, _key(path)))
    if not recordings:
        raise ValueError(f"{manifest}: none of {len(chosen)} recordings can be judged; the first: {skipped[0]['why']}")
    known = {entry["speaker"] for entry in lines if entry["split"] == "train"}
    return Recordings(recordings, rates[0], split, skipped, _notes(recordings, split, known))


def _notes(recordings: list[Recording], split: str, trained_on: set[str]) -> list[str]:
    """How held out these recordings are, by the manifest; it may not be the one the model was trained on."""
    if split == "train":
        return ["training used these recordings: the manifest has no others"]
    speakers = {recording.speaker for recording in recordings}
    n, heard = len(speakers), len(speakers & trained_on) or "none"
    return [f"{n} speaker{'s' * (n != 1)}, of whom training heard {heard} in other recordings"]


def read_wav(path: Path) -> np.ndarray:
    """float32 [T] of a mono file."""
    return sf.read(path, dtype="float32")[0]


def _why_not(path: Path, sample_rate: int) -> str:
    """Why a file cannot be judged; "" where it can."""
    if not path.is_file():
        return f"{path}: missing"
    try:
        info = sf.info(path)
    except sf.LibsndfileError as error:
        return f"{path}: not readable ({error.error_string})"
    if info.samplerate != sample_rate or info.channels != 1:
        return f"{path}: {info.samplerate} Hz, {info.channels} channels, the manifest says {sample_rate} Hz, mono"
    if info.duration < MIN_SECONDS:
        return f"{path}: {info.duration:.2f} s, shorter than {MIN_SECONDS} s"
    try:
        return "" if np.isfinite(read_wav(path)).all() else f"{path}: holds NaN or infinity"
    except sf.LibsndfileError as error:
        return f"{path}: damaged ({error.error_string})"


def _read_texts(path: str) -> dict[str, tuple[str, str | None]]:
    """(text, language) by name."""
    return {get_value(entry, "path", str, place): (get_value(entry, "text", str, place), entry.get("language"))
            for place, entry in read_objects(Path(path))}  # fmt: skip


def _key(path: Path) -> str:
    """16 hex digits of where a file is and when it was written."""
    stat = path.stat()
    return hashlib.sha256(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:16]
