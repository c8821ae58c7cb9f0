"""The prescribed Telugu recipe and ours, scaled down alike, on the same data for the same CPU time.

    python benchmarks/telugu_recipes.py MANIFEST_24KHZ OUT_DIR [--minutes 30]

Both runs go at once, each on a core of its own with one thread. What is scaled is the same for both: an eighth of
the channels, 0.25 s segments, 4 of them an update. What is a recipe's own stays as in its config: discriminators (a quarter
of the channels), losses, weights, learning rates. Prints the metrics over time as a Markdown table.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from codec.runlog import read_metrics

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "model.latent_dim=128", "model.encoder.encoder_dim=8", "model.decoder.decoder_dim=128",
    "model.quantizer.codebook_dim=32", "model.quantizer.kmeans_frames=16384",
    "data.segment_samples=6080", "data.batch_size=4", "data.segments_per_epoch=4000", "data.n_workers=1",
    "data.val_segments=24", "data.val_segment_samples=24000", "train.precision=fp32", "train.log_every=10",
    "train.checkpoint_every=1000000", "optim.warmup_steps=0",
]  # fmt: skip
RECIPES = {
    "telugu_prescribed": [
        "discriminators.sets.0.channels=[8, 16, 64, 256, 256, 256]", "phases.0.steps=1000000", "train.val_every=100",
    ],
    "telugu": [
        "discriminators.sets.0.channels=[8, 32, 128, 256, 256]", "discriminators.sets.1.channels=8",
        "phases.0.steps=600", "phases.1.steps=1000000", "train.val_every=100",
    ],
}  # fmt: skip
COLUMNS = ("val/snr_db", "val/amplitude_ratio", "val/mel", "train/loss_d", "train/feat", "train/acc_real", "train/acc_fake",
           "val/perplexity_0", "val/perplexity_7")  # fmt: skip


def start(name: str, manifest: str, out_dir: Path, minutes: float, core: int) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train_codec_gan.py"), "--config", str(ROOT / "configs" / f"{name}.yaml"),
               "--run_dir", str(out_dir / name), "--set", f"data.manifest={manifest}", f"train.max_minutes={minutes}",
               *SMALL, *RECIPES[name]]  # fmt: skip
    with open(out_dir / f"{name}.log", "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"},
                                preexec_fn=lambda: os.sched_setaffinity(0, {core}))  # fmt: skip


def table(run_dir: Path, rows: int = 12) -> str:
    """Metrics at `rows` validations, each training scalar as the mean of the 10 lines before."""
    lines = read_metrics(run_dir)
    started = lines[0]["time"]
    validations = [i for i, line in enumerate(lines) if "val/snr_db_step" in line]
    text = ["| minutes | step | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    chosen = validations[:: max(len(validations) // rows, 1)]
    for i in chosen + ([validations[-1]] if validations[-1] not in chosen else []):
        cells = [f"{(lines[i]['time'] - started) / 60:.1f}", str(lines[i]["step"])]
        for column in COLUMNS:
            near = [line[f"{column}_step"] for line in lines[: i + 1] if line.get(f"{column}_step") is not None]
            if column.startswith("val/"):
                near = near[-1:]
            cells.append(f"{sum(near[-10:]) / len(near[-10:]):.3g}" if near else "")
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("manifest")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--minutes", type=float, default=30)
    args = parser.parse_args()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    runs = [start(name, args.manifest, args.out_dir, args.minutes, core) for core, name in enumerate(RECIPES)]
    for run in runs:
        run.wait()
    for name in RECIPES:
        print(f"\n{name}\n\n{table(args.out_dir / name)}")


if __name__ == "__main__":
    main()
