"""Amy's configs, and the whole path from Mimi's weights and real teachers to probes, at small sizes."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
import yaml
from conftest import speech_like
from test_convert import make_random
from test_teachers import save_qwen, save_wavlm
from transformers import MimiConfig, MimiModel

from codec.cli import main
from codec.config import load_config, model_differences, phase_config
from codec.model import Codec
from train_codec_gan import train

CONFIGS = Path(__file__).parents[1] / "configs"
WORDS = ["the", "cat", "sat", "on", "the", "mat"]


@pytest.fixture(scope="module")
def speech(tmp_path_factory) -> Path:
    """Eight utterances at 24 kHz of four speakers, with words: two of the speakers for testing."""
    folder, lines, words = tmp_path_factory.mktemp("amy"), [], []
    for i in range(8):
        n_samples = 30000 + 1111 * i
        sf.write(folder / f"{i}.wav", speech_like(n_samples, 24000, seed=i), 24000, subtype="PCM_16")
        split = ("train", "train", "train", "val", "test", "test", "test", "test")[i]
        lines.append({"path": f"{i}.wav", "speaker": f"s{i // 2}", "split": split, "sample_rate": 24000,
                      "n_samples": n_samples})  # fmt: skip
        edges = np.linspace(0.05, n_samples / 24000 - 0.05, len(WORDS) + 1)
        timed = [{"word": w, "start": a, "end": b} for w, a, b in zip(WORDS, edges[:-1], edges[1:])]
        words.append({"path": f"{i}.wav", "text": " ".join(WORDS), "words": timed})
    for name, rows in (("manifest", lines), ("words", words)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def codec(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def small(name: str, speech: Path, tmp_path: Path, width: int) -> Path:
    """A config of ours with every size cut down; what makes it Amy stays."""
    raw = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    model = raw["model"]
    model["latent_dim"] = 16
    for body, dim in (("encoder", "encoder_dim"), ("decoder", "decoder_dim")):
        model[body][dim] = 4 * (1 if body == "encoder" else 16)
        model[body]["transformer"] |= {"n_layers": 2, "n_heads": 2, "ff_dim": 32, "window": 10}
    model["quantizer"] |= {"n_codebooks": 5, "codebook_size": 64, "codebook_dim": 8, "kmeans_frames": 64}
    raw["discriminators"]["sets"] = [{"type": "msstft", "windows": [512], "channels": 4}]
    raw["distill"]["llm"] |= {"features": str(speech / "llm"), "dim": width, "hidden_dim": 8}
    raw["distill"]["wavlm"] |= {"features": str(speech / "wavlm"), "dim": width, "hidden_dim": 8}
    raw["distill"]["pitch"] |= {"features": str(speech / "pitch"), "hidden_dim": 8}
    raw["losses"] |= {"mel_windows": [256], "mel_bins": [20], "msspec_windows": [256]}
    raw["data"] |= {"manifest": str(speech / "manifest.jsonl"), "segment_samples": 19200, "val_segment_samples": 19200,
                    "batch_size": 2, "segments_per_epoch": 4, "n_workers": 0, "val_segments": 2}  # fmt: skip
    raw["train"] |= {"precision": "fp32", "log_every": 1, "val_every": 3, "checkpoint_every": 3, "disc_warmup_steps": 1,
                     "init_from": str(speech / "mimi")}  # fmt: skip
    raw["phases"] = [phase | {"steps": 3} for phase in raw["phases"]]
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path / "small.yaml"


def test_amy_is_mimi_with_a_prosodic_codebook():
    amy, grown, mimi = (load_config(CONFIGS / f"{name}.yaml") for name in ("amy", "amy_from_mimi", "mimi"))
    assert not model_differences(amy.model, grown.model)
    assert amy.model.encoder == mimi.model.encoder and amy.model.decoder == mimi.model.decoder
    with torch.device("meta"):
        codec = Codec(amy.model)
    assert (codec.n_codebooks, codec.frame_rate_hz) == (9, 12.5) and codec.bitrate_kbps == pytest.approx(1.2375)
    assert (amy.distill.llm.n_codebooks, amy.distill.wavlm.n_codebooks) == (1, 2)
    first, second = (phase_config(amy, i).loss_weights for i in (0, 1))
    assert first.msspec == 15 and second.msspec < first.msspec and first.wavlm == second.wavlm > 0


def test_amy_grows_from_a_converted_mimi_with_real_teachers_and_is_probed(speech, tmp_path, capsys):
    torch.manual_seed(5)
    theirs = MimiModel(MimiConfig(
        num_filters=4, hidden_size=16, upsample_groups=16, num_hidden_layers=2, intermediate_size=32, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=10, codebook_size=64, codebook_dim=8,
        vector_quantization_hidden_dimension=8, num_quantizers=6, num_semantic_quantizers=1))  # fmt: skip
    make_random(theirs, "mimi").save_pretrained(tmp_path / "theirs")
    manifest, words = speech / "manifest.jsonl", speech / "words.jsonl"
    assert codec("convert", "--from", tmp_path / "theirs", speech / "mimi") == 0
    assert codec("features", manifest, speech / "wavlm", "--speech", save_wavlm(tmp_path / "w", "layer")) == 0
    assert codec("features", manifest, speech / "llm", "--text", save_qwen(tmp_path / "q"), "--words", words) == 0
    assert codec("features", manifest, speech / "pitch", "--pitch") == 0
    config = load_config(small("amy_from_mimi", speech, tmp_path, 16))
    train(config, tmp_path / "run", False, torch.device("cpu"))
    assert "codebooks 1 are new" in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = {name for line in lines for name in line}
    wanted = ["train/llm_step", "train/wavlm_epoch", "val/wavlm_gain_step", "train/grad_wavlm_to_1_step",
              "train/pull_llm_wavlm_step", "val/perplexity_1_step", "train/wavlm_llm_ratio_step",
              "val/pitch_gain_step"]  # fmt: skip
    assert logged.issuperset(wanted)
    values = {name: line[name] for line in lines for name in line}
    assert all(isinstance(values[name], float) and np.isfinite(values[name]) for name in wanted)
    assert codec("probe", tmp_path / "run", manifest, "--words", words, "--out", tmp_path / "probe.json") == 0
    figures = json.loads((tmp_path / "probe.json").read_text())
    assert "semantic+prosodic" in json.dumps(figures)
    capsys.readouterr()
    assert codec("info", tmp_path / "run") == 0 and "(1 semantic, 1 prosodic, 3 acoustic)" in capsys.readouterr().out
    assert codec("convert", "--from", tmp_path / "run", tmp_path / "published") == 0
    card = (tmp_path / "published" / "README.md").read_text()
    assert "Teachers: llm is `q`, layer -2, read from the first 1 codebooks; wavlm is `w`" in card
    wavs = [speech / "4.wav", speech / "6.wav"]
    assert codec("probe", tmp_path / "run", "--swap", *wavs, tmp_path / "swapped.wav") == 0
    assert sf.info(str(tmp_path / "swapped.wav")).frames == sf.info(str(wavs[0])).frames
