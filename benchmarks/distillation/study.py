"""The study of docs/distillation.md: one common start, one remedy at a time, the same updates, held-out speakers.

    python benchmarks/distillation/study.py base DATA_DIR OUT_DIR runs/demo           the common start: reconstruction alone
    python benchmarks/distillation/study.py run DATA_DIR OUT_DIR [--only NAME ...]    experiments from it, two at once
    python benchmarks/distillation/study.py bits DATA_DIR OUT_DIR                     VQ of the teacher itself
    python benchmarks/distillation/study.py table OUT_DIR                             Markdown

DATA_DIR holds what docs/distillation.md says how to make: speech/, features/wavlm, features/llm. A result is OUT_DIR/NAME.json,
its codec OUT_DIR/NAME/, a folder for `codec probe`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import default_collate

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from safetensors.torch import save_file  # noqa: E402

from codec import metrics  # noqa: E402
from codec.checkpoint import grow, inference_tensors, load_into, load_tensors  # noqa: E402
from codec.config import Config, load_config, phase_at, phase_config  # noqa: E402
from codec.data import SegmentDataset, StepSampler, read_manifest, segment_loader  # noqa: E402
from codec.distill import DistilledSegments, open_teachers  # noqa: E402
from codec.features import FeatureStore  # noqa: E402
from codec.files import write_atomically  # noqa: E402
from codec.pretrained import resolve  # noqa: E402
from codec.rvq import QuantizerOutput, kmeans, nearest  # noqa: E402
from train_codec_gan import Training, build, start_codebooks, train_step  # noqa: E402

HERE = Path(__file__).resolve().parent
STEPS, BASE_STEPS = 300, 300


def teacher(name: str, dim: int, n_codebooks: int, **settings) -> str:
    value = {"features": f"DATA/features/{name}", "dim": dim, "n_codebooks": n_codebooks, **settings}
    return f"distill.{name}={json.dumps(value)}"


def heads(**settings) -> list[str]:
    """Both teachers as Amy has them: the LLM on codebook 0, the speech encoder on codebooks 0 and 1."""
    return [teacher("llm", 384, 1, **settings), teacher("wavlm", 512, 2, **settings)]


def weights(llm: float, wavlm: float, **others: float) -> list[str]:
    return [f"loss_weights.{name}={value}" for name, value in {"llm": llm, "wavlm": wavlm, **others}.items()]


Q = "model.quantizer"
STOP = [f"{Q}.semantic_gradient=0"]
BLOCKS, INPUTS = [f"{Q}.semantic_blocks=2"], [f"{Q}.semantic_inputs=own"]
OWN, DEEP = [*BLOCKS, *INPUTS, *STOP], [f"{Q}.semantic_blocks=6"]
FIFTH = [f"{Q}.semantic_to_encoder=0.2"]
FROM_02 = [*OWN, *DEEP, *FIFTH, f"{Q}.semantic_layer_scale=0.2"]
FAST = ["optim.lr_scale_projections=3", "optim.lr_scale_heads=3"]
PITCH = teacher("pitch", 39, 2, detach_first=1)
SCHEDULE = "phases=" + json.dumps([
    {"name": name, "steps": STEPS // 2, "set": {"loss_weights.llm": llm, "loss_weights.wavlm": wavlm}}
    for name, llm, wavlm in (("teachers", 15, 60), ("both", 2.5, 10))
])  # fmt: skip
ALONE = {"wave": 0, "scale": 0, "msspec": 0}
# name: (config, what the heads read: "codes", or for ceilings "latent"; what of their gradient passes: "all" or "none")
EXPERIMENTS: dict[str, tuple[list[str], str, str]] = {
    "documented, MLP": ([*heads(), *weights(1, 1)], "codes", "all"),
    "own, x20": ([*heads(), *weights(5, 20), *OWN], "codes", "all"),
    "reconstruction only": ([*heads(), *weights(1, 1)], "codes", "none"),
    "ceiling: own, codes, distillation alone": ([*heads(), *weights(5, 20, **ALONE), *OWN], "codes", "all"),
    "x20": ([*heads(), *weights(5, 20)], "codes", "all"),
    "documented, MLP, wavlm x5": ([*heads(), *weights(1, 5)], "codes", "all"),
    "own": ([*heads(), *weights(1, 1), *OWN], "codes", "all"),
    "ceiling: own, latent, distillation alone": ([*heads(), *weights(5, 20, **ALONE, commit=0), *OWN], "latent", "all"),
    "documented, linear": ([*heads(head="linear"), *weights(1, 1)], "codes", "all"),
    "ceiling: latent, encoder as it is": ([*heads(), *weights(1, 1)], "latent", "none"),
    "own inputs, stop, x20": ([*heads(), *weights(5, 20), *INPUTS, *STOP], "codes", "all"),
    "own blocks, x20": ([*heads(), *weights(5, 20), *BLOCKS], "codes", "all"),
    "stop, x20": ([*heads(), *weights(5, 20), *STOP], "codes", "all"),
    "x20, conv head": ([*heads(head="conv"), *weights(5, 20)], "codes", "all"),
    "x20, wavlm alone": ([*heads(), *weights(0, 20)], "codes", "all"),
    "x60": ([*heads(), *weights(15, 60)], "codes", "all"),
    "own, x60": ([*heads(), *weights(15, 60), *OWN], "codes", "all"),
    "own, x200": ([*heads(), *weights(50, 200), *OWN], "codes", "all"),
    "own, 6 blocks, x20": ([*heads(), *weights(5, 20), *OWN, *DEEP], "codes", "all"),
    "own, 6 blocks, x60": ([*heads(), *weights(15, 60), *OWN, *DEEP], "codes", "all"),
    "own, 6 blocks, x60, nothing into the encoder": (
        [*heads(), *weights(15, 60), *OWN, *DEEP, f"{Q}.semantic_to_encoder=0"], "codes", "all"),
    "own, 6 blocks, x60, a fifth into the encoder": ([*heads(), *weights(15, 60), *OWN, *DEEP, *FIFTH], "codes", "all"),
    "own, 6 blocks, x40, a fifth into the encoder": ([*heads(), *weights(10, 40), *OWN, *DEEP, *FIFTH], "codes", "all"),
    "6 own blocks, x60": ([*heads(), *weights(15, 60), *DEEP], "codes", "all"),
    "6 own blocks, x60, a fifth into the encoder": ([*heads(), *weights(15, 60), *DEEP, *FIFTH], "codes", "all"),
    "ceiling: own, 6 blocks, codes, distillation alone": (
        [*heads(), *weights(15, 60, **ALONE), *OWN, *DEEP], "codes", "all"),
    "own, 6 blocks, x60 then x10": ([*heads(), *OWN, *DEEP, SCHEDULE], "codes", "all"),
    "own, 6 blocks, reconstruction only": ([*heads(), *weights(1, 1), *OWN, *DEEP, *FIFTH], "codes", "none"),
    "6 blocks from 0.2, x40": ([*heads(), *weights(10, 40), *FROM_02], "codes", "all"),
    "6 blocks from 0.2, fast, x40": ([*heads(), *weights(10, 40), *FROM_02, *FAST], "codes", "all"),
    "6 blocks from 0.2, fast, x20": ([*heads(), *weights(5, 20), *FROM_02, *FAST], "codes", "all"),
    "ceiling: 6 blocks from 0.2, fast, distillation alone": (
        [*heads(), *weights(15, 60, **ALONE), *FROM_02, *FAST, f"{Q}.semantic_to_encoder=1"], "codes", "all"),
    **{f"6 blocks from 0.2, fast, x{wavlm}, pitch x{pitch}": (
        [*heads(), PITCH, *weights(llm, wavlm, pitch=pitch), *FROM_02, *FAST], "codes", "all")
       for llm, wavlm, pitch in ((4, 15, 3), (4, 15, 5), (5, 20, 3), (5, 20, 5), (5, 20, 60))},
    "own, x60, two prosodic codebooks": (
        [teacher("llm", 384, 1), teacher("wavlm", 512, 3), *weights(15, 60), *OWN, f"{Q}.n_prosodic=2"], "codes", "all"),
}


def config_of(overrides: list[str], data: Path, steps: int) -> Config:
    resolved = [item.replace("DATA", str(data)) for item in overrides]
    fixed = [f"data.manifest={data}/speech/manifest.jsonl", f"phases.0.steps={steps}"]
    return load_config(HERE / "base.yaml", [*fixed, *resolved])


def segments(config: Config, split: str, seed: int, samples: int) -> DistilledSegments:
    utterances = read_manifest(config.data.manifest, split, config.model.sample_rate)
    teachers = open_teachers(config.distill)
    dataset = SegmentDataset(utterances, samples, seed)
    return DistilledSegments(dataset, teachers, config.model.encoder.hop_length, config.model.sample_rate)


def load_common(t: Training, path: Path) -> None:
    """The common start; what an experiment adds to the model keeps its first values."""
    tensors = grow(load_tensors(path), t.codec.state_dict(), 2)
    load_into(t.codec, tensors, str(path))


def train(config: Config, t: Training, train_set: DistilledSegments, steps: int, watch: Callable[[int, dict], None]) -> None:
    sampler = StepSampler(0, steps, config.data.batch_size, 0, 1)
    phases = [phase_config(config, index) for index in range(len(config.phases))]
    for step, (wav, targets) in enumerate(segment_loader(train_set, sampler, config.data.n_workers, False)):
        watch(step, train_step(wav, t, phases[phase_at(config, step)], step, targets=targets))


@torch.no_grad()
def judge(config: Config, t: Training, split: str, n_segments: int = 64) -> dict[str, float]:
    """Held-out figures over fixed segments: mel distance, SNR, teacher losses with the run's own heads."""
    held_out = segments(config, split, 12345, config.data.val_segment_samples)
    t.codec.eval()
    signal, codes, sums = [], [], {name: torch.zeros(2) for name in held_out.teachers}
    for index in range(n_segments):
        wav, targets = default_collate([held_out[index]])
        out = t.codec(wav)
        codes.append(out.quantized.codes)
        signal.append(torch.stack([metrics.mel_distance(wav, out.wav_hat, 16000), metrics.snr_db(wav, out.wav_hat)], 1))
        for name, loss in t.heads(out.quantized.prefixes, targets).items():
            sums[name] += torch.stack([(loss * targets[name].mask).sum(), targets[name].mask.sum()])
    t.codec.train()
    mel, snr_db = torch.cat(signal).nanmean(0).tolist()
    _, perplexity = metrics.codebook_usage(torch.cat(codes), t.codec.codebook_size)
    return {"mel": mel, "snr_db": snr_db, **{name: float(loss / n_frames) for name, (loss, n_frames) in sums.items()},
            **{f"perplexity_{i}": float(perplexity[i]) for i in range(3)}}  # fmt: skip


def make_base(data: Path, out_dir: Path, quickstart: Path) -> None:
    """The common start: the body of a quickstart run with a split quantizer, trained on for reconstruction alone."""
    config = config_of([], data, BASE_STEPS)
    t = build(config, torch.device("cpu"))
    train_set = segments(config, "train", 0, config.data.segment_samples)
    tensors, fresh = inference_tensors(resolve(quickstart)), t.codec.state_dict()
    for name, value in fresh.items():
        if name in tensors:
            value.copy_(tensors[name])
    for part in ("semantic", "acoustic"):  # each codes all of z at first, and their outputs are added
        fresh[f"quantizer.{part}.project_in.weight"].copy_(tensors["quantizer.project_in.weight"])
        fresh[f"quantizer.{part}.project_out.weight"].copy_(tensors["quantizer.project_out.weight"] / 2)
    start_codebooks(t.codec, train_set.segments, config, torch.device("cpu"))
    started = time.monotonic()

    def watch(step: int, log: dict) -> None:
        if step % 50 == 49:
            rate = (step + 1) * 16 / (time.monotonic() - started)
            print(f"base {step + 1}: msspec {log['msspec']:.4f}, commit {log['commit']:.4f}, {rate:.0f} s/s", flush=True)

    train(config, t, train_set, BASE_STEPS, watch)
    scores = judge(config, t, "test")
    save_file({name: value.clone() for name, value in t.codec.state_dict().items()}, out_dir / "base.safetensors")
    write_atomically(out_dir / "base.json", json.dumps(scores))
    print(scores)


def read_instead(t: Training, what: str, gradient: str) -> None:
    """Let the heads read the continuous latents of the first group, or let nothing of their gradient through."""
    group = t.codec.quantizer.semantic
    forward = group.forward

    def replaced(z: Tensor, n_codebooks: int | None = None) -> QuantizerOutput:
        out = forward(z, n_codebooks)
        prefixes = out.prefixes
        if what == "latent":
            z = z.transpose(1, 2)
            inputs = [group.project_in(z), *(own(z) for own in group.own_inputs)]
            prefixes = tuple(inputs[min(i, len(inputs) - 1)] for i in range(len(prefixes)))
        if gradient == "none":
            prefixes = tuple(prefix.detach() for prefix in prefixes)
        return out._replace(prefixes=prefixes)

    group.forward = replaced


def run_one(data: Path, out_dir: Path, name: str, steps: int) -> None:
    """One experiment from the common start; OUT_DIR/NAME.json has held-out figures and the course of the run."""
    overrides, what, gradient = EXPERIMENTS[name]
    config = config_of(overrides, data, steps)
    train_set = segments(config, "train", 1, config.data.segment_samples)
    t = build(config, torch.device("cpu"), train_set.teachers)
    load_common(t, out_dir / "base.safetensors")
    added = range(2, config.model.quantizer.n_first)
    if added:
        start_codebooks(t.codec, train_set.segments, config, torch.device("cpu"), added)
    if (what, gradient) != ("codes", "all"):
        read_instead(t, what, gradient)
    course, started = [], time.monotonic()

    def watch(step: int, log: dict) -> None:
        if (step + 1) % config.train.log_every == 0:
            course.append({"step": step + 1} | {key: round(float(value), 5) for key, value in log.items()})

    train(config, t, train_set, steps, watch)
    seconds = time.monotonic() - started
    scores = {split: judge(config, t, split) for split in ("val", "test")}
    if not (out_dir / slug(name)).exists():
        t.codec.save_pretrained(out_dir / slug(name))
    result = {"name": name, "config": overrides, "steps": steps, "seconds": seconds, **scores, "course": course}
    write_atomically(out_dir / f"{slug(name)}.json", json.dumps(result, indent=1))
    figures = ", ".join(f"{key} {value:.3f}" for key, value in scores["test"].items())
    print(f"{name}: {figures} ({seconds:.0f} s)", flush=True)


def table(out_dir: Path) -> None:
    """Held-out figures of every experiment, and the gradients that reach the first codebooks in its last third."""
    print("| experiment | val wavlm | test wavlm | test llm | test mel, dB | gradient, msspec : wavlm | cosine |")
    print("|---|---|---|---|---|---|---|")
    for name in EXPERIMENTS:
        path = out_dir / f"{slug(name)}.json"
        if path.is_file():
            result = json.loads(path.read_text())
            late, val, test = result["course"][-len(result["course"]) // 3 :], result["val"], result["test"]
            wavlm, rest = (sum(row.get(key, 0) for row in late) for key in ("grad_wavlm_to_1", "grad_msspec_to_1"))
            pull = sum(row.get("pull_wavlm_rest", 0) for row in late) / len(late)
            print(f"| {name} | {val['wavlm']:.3f} | {test['wavlm']:.3f} | {test['llm']:.3f} | {test['mel']:.2f} "
                  f"| {rest / wavlm if wavlm else 0:.1f} | {pull:.2f} |")  # fmt: skip


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def run_all(data: Path, out_dir: Path, names: list[str], steps: int) -> None:
    """Experiments that have no result yet, two at once, a core each."""
    waiting = [name for name in names or EXPERIMENTS if not (out_dir / f"{slug(name)}.json").is_file()]
    running: list[subprocess.Popen] = []
    while waiting or running:
        running = [process for process in running if process.poll() is None]
        if waiting and len(running) < 2:
            command = [sys.executable, __file__, "one", data, out_dir, "--only", waiting.pop(0), "--steps", str(steps)]
            running.append(subprocess.Popen(command))
        time.sleep(1)


@torch.no_grad()
def bits(data: Path, out_dir: Path) -> None:
    """1 - cosine that a residual VQ of the teacher itself reaches: what so many bits a frame can tell, at best."""
    results = []
    for name in (path.name for path in sorted((data / "features").iterdir(), reverse=True)):
        store = FeatureStore(data / "features" / name)
        for rate_hz in (12.5, 25.0, 50.0):
            train_frames, test_frames = (unit_frames(store, data, split, int(16000 / rate_hz)) for split in ("train", "test"))
            row = {"teacher": name, "rate_hz": rate_hz, "constant": round(1 - float(test_frames.mean(0).norm()), 4)}
            for size in (16, 64, 256, 1024):
                residual, rest, decoded = train_frames, test_frames, 0
                for level in (1, 2):
                    means, _ = kmeans(residual, size, torch.Generator().manual_seed(0))
                    decoded = decoded + means[nearest(rest, means)]
                    row[f"{level} x {size}"] = round(float((1 - F.cosine_similarity(decoded, test_frames, -1)).mean()), 4)
                    residual = residual - means[nearest(residual, means)]
                    rest = test_frames - decoded
            results.append(row)
            print(row, flush=True)
    write_atomically(out_dir / "bits.json", json.dumps(results, indent=1))


def unit_frames(store: FeatureStore, data: Path, split: str, hop_length: int) -> Tensor:
    """Unit vectors [M, D] of up to 30,000 frames with a target, at a frame rate."""
    frames = []
    for utterance in read_manifest(data / "speech" / "manifest.jsonl", split, 16000):
        values, mask = store.targets(utterance, 0, utterance.n_samples // hop_length, hop_length, 16000)
        frames.append(F.normalize(values[mask > 0], dim=-1))
    joined = torch.cat(frames)
    return joined[torch.randperm(len(joined), generator=torch.Generator().manual_seed(0))[:30000]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["base", "run", "one", "bits", "table"])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.command == "base":
        make_base(*args.folders)  # DATA_DIR OUT_DIR and the quickstart run
    elif args.command == "one":
        run_one(*args.folders, args.only[0], args.steps)
    elif args.command == "run":
        run_all(*args.folders, args.only, args.steps)
    elif args.command == "bits":
        bits(*args.folders)
    elif args.command == "table":
        table(*args.folders)
    return 0


if __name__ == "__main__":
    sys.exit(main())
