"""Put a run into the package as its own model: `codec/base`, with a card of what `evaluate_codec.py` measured, and its curves.

    python benchmarks/ship_base.py RUN EVALUATION_DIR...

The evaluations are of the run itself; their rows of it, of Opus at the nearest rates and of the uncoded audio are shown.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from codec import prior
from codec.card import n_weights, run_section
from codec.checkpoint import find_checkpoint, load_state
from codec.config import Config, parse_config, trained_counts
from codec.convert import convert
from codec.data import read_manifest
from codec.files import write_atomically
from codec.model import Codec
from codec.pretrained import BASE
from codec.runlog import read_metrics

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ROOT / "benchmarks/train_base.sh"  # stands in the card
sys.path.insert(0, str(ROOT / "benchmarks/failures"))
import curves  # noqa: E402

METRICS = (
    "pesq_wb", "stoi", "estoi", "visqol", "distillmos", "dnsmos", "speaker_similarity", "wer", "wer_uncoded", "phoneme_error",
    "log_f0_rmse", "voicing_error", "mel_db", "snr_db", "si_sdr_db", "amplitude_ratio", "dc_offset",
)  # fmt: skip
PANELS = {"val/mel_step": "val/mel, dB", "val/snr_db_step": "val/snr_db", "val/amplitude_ratio_step": "val/amplitude_ratio"}

CARD = """# The model that comes with the package

24 kHz speech to 50 frames a second of {counts} codes of 10 bits and back, {rates} kbps in the files of the first table,
whose codes are entropy coded; {parameters:.2f}M parameters and codebooks. It is what `codec encode`,
`decode`, `reconstruct` and `Codec.from_pretrained()` use when nothing else is named, and what `configs/telugu_finetune.yaml`
starts from.

**What it cannot do.** It has heard {hours:.1f} hours, the last stage {last_hours:.1f}, of phrases, words, letters, prompts
and the dialogues of games; no running speech, no music, no noise, no natural Telugu. {below}It looks ahead
{ahead_ms:.0f} ms, so it is not for conversations.

## Measured

By `evaluate_codec.py` on recordings that no training used; means with 95 % bootstrap intervals over the files. Files of one
speaker are not independent. Short test sets cannot use every entry: half a minute has 1,500 frames for the 1,024 of a codebook.
WER is counted by Whisper base, with half a second of silence around each file. One of the losses listened to its encoder;
phonemes, DistillMOS and the others are heard by networks that training did not meet.

{tables}

## Training

`benchmarks/train_base.sh`:

```bash
{commands}```

On {machine}; the last stage took {minutes:.0f} minutes for {step} updates. {history}Curves: `docs/base/`.

{training}

## Licences

The weights: MIT, as the package. They were trained on packages of Debian, of which nothing is passed on here:
tuxpaint-stamps-default, fillets-ng-data-cs and -nl (GPL-2), klettres-data (GPL-2+), ktuberling-data (GPL-2+, some CC),
hedgewars-data (GFDL-1.3), gcin-voice (LGPL-3 and CC-BY-3.0: Edward Der-Hua Liu; ChionMeilin, voice of Chu Lo) and
asterisk-core-sounds-en and -fr (CC-BY-SA-3.0: Allison Smith; June Wallack).
"""


def table(results: dict) -> str:
    """Markdown: one row a metric, one column a system."""
    systems = results["systems"]
    ours = [s for s in systems if s["family"] == systems[0]["family"]]
    shown = ours + [s for s in systems if s["family"] == "opus" or s["name"] == "uncoded"]
    names = [f"base, {s['setting'].split()[0]} codes" if s in ours else s["name"] for s in shown]
    test_set, metrics = results["test_set"], results["metrics"]
    languages = ", ".join(sorted({language for language in test_set["languages"] if language}))
    lines = [f"{len(test_set['files'])} files, {test_set['seconds'] / 60:.1f} minutes, {languages}:", "",
             "| metric | " + " | ".join(names) + " |", "|---|" + "---|" * len(shown),
             "| kbps on disk | " + " | ".join(f"{s['kbps']:.2f}" if s["kbps"] else "-" for s in shown) + " |",
             "| of which codes | " + " | ".join(f"{s['payload_kbps']:.2f}" if s["payload_kbps"] else "-" for s in shown) + " |"]
    for key in METRICS:
        cells = [cell(s["means"].get(key), metrics[key]["digits"]) for s in shown] if key in metrics else ["-"]
        if set(cells) != {"-"}:
            lines.append(f"| {metrics[key]['title']} | {' | '.join(cells)} |")
    if any(s.get("codebooks") for s in ours):
        lines.append(f"| codebooks used | {' | '.join(used(s.get('codebooks')) for s in shown)} |")
    return "\n".join(lines)


def listed(items: list) -> str:
    """1, 2 or 3"""
    *before, last = map(str, items)
    return f"{', '.join(before)} or {last}" if before else last


def cell(figures: dict | None, digits: int) -> str:
    if not figures or figures["mean"] is None:
        return "-"
    spread = "" if figures.get("low") is None else f" [{figures['low']:.{digits}f}, {figures['high']:.{digits}f}]"
    return f"{figures['mean']:.{digits}f}{spread}"


def used(levels: list[dict] | None) -> str:
    """The least and the most used codebook."""
    shares = [100 * level["used"] for level in levels or []]
    return f"{min(shares):.0f} to {max(shares):.0f} %" if shares else "-"


def draw_curves(run_dir: Path) -> str:
    rows = [row for row in read_metrics(run_dir) if row.get("val/mel_step") is not None]
    steps = np.array([row["step"] for row in rows])
    panels = {title: {"base": (steps, np.array([row[key] for row in rows], float))} for key, title in PANELS.items()}
    return curves.draw(panels, "The run of codec/base, validation", [])


def ship(run: Path, evaluations: list[Path], below: str, history: str, machine: str) -> int:
    """Make `run` the package's model: BASE anew, whole or not at all, and the run's curves. Its number of updates."""
    checkpoint = find_checkpoint(run)
    rows = read_metrics(run)
    step = load_state(checkpoint)["step"]
    with tempfile.TemporaryDirectory(dir=BASE.parent) as folder:
        new = Path(folder) / "base"
        convert(str(run), new, small=True)
        if not (new / prior.FILE).is_file():
            raise ValueError(f"{checkpoint}: has no {prior.FILE}, expected one; make it by `codec prior {run} MANIFEST`")
        codec = Codec.from_pretrained(new)
        training = run_section(checkpoint)
        manifest, rate = Path(config_of(checkpoint).data.manifest), codec.sample_rate
        last_hours = sum(u.n_samples for u in read_manifest(manifest, "train", rate)) / rate / 3600
        hours = json.loads(manifest.with_name("stats.json").read_text())["splits"]["train"]["hours"]
        results = [json.loads((path / "results.json").read_text()) for path in evaluations]
        systems = results[0]["systems"]
        rates = [f"{s['payload_kbps']:.1f}" for s in systems if s["family"] == systems[0]["family"]]
        frames = codec.decoder.reach_frames / 2 + (codec.receptive_field_samples / 2) / codec.hop_length
        card = CARD.format(
            counts=listed(trained_counts(codec.config)), rates=listed(rates),
            parameters=n_weights(codec.state_dict()) / 1e6, hours=hours, last_hours=last_hours,
            below=below + " " * bool(below), history=history + " " * bool(history),
            ahead_ms=1000 * frames / codec.frame_rate_hz, tables="\n\n".join(table(r) for r in results),
            commands=TRAIN.read_text(encoding="utf-8"), training=training.replace("## ", "### "),
            machine=machine, minutes=trained_minutes(rows), step=step,
        )  # fmt: skip
        write_atomically(new / "README.md", card)
        curves_drawn = draw_curves(run)
        if BASE.exists():
            BASE.rename(Path(folder) / "before")
        new.rename(BASE)
    (ROOT / "docs/base").mkdir(parents=True, exist_ok=True)
    write_atomically(ROOT / f"docs/base/{run.name}.svg", curves_drawn)
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("evaluations", type=Path, nargs="+")
    parser.add_argument("--below", default="", help="a sentence on where it falls short")
    parser.add_argument("--history", default="", help="a sentence on how the run differed from the config")
    parser.add_argument("--machine", default="2 CPU cores", help="that trained it")
    args = parser.parse_args()
    step = ship(args.run, args.evaluations, args.below, args.history, args.machine)
    print(f"{BASE}: {sum(path.stat().st_size for path in BASE.iterdir()) / 1e6:.1f} MB, step {step}")


def config_of(checkpoint: Path) -> Config:
    path = checkpoint / "config.yaml"
    return parse_config(path.read_text(encoding="utf-8"), str(path))


def trained_minutes(rows: list[dict]) -> float:
    """From the log's clock, without the pauses between sittings."""
    times = np.array([row["time"] for row in rows if "time" in row])
    gaps = np.diff(times)
    return float(gaps[gaps < 300].sum()) / 60


if __name__ == "__main__":
    main()
