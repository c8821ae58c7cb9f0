"""The model card: README.md of a folder of weights, with what is known about them filled in."""

from __future__ import annotations

import json
import math
from pathlib import Path

from torch import Tensor

from codec.checkpoint import load_state
from codec.config import TEACHERS, Config, ModelConfig, parse_config, phase_config, to_dict
from codec.pretrained import public_name

USE_CODEC = '''from codec.audio import load_audio
from codec.model import Codec

codec = Codec.from_pretrained("FOLDER_OR_HUB_ID")
wav = load_audio("in.wav", codec.sample_rate)[None]    # [1, 1, T]
gain = codec.gain(wav)                                 # to the level it was trained on
codes = codec.encode_long(gain * wav)                  # [1, N, T']
wav_hat = codec.decode_long(codes, wav.shape[-1]) / gain'''

USE_TRANSFORMERS = '''from transformers import AutoFeatureExtractor, AutoModel

model = AutoModel.from_pretrained("FOLDER_OR_HUB_ID")
extract = AutoFeatureExtractor.from_pretrained("FOLDER_OR_HUB_ID")
inputs = extract(wav, sampling_rate=extract.sampling_rate, return_tensors="pt")    # wav: NumPy, [T]
wav_hat = model(inputs["input_values"]).audio_values'''

LICENCE = """> **TODO, author:** no licence is stated yet. Say here, and as `license:` at the top of this file, under which
> terms these weights may be used; the training data and any weights this run started from may bind you."""

NOT_RECORDED = "## Training\n\n> **TODO, author:** say on which data, how long and by which config these weights were trained."


def model_card(model: ModelConfig, n_parameters: int, *, library: str = "codec", title: str = "Neural speech codec",
               training: str = NOT_RECORDED) -> str:  # fmt: skip
    """README.md with the front matter that the hub reads.

    Args:
        n_parameters: weights and codebooks, weight norm folded.
        library: "codec" or "transformers": which of them loads the folder.
        training: Markdown between the use and the licence, as `run_section` or `source_section` gives it.
    """
    quantizer, frame_rate_hz = model.quantizer, model.sample_rate / model.encoder.hop_length
    bits = math.log2(quantizer.codebook_size)
    kbps = frame_rate_hz * bits * quantizer.n_codebooks / 1000
    return f"""---
library_name: {library}
pipeline_tag: audio-to-audio
tags:
- audio
- speech
- speech codec
---

# {title}

| sample rate | frame rate | codebooks | bitrate | parameters |
|---|---|---|---|---|
| {model.sample_rate} Hz | {frame_rate_hz:g} Hz | {quantizer.n_codebooks} × {quantizer.codebook_size} entries | \
{kbps:.4g} kbps, {frame_rate_hz * bits / 1000:.4g} a codebook | {n_parameters / 1e6:.2f}M |

## Use

```python
{USE_CODEC if library == "codec" else USE_TRANSFORMERS}
```{_level_line(model) if library == "transformers" else ""}

{training}

## Licence

{LICENCE}
"""


def _level_line(model: ModelConfig) -> str:
    """What transformers' classes cannot say."""
    if model.level_db is None:
        return ""
    return f"\n\nIt was trained on speech at {model.level_db:g} dB RMS and codes other levels badly: bring `wav` there first."


def n_weights(tensors: dict[str, Tensor]) -> int:
    """Parameters and codebooks of a codec's tensors; statistics and the gains of weight norm do not count."""
    left_out = ("ema_count", "ema_sum", "weight.original0")
    return sum(value.numel() for name, value in tensors.items() if not name.endswith(left_out))


def source_section(source: str) -> str:
    """Training of weights that were only converted."""
    return f"## Training\n\nConverted from `{source}`; no training run here. Its own card says how it was trained."


def run_section(checkpoint: Path) -> str:
    """Data, recipe and metrics of the run that a checkpoint belongs to.

    Args:
        checkpoint: folder with config.yaml and state.json; metrics.jsonl is the run's, where the folder still lies in one.
    """
    path = checkpoint / "config.yaml"
    config = parse_config(path.read_text(encoding="utf-8"), str(path))
    step = load_state(checkpoint)["step"]
    folder = checkpoint.resolve().parent
    metrics = (_metrics(folder.parent, step) if folder.name == "checkpoints" else
               "## Metrics\n\nThe log of the run was out of reach when this card was written.")  # fmt: skip
    return "\n\n".join([_data(config), _recipe(config, step), metrics])


def _data(config: Config) -> str:
    """What the run was trained on, from the statistics beside its manifest."""
    manifest = Path(config.data.manifest)
    path = manifest.with_name("stats.json")
    if not path.is_file():
        return f"## Data\n\nManifest `{manifest.name}`; its stats.json was out of reach when this card was written."
    stats = json.loads(path.read_text(encoding="utf-8"))
    rows = [f"| {split} | {part['hours']:.2f} | {part['n_speakers']} | {part['n_utterances']} |"
            for split, part in stats["splits"].items()]  # fmt: skip
    head = f"{stats['hours']:.2f} h at {config.model.sample_rate} Hz, from {stats['n_recordings']} recordings."
    return "\n".join(["## Data", "", head, "", "| split | hours | speakers | utterances |", "|---|---|---|---|", *rows])


def _recipe(config: Config, step: int) -> str:
    """Steps, phases, losses, discriminators and optimizer."""
    audio_h = step * config.data.batch_size * config.data.segment_samples / config.model.sample_rate / 3600
    optim, sets = config.optim, [kind.type for kind in config.discriminators.sets]
    source = config.train.init_from
    start = f" It started from the weights of `{public_name(source)}`." if source else ""
    rows = []
    for index, phase in enumerate(config.phases):
        weights = to_dict(phase_config(config, index).loss_weights)
        losses = ", ".join(f"{name} {weight:g}" for name, weight in weights.items() if weight)
        rows.append(f"| {phase.name} | {phase.steps} | {losses} |")
    return "\n".join([
        "## Recipe", "",
        f"Config `{config.name}`, {step} of {config.total_steps} steps, {audio_h:.2f} h of audio seen: "
        f"{config.data.batch_size} segments of {config.data.segment_samples / config.model.sample_rate:.2f} s a step.{start}",
        f"AdamW, learning rate {optim.lr_g:g} (discriminators {optim.lr_d:g}), betas {list(optim.betas)}, {optim.schedule}. "
        f"Discriminators: {', '.join(sets) or 'none'}; {config.losses.adversarial} loss"
        f"{', gradients balanced' if config.losses.balancer else ''}.{_teachers(config)}", "",
        "| phase | steps | loss weights |", "|---|---|---|", *rows,
    ])  # fmt: skip


def _teachers(config: Config) -> str:
    """Whose features the first codebooks were taught by: their licences may bind."""
    told = []
    for name in TEACHERS:
        teacher = getattr(config.distill, name)
        if teacher is not None:
            path = Path(teacher.features) / "teacher.json"
            known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            told.append(f"{name} is `{known.get('teacher', 'unknown')}`, layer {known.get('layer', 'unknown')}, read from the "
                        f"first {teacher.n_codebooks} codebooks")  # fmt: skip
    return f" Teachers: {'; '.join(told)}." if told else ""


def _metrics(run_dir: Path, step: int) -> str:
    """The validation of this checkpoint (the last one not after it) beside the best one of the run."""
    from codec.runlog import read_metrics  # here: it loads tensorboard, which using a codec does not need

    lines = read_metrics(run_dir) if (run_dir / "metrics.jsonl").is_file() else []
    validations = [line for line in lines if line.get("val/mel_step") is not None and line["step"] <= step]
    if not validations:
        return "## Metrics\n\nNo validation was logged up to this checkpoint."
    last, best = validations[-1], min(validations, key=lambda line: line["val/mel_step"])
    scores = {name.removeprefix("val/").removesuffix("_step"): (last[name], best.get(name))
              for name in last if name.startswith("val/") and name.endswith("_step")}  # fmt: skip
    rows = [f"| {name} | {_number(here)} | {_number(there)} |" for name, (here, there) in scores.items()
            if not name.startswith(("used_", "perplexity_"))]  # fmt: skip
    perplexities = zip(*[pair for name, pair in scores.items() if name.startswith("perplexity_") and None not in pair])
    spans = [f"{min(values):.0f} to {max(values):.0f}" for values in perplexities] or ["", ""]
    return "\n".join(["## Metrics", "", "On fixed segments of the validation split.", "",
                      f"| metric | here (step {last['step']}) | best mel (step {best['step']}) |", "|---|---|---|", *rows,
                      f"| codebook perplexity | {spans[0]} | {spans[1]} |"])  # fmt: skip


def _number(value: float | None) -> str:
    """A logged number; None where it was not finite."""
    return "not finite" if value is None else f"{value:.4g}"
