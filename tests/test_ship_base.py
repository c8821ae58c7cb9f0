"""benchmarks/ship_base.py: a run becomes the package's model with a card of what was measured, or all stays as it was."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_config

from codec.cli import main
from codec.model import Codec
from train_codec_gan import train

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import ship_base  # noqa: E402

RESULTS = {
    "test_set": {"files": ["a.wav", "b.wav"], "seconds": 90.0, "languages": ["te", None, "es"]},
    "metrics": {"pesq_wb": {"title": "PESQ-WB", "digits": 2}, "wer": {"title": "WER", "digits": 3}},
    "systems": [
        {"name": "tiny@1", "family": "tiny", "setting": "2 of 3 codebooks", "kbps": 1.234, "payload_kbps": 1.06,
         "codebooks": [{"used": 0.5}, {"used": 0.914}],
         "means": {"pesq_wb": {"mean": 1.5, "low": 1.414, "high": 1.6}, "wer": {"mean": None}}},
        {"name": "speex@6", "family": "speex", "setting": "6 kbps", "kbps": 6.0, "payload_kbps": 6.0, "means": {}},
        {"name": "opus@6", "family": "opus", "setting": "6 kbps", "kbps": 7.5, "payload_kbps": None,
         "means": {"pesq_wb": {"mean": 2.0, "low": None, "high": None}, "wer": {"mean": None}}},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def run(manifest, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ship")
    shutil.copytree(manifest.parent, folder / "speech")
    part = {"hours": 0.25, "n_speakers": 3, "n_utterances": 10}
    stats = {"hours": 0.5, "n_recordings": 12, "splits": {"train": part, "val": part}}
    (folder / "speech/stats.json").write_text(json.dumps(stats))
    train(tiny_config([], folder / "speech/manifest.jsonl"), folder / "tiny", False, torch.device("cpu"))
    assert main(["prior", str(folder / "tiny"), str(folder / "speech/manifest.jsonl"), "--steps", "2"]) == 0
    return folder / "tiny"


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """Where the package's model lies; there is an older one."""
    base = tmp_path / "codec/base"
    base.mkdir(parents=True)
    (base / "README.md").write_text("older")
    monkeypatch.setattr(ship_base, "BASE", base)
    monkeypatch.setattr(ship_base, "ROOT", tmp_path)
    return base


def evaluation(folder: Path) -> Path:
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(RESULTS))
    return folder


def test_the_package_gets_the_run_its_card_and_its_curves(run, package, tmp_path):
    out = evaluation(tmp_path / "evaluation")
    assert ship_base.ship(run, [out], "It cannot sing.", "Stopped once.", "one core") == 8
    wav = torch.randn(1, 1, 4000)
    codes, shipped = (Codec.from_pretrained(folder).encode(wav) for folder in (run, package))
    assert (codes == shipped).float().mean() > 0.9  # in fp16
    card = (package / "README.md").read_text()
    for said in ("no natural Telugu. It cannot sing. It looks ahead", "On one core;", "Stopped once. Curves:",
                 "has heard 0.2 hours", "2 files, 1.5 minutes, es, te:", "| metric | base, 2 codes | opus@6 |",
                 "| kbps on disk | 1.23 | 7.50 |", "| of which codes | 1.06 | - |", "a second of 3 codes of", "back, 1.1 kbps",
                 "| PESQ-WB | 1.50 [1.41, 1.60] | 2.00 |",
                 "| codebooks used | 50 to 91 % | - |"):  # fmt: skip
        assert said in card, said
    assert "speex" not in card and "| WER |" not in card and "older" not in card  # a row that nobody has a value in
    assert "<svg" in (tmp_path / "docs/base/tiny.svg").read_text()
    assert [path.name for path in package.parent.iterdir()] == ["base"]


@pytest.mark.parametrize("breaks", ["table", "draw_curves"])
def test_what_fails_leaves_the_package_as_it_was(run, package, tmp_path, monkeypatch, breaks):
    monkeypatch.setattr(ship_base, breaks, lambda of: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ship_base.ship(run, [evaluation(tmp_path / "evaluation")], "", "", "one core")
    assert (package / "README.md").read_text() == "older"
    assert [path.name for path in package.parent.iterdir()] == ["base"] and not (tmp_path / "docs").exists()
