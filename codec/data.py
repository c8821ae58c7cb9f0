"""Training data: random segments of a manifest's utterances, read by seeking.

Segment number `index` is a pure function of (seed, index). Update `step` of a run takes the segments
[step * batch_size, (step + 1) * batch_size), split over the ranks in order. So the data of a run depend on
neither the number of ranks nor on where it was resumed, and there is no loader state to save.
"""

import json
import math
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from codec.audio import read_segment

REQUIRED_KEYS = {"path": str, "speaker": str, "split": str, "sample_rate": int, "n_samples": int}


class Utterance(NamedTuple):
    path: Path
    speaker: str
    n_samples: int
    name: str = ""  # path as the manifest has it: the key of features and words


def read_manifest(manifest: str | Path, split: str, sample_rate: int) -> list[Utterance]:
    """The utterances of one split, in the file's order; may be empty.

    Args:
        manifest: JSONL as `prepare_speaker_data.py` writes it; relative paths are relative to its folder.
        split: "train", "val" or "test".
        sample_rate: Hz that every line must have.
    Raises:
        ValueError: no such file, a line that is not as expected, another sample rate, a missing audio file.
    """
    manifest = Path(manifest)
    utterances = []
    for number, entry in enumerate(read_entries(manifest), 1):
        if entry["sample_rate"] != sample_rate:
            raise ValueError(f"{manifest}:{number}: sample_rate={entry['sample_rate']}, the model's is {sample_rate}; "
                             f"prepare the data with --sample_rate {sample_rate}")  # fmt: skip
        if entry["split"] == split and entry["n_samples"] > 0:
            path = manifest.parent / entry["path"]
            utterances.append(Utterance(path, entry["speaker"], entry["n_samples"], entry["path"]))
    missing = [utterance.path for utterance in utterances if not utterance.path.is_file()]
    if missing:
        raise ValueError(f"{manifest}: {len(missing)} of {len(utterances)} audio files are missing, the first is "
                         f"{missing[0]}; move them back or prepare again")  # fmt: skip
    return utterances


def read_entries(manifest: str | Path) -> Iterator[dict]:
    """The objects of a manifest, line by line, each with REQUIRED_KEYS.

    Raises:
        ValueError: no such file, or a line that is not as expected.
    """
    if not Path(manifest).is_file():
        raise ValueError(f"{manifest}: no such manifest; make one with prepare_speaker_data.py DATA_DIR OUT_DIR")
    with open(manifest, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            yield _parse_line(line, f"{manifest}:{number}")


def _parse_line(line: str, where: str) -> dict:
    try:
        entry = json.loads(line)
    except ValueError:
        raise ValueError(f"{where}: not a JSON object; prepare the data again") from None
    absent = [key for key in REQUIRED_KEYS if not isinstance(entry, dict) or key not in entry]
    if absent:
        raise ValueError(f"{where}: lacks {', '.join(absent)}; prepare the data again")
    for key, kind in REQUIRED_KEYS.items():
        if not isinstance(entry[key], kind):
            raise ValueError(f"{where}: {key}={entry[key]!r}, expected {kind.__name__}; prepare the data again")
    return entry


class SegmentDataset(Dataset):
    """Segments of fixed length, [1, S] float32, by number.

    A segment's utterance is drawn in proportion to its length, its start uniformly, so that a second of a long
    recording is as likely as a second of a short one. Speaker-balanced: first the speaker, uniformly, then as
    before. An utterance shorter than the segment is padded with zeros at its end.

    With `speeds`, each segment is resampled to play at one of them, drawn uniformly: pitch and formants move with it, so
    that few speakers pass for more (speed perturbation, Ko et al. 2015).
    """

    def __init__(
        self, utterances: list[Utterance], segment_samples: int, seed: int, speaker_balanced: bool = False,
        speeds: tuple[float, ...] = (),
    ):  # fmt: skip
        if not utterances:
            raise ValueError("data: no utterances to draw segments from; the manifest has none of this split")
        self.utterances, self.segment_samples, self.seed = utterances, segment_samples, seed
        self.speeds = speeds or (1.0,)
        groups: dict[str, list[Utterance]] = {}
        for utterance in utterances:
            groups.setdefault(utterance.speaker if speaker_balanced else "", []).append(utterance)
        self.groups = [groups[name] for name in sorted(groups)]
        self.ends = [np.cumsum([u.n_samples for u in group]) for group in self.groups]

    def position(self, index: int) -> tuple[Utterance, int, float]:
        """Utterance, first sample and speed of segment `index`."""
        rng = np.random.default_rng((self.seed, index))
        group = rng.integers(len(self.groups)) if len(self.groups) > 1 else 0
        utterance = self.groups[group][
            np.searchsorted(self.ends[group], rng.integers(self.ends[group][-1]), side="right")
        ]
        speed = self.speeds[rng.integers(len(self.speeds))] if len(self.speeds) > 1 else self.speeds[0]
        return utterance, int(rng.integers(max(utterance.n_samples - self._span(speed), 0) + 1)), speed

    def _span(self, speed: float) -> int:
        """Recorded samples that a segment takes."""
        return math.ceil(self.segment_samples * speed)

    def __getitem__(self, index: int) -> Tensor:
        utterance, start, speed = self.position(index)
        n_samples = min(self._span(speed), utterance.n_samples)
        try:
            wav = read_segment(utterance.path, start, n_samples)
        except ValueError as error:  # one bad file must not end a run of days; silence keeps the order of the data
            warnings.warn(f"{error}; silence in its place", stacklevel=2)
            return torch.zeros(1, self.segment_samples)
        if len(wav) < n_samples:
            warnings.warn(f"{utterance.path}: {start + len(wav)} samples, the manifest says {utterance.n_samples}; "
                          "padded with silence", stacklevel=2)  # fmt: skip
        sound = torch.from_numpy(wav)
        if speed != 1:  # not by NumPy's BLAS, whose threads beside torch's made an update 1.6 times as long
            from torchaudio.functional import resample

            sound = resample(sound, round(100 * speed), 100)[: self.segment_samples]
        segment = torch.zeros(1, self.segment_samples)
        segment[0, : len(sound)] = sound
        return segment


class StepSampler(Sampler[list[int]]):
    """The segment numbers of this rank, one list an update, from `first_step` to `last_step` (exclusive)."""

    def __init__(self, first_step: int, last_step: int, batch_size: int, rank: int, world_size: int):
        if batch_size % world_size:
            raise ValueError(f"data.batch_size={batch_size} does not divide among {world_size} processes; "
                             f"try {batch_size // world_size * world_size or world_size}")  # fmt: skip
        self.steps = range(first_step, last_step)
        self.batch_size, self.share, self.rank = batch_size, batch_size // world_size, rank

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            first = step * self.batch_size + self.rank * self.share
            yield list(range(first, first + self.share))


def segment_loader(dataset: Dataset, sampler: StepSampler, n_workers: int, pin_memory: bool) -> DataLoader:
    """Batches of the dataset's items in the sampler's order."""
    return DataLoader(dataset, batch_sampler=sampler, num_workers=n_workers, pin_memory=pin_memory,
                      prefetch_factor=4 if n_workers else None, worker_init_fn=_leave_signals_to_main)  # fmt: skip


def _leave_signals_to_main(worker_id: int) -> None:
    """Ctrl-C and SIGTERM reach the whole process group; the main process finishes its update, saves, and ends us."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
