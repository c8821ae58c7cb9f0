"""Teacher features on disk: one safetensors file an utterance, read by segment as targets at the codec's frame rate.

FOLDER/teacher.json, written last, says what the teacher is; FOLDER/NAME with its suffix replaced by .safetensors holds
the utterance that the manifest calls NAME, with n_samples and sample_rate, those of the manifest, as metadata:

    frames  "features" [N, D] float16: vector j is of the time first_centre_s + j * frame_s (speech encoders)
    tokens  "features" [M, D] float16, "spans" [M, 2] float32 seconds, ordered by start: one a token that lies on a
            word (language models)

An utterance that has no features has an empty file, with the reason as metadata "skipped".
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from codec.data import Utterance
from codec.files import write_atomically
from codec.pretrained import read_json

TEACHER, SUFFIX = "teacher.json", ".safetensors"
KEYS = {"frames": ("dim", "mean", "constant_loss", "frame_s", "first_centre_s"), "tokens": ("dim", "mean", "constant_loss")}
AGAIN = "run `codec features` again"
LARGEST = torch.finfo(torch.float16).max
EDGE = 1e-6  # teacher frames: a point that rounding puts outside is inside
MEAN_UTTERANCES = 500


class Targets(NamedTuple):
    values: Tensor  # [T', D] float32, 0 where there is no target
    mask: Tensor  # [T'] float32, 1 where the frame has a target


class Header(NamedTuple):
    n_rows: int
    dim: int
    metadata: dict[str, str]


# ---- files ------------------------------------------------------------------------------------------------

def feature_path(folder: str | Path, name: str) -> Path:
    """The file of the utterance `name`.

    Raises:
        ValueError: the name leads out of the folder.
    """
    relative = PurePosixPath(name)
    if not relative.name or relative.is_absolute() or ".." in relative.parts:
        raise ValueError(f"{name!r}: leads out of the manifest's folder, expected a path below it, as it names the utterance's "
                         "feature file too; put the manifest above the audio")  # fmt: skip
    return Path(folder) / relative.with_suffix(SUFFIX)


def check_names(utterances: list[Utterance]) -> None:
    """Raises: ValueError: a name leads out of the folder, or two utterances would share one file."""
    counts = Counter(feature_path("", utterance.name) for utterance in utterances)
    path, count = max(counts.items(), key=lambda item: item[1], default=("", 1))
    if count > 1:
        raise ValueError(f"{path}: {count} utterances of the manifest would share this feature file; give the audio files "
                         "names that differ in more than the suffix")  # fmt: skip


def write_frames(folder: str | Path, name: str, features: Tensor, utterance: Utterance, sample_rate: int) -> None:
    """Write what a speech encoder says of an utterance.

    Args:
        features: [N, D]; clipped to what float16 holds.
        sample_rate: Hz, the manifest's.
    Raises:
        ValueError: NaN or infinity inside.
    """
    _write(folder, name, {"features": _half(name, features)}, utterance, sample_rate)


def write_tokens(
    folder: str | Path, name: str, features: Tensor, spans: Tensor, utterance: Utterance, sample_rate: int
) -> None:
    """Write what a language model says of an utterance.

    Args:
        features: [M, D], one vector a token that lies on a word.
        spans: [M, 2] seconds from the start of the utterance; of equal starts the later token counts.
    Raises:
        ValueError: NaN or infinity inside.
    """
    order = torch.argsort(spans[:, 0], stable=True)
    tensors = {"features": _half(name, features)[order], "spans": spans[order].float()}
    _write(folder, name, tensors, utterance, sample_rate)


def write_skipped(
    folder: str | Path, kind: str, dim: int, reason: str, utterance: Utterance, sample_rate: int
) -> None:
    """Write that an utterance has no features, and why."""
    tensors = {"features": torch.empty(0, dim, dtype=torch.float16)}
    if kind == "tokens":
        tensors["spans"] = torch.empty(0, 2)
    _write(folder, utterance.name, tensors, utterance, sample_rate, {"skipped": reason})


def _half(name: str, features: Tensor) -> Tensor:
    """float16 on the CPU; a first token's massive activations may exceed its range."""
    if not features.isfinite().all():
        raise ValueError(f"{name}: the teacher's features hold NaN or infinity")
    return features.float().clamp(-LARGEST, LARGEST).half().cpu()


def _write(
    folder: str | Path, name: str, tensors: dict[str, Tensor], utterance: Utterance, sample_rate: int,
    metadata: dict[str, str] | None = None,
) -> None:  # fmt: skip
    path = feature_path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"n_samples": str(utterance.n_samples), "sample_rate": str(sample_rate), **(metadata or {})}
    write_atomically(path, save({key: value.contiguous() for key, value in tensors.items()}, metadata))


def read_header(path: Path) -> Header:
    """Shape and metadata of a feature file, without its data.

    Raises:
        ValueError: not a whole feature file.
    """
    try:
        with safe_open(path, "pt") as file:
            n_rows, dim = file.get_slice("features").get_shape()
            spans = file.get_slice("spans").get_shape() if "spans" in file.keys() else [n_rows, 2]
            metadata = file.metadata() or {}
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path}: not a whole feature file ({str(error).splitlines()[0]}); remove it and {AGAIN}") from None
    if spans != [n_rows, 2]:
        raise ValueError(f"{path}: {n_rows} features with spans of shape {spans}; remove it and {AGAIN}")
    return Header(n_rows, dim, metadata)


def is_written(folder: str | Path, utterance: Utterance, sample_rate: int) -> bool:
    """True where the utterance's features are there, whole, and made of audio of this length and rate."""
    try:
        metadata = read_header(feature_path(folder, utterance.name)).metadata
    except ValueError:
        return False
    return "skipped" not in metadata and _made_of(metadata) == (utterance.n_samples, sample_rate)


def _made_of(metadata: dict[str, str]) -> tuple[int, int]:
    """n_samples and sample rate of the audio behind a file; (0, 0) where it does not tell."""
    n_samples, sample_rate = metadata.get("n_samples", ""), metadata.get("sample_rate", "")
    return (int(n_samples), int(sample_rate)) if n_samples.isdigit() and sample_rate.isdigit() else (0, 0)


def finish(folder: str | Path, info: dict, names: list[str]) -> float:
    """Write teacher.json, which declares the cache complete.

    Args:
        info: what it shall hold beside mean and constant_loss.
        names: the utterances; at most 500 of them, evenly spaced, make the mean.
    Returns:
        constant_loss, 1 - |mean of the normalised vectors|: the mean 1 - cosine of the best constant prediction.
    Raises:
        ValueError: there is not one feature.
    """
    total, count = torch.zeros(info["dim"], dtype=torch.float64), 0
    spaced = np.linspace(0, len(names) - 1, min(len(names), MEAN_UTTERANCES)).round().astype(int)
    for i in spaced:
        with safe_open(feature_path(folder, names[i]), "pt") as file:
            features = file.get_tensor("features").double()
        total += F.normalize(features, dim=1).sum(0)
        count += len(features)
    if not count:
        raise ValueError(f"{folder}: {len(spaced)} utterances read, none has features; see the reasons for skipping them")
    mean = total / count
    constant_loss = 1 - mean.norm().item()
    info = {**info, "constant_loss": constant_loss, "mean": mean.tolist()}
    write_atomically(Path(folder) / TEACHER, json.dumps(info) + "\n")
    return constant_loss


# ---- pooling ----------------------------------------------------------------------------------------------

def pooling(
    centres_s: np.ndarray, period_s: float, n_rows: int, frame_s: float, first_centre_s: float
) -> tuple[np.ndarray, np.ndarray]:
    """Which teacher frames make a codec frame's target, and with what weights.

    The target is the mean of the teacher over two codec frames around the centre, taken at n = round(2 r) evenly spaced
    points, r being the codec's frame period over the teacher's; where r <= 1 it is the teacher at the centre itself. Between
    its frames the teacher is interpolated linearly, so a linear ramp comes out exactly; half a frame beyond the first and
    the last it is constant; points farther out do not count. From 50 to 12.5 Hz, on a common grid, this is
    avg_pool1d(kernel 8, stride 4, padding 2) without the padding.

    Args:
        centres_s: [T'] centres of the codec's frames, seconds.
        period_s: the codec's frame period.
        n_rows: teacher frames, at least 1; frame j is centred at first_centre_s + j * frame_s.
    Returns:
        teacher frames [T', 2n] int64 and their weights [T', 2n] float32, which sum to 1, or are 0 where no point counts.

    Source: Défossez et al. 2024 (Moshi), 3.3.3, for 50 to 12.5 Hz; the rule for other rates is ours.
    """
    ratio = period_s / frame_s
    n_points = round(2 * ratio) if ratio > 1 + EDGE else 1
    offsets_s = (np.arange(n_points) - (n_points - 1) / 2) * 2 * period_s / n_points
    position = (centres_s[:, None] + offsets_s - first_centre_s) / frame_s  # in teacher frames
    counts = (position >= -0.5 - EDGE) & (position <= n_rows - 0.5 + EDGE)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    position = position.clip(0, n_rows - 1)
    left = position.astype(np.int64)
    weight = share * (position - left)
    index = np.concatenate([left, np.minimum(left + 1, n_rows - 1)], 1)
    return index, np.concatenate([share - weight, weight], 1, dtype=np.float32)


# ---- reading ----------------------------------------------------------------------------------------------

class FeatureStore:
    """The features of one teacher, read by segment.

    Attributes:
        kind: "frames" or "tokens".
        dim: D.
        mean: [D], mean of the L2-normalised vectors.
        constant_loss: mean 1 - cosine of the best constant prediction: what a distillation loss has to beat.
    """

    def __init__(self, folder: str | Path):
        """Raises: ValueError: no teacher.json, or not as `codec features` writes it."""
        self.folder = Path(folder)
        info = _read_info(self.folder / TEACHER)
        self.kind, self.dim, self.constant_loss = info["kind"], info["dim"], info["constant_loss"]
        self.frame_s, self.first_centre_s = info.get("frame_s"), info.get("first_centre_s")
        self.mean = torch.tensor(info["mean"], dtype=torch.float32)
        self.broken: set[str] = set()  # utterances warned of

    def check(self, utterances: list[Utterance], sample_rate: int) -> int:
        """Compare the files with a manifest, by their headers.

        Args:
            utterances: those to train on.
            sample_rate: Hz, the manifest's.
        Returns:
            number of utterances without any target, which the teacher skipped.
        Raises:
            ValueError: files are missing, or one is broken, of other audio, or of another teacher.
        """
        check_names(utterances)
        missing = [u.name for u in utterances if not feature_path(self.folder, u.name).is_file()]
        if missing:
            raise ValueError(f"{self.folder}: {len(missing)} of {len(utterances)} utterances have no features, the first is "
                             f"{missing[0]}; {AGAIN} with this manifest")  # fmt: skip
        return sum(self._check_file(utterance, sample_rate) == 0 for utterance in utterances)

    def _check_file(self, utterance: Utterance, sample_rate: int) -> int:
        """Number of features of an utterance, when its file fits."""
        header = read_header(feature_path(self.folder, utterance.name))
        where, mend = f"{self.folder}: {utterance.name}", f"remove its file and {AGAIN}"
        expected = (utterance.n_samples, sample_rate)
        if _made_of(header.metadata) != expected:
            raise ValueError(f"{where}: features of {_made_of(header.metadata)} (samples, Hz), the manifest says {expected}; "
                             f"shifted or of another rate; {mend}")  # fmt: skip
        if header.dim != self.dim:
            raise ValueError(f"{where}: features of width {header.dim}, {TEACHER} says {self.dim}; {mend}")
        duration_s = utterance.n_samples / sample_rate
        if self.kind == "tokens" or "skipped" in header.metadata:
            return header.n_rows
        # The last frames that a convolution without padding lacks, or the one that padding adds.
        if abs(header.n_rows * self.frame_s - duration_s) > 2 * self.frame_s:
            raise ValueError(f"{where}: {header.n_rows} frames of {self.frame_s} s, the audio is {duration_s:.2f} s long: "
                             f"truncated or of another teacher; {mend}")  # fmt: skip
        return header.n_rows

    def targets(
        self, utterance: Utterance, start_sample: int, n_frames: int, hop_length: int, sample_rate: int
    ) -> Targets:
        """Targets of the codec's frames of one segment; frame i is centred at start_sample + (i + 0.5) * hop_length.

        A frame has a target where its centre lies inside the utterance and, of kind "frames", a point of its window
        inside the teacher's frames (see `pooling`), of kind "tokens", its centre inside a token's span, start included,
        end not; of several the last.

        Args:
            start_sample: first sample of the segment in the utterance's file, at `sample_rate`.
            n_frames: T'; frames past the end of the utterance have mask 0.
        Returns:
            Targets. Where the file cannot be read the mask is 0 and a warning, one a file, says why: one broken file
            must not end a run of days.
        """
        position = start_sample + (np.arange(n_frames) + 0.5) * hop_length
        targets = Targets(torch.zeros(n_frames, self.dim), torch.zeros(n_frames))
        try:
            with safe_open(feature_path(self.folder, utterance.name), "pt") as file:
                if file.get_slice("features").get_shape()[0]:
                    read = self._pooled if self.kind == "frames" else self._token_under
                    targets = read(file, position / sample_rate, hop_length / sample_rate)
        except (OSError, ValueError, SafetensorError) as error:
            if utterance.name not in self.broken:
                self.broken.add(utterance.name)
                warnings.warn(f"{self.folder}: {utterance.name}: {error}; no targets in its place", stacklevel=2)
        mask = targets.mask * torch.from_numpy(position < utterance.n_samples)
        return Targets(targets.values * mask[:, None], mask)

    def _pooled(self, file: safe_open, centres_s: np.ndarray, period_s: float) -> Targets:
        """Targets of kind "frames"; only the rows of the segment are read."""
        features = file.get_slice("features")
        index, weights = pooling(centres_s, period_s, features.get_shape()[0], self.frame_s, self.first_centre_s)
        first = int(index.min())
        rows = features[first : int(index.max()) + 1].float()
        weights = torch.from_numpy(weights)
        values = F.embedding_bag(torch.from_numpy(index - first), rows, mode="sum", per_sample_weights=weights)
        return Targets(values, (weights.sum(1) > 0.5).float())

    def _token_under(self, file: safe_open, centres_s: np.ndarray, period_s: float) -> Targets:
        """Targets of kind "tokens"; only the rows of the segment are read."""
        starts, ends = file.get_tensor("spans").numpy().T
        centres_s = centres_s.astype(np.float32)  # as the spans, so that a centre on an edge is on it
        # A few tokens overlap a segment: every frame against every one of them is quick.
        near = np.flatnonzero((starts <= centres_s[-1]) & (ends > centres_s[0]))
        if not len(near):
            return Targets(torch.zeros(len(centres_s), self.dim), torch.zeros(len(centres_s)))
        under = (starts[near] <= centres_s[:, None]) & (centres_s[:, None] < ends[near])
        last = near[len(near) - 1 - under[:, ::-1].argmax(1)]
        rows = file.get_slice("features")[int(near[0]) : int(near[-1]) + 1].float()
        return Targets(rows[torch.from_numpy(last - near[0])], torch.from_numpy(under.any(1)).float())


def _read_info(path: Path) -> dict:
    """teacher.json, checked."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file, so there are no features or they are not complete; {AGAIN}")
    info = read_json(path)
    if info.get("kind") not in KEYS:
        raise ValueError(f"{path}: kind={info.get('kind')!r}, expected {' or '.join(KEYS)}; {AGAIN}")
    for key in KEYS[info["kind"]]:
        kind = {"dim": int, "mean": list}.get(key, (int, float))
        if not isinstance(info.get(key), kind):
            raise ValueError(f"{path}: {key}={info.get(key)!r}, expected {'a list' if kind is list else 'a number'}; {AGAIN}")
    if len(info["mean"]) != info["dim"] or info.get("frame_s", 1) <= 0:
        raise ValueError(f"{path}: dim={info['dim']} with a mean of {len(info['mean'])} numbers, "
                         f"frame_s={info.get('frame_s')}; {AGAIN}")  # fmt: skip
    return info
