"""The recipes side by side: same data, same number of audio-seconds, one model size, one bitrate, one thread each.

    python benchmarks/recipes.py MANIFEST_24KHZ OUT_DIR [--seconds 800] [--only telugu mimi]

Two runs go at once, each on a core of its own. What is scaled is the same for all: 2.4 to 2.5M parameters (codebooks not
counted), 3 kbps in codebooks of 1024 entries, an update on one segment of 0.96 s, k-means on as many frames, a quarter of
the discriminators' channels. What is a recipe's own stays as in its config: body, discriminators, losses, weights,
optimizer, schedule. 100 held-out utterances are then judged by evaluate_codec.py, beside Opus, Codec2 and Speex; what follows
`--evaluate` is passed on to it. A finished run is not trained again.
"""

import argparse
import json
import os
import queue
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.nn.utils import parametrize

from codec.config import ModelConfig, load_config
from codec.files import write_atomically
from codec.model import Codec

ROOT = Path(__file__).resolve().parent.parent
SAMPLE_RATE, SEGMENT_SAMPLES = 24000, 23040  # 0.96 s: 72 frames at 75 Hz, 12 at 12.5 Hz

ALIKE = [
    f"data.segment_samples={SEGMENT_SAMPLES}", "data.batch_size=1", "data.segments_per_epoch=1000",
    "data.n_workers=0", "data.val_segments=16", "data.val_segment_samples=0", "train.precision=fp32", "train.log_every=10",
    "train.val_every=1000000", "train.checkpoint_every=1000000",
]  # fmt: skip
KMEANS = ["model.quantizer.kmeans_frames=4096"]
MPD_MRD = ["discriminators.sets.0.channels=[8, 32, 128, 256, 256]", "discriminators.sets.1.channels=8"]
# EnCodec's commit 1 stands beside a gradient of norm 1 an item: with one item an update it stays 1
MSSTFT = ["discriminators.sets.0.channels=8", "loss_weights.commit=1.0"]
DAC_BODY = ["model.encoder.encoder_dim=12", "model.decoder.decoder_dim=272", "model.latent_dim=192",
            "model.quantizer.n_codebooks=4"]  # fmt: skip
MIMI_BODY = [
    "model.encoder.encoder_dim=12", "model.decoder.decoder_dim=192", "model.latent_dim=88",
    "model.encoder.transformer.n_heads=4", "model.encoder.transformer.ff_dim=352",
    "model.decoder.transformer.n_heads=4", "model.decoder.transformer.ff_dim=352",
    "model.quantizer.codebook_dim=44", "model.quantizer.n_codebooks=24", "model.quantizer.codebook_size=1024",
]  # fmt: skip
RECIPES = {  # row: config and what scales it
    "telugu": ("telugu", DAC_BODY + MPD_MRD + KMEANS + ["model.quantizer.codebook_dim=32", "optim.warmup_steps=0"]),
    # sums over codebooks, so the weights follow their number
    "dac": ("dac_24khz", DAC_BODY + MPD_MRD + ["loss_weights.commit=1.0", "loss_weights.codebook=4.0"]),
    "encodec": ("encodec_24khz", MSSTFT + KMEANS + [
        "model.encoder.encoder_dim=13", "model.decoder.decoder_dim=208", "model.latent_dim=52",
        "model.quantizer.codebook_dim=52", "model.quantizer.n_codebooks=4", "model.quantizer.dropout_counts=[2, 4]",
    ]),
    "mimi": ("mimi", MIMI_BODY + MSSTFT + KMEANS),
    # the baseline of Mimi's paper: its body, EnCodec's losses
    "mimi_reconstruction": ("mimi", MIMI_BODY + MSSTFT + KMEANS + [
        "loss_weights.adv=4.0", "loss_weights.feat=4.0", "loss_weights.wave=0.1", "loss_weights.msspec=2.0",
    ]),
}  # fmt: skip

def overrides(name: str, manifest: str | Path, seconds: float) -> list[str]:
    """`--set` items of one run. Phases keep their shares of the updates."""
    config, own = RECIPES[name]
    n_updates = round(seconds * SAMPLE_RATE / SEGMENT_SAMPLES)
    phases = load_config(ROOT / "configs" / f"{config}.yaml").phases
    total = sum(phase.steps for phase in phases)
    steps = [round(n_updates * phase.steps / total) for phase in phases]
    return [f"data.manifest={manifest}", *ALIKE, *own, *(f"phases.{i}.steps={n}" for i, n in enumerate(steps))]


def n_parameters(model: ModelConfig) -> int:
    """Weights of a codec as inference has them: weight norm folded, codebooks left out."""
    with torch.device("meta"):
        codec = Codec(model)
    gains = sum(module.parametrizations.weight.original0.numel() for module in codec.modules()
                if parametrize.is_parametrized(module, "weight"))  # fmt: skip
    learnt_codebooks = codec.quantizer.codebooks.numel() if model.quantizer.type == "factorized" else 0
    return sum(p.numel() for p in codec.parameters()) - gains - learnt_codebooks


def train(name: str, manifest: Path, run_dir: Path, seconds: float, cores: queue.Queue) -> None:
    """One run on a free core; leaves its CPU time, data and validation included, in cpu_minutes.json."""
    core = cores.get()
    command = [sys.executable, str(ROOT / "train_codec_gan.py"), "--config", str(ROOT / f"configs/{RECIPES[name][0]}.yaml"),
               "--run_dir", str(run_dir), "--set", *overrides(name, manifest, seconds)]  # fmt: skip
    with open(run_dir.with_suffix(".log"), "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"},
                                   preexec_fn=lambda: os.sched_setaffinity(0, {core}))  # fmt: skip
    _, status, usage = os.wait4(process.pid, 0)
    cores.put(core)
    if os.waitstatus_to_exitcode(status):
        raise ValueError(f"{name}: training failed; see {log.name}")
    write_atomically(run_dir / "cpu_minutes.json", json.dumps((usage.ru_utime + usage.ru_stime) / 60))


def training_table(out_dir: Path, names: list[str]) -> str:
    """Markdown: size, bitrate and cost of each run."""
    lines = ["| recipe | parameters M | kbps | updates | CPU minutes |", "|---|---:|---:|---:|---:|"]
    for name in names:
        config = load_config(out_dir / name / "config.yaml")
        minutes = json.loads((out_dir / name / "cpu_minutes.json").read_text())
        n, kbps = n_parameters(config.model), Codec.from_pretrained(out_dir / name).bitrate_kbps
        lines.append(f"| `{name}` | {n / 1e6:.2f} | {kbps:.2f} | {config.total_steps} | {minutes:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("manifest", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--seconds", type=float, default=800, help="of audio that each recipe is trained on")
    parser.add_argument("--evaluate", nargs=argparse.REMAINDER, default=[], help="further options of evaluate_codec.py")
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="RECIPE")
    args = parser.parse_args()
    args.out_dir = args.out_dir.resolve()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    cores: queue.Queue[int] = queue.Queue()
    for core in sorted(os.sched_getaffinity(0))[:2]:
        cores.put(core)
    run_dirs = {name: args.out_dir / name for name in args.only}
    with ThreadPoolExecutor(cores.qsize()) as pool:
        runs = [pool.submit(train, name, args.manifest, run_dir, args.seconds, cores)
                for name, run_dir in run_dirs.items() if not (run_dir / "cpu_minutes.json").exists()]  # fmt: skip
    for run in runs:
        run.result()
    print(training_table(args.out_dir, args.only))
    first, *others = map(str, run_dirs.values())
    command = [sys.executable, "evaluate_codec.py", "--checkpoint", first, "--manifest", str(args.manifest.resolve()),
               "--against", ",".join(["opus", "codec2", "speex", *others]), "--n_files", "100",
               "--out", str(args.out_dir / "evaluation"), *args.evaluate]  # fmt: skip
    subprocess.run(command, check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
