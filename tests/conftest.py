"""Shared small things: a tiny config, synthetic speech-like audio, a manifest over it."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from codec.config import Config, parse_config

torch.set_num_threads(1)  # the tensors are tiny: two threads mostly wait for each other

TINY = """
name: tiny
model:
  sample_rate: 8000
  latent_dim: 16
  encoder: {type: conv, encoder_dim: 4, strides: [4, 5], dilations: [1, 3]}
  quantizer: {type: ema, n_codebooks: 3, codebook_size: 16, codebook_dim: 8, kmeans_frames: 256}
  decoder: {type: conv, decoder_dim: 16, strides: [5, 4], dilations: [1, 3]}
discriminators:
  sets:
    - {type: mrd, windows: [256], channels: 4}
losses: {mel_windows: [128, 256], mel_bins: [10, 20], msspec_windows: [64, 128]}
loss_weights: {adv: 1.0, feat: 2.0, wave: 1.0, mel: 1.0, commit: 0.25}
optim: {lr_g: 1.0e-3, lr_d: 1.0e-3}
data: {manifest: MANIFEST, segment_samples: 2000, batch_size: 4, segments_per_epoch: 16, n_workers: 1, val_segments: 4}
train: {log_every: 1, val_every: 4, checkpoint_every: 2, keep_last: 2}
phases:
  - {name: warm-up, steps: 3, set: {loss_weights.adv: 0.0, loss_weights.feat: 0.0}}
  - {name: adversarial, steps: 5}
"""


def tiny_config(overrides: list[str] | None = None, manifest: str | Path = "none.jsonl") -> Config:
    return parse_config(TINY.replace("MANIFEST", str(manifest)), "tiny.yaml", overrides)


def speech_like(n_samples: int, sample_rate: int = 8000, seed: int = 0) -> np.ndarray:
    """Harmonics with a moving pitch under a syllable-rate envelope, plus a little noise; peak below 0.6."""
    rng = np.random.default_rng(seed)
    t = np.arange(n_samples) / sample_rate
    pitch = 120 + 30 * rng.random() + 20 * np.sin(2 * np.pi * 0.7 * t + rng.random())
    phase = 2 * np.pi * np.cumsum(pitch) / sample_rate
    voice = sum(np.sin(k * phase) / k for k in range(1, 12))
    envelope = np.clip(np.sin(2 * np.pi * 3 * t + 6 * rng.random()), 0, None)
    return (0.15 * voice * envelope + 0.003 * rng.standard_normal(n_samples)).astype(np.float32)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(20261121)  # no seed that a test uses itself: its noise would equal its signal


@pytest.fixture(autouse=True)
def signal_handlers():
    """Put back what a training run in this process replaced."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def manifest(tmp_path_factory) -> Path:
    """Twelve utterances of three speakers at 8 kHz, ten for training, two for validation."""
    folder = tmp_path_factory.mktemp("speech")
    lines = []
    for i in range(12):
        n_samples = 4000 + 1500 * i
        sf.write(folder / f"{i}.wav", speech_like(n_samples, seed=i), 8000, subtype="PCM_16")
        lines.append({"path": f"{i}.wav", "speaker": f"s{i % 3}", "split": "train" if i < 10 else "val",
                      "sample_rate": 8000, "n_samples": n_samples, "rms_db": -20.0, "source": "x", "start_s": 0.0})
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
