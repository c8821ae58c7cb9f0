"""The zoo of failures: every way a run is known to die, made to happen on real speech, beside healthy runs of every recipe.

    python benchmarks/failures/zoo.py run DATA OUT_DIR [--only NAME ...] [--seeds 0 1 2]    two runs at once, a core each
    python benchmarks/failures/zoo.py report OUT_DIR [PICTURES]    what `codec doctor` says of each, and when: Markdown

DATA holds speech/ at 16 kHz, as `make demo` prepares it, and study/, as docs/distillation.md makes it. A failure
is configs/quickstart.yaml with a few keys changed, and where no key can do it a fault: a few lines below that replace a
function of the codec while the run lasts. It trains through `train_codec_gan.train` itself, and the doctor sees its
metrics.jsonl alone. A run is OUT_DIR/NAME_SEED; one that has ended is not run again. Failures run with the first seed only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import soundfile as sf
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]
import curves  # noqa: E402

import train_codec_gan as trainer  # noqa: E402
from codec import decoder, losses, rvq  # noqa: E402
from codec.audio import read_segment  # noqa: E402
from codec.config import Config, load_config  # noqa: E402
from codec.data import SegmentDataset  # noqa: E402
from codec.doctor import read_rows  # noqa: E402
from codec.files import write_atomically  # noqa: E402
from codec.health import Diagnosis, History, diagnose  # noqa: E402

# ------------------------------------------------------------------------------- the zoo


class Failure(NamedTuple):
    number: int  # in docs/failures.md
    name: str
    overrides: list[str]  # DATA and OUT stand for the folders
    fault: str = ""  # name of a function below
    config: str = "quickstart"


def phases(*parts: tuple[int, dict[str, float]]) -> str:
    """`--set` item of (steps, what the phase sets) one after the other."""
    return "phases=" + json.dumps([{"name": f"phase{i}", "steps": steps, "set": keys} for i, (steps, keys) in enumerate(parts)])


def weights(**values: float) -> list[str]:
    return [f"loss_weights.{name}={value}" for name, value in values.items()]


def stand_ins(*names: str, **settings: int) -> list[str]:
    """Teachers of docs/distillation.md's study in place of WavLM and a language model; `settings` of all their heads."""
    dims = {"llm": 384, "wavlm": 512, "pitch": 39}
    return ["data.manifest=DATA/study/speech/manifest.jsonl",
            *(f"distill.{name}.{key}={value}" for name in names for key, value in (
                {"features": f"DATA/study/features/{name}", "dim": dims[name]} | settings).items())]  # fmt: skip


NO_ADVERSARY = {"loss_weights.adv": 0.0, "loss_weights.feat": 0.0}
RECONSTRUCTION = phases((300, NO_ADVERSARY))
PRESCRIBED = {"loss_weights.wave": 0.1, "loss_weights.scale": 0, "loss_weights.mel": 0}  # as in configs/telugu_prescribed.yaml
SHORT = [
    "data.n_workers=0", "data.val_segments=16", "data.val_segment_samples=16000", "train.precision=fp32", "train.log_every=10",
    "train.val_every=50", "train.checkpoint_every=1000000", "train.keep_last=1", "train.max_minutes=0", "doctor.watch_every=50",
]  # fmt: skip
QUICKSTART = ["data.manifest=DATA/speech/manifest.jsonl", "data.segments_per_epoch=1600", "optim.warmup_steps=30"]
FACTORIZED = "model.quantizer={type: factorized, n_codebooks: 12, codebook_size: 1024, codebook_dim: 8}"
SPLIT = ["model.quantizer.n_codebooks=8", "model.quantizer.n_semantic=1", "model.quantizer.n_prosodic=1"]
# Convolutional bodies, a sixteenth of their widths, on a core and at 16 kHz
CONV = ["model.sample_rate=16000", "data.manifest=DATA/speech/manifest.jsonl", "data.segment_samples=4160", "data.batch_size=4",
        "data.segments_per_epoch=800", "optim.warmup_steps=30"]  # fmt: skip
DAC_BODY = ["model.latent_dim=64", "model.encoder.encoder_dim=4", "model.decoder.decoder_dim=64"]
EMA = ["model.quantizer.codebook_dim=32", "model.quantizer.codebook_size=256", "model.quantizer.kmeans_frames=2048"]
MPD_MRD = ["discriminators.sets.0.periods=[2, 5]", "discriminators.sets.0.channels=[8, 16, 32, 64, 64]",
           "discriminators.sets.1.windows=[1024, 256]", "discriminators.sets.1.channels=4"]  # fmt: skip
MSSTFT = ["discriminators.sets.0.windows=[1024, 256]", "discriminators.sets.0.channels=4"]

FAILURES = [
    Failure(1, "vq_outweighs", [RECONSTRUCTION, *weights(commit=100, wave=1, scale=0, mel=0)]),
    Failure(2, "output_scale_3", [RECONSTRUCTION], "output_scale_3"),
    Failure(3, "codebook_loss_missing", [RECONSTRUCTION, FACTORIZED, *weights(commit=1, codebook=0)], "tiny_codebooks"),
    Failure(4, "straight_through_n_times", [RECONSTRUCTION], "gradient_n_times"),
    Failure(4, "commitment_of_one", [RECONSTRUCTION], "commitment_of_the_first"),
    Failure(5, "discriminator_learns_nothing", [
        phases((100, NO_ADVERSARY), (200, PRESCRIBED)), *weights(feat=2), "losses.feat_relative=false", "optim.lr_d=0"]),
    Failure(5, "telugu_prescribed", [
        phases((400, {})), *CONV, *DAC_BODY, *EMA, "discriminators.sets.0.channels=[4, 8, 16, 64, 64, 64]"],
        config="telugu_prescribed"),
    Failure(6, "discriminator_overpowers", [
        phases((60, NO_ADVERSARY), (240, PRESCRIBED | {"optim.lr_g": 1e-6})), *weights(feat=0), "optim.lr_d=5e-3",
        "optim.schedule=constant"]),
    Failure(7, "discriminator_unclipped", [
        phases((100, NO_ADVERSARY), (200, {})), "losses.adversarial=least_squares", "optim.max_grad_norm_d=1e9",
        "optim.lr_d=0.3"]),
    Failure(8, "codebook_collapse", [RECONSTRUCTION, "model.quantizer.dead_threshold=0"], "far_codebooks"),
    Failure(9, "distillation_stuck", [
        RECONSTRUCTION, *SPLIT, *stand_ins("llm", n_codebooks=1), *stand_ins("wavlm", n_codebooks=2),
        *weights(llm=1, wavlm=1, msspec=15, mel=0)]),
    Failure(10, "adversarial_only_too_early", [phases((300, {})), *weights(wave=0, scale=0, mel=0, msspec=0)]),
    Failure(11, "epoch_of_two_steps", [phases((150, NO_ADVERSARY)), "data.segments_per_epoch=16"]),
    Failure(12, "nan_data", [RECONSTRUCTION], "nan_data"),
    Failure(12, "inf_gradients", [RECONSTRUCTION], "inf_gradients"),
    Failure(13, "learning_rate_too_high", [RECONSTRUCTION, "optim.lr_g=1", "optim.schedule=constant"]),
    Failure(13, "learning_rate_100_times", [RECONSTRUCTION, "optim.lr_g=0.1", "optim.schedule=constant"]),
    Failure(14, "clipped_audio", [RECONSTRUCTION], "clipped"),
    Failure(14, "silent_audio", [RECONSTRUCTION], "silent"),
    Failure(14, "shifted_audio", [RECONSTRUCTION], "shifted"),
    Failure(14, "duplicated_audio", [RECONSTRUCTION], "duplicated"),
    Failure(15, "random_mel_filters", [RECONSTRUCTION, *weights(wave=0, scale=0, mel=1)], "random_mel_filters"),
]  # fmt: skip

# ------------------------------------------------------------------ the recipes, scaled down

HALVES = phases((100, NO_ADVERSARY), (150, {}))
DAC = [*CONV, *DAC_BODY, *MPD_MRD, HALVES, "model.quantizer.n_codebooks=4", *weights(commit=1, codebook=4)]
MIMI_BODY = [
    "model.sample_rate=16000", "model.latent_dim=64", "model.encoder.encoder_dim=8", "model.decoder.decoder_dim=128",
    "model.encoder.strides=[2, 4, 4, 5]", "model.decoder.strides=[5, 4, 4, 2]",  # 50 frames a second, as 1 s segments are short
    "model.encoder.transformer={n_layers: 2, n_heads: 4, ff_dim: 256, window: 250}",
    "model.decoder.transformer={n_layers: 2, n_heads: 4, ff_dim: 256, window: 250}", *EMA,
]  # fmt: skip
SPECTRAL = [f"model.{part}={{type: spectral, n_fft: 1280, hop_length: 320, dim: 256, n_blocks: 4}}" for part in
            ("encoder", "decoder")]  # fmt: skip
SECONDS = ["data.manifest=DATA/speech/manifest.jsonl", "data.segment_samples=10240", "data.batch_size=4",
           "data.segments_per_epoch=800", "optim.warmup_steps=30"]  # fmt: skip
BASE = ["model.sample_rate=16000", *(f"model.{part}.{key}" for part in ("encoder", "decoder") for key in (
    "hop_length=320", "window_length=480", "n_fft=320")), "data.manifest=DATA/speech/manifest.jsonl"]  # fmt: skip
AMY = stand_ins("llm", "wavlm", "pitch", hidden_dim=512)
HEALTHY = {  # config: what scales it to a core and 16 kHz; rates, losses and weights stay the recipe's, without a recogniser
    "quickstart": [phases((100, NO_ADVERSARY), (150, {"optim.lr_d": 1e-3}))],
    "base_cpu": [*BASE, phases((150, NO_ADVERSARY), (100, {}))],
    "base": [*BASE, "train.precision=fp32", "data.batch_size=4", *MPD_MRD,
             phases((150, NO_ADVERSARY), (100, {}))],
    "base_cpu_finish": [*BASE, "train.init_from=OUT/base_cpu_SEED", "train.refit_frames=4000", "train.disc_warmup_steps=50",
                        "loss_weights.whisper=0",
                        phases((250, {}))],
    "base_cpu_heard": [*BASE, "train.init_from=OUT/base_cpu_SEED", "loss_weights.whisper=0", phases((250, NO_ADVERSARY))],
    "telugu_finetune": [*BASE, "train.init_from=OUT/base_cpu_SEED", "train.disc_warmup_steps=20",
                        phases((150, NO_ADVERSARY), (100, {}))],
    "mimi": [*SECONDS, *MIMI_BODY, *MSSTFT, "model.quantizer.n_codebooks=8",
             phases((100, NO_ADVERSARY | {"loss_weights.msspec": 2.0, "loss_weights.wave": 0.1}), (150, {}))],
    "telugu": [*CONV, *DAC_BODY, *EMA, *MPD_MRD, HALVES],
    "telugu_stable": [*CONV, *DAC_BODY, *EMA, phases((250, {}))],
    "dac_16khz": DAC, "dac_24khz": DAC, "dac_44khz": [*DAC, "data.segment_samples=4608", "data.val_segment_samples=15872"],
    "encodec_24khz": [*SECONDS, "model.sample_rate=16000", "model.latent_dim=64", "model.encoder.encoder_dim=8",
                      "model.decoder.decoder_dim=128", *EMA, "model.quantizer.codebook_dim=64", "model.quantizer.n_codebooks=8",
                      "model.quantizer.dropout_counts=[2, 4, 8]", *MSSTFT, HALVES],
    "amy": [*SECONDS, "model.sample_rate=16000", "model.latent_dim=256", "model.pad_input=true", *SPECTRAL, *SPLIT,
            "model.quantizer.codebook_size=1024", "model.quantizer.codebook_dim=64", "model.quantizer.kmeans_frames=4096",
            *MSSTFT, *AMY, phases((150, {}), (100, {"loss_weights.msspec": 2.0}))],
    "amy_from_mimi": [*SECONDS, *MIMI_BODY, *MSSTFT, *SPLIT, *AMY, "train.init_from=OUT/mimi_SEED",
                      "train.disc_warmup_steps=20", phases((150, {}), (100, {"loss_weights.msspec": 2.0}))],
}  # fmt: skip
RUNS = {failure.name: failure for failure in FAILURES} | {
    name: Failure(0, name, overrides, "", name) for name, overrides in HEALTHY.items()
}

# -------------------------------------------------------------------------------- faults


class _ScaleAfterTanh(nn.Module):
    """Failure 2 as it was seen: the scale starts at 3, outside of tanh, and an offset of half gives the DC of -1.4."""

    def __init__(self):
        super().__init__()
        self.output_scale, self.offset = nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.tensor(-0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.output_scale * torch.tanh(x + self.offset)


def output_scale_3() -> AbstractContextManager:
    return patch.object(decoder, "ScaledTanh", _ScaleAfterTanh)


def tiny_codebooks() -> AbstractContextManager:
    """Codebooks start between -1/K and 1/K, as in many VQ-VAEs; without a codebook loss they stay there."""
    start = rvq.FactorizedCodebook.__init__

    def started(self: rvq.FactorizedCodebook, *sizes: int) -> None:
        start(self, *sizes)
        nn.init.uniform_(self.codebook.weight, -1 / len(self.codebook.weight), 1 / len(self.codebook.weight))

    return patch.object(rvq.FactorizedCodebook, "__init__", started)


def gradient_n_times() -> AbstractContextManager:
    """Straight-through steps of N codebooks summed over a detached residual: the encoder gets N times the gradient."""
    forward = rvq.EMAResidualVQ.forward

    def forwarded(self: rvq.EMAResidualVQ, z: Tensor, n_codebooks: int | None = None) -> rvq.QuantizerOutput:
        out = forward(self, z, n_codebooks)
        x = len(self.codebooks) * self.project_in(z.transpose(1, 2))
        q = sum(book[out.codes[:, i]] for i, book in enumerate(self.codebooks))
        return out._replace(z_q=self.project_out(x + (q - x).detach()).transpose(1, 2))

    return patch.object(rvq.EMAResidualVQ, "forward", forwarded)


def commitment_of_the_first() -> AbstractContextManager:
    """What a straight-through step with a live residual does: commitment has no gradient after the first codebook."""
    forward = rvq.EMAResidualVQ.forward

    def forwarded(self: rvq.EMAResidualVQ, z: Tensor, n_codebooks: int | None = None) -> rvq.QuantizerOutput:
        out = forward(self, z, n_codebooks)
        distances = torch.cat([out.distances[:, :1], out.distances[:, 1:].detach()], 1)
        return out._replace(distances=distances, commit=rvq.commitment(distances, out.active))

    return patch.object(rvq.EMAResidualVQ, "forward", forwarded)


def far_codebooks() -> AbstractContextManager:
    """No k-means start: random codebooks far from anything the encoder says, so that one entry is the nearest for all."""

    def start(codec: nn.Module, *others: object) -> None:
        for buffer in (codec.quantizer.codebooks, codec.quantizer.ema_sum):
            buffer.mul_(30)

    return patch.object(trainer, "start_codebooks", start)


def nan_data() -> AbstractContextManager:
    """Every fortieth segment is silence divided by its level, 0 / 0."""
    read = SegmentDataset.__getitem__
    return patch.object(SegmentDataset, "__getitem__",
                        lambda self, index: read(self, index) * (math.nan if index % 40 == 0 else 1))  # fmt: skip


def inf_gradients() -> AbstractContextManager:
    """From the hundredth update on every fourth overflows in its backward, as fp16 does; the losses stay finite."""
    loss, calls = trainer.waveform_loss, [0]

    def overflowing(wav: Tensor, wav_hat: Tensor) -> Tensor:
        calls[0] += 1
        term = loss(wav, wav_hat)
        if calls[0] > 100 and calls[0] % 4 == 0:
            term.register_hook(lambda grad: grad * math.inf)
        return term

    return patch.object(trainer, "waveform_loss", overflowing)


def random_mel_filters() -> AbstractContextManager:
    """A filterbank of noise where the training loss believes in mel bands; validation has its own."""
    return patch.object(losses, "mel_filterbank", lambda sample_rate, n_fft, n_mels: torch.randn(
        n_fft // 2 + 1, n_mels, generator=torch.Generator().manual_seed(0)))  # fmt: skip


# Damage to recordings, [N] of [n] samples each


def clipped(wavs: list[np.ndarray]) -> list[np.ndarray]:
    return [0.99 * np.clip(8 * wav, -1, 1) for wav in wavs]


def silent(wavs: list[np.ndarray]) -> list[np.ndarray]:
    return [wav * (index % 5 == 0) for index, wav in enumerate(wavs)]


def shifted(wavs: list[np.ndarray]) -> list[np.ndarray]:
    return [0.5 * wav + 0.2 for wav in wavs]


def duplicated(wavs: list[np.ndarray]) -> list[np.ndarray]:
    return [wavs[index % 3] for index in range(len(wavs))]


DAMAGES: dict[str, Callable[[list[np.ndarray]], list[np.ndarray]]] = {
    "clipped": clipped, "silent": silent, "shifted": shifted, "duplicated": duplicated,
}  # fmt: skip


def damage(kind: str, manifest: Path, folder: Path) -> None:
    """A tenth of the training recordings and a fifth of the validation ones, damaged; duplicates do so to training only."""
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for split, every in (("train", 10), ("val", 5)):
        chosen = [line for line in lines if line["split"] == split][::every]
        wavs = [read_segment(manifest.parent / line["path"], 0, line["n_samples"]) for line in chosen]
        if split == "train" or kind != "duplicated":
            wavs = DAMAGES[kind](wavs)
        for index, (line, wav) in enumerate(zip(chosen, wavs)):
            name = f"{split}{index}.wav"
            sf.write(folder / name, wav, line["sample_rate"], subtype="PCM_16")
            entries.append(line | {"path": name, "n_samples": len(wav)})
    write_atomically(folder / "manifest.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries))


# ------------------------------------------------------------------------------- running


def config_of(run: Failure, data: Path, out_dir: Path, seed: int) -> Config:
    """The run's config, whole."""
    scaled = QUICKSTART if run.config == "quickstart" else []
    damaged = [f"data.manifest={out_dir}/data_{run.fault}/manifest.jsonl"] if run.fault in DAMAGES else []
    items = [item.replace("DATA/", f"{data}/").replace("OUT/", f"{out_dir}/").replace("_SEED", f"_{seed}")
             for item in [*SHORT, *scaled, *run.overrides]]  # fmt: skip
    return load_config(ROOT / "configs" / f"{run.config}.yaml", [*items, *damaged, f"train.seed={seed}"])


def run_one(data: Path, out_dir: Path, name: str, seed: int) -> None:
    """One run with its fault; what ended it before its last step is in ended.txt."""
    run, run_dir, message = RUNS[name], out_dir / f"{name}_{seed}", ""
    shutil.rmtree(run_dir, ignore_errors=True)  # the rest of one that was killed
    if run.fault in DAMAGES:
        damage(run.fault, data / "speech" / "manifest.jsonl", out_dir / f"data_{run.fault}")
    fault = globals()[run.fault]() if run.fault and run.fault not in DAMAGES else nullcontext()
    try:
        with fault:
            trainer.train(config_of(run, data, out_dir, seed), run_dir, False, torch.device("cpu"))
    except ValueError as error:
        if not (run_dir / "metrics.jsonl").is_file():
            raise  # it never began
        message = str(error)
    if name not in ("mimi", "base_cpu"):  # other runs start from those
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    write_atomically(run_dir / "ended.txt", message)


def run_all(data: Path, out_dir: Path, names: list[str], seeds: list[int]) -> None:
    """Runs that have not ended yet, two at once, one thread each."""
    waiting = [(name, seed) for name in names or RUNS for seed in (seeds if name in HEALTHY else seeds[:1])
               if not (out_dir / f"{name}_{seed}" / "ended.txt").is_file()]  # fmt: skip
    running: list[subprocess.Popen] = []
    while waiting or running:
        running = [process for process in running if process.poll() is None]
        if waiting and len(running) < 2:
            name, seed = waiting.pop(0)
            command = [sys.executable, __file__, "one", data, out_dir, "--only", name, "--seeds", str(seed)]
            with open(out_dir / f"{name}_{seed}.log", "w") as log:
                running.append(subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}))
        time.sleep(1)


# -------------------------------------------------------------------------------- report

RECONSTRUCTED = ("val/snr_db", "val/amplitude_ratio")
PANELS = {  # number: what shows the failure
    1: ("val/amplitude_ratio", "val/snr_db", "train/grad_z_commit", "train/grad_z_signal"),
    2: ("train/loss_g", "train/output_dc", "train/output_peak", "val/snr_db"),
    3: ("train/codebook_drift", "train/commit", *RECONSTRUCTED),
    4: ("train/ste_gain", "train/commit_reach", "train/vq_error", "val/mel"),
    5: ("train/loss_d", "train/feat", "train/acc_fake", "val/snr_db"),
    6: ("train/loss_d", "train/adv_g", "train/acc_fake", "val/mel"),
    7: ("train/grad_norm_d_max", "train/loss_d", "train/feat", "val/mel"),
    8: ("val/perplexity_0", "val/used_0", "train/vq_error", "val/mel"),
    9: ("train/wavlm", "train/llm", "val/wavlm_gain", "val/llm_gain"),
    10: ("train/adv_g", "train/feat", "val/mel", "val/snr_db"),
    11: ("epoch/train/mel", "train/mel", "val/mel", "train/audio_hours"),
    12: ("train/skipped", "train/grad_norm_g", "train/loss_g", "val/mel"),
    13: ("train/loss_g", "train/grad_norm_g_max", "val/mel", "val/snr_db"),
    14: ("train/input_clipped", "train/input_silent", "train/input_dc", "train/mel"),
    15: ("train/mel", "val/mel", "train/mel_off", "val/snr_db"),
}


class Told(NamedTuple):
    """What the doctor said of a run from its metrics alone, one diagnosis a validation."""

    rows: list[dict]
    diagnoses: list[Diagnosis]

    def first(self, number: int) -> float:
        """Step at which that failure first led the findings; infinite where it never did."""
        return min((d.step for d in self.diagnoses if d.findings and d.findings[0].number == number), default=math.inf)

    def titles(self, level: str) -> list[str]:
        """Different findings of a level over the whole run."""
        return sorted({finding.title for d in self.diagnoses for finding in d.findings if finding.level == level})


def consult(run_dir: Path) -> Told:
    """Ask the doctor after every validation, as if the run had come only so far."""
    rows = read_rows(run_dir)
    steps = sorted({row["step"] for row in rows if any(key.startswith("val/") and key.endswith("_step") for key in row)})
    return Told(rows, [diagnose(History.from_rows(rows, until=step)) for step in steps or [rows[-1]["step"]]])


def failure_table(told: dict[str, Told]) -> list[str]:
    lines = ["| # | run | steps | named at | allowed | wrong first findings | at the end | ended by itself |", "|---" * 8 + "|"]
    for failure in FAILURES:
        for name, case in ((name, case) for name, case in told.items() if name.rpartition("_")[0] == failure.name):
            last, step = case.diagnoses[-1], case.first(failure.number)
            planned = History.from_rows(case.rows).last("train/total_steps", last.step)
            wrong = {d.findings[0].number for d in case.diagnoses if d.findings} - {failure.number}
            said = "; ".join(f"{f.number} {f.title} ({f.level}, {f.confidence:.0%})" for f in last.findings) or "nothing"
            named = f"{step:g}" if math.isfinite(step) else "never"
            lines.append(f"| {failure.number} | {name} | {last.step} | {named} | {max(0.1 * planned, 300):g} "
                         f"| {', '.join(map(str, sorted(wrong))) or '–'} | {last.verdict}: {said} "
                         f"| {'yes' if last.step < planned else 'no'} |")  # fmt: skip
    return lines


def healthy_table(told: dict[str, Told]) -> list[str]:
    lines = ["| run | steps | verdict at the end | critical, whole run | warnings, whole run |", "|---" * 5 + "|"]
    for name, case in told.items():
        if name.rpartition("_")[0] in HEALTHY:
            last, found = case.diagnoses[-1], [", ".join(case.titles(level)) or "–" for level in ("critical", "warning")]
            lines.append(f"| {name} | {last.step} | {last.verdict} | {found[0]} | {found[1]} |")
    return lines


def picture(failure: Failure, case: Told, healthy: Told, beside: str) -> str:
    """The failing run beside a healthy one, with a line where the doctor named it."""
    own, other = History.from_rows(case.rows), History.from_rows(healthy.rows)
    panels = {name: {failure.name: own.series(name), f"healthy {beside}": other.series(name)}
              for name in PANELS[failure.number]}  # fmt: skip
    step = case.first(failure.number)
    return curves.draw(panels, f"{failure.number}. {failure.name.replace('_', ' ')}",
                       [(step, "named by the doctor")] if math.isfinite(step) else [])  # fmt: skip


def report(out_dir: Path, pictures: Path) -> None:
    """Two tables on standard output; a picture of every failure that has a healthy run to stand beside."""
    told = {path.parent.name: consult(path.parent) for path in sorted(out_dir.glob("*/ended.txt"))}
    print("\n".join([*failure_table(told), "", *healthy_table(told)]))
    pictures.mkdir(parents=True, exist_ok=True)
    for failure in FAILURES:
        beside = "amy" if failure.number == 9 else "quickstart"
        case = next((case for name, case in told.items() if name.rpartition("_")[0] == failure.name), None)
        healthy = next((case for name, case in told.items() if name.rpartition("_")[0] == beside), None)
        if case and healthy:
            write_atomically(pictures / f"{failure.name}.svg", picture(failure, case, healthy, beside))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["run", "one", "report"])
    parser.add_argument("folders", type=Path, nargs="+", help="DATA OUT_DIR, or of a report OUT_DIR [PICTURES]")
    parser.add_argument("--only", nargs="*", default=[], choices=RUNS, metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of healthy runs; failures take the first")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.command == "report":
        report(args.folders[0], args.folders[1] if len(args.folders) > 1 else ROOT / "docs" / "failures")
        return 0
    data, out_dir = (folder.resolve() for folder in args.folders)
    out_dir.mkdir(parents=True, exist_ok=True)
    if args.command == "one":
        run_one(data, out_dir, args.only[0], args.seeds[0])
    else:
        run_all(data, out_dir, args.only, args.seeds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
