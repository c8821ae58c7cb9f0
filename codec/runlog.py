"""A run's log: TensorBoard for eyes and ears, metrics.jsonl for programs."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from codec.files import write_atomically

FLOOR_DB = -80.0
# dark to bright in near-even steps of lightness, so that level reads off in grey too
COLOURS = np.array(
    [(0, 0, 4), (40, 17, 90), (110, 30, 125), (180, 54, 110), (235, 90, 75), (252, 160, 95), (252, 250, 190)],
    np.float32,
)


class RunLog:
    """Writes run_dir/tensorboard/ and run_dir/metrics.jsonl.

    A line of metrics.jsonl is {"step": int, "time": Unix seconds, NAME: number, ...}. NaN and Inf are not
    JSON: such a value is written as null, and the line has "nonfinite": {NAME: "nan" | "inf" | "-inf"}.

    Args:
        run_dir: folder of the run; made if missing.
        resume_step: step of the checkpoint that training goes on from. What was logged after it is dropped,
            so that a resumed run's log equals that of a run that was never stopped. None: a new run.
    Raises:
        ValueError: a new run would write into the log of another.
    """

    def __init__(self, run_dir: str | Path, *, resume_step: int | None = None):
        run_dir = Path(run_dir)
        path = run_dir / "metrics.jsonl"
        if resume_step is not None:
            kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= resume_step]
            run_dir.mkdir(parents=True, exist_ok=True)
            write_atomically(path, "".join(f"{line}\n" for line in kept))
        elif path.exists() and path.stat().st_size > 0:
            raise ValueError(f"{path}: holds another run's log; resume that run or choose another folder")
        run_dir.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a", encoding="utf-8")
        purge_step = None if resume_step is None else resume_step + 1
        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log named numbers of one step.

        Args:
            step: generator updates done.
            values: e.g. {"train/mel_step": 1.2}; "step", "time" and "nonfinite" are taken.
        """
        line: dict = {"step": step, "time": round(time.time(), 3)}
        nonfinite = {}
        for name, value in values.items():
            assert name not in ("step", "time", "nonfinite"), name
            self.writer.add_scalar(name, value, step)
            line[name] = float(value) if math.isfinite(value) else None
            if not math.isfinite(value):
                nonfinite[name] = str(float(value))
        if nonfinite:
            line["nonfinite"] = nonfinite
        self.file.write(json.dumps(line, allow_nan=False) + "\n")
        self.file.flush()

    def audio(self, step: int, tag: str, wav: Tensor, sample_rate: int) -> None:
        """Log wav [1, T] for listening; values beyond [-1, 1] are clipped, non-finite ones silenced."""
        sound = wav.detach().float().cpu().nan_to_num(0.0, 0.0, 0.0).clamp(-1, 1)
        self.writer.add_audio(tag, sound, step, sample_rate=sample_rate)

    def spectrogram(self, step: int, tag: str, wav: Tensor, wav_hat: Tensor, sample_rate: int) -> None:
        """Log a picture: wav [1, T] above its reconstruction wav_hat [1, T], 0 Hz to sample_rate / 2 each."""
        image = spectrogram_image(wav, wav_hat, sample_rate)
        self.writer.add_image(tag, image, step, dataformats="HWC")

    def text(self, step: int, tag: str, markdown: str) -> None:
        """Log words."""
        self.writer.add_text(tag, markdown, step)

    def close(self) -> None:
        """Flush and close both logs."""
        self.file.close()
        self.writer.close()


@dataclass
class EpochMeans:
    """Mean of each scalar over the steps since the last pop. Non-finite values are left out.

    Args:
        sums: name -> sum so far; with `counts` all there is to save and restore.
        counts: name -> number of finite values so far.
    """

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, values: dict[str, float]) -> None:
        """Take in the scalars of one step; a name may be absent from some steps."""
        for name, value in values.items():
            finite = math.isfinite(value)
            self.sums[name] = self.sums.get(name, 0.0) + (float(value) if finite else 0.0)
            self.counts[name] = self.counts.get(name, 0) + finite

    def pop(self) -> dict[str, float]:
        """Mean per name (NaN where no value was finite), then start over."""
        means = {
            name: total / self.counts[name] if self.counts[name] else math.nan
            for name, total in self.sums.items()
        }
        self.sums, self.counts = {}, {}
        return means


def read_metrics(run_dir: str | Path, max_bytes: int = 0) -> list[dict]:
    """Lines of a run's metrics.jsonl as dicts, oldest first; a torn last line is left out.

    Args:
        max_bytes: read no more than so much, from the end; 0: all.
    Raises:
        ValueError: the run has no such file.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; is {run_dir} the folder of a run?")
    return [json.loads(line) for line in _whole_lines(path, max_bytes)]


def spectrogram_image(wav: Tensor, wav_hat: Tensor, sample_rate: int) -> np.ndarray:
    """Two log-magnitude spectrograms, one above the other, in one colour scale of 80 dB.

    Args:
        wav: [1, T] or [T]; the upper picture. The loudest bin of it is the scale's top.
        wav_hat: [1, T'] or [T'], as `wav`; the lower picture, cut or padded to T.
        sample_rate: Hz; sets the window (about 40 ms).
    Returns:
        uint8 [H, W, 3]; time to the right, frequency upward, linear from 0 Hz to sample_rate / 2.
    """
    n_fft = max(64, 2 ** round(math.log2(0.043 * sample_rate)))
    n_samples = wav.shape[-1]
    lower = torch.nn.functional.pad(wav_hat, (0, max(0, n_samples - wav_hat.shape[-1])))[..., :n_samples]
    both = torch.stack([wav.reshape(-1), lower.reshape(-1)]).detach().float().cpu().nan_to_num(0.0, 0.0, 0.0)
    hop = max(n_fft // 8, -(-n_samples // 1600))  # at most about 1600 columns
    window = torch.hann_window(n_fft)
    spectra = torch.stft(both, n_fft, hop, window=window, pad_mode="constant", return_complex=True).abs()
    db = 20 * torch.log10(spectra / spectra[0].max().clamp(min=1e-8) + 1e-8)
    level = (1 - db / FLOOR_DB).clamp(0, 1).flip(1).numpy()
    gap = np.ones((6, level.shape[2]), np.float32)
    return _colour(np.concatenate([level[0], gap, level[1]]))


def _colour(level: np.ndarray) -> np.ndarray:
    """Map [H, W] in [0, 1] to uint8 [H, W, 3]."""
    stops = np.linspace(0, 1, len(COLOURS))
    channels = [np.interp(level, stops, COLOURS[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _whole_lines(path: Path, max_bytes: int = 0) -> list[str]:
    """Lines of a file up to its last newline: a kill can tear the line after it; those in the last bytes, if limited."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        skipped = max(path.stat().st_size - max_bytes, 0) if max_bytes else 0
        file.seek(skipped)
        return file.read().decode(errors="replace").split("\n")[bool(skipped) : -1]
