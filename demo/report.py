"""Reconstruct held-out speech with a trained run and say how good it is.

    python demo/report.py RUN_DIR MANIFEST

leaves RUN_DIR/report.md and RUN_DIR/samples/ (wav pairs, spectrograms) and prints the report.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from codec import metrics
from codec.audio import load_audio, save_audio
from codec.checkpoint import find_checkpoint, load_state
from codec.data import Utterance, read_manifest
from codec.files import write_atomically
from codec.model import Codec
from codec.runlog import read_metrics, spectrogram_image

MAX_UTTERANCES = 100
MAX_SAMPLES = 6
MIN_SECONDS = 0.5  # shorter than this PESQ and STOI find nothing to judge
PAUSE_S = 300.0  # a longer gap between two lines of the log is a stop, not training
COLUMNS = {
    "snr_db": "SNR dB",
    "si_sdr_db": "SI-SDR dB",
    "amplitude_ratio": "amplitude ratio",
    "mel_distance": "mel distance dB",
    "pesq_wb": "PESQ-WB",
    "stoi": "STOI",
}


def main(arguments: list[str] | None = None) -> int:
    """Command line; 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(description="Report on a trained run from the held-out recordings.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("manifest", type=Path, help="manifest.jsonl of prepare_speaker_data.py")
    parser.add_argument("--which", choices=("latest", "best"), default="latest", help="checkpoint of the run")
    parser.add_argument("--seed", type=int, default=0, help="chooses the utterances")
    options = parser.parse_args(arguments)
    try:
        report(options.run_dir, options.manifest, options.which, options.seed)
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


def report(run_dir: Path, manifest: Path, which: str, seed: int) -> None:
    """Measure, write samples and report.md, print.

    Raises:
        ValueError: no checkpoint, no manifest, or no utterances in it.
    """
    start = time.monotonic()
    checkpoint = find_checkpoint(run_dir, which)
    codec = Codec.from_pretrained(checkpoint)
    utterances = {name: read_manifest(manifest, name, codec.sample_rate) for name in ("test", "val", "train")}
    split = next((name for name in utterances if utterances[name]), "test")
    chosen = choose(utterances[split], MIN_SECONDS * codec.sample_rate, seed)
    trained_on = {utterance.speaker for utterance in utterances["train"]}
    rows, codes, samples = [], [], []
    for utterance in chosen:
        wav = load_audio(utterance.path, codec.sample_rate)
        codes.append(codec.encode(wav[None]))
        wav_hat = codec.decode(codes[-1], wav.shape[-1])[0]
        row = {"speaker": utterance.speaker, "seconds": wav.shape[-1] / codec.sample_rate}
        rows.append(row | measure(wav, wav_hat, codec.sample_rate))
        samples.append((wav, wav_hat))
    names = write_samples(run_dir / "samples", chosen, samples, codec.sample_rate)
    text = "\n\n".join(
        [
            f"# Report of {run_dir}",
            listening_section(run_dir, names, split),
            quality_section(rows, trained_on, split),
            codebook_section(torch.cat(codes, -1), codec.codebook_size),
            model_section(codec, checkpoint, run_dir),
        ]
    )
    write_atomically(run_dir / "report.md", text + "\n")
    print(text)
    print(f"\nWritten in {time.monotonic() - start:.0f} s: {run_dir / 'report.md'} and {run_dir / 'samples'}/")


def choose(utterances: list[Utterance], min_samples: float, seed: int) -> list[Utterance]:
    """A seeded choice of at most MAX_UTTERANCES utterances of some length.

    Raises:
        ValueError: there is none.
    """
    long_enough = sorted(utterance for utterance in utterances if utterance.n_samples >= min_samples)
    if not long_enough:
        raise ValueError(f"the manifest has no utterances of {min_samples:.0f} samples; prepare more recordings")
    return random.Random(seed).sample(long_enough, min(MAX_UTTERANCES, len(long_enough)))


def measure(wav: Tensor, wav_hat: Tensor, sample_rate: int) -> dict[str, float]:
    """Every measure of one utterance, [1, T] against [1, T]; NaN where it has none or the package is absent."""
    pair = (wav[None], wav_hat[None])
    values = {
        "snr_db": metrics.snr_db(*pair),
        "si_sdr_db": metrics.si_sdr_db(*pair),
        "amplitude_ratio": metrics.amplitude_ratio(*pair),
        "mel_distance": metrics.mel_distance(*pair, sample_rate),
        "pesq_wb": metrics.pesq_wb(*pair, sample_rate),
        "stoi": metrics.stoi(*pair, sample_rate),
    }
    return {name: math.nan if value is None else value.item() for name, value in values.items()}


def write_samples(
    folder: Path, chosen: list[Utterance], samples: list[tuple[Tensor, Tensor]], sample_rate: int
) -> list[str]:
    """Write wav pairs and spectrograms, speakers taking turns; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("*_original.wav"), *folder.glob("*_reconstruction.wav"), *folder.glob("*.png")]:
        old.unlink()
    seen: list[str] = []
    order = []
    for index, utterance in enumerate(chosen):
        order.append((seen.count(utterance.speaker), index))
        seen.append(utterance.speaker)
    names = []
    for _, index in sorted(order)[:MAX_SAMPLES]:
        wav, wav_hat = samples[index]
        name = f"{len(names) + 1}_{chosen[index].path.stem}"
        save_audio(folder / f"{name}_original.wav", wav, sample_rate)
        save_audio(folder / f"{name}_reconstruction.wav", wav_hat, sample_rate)
        Image.fromarray(spectrogram_image(wav, wav_hat, sample_rate)).save(folder / f"{name}.png")
        names.append(name)
    return names


def listening_section(run_dir: Path, names: list[str], split: str) -> str:
    """Where to listen, and one picture."""
    pairs = [f"- `samples/{name}_original.wav`, then `samples/{name}_reconstruction.wav`" for name in names]
    unseen = "that training used: there were too few for a test split" if split == "train" else "that training never saw"
    head = f"In `{run_dir}`, original and reconstruction of recordings {unseen}:"
    picture = "Spectrograms of the first pair, original above reconstruction; 0 Hz is at the bottom of each:"
    return "\n".join(["## Listen", "", head, "", *pairs, "", picture, "", f"![](samples/{names[0]}.png)"])


def quality_section(rows: list[dict], trained_on: set[str], split: str) -> str:
    """Means over all utterances and per speaker, and what "held out" means here."""
    groups = {"all": rows}
    for row in sorted(rows, key=lambda row: row["speaker"]):
        groups.setdefault(f"`{row['speaker']}`", []).append(row)
    known = {row["speaker"] for row in rows} & trained_on
    note = f"{len(known)} of {len(groups) - 1} speakers have other recordings in the training split."
    head = f"Means over utterances of the {split} split. {note}"
    table = [
        "| speaker | utterances | seconds | " + " | ".join(COLUMNS.values()) + " |",
        "|---|" + "---:|" * (2 + len(COLUMNS)),
    ]
    for name, group in groups.items():
        cells = [name, str(len(group)), f"{sum(row['seconds'] for row in group):.0f}"]
        cells += [_mean_cell([row[column] for row in group]) for column in COLUMNS]
        table.append(f"| {' | '.join(cells)} |")
    for name, package in (("pesq_wb", "pesq"), ("stoi", "pystoi")):
        if all(math.isnan(row[name]) for row in rows):
            table.append(f"\nNo {COLUMNS[name]}: `pip install {package}`.")
    return "\n".join(["## Quality", "", head, "", *table])


def codebook_section(codes: Tensor, codebook_size: int) -> str:
    """Use of each codebook over codes [1, N, T'] of all utterances."""
    used, perplexity = metrics.codebook_usage(codes, codebook_size)
    head = f"Of {codebook_size} entries each, over the {codes.shape[-1]} frames of these utterances."
    rows = [f"| {i} | {100 * u:.1f} % | {p:.0f} |" for i, (u, p) in enumerate(zip(used, perplexity, strict=True), 1)]
    return "\n".join(["## Codebooks", "", head, "", "| codebook | used | perplexity |", "|---:|---:|---:|", *rows])


def model_section(codec: Codec, checkpoint: Path, run_dir: Path) -> str:
    """Size, rates and training."""
    n_params = sum(parameter.numel() for parameter in codec.parameters())
    rates = f"{codec.sample_rate} Hz, {codec.frame_rate_hz:g} frames/s x {codec.n_codebooks} codebooks"
    steps, minutes = load_state(checkpoint).get("step", "unknown"), training_minutes(run_dir)
    return "\n".join(
        [
            "## Model and training",
            "",
            f"- checkpoint `{checkpoint}`, model {codec.model_id}",
            f"- {n_params:,} parameters, {rates} of {codec.codebook_size} entries = {codec.bitrate_kbps:.2f} kbps",
            f"- {steps} generator updates in {minutes:.1f} minutes",
        ]
    )


def training_minutes(run_dir: Path) -> float:
    """Time between the log's lines, stops left out."""
    times = [line["time"] for line in read_metrics(run_dir)]
    gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    return sum(gap for gap in gaps if 0 < gap < PAUSE_S) / 60


def _mean_cell(values: list[float]) -> str:
    """Mean of the finite values."""
    finite = [value for value in values if math.isfinite(value)]
    return f"{sum(finite) / len(finite):.2f}" if finite else "-"


if __name__ == "__main__":
    torch.set_num_threads(1)  # utterances are short: more threads wait for each other, badly on a busy machine
    sys.exit(main())
