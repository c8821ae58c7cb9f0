"""What the doctor costs: watched updates against plain ones in turn, figures of every update, one diagnosis a validation.

    python benchmarks/doctor_cost.py configs/quickstart.yaml MANIFEST [--pairs 12] [--set KEY=VALUE ...]
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from codec.config import load_config, phase_config  # noqa: E402
from codec.doctor import to_markdown  # noqa: E402
from codec.health import History, diagnose  # noqa: E402
from codec.watch import CodebookWatch, sound_figures  # noqa: E402
from train_codec_gan import build, open_data, train_step  # noqa: E402


def seconds(action, *arguments) -> float:
    started = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("manifest")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--set", nargs="+", default=[], action="extend")
    args = parser.parse_args()
    config = load_config(args.config, [f"data.manifest={args.manifest}", *args.set])
    segments, _ = open_data(config)
    t = build(config, torch.device("cpu"))
    wav = torch.stack([segments.segments[i] for i in range(config.data.batch_size)])
    watch, names = CodebookWatch(), set()
    for index, phase in enumerate(config.phases):
        resolved, plain, watched = phase_config(config, index), [], []
        for step in range(args.pairs + 1):
            plain.append(seconds(train_step, wav, t, resolved, step))
            watched.append(seconds(train_step, wav, t, resolved, step, False, None, watch))
        step_s, more = statistics.median(plain[1:]), statistics.median(b - a for a, b in zip(plain[1:], watched[1:]))
        figures = statistics.median(seconds(sound_figures, wav, wav) for _ in range(20))
        share = (more / config.doctor.watch_every + figures) / step_s
        names |= set(train_step(wav, t, resolved, 0, watch=watch))
        print(f"{phase.name}: {1000 * step_s:.0f} ms an update; watched {1000 * more:.0f} ms more, one in "
              f"{config.doctor.watch_every}; figures of sound {1000 * figures:.2f} ms: {100 * share:.2f} % of a step")
    n_lines = config.total_steps // config.train.log_every
    rows = [{"step": (i + 1) * config.train.log_every} | {f"train/{name}_step": 0.1 for name in names} for i in range(n_lines)]
    text = "\n".join(map(json.dumps, rows))
    taken = seconds(lambda: to_markdown(diagnose(History.from_rows(list(map(json.loads, text.split("\n"))))), "run"))
    print(f"a diagnosis of {n_lines} lines, the whole run's: {taken:.2f} s, one every {config.train.val_every} updates: "
          f"{100 * taken / (config.train.val_every * step_s):.2f} % of a step")
    return 0


if __name__ == "__main__":
    sys.exit(main())
