"""Fine-tune converted weights for 50 updates on a language they have not heard: does validation get better?

    python benchmarks/finetune.py RECIPES_OUT MANIFEST_24KHZ OUT_DIR [--language el]

RECIPES_OUT is what benchmarks/recipes.py left. Each of dac, encodec and mimi goes the whole way of a released model:
our run -> a transformers folder -> `codec convert` -> `train.init_from`, with its own recipe. Two things are set: where
gradients are balanced, mel 10 joins them (half of the gradient or more), and the discriminators, which no released codec
brings, learn alone first.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import torch

from codec.config import load_config
from codec.data import SegmentDataset, read_manifest
from codec.model import Codec
from codec.runlog import read_metrics

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from train_codec_gan import VAL_SEED, validate  # noqa: E402

WARMUP, STEPS = 25, 50


def one_language(manifest: Path, language: str, folder: Path) -> Path:
    """A manifest of one speaker group of another: every fifth recording validates, the rest trains."""
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    lines = [line for line in lines if line["speaker"] == language]
    sources = sorted({line["source"] for line in lines})
    for line in lines:
        line["split"] = "val" if sources.index(line["source"]) % 5 == 0 else "train"
        line["path"] = str((manifest.parent / line["path"]).resolve())
    path = folder / f"{language}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(*command: object) -> None:
    subprocess.run([sys.executable, *map(str, command)], check=True, cwd=ROOT)


def finetune(name: str, recipes: Path, manifest: Path, folder: Path) -> dict:
    """Convert out and back, measure, train, measure."""
    theirs, converted, trained = folder / name / "transformers", folder / name / "converted", folder / name / "run"
    run("-m", "codec.cli", "convert", "--from", recipes / name, "--to", "transformers", theirs)
    run("-m", "codec.cli", "convert", "--from", theirs, converted)
    config_path = recipes / name / "config.yaml"
    balanced = load_config(config_path).losses.balancer
    values = [f"data.manifest={manifest}", f"train.init_from={converted}", f"train.disc_warmup_steps={WARMUP}",
              f"phases=[{{name: finetune, steps: {WARMUP + STEPS}}}]", f"train.val_every={WARMUP + STEPS}",
              "train.max_minutes=0", "optim.warmup_steps=0",
              *(["loss_weights.mel=10.0"] if balanced else [])]  # fmt: skip
    config = load_config(config_path, values)
    n_samples = config.data.val_segment_samples or config.data.segment_samples
    val = SegmentDataset(read_manifest(manifest, "val", config.model.sample_rate), n_samples, VAL_SEED)
    before = validate(Codec.from_pretrained(converted), val, config, torch.device("cpu"), None, 0)
    run("train_codec_gan.py", "--config", config_path, "--run_dir", trained, "--set", *values)
    after = [line for line in read_metrics(trained) if "val/mel_step" in line][-1]
    return {key: (before[f"val/{key}"], after[f"val/{key}_step"]) for key in ("mel", "snr_db", "amplitude_ratio")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", type=Path)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--language", default="el", help="speaker group of the manifest that was held out")
    args = parser.parse_args()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    out_dir = args.out_dir.resolve()  # the scripts run in the project's folder
    manifest = one_language(args.manifest.resolve(), args.language, out_dir)
    print("| recipe | mel dB before | after | SNR dB before | after | amplitude before | after |\n" + "|---" * 7 + "|")
    for name in ("dac", "encodec", "mimi"):
        pairs = finetune(name, args.recipes.resolve(), manifest, out_dir)
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for pair in pairs.values() for value in pair) + " |", flush=True)
        assert pairs["mel"][1] < pairs["mel"][0] and math.isfinite(pairs["mel"][1]), name


if __name__ == "__main__":
    main()
