"""Does preflight forecast time and memory? It, then the run itself, in processes of their own, on an idle machine.

    python benchmarks/forecast.py configs/quickstart.yaml [--set KEY=VALUE ...]
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(arguments: list[str]) -> tuple[str, float, float]:
    """What a command says, the seconds it takes, and the largest memory of its main process in GiB."""
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen([sys.executable, ROOT / "train_codec_gan.py", *arguments], stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        said.seek(0)
        text = said.read()
    if status:
        raise SystemExit(text[-2000:])
    return text, seconds, usage.ru_maxrss / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--set", nargs="+", default=[], action="extend")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        both = ["--config", args.config, "--run_dir", f"{folder}/run", *(["--set", *args.set] if args.set else [])]
        said = run([*both, "--preflight"])[0]
        _, nothing_s, _ = run([*both, "--set", "phases=[{name: none, steps: 1}]", "--run_dir", f"{folder}/one"])
        _, run_s, gib = run(both)
    amount, unit = re.search(r"ok\s+([\d.]+) (min|h) for [\d,]+ steps", said).groups()
    forecast_s = float(amount) * {"min": 60, "h": 3600}[unit]
    memory = float(re.search(r"memory: ([\d.]+) GiB", said)[1])
    print(said)
    print(f"time: forecast {forecast_s:.0f} s; the run took {run_s:.0f} s, {run_s - nothing_s:.0f} of them beyond one step: "
          f"forecast / taken {forecast_s / run_s:.2f}")
    print(f"memory: forecast {memory:.2f} GiB, taken {gib:.2f}: {memory / gib:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
