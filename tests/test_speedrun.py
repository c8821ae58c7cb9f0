"""The ladder of benchmarks/speedrun.py: what its rungs have in common, and how its clock is read."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from conftest import speech_like

from codec.config import model_differences
from codec.model import Codec

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import speedrun  # noqa: E402


@pytest.mark.parametrize("rung", speedrun.LADDER, ids=lambda rung: rung.name)
def test_every_rung_has_the_bitrate_and_the_parameters_of_ours(rung):
    config, ours = (speedrun.config_of(r, Path("none.jsonl")) for r in (rung, speedrun.LADDER[-1]))
    assert Codec(config.model).bitrate_kbps == pytest.approx(6.0)
    ratio = speedrun.n_parameters(config.model) / speedrun.n_parameters(ours.model)
    assert 0.95 < ratio < 1.05 and (ratio >= 1 or rung.name not in ("dac", "encodec"))
    assert config.total_steps == speedrun.UPDATES and config.model.sample_rate == 24000


def test_the_shipped_config_differs_from_the_rung_before_it_in_its_adversary_alone():
    *_, last, ours = (speedrun.config_of(rung, Path("none.jsonl")) for rung in speedrun.LADDER)
    assert not model_differences(last.model, ours.model) and last.model.quantizer == ours.model.quantizer
    assert all(getattr(last.data, key) == getattr(ours.data, key) for key in ("segment_samples", "batch_size"))
    weights, optim = vars(last.loss_weights), vars(last.optim)
    assert {name for name in weights if weights[name] != vars(ours.loss_weights)[name]} <= {"adv", "feat"}
    assert {name for name in optim if optim[name] != vars(ours.optim)[name]} <= {"lr_d", "max_grad_norm_d"}


def test_the_time_to_a_quality_is_read_between_looks():
    looks = [{"seconds": 10.0 * i, "stoi": value} for i, value in enumerate((0.1, 0.5, 0.7, 0.6))]
    assert speedrun.time_to(looks, "stoi", 0.6) == pytest.approx(15.0)
    assert speedrun.time_to(looks, "stoi", 0.3) == pytest.approx(5.0)
    assert speedrun.time_to(looks, "stoi", 0.1) == 0.0
    assert speedrun.time_to(looks, "stoi", 0.71) is None


def test_a_rung_trains_by_the_clock_and_is_looked_at(tmp_path, monkeypatch, capsys):
    lines = []
    for i in range(8):
        wav = speech_like(30000, 24000, seed=i)
        sf.write(tmp_path / f"{i}.wav", wav, 24000, subtype="PCM_16")
        lines.append({"path": f"{i}.wav", "speaker": "s", "split": "train" if i < 6 else "val", "sample_rate": 24000,
                      "n_samples": len(wav)})  # fmt: skip
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    small = ("model.quantizer.kmeans_frames=1024", "data.batch_size=2")
    rung = speedrun.LADDER[-1]
    monkeypatch.setattr(speedrun, "LADDER", [speedrun.Rung(rung.name, rung.config, rung.changes + small, 0.6, rung.what, 0.3)])
    monkeypatch.setattr(speedrun, "LOOKS", 2)
    monkeypatch.setattr(sys, "argv", ["speedrun.py", "run", str(manifest), str(tmp_path / "out"), "--minutes", "0.2"])
    speedrun.main()
    run = json.loads((tmp_path / "out" / "ours.json").read_text())
    start, first, last = run["looks"]
    assert start["updates"] == 0 < start["seconds"]  # the start from speech is on the clock
    assert 6 <= first["seconds"] < last["seconds"] and last["updates"] > first["updates"] > 0
    assert all(np.isfinite(value) for value in last.values()) and 0 < last["stoi"] < 1
    assert f"| `ours` | {rung.what} |" in capsys.readouterr().out
