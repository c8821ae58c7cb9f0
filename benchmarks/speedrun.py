"""Time to quality: single changes from the DAC-shaped recipe to `configs/base_cpu.yaml`, each given the same wall time.

    python benchmarks/speedrun.py run MANIFEST_24KHZ OUT_DIR [--minutes 6] [--only dac ours]
    python benchmarks/speedrun.py table OUT_DIR

From `dac` on every rung is the one before it with one thing changed; all have 6 kbps and 4.3 to 4.5M parameters. Runs go one
after the other on an otherwise idle machine, with the real networks, losses and updates of `train_codec_gan.py`; schedules
and phases go by the clock, so that each recipe comes to its end. The start from speech (components, k-means) is on the clock;
it stands still while a run is judged: STOI and mel distance of whole utterances of the validation split, PESQ-WB at the end,
with averaged weights where the recipe keeps them. A finished rung is not run again.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pesq import PesqError, pesq
from pystoi import stoi
from recipes import n_parameters

from codec import metrics
from codec.audio import read_segment, resample_array
from codec.config import Config, load_config, phase_at, phase_config
from codec.data import StepSampler, Utterance, read_manifest, segment_loader
from codec.files import write_atomically
from codec.model import Codec
from train_codec_gan import average_weights, build, exchange_weights, open_data, start_from_speech, train_step

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
LOOKS, N_UTTERANCES, MIN_S = 6, 24, 0.8  # looks a run after the first; utterances of at least so many seconds
UPDATES = 100_000  # what a config calls its length; the clock decides how many there are
WANTED = 0.80  # STOI


@dataclass(frozen=True)
class Rung:
    """One recipe: a config, what changes it, from which share of the time on it has an adversary, and until which share the
    waveform comes first."""

    name: str
    config: str
    changes: tuple[str, ...]
    adversary_from: float
    what: str
    waveform_until: float = 0.0


def phases(rung: Rung) -> str:
    """`--set` item of a run's phases, in updates of which UPDATES are the whole."""
    first, last = round(UPDATES * rung.waveform_until), round(UPDATES * rung.adversary_from)
    alone = {"loss_weights.adv": 0.0, "loss_weights.feat": 0.0}
    parts = [{"name": "waveform", "steps": first, "set": alone | {"loss_weights.wave": 5.0, "loss_weights.cspec": 1.0}},
             {"name": "reconstruction", "steps": last - first, "set": alone},
             {"name": "adversarial", "steps": UPDATES - last}]  # fmt: skip
    return "phases=" + json.dumps([part for part in parts if part["steps"]])


SEGMENTS = ("data.segments_per_epoch=4000", "data.n_workers=0", "train.precision=fp32")
DAC = (
    "model.encoder.encoder_dim=18", "model.decoder.decoder_dim=352", "model.latent_dim=256", "model.quantizer.n_codebooks=8",
    "data.segment_samples=9280", "data.batch_size=4",
    "discriminators.sets.0.channels=[8, 32, 128, 256, 256]", "discriminators.sets.1.channels=8",
    # sums over codebooks, so the weights follow their number
    "loss_weights.commit=2.0", "loss_weights.codebook=8.0",
)  # fmt: skip
ENCODEC = (
    "model.encoder.encoder_dim=18", "model.decoder.decoder_dim=272", "model.latent_dim=88", "model.quantizer.codebook_dim=88",
    "model.quantizer.n_codebooks=8", "model.quantizer.dropout_counts=[2, 4, 8]", "model.quantizer.kmeans_frames=16384",
    "data.segment_samples=24000", "data.batch_size=2", "discriminators.sets.0.channels=8",
)  # fmt: skip
FLOOR = ("losses.mel_floor=1.0e-2",)
LATE = ("loss_weights.wave=5.0", "loss_weights.scale=100.0", "loss_weights.mel=1.0")
EMA = (
    "model.quantizer={type: ema, n_codebooks: 8, codebook_size: 1024, codebook_dim: 64, dead_threshold: 0.2, "
    "kmeans_frames: 32768, dropout: 0.25, dropout_counts: [2, 4, 8]}", "loss_weights.commit=0.25", "loss_weights.codebook=0.0",
)  # fmt: skip
SCALES = ("losses.mel_windows=[192, 768, 2048]", "losses.mel_bins=[20, 40, 100]")
RATE = ("optim.lr_g=1.0e-3", "optim.schedule=cosine", "optim.min_lr_ratio=0.05", f"optim.warmup_steps={UPDATES // 50}",
        "optim.max_grad_norm_g=5.0", "optim.ema_decay=0.0")  # fmt: skip
BODY = "{{type: spectral, n_fft: 1920, hop_length: 480, dim: 256, n_blocks: {}, expansion: 3, kernel_size: 7}}"
SPECTRAL = (f"model.encoder={BODY.format(3)}", f"model.decoder={BODY.format(4)}", "model.quantizer.n_codebooks=12",
            "model.quantizer.dropout_counts=[3, 6, 12]", "data.segment_samples=19200", "data.batch_size=8")  # fmt: skip
CSPEC = ("loss_weights.cspec=5.0", "loss_weights.wave=1.0")
LAPPED_BODY = "{{type: lapped, window_length: 720, hop_length: 480, n_fft: 1920, n_envelope: 16, dim: 256, n_blocks: {}}}"
LAPPED = (f"model.encoder={LAPPED_BODY.format(2)}", f"model.decoder={LAPPED_BODY.format(7)}", "model.latent_dim=64")
BEAM = ("model.quantizer.beam=8",)
SHORT_BODY = LAPPED_BODY.replace("n_fft: 1920, n_envelope: 16", "n_fft: 480, n_spectra: 4, n_envelope: 32")
SHORT = (f"model.encoder={SHORT_BODY.format(2)}", f"model.decoder={SHORT_BODY.format(7)}")
# what base_cpu.yaml has for an hour and not for minutes: slow codebooks, other speeds, the longest search, ten blocks
MINUTES = ("model.quantizer.decay=0.99", "model.quantizer.dead_threshold=0.2", "data.speeds=[1.0]",
           "model.quantizer.beam=8", "model.decoder.n_blocks=7")
LADDER = [
    Rung("encodec", "encodec_24khz", ENCODEC, 0.0, "EnCodec's shape: causal, LSTM, MS-STFT discriminator, balancer"),
    Rung("dac", "dac_24khz", DAC, 0.0, "DAC's shape: Snake, factorised codebooks, adversary from the start"),
    Rung("floor", "dac_24khz", DAC + FLOOR, 0.0, "floor of the mel loss 1e-2, not 1e-5"),
    Rung("late", "dac_24khz", DAC + FLOOR + LATE, 0.9, "waveform, level and mel; adversary in the last tenth"),
    Rung("ema", "dac_24khz", DAC + FLOOR + LATE + EMA, 0.9, "Euclidean EMA codebooks, started by k-means"),
    Rung("scales", "dac_24khz", DAC + FLOOR + LATE + EMA + SCALES, 0.9, "3 mel scales, not 7"),
    Rung("rate", "dac_24khz", DAC + FLOOR + LATE + EMA + SCALES + RATE, 0.9, "learning rate 1e-3 and a cosine, not 1e-4"),
    Rung("spectral", "dac_24khz", DAC + FLOOR + LATE + EMA + SCALES + RATE + SPECTRAL, 0.9,
         "STFT, ConvNeXt at 50 frames a second, inverse STFT"),
    Rung("cspec", "dac_24khz", DAC + FLOOR + LATE + EMA + SCALES + RATE + SPECTRAL + CSPEC, 0.9,
         "compressed complex spectra, in the first half beside a strong waveform", 0.5),
    Rung("lapped", "dac_24khz", DAC + FLOOR + LATE + EMA + SCALES + RATE + SPECTRAL + CSPEC + LAPPED, 0.9,
         "principal components of waveform and envelope to start from, networks beside them"),
    Rung("beam", "dac_24khz", DAC + FLOOR + LATE + EMA + SCALES + RATE + SPECTRAL + CSPEC + LAPPED + BEAM, 0.9,
         "8 sums of codes kept while they are searched for, at inference"),
    Rung("spectra", "dac_24khz", DAC + FLOOR + LATE + EMA + SCALES + RATE + SPECTRAL + CSPEC + LAPPED + BEAM + SHORT, 0.9,
         "four short spectra a frame, not a long one; half of the numbers for them"),
    Rung("ours", "base_cpu", RATE + MINUTES, 0.9, "one lean spectral discriminator, hinge: base_cpu.yaml"),
]  # fmt: skip


def config_of(rung: Rung, manifest: Path) -> Config:
    return load_config(ROOT / f"configs/{rung.config}.yaml",
                       [f"data.manifest={manifest}", *SEGMENTS, *rung.changes, phases(rung)])  # fmt: skip


def read_validation(manifest: Path, sample_rate: int) -> list[np.ndarray]:
    """Whole utterances, the same in every run."""
    long_enough = [u for u in read_manifest(manifest, "val", sample_rate) if u.n_samples >= MIN_S * sample_rate]
    picks = np.random.default_rng(1).permutation(len(long_enough))[:N_UTTERANCES]
    return [_read(long_enough[i]) for i in picks]


def _read(utterance: Utterance) -> np.ndarray:
    return read_segment(utterance.path, 0, utterance.n_samples)


@torch.no_grad()
def judge(codec: Codec, wavs: list[np.ndarray], with_pesq: bool) -> dict[str, float]:
    """Means over the utterances, at all codebooks."""
    names = ("stoi", "mel_db", "snr_db", "amplitude_ratio", *["pesq_wb"] * with_pesq)
    scores: dict[str, list[float]] = {name: [] for name in names}
    codec.eval()
    for samples in wavs:
        wav = torch.from_numpy(samples)[None, None]
        wav_hat = codec(wav).wav_hat
        scores["mel_db"].append(metrics.mel_distance(wav, wav_hat, codec.sample_rate).item())
        scores["snr_db"].append(metrics.snr_db(wav, wav_hat).item())
        scores["amplitude_ratio"].append(metrics.amplitude_ratio(wav, wav_hat).item())
        a, b = (resample_array(x, codec.sample_rate, 16000) for x in (samples, wav_hat[0, 0].numpy()))
        scores["stoi"].append(float(stoi(a, b, 16000)))
        if with_pesq:
            scores["pesq_wb"].append(_pesq(a, b))
    codec.train()
    return {name: statistics.fmean(values) for name, values in scores.items()}


def _pesq(wav: np.ndarray, wav_hat: np.ndarray) -> float:
    try:
        return pesq(16000, wav, wav_hat, "wb")
    except PesqError:  # it finds no speech in an output that is nearly silent; 1.04 is what unlike sounds have
        return 1.04


def run_rung(rung: Rung, manifest: Path, seconds: float) -> dict:
    """Train by the clock; returns what was seen at each look."""
    config = config_of(rung, manifest)
    t = build(config, CPU)
    segments, _ = open_data(config)
    wavs = read_validation(manifest, config.model.sample_rate)
    batches = iter(segment_loader(segments, StepSampler(0, 2**31, config.data.batch_size, 0, 1), 0, pin_memory=False))
    started = time.monotonic()
    start_from_speech(t.codec, segments.segments, config, CPU)
    average_weights(t, decay=0.0)
    start = time.monotonic() - started
    looks, trained, updates = [], start, 0

    def look() -> None:
        exchange_weights(t)  # with the averages, where the recipe keeps them
        looks.append({"seconds": trained, "updates": updates, **judge(t.codec, wavs, trained >= seconds)})
        exchange_weights(t)
        print(rung.name, {key: round(value, 3) for key, value in looks[-1].items()}, flush=True)

    look()  # some recipes are a codec before their first update
    while trained < seconds:
        share = (trained - start) / (seconds - start)  # schedules begin with the updates
        started, step = time.monotonic(), min(int(UPDATES * share), UPDATES - 1)
        train_step(next(batches)[0], t, phase_config(config, phase_at(config, step)), step)
        trained, updates = trained + time.monotonic() - started, updates + 1
        if trained >= start + (seconds - start) * len(looks) / LOOKS:
            look()
    audio_s = updates * config.data.batch_size * config.data.segment_samples / config.model.sample_rate
    return {"name": rung.name, "what": rung.what, "seconds": seconds, "parameters": n_parameters(config.model),
            "audio_per_s": audio_s / trained, "looks": looks}  # fmt: skip


def time_to(looks: list[dict], key: str, wanted: float) -> float | None:
    """Seconds until a figure was reached, read off the straight line between two looks; None: it was not."""
    if looks[0][key] >= wanted:
        return looks[0]["seconds"]
    before = looks[0]
    for look in looks[1:]:
        if look[key] >= wanted:
            share = (wanted - before[key]) / max(look[key] - before[key], 1e-9)
            return before["seconds"] + share * (look["seconds"] - before["seconds"])
        before = look
    return None


def table(out_dir: Path) -> str:
    """Markdown: one row a rung."""
    lines = [f"| rung | what changed | parameters M | audio s/s | minutes to STOI {WANTED:.2f} | STOI | PESQ-WB | mel dB | "
             "SNR dB | amplitude |", "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for rung in LADDER:
        path = out_dir / f"{rung.name}.json"
        if path.exists():
            run = json.loads(path.read_text())
            last, reached = run["looks"][-1], time_to(run["looks"], "stoi", WANTED)
            minutes = f"{reached / 60:.1f}" if reached else f"not in {run['seconds'] / 60:g}"
            lines.append(f"| `{rung.name}` | {rung.what} | {run['parameters'] / 1e6:.2f} | {run['audio_per_s']:.1f} | "
                         f"{minutes} | {last['stoi']:.3f} | {last['pesq_wb']:.2f} | {last['mel_db']:.2f} | "
                         f"{last['snr_db']:.1f} | {last['amplitude_ratio']:.2f} |")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("manifest", type=Path)
    run.add_argument("out_dir", type=Path)
    run.add_argument("--minutes", type=float, default=6)
    run.add_argument("--only", nargs="+", choices=[rung.name for rung in LADDER], default=[rung.name for rung in LADDER])
    commands.add_parser("table").add_argument("out_dir", type=Path)
    args = parser.parse_args()
    if args.command == "run":
        args.out_dir.mkdir(parents=True, exist_ok=True)
        for rung in LADDER:
            path = args.out_dir / f"{rung.name}.json"
            if rung.name in args.only and not path.exists():
                result = run_rung(rung, args.manifest.resolve(), 60 * args.minutes)
                write_atomically(path, json.dumps(result, indent=1) + "\n")
    print(table(args.out_dir))


if __name__ == "__main__":
    main()
