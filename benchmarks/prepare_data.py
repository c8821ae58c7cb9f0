"""Peak memory and speed of prepare_speaker_data.py on one synthetic recording of several hours.

    python benchmarks/prepare_data.py [--hours 3]
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile as sf

ROOT = Path(__file__).resolve().parents[1]
SAMPLE_RATE = 44100
BLOCK_S = 60  # small: Linux counts the memory of this process at the fork as the child's


def speech_like(seconds: int, sample_rate: int, seed: int) -> np.ndarray:
    """float32 [T]: words of noise of 0.1 to 0.6 s, pauses of 0.05 to 1.2 s, and a noise floor at -60 dB."""
    rng = np.random.default_rng(seed)
    envelope = np.full(seconds * sample_rate, 0.001, np.float32)
    position = 0
    while position < len(envelope):
        n_word = int(rng.uniform(0.1, 0.6) * sample_rate)
        word = envelope[position:position + n_word]
        word[:] = rng.uniform(0.02, 0.15) * np.hanning(n_word)[:len(word)] + 0.001
        position += n_word + int(rng.uniform(0.05, 1.2) ** 2 * sample_rate)
    return envelope * rng.standard_normal(len(envelope), dtype=np.float32)


def write_recording(path: Path, hours: float) -> None:
    with sf.SoundFile(path, "w", SAMPLE_RATE, 1, subtype="PCM_16") as file:
        for index in range(round(hours * 3600 / BLOCK_S)):
            file.write(speech_like(BLOCK_S, SAMPLE_RATE, seed=index))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, default=3.0)
    hours = parser.parse_args().hours
    with tempfile.TemporaryDirectory() as folder:
        data_dir, out_dir = Path(folder, "data"), Path(folder, "out")
        data_dir.mkdir()
        write_recording(data_dir / "long.wav", hours)
        command = [sys.executable, ROOT / "prepare_speaker_data.py", data_dir, out_dir, "--jobs", "1"]
        start = time.monotonic()
        subprocess.run(command, check=True)
        seconds = time.monotonic() - start
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = usage.ru_utime + usage.ru_stime
    unit = 1e6 if sys.platform == "darwin" else 1e3  # bytes there, kilobytes elsewhere
    print(f"{hours:g} h at {SAMPLE_RATE} Hz: peak memory {usage.ru_maxrss / unit:.0f} MB; "
          f"{hours * 3600 / seconds:.0f} x real time by the clock ({seconds:.1f} s), "
          f"{hours * 3600 / cpu_s:.0f} x by CPU time ({cpu_s:.1f} s)")


if __name__ == "__main__":
    main()
