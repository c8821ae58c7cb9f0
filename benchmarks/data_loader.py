"""How many random one-second segments a second one core reads: from prepared utterances, and from one long file.

    python benchmarks/data_loader.py [MANIFEST]

Without a manifest, prepared data are made up: 2000 utterances of 2 to 12 s. The long file is 3 hours at 24 kHz.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile as sf
import torch

from codec.data import SegmentDataset, Utterance, read_manifest

SAMPLE_RATE = 24000


def noise(n_samples: int, rng: np.random.Generator) -> np.ndarray:
    return (0.1 * rng.standard_normal(n_samples)).astype(np.float32)


def made_up_utterances(folder: Path, rng: np.random.Generator) -> list[Utterance]:
    utterances = []
    for i in range(2000):
        n_samples = int(rng.integers(2 * SAMPLE_RATE, 12 * SAMPLE_RATE))
        sf.write(folder / f"{i}.wav", noise(n_samples, rng), SAMPLE_RATE, subtype="PCM_16")
        utterances.append(Utterance(folder / f"{i}.wav", "a", n_samples))
    return utterances


def long_recording(folder: Path, rng: np.random.Generator) -> list[Utterance]:
    with sf.SoundFile(folder / "long.wav", "w", SAMPLE_RATE, 1, "PCM_16") as file:
        for _ in range(180):
            file.write(noise(60 * SAMPLE_RATE, rng))
    return [Utterance(folder / "long.wav", "a", 180 * 60 * SAMPLE_RATE)]


def segments_per_second(utterances: list[Utterance], segment_samples: int, seconds: float = 5.0) -> float:
    dataset = SegmentDataset(utterances, segment_samples, seed=0)
    index, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        dataset[index]
        index += 1
    return index / (time.perf_counter() - started)


def main() -> None:
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        if len(sys.argv) > 1:
            rate = json.loads(Path(sys.argv[1]).read_text().split("\n", 1)[0])["sample_rate"]
            prepared = read_manifest(sys.argv[1], "train", rate)
        else:
            rate, prepared = SAMPLE_RATE, made_up_utterances(Path(folder), rng)
        long = long_recording(Path(folder), rng)
        for name, utterances, hz in (("prepared utterances", prepared, rate), ("one 3-hour wav", long, SAMPLE_RATE)):
            print(f"{name}: {segments_per_second(utterances, hz):.0f} one-second segments a second on one core")


if __name__ == "__main__":
    main()
