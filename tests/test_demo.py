import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from PIL import Image
from test_cli import CONFIG, save_run

from codec import metrics
from codec.runlog import RunLog

sys.path.insert(0, str(Path(__file__).parent.parent / "demo"))
import fetch_speech  # noqa: E402
import report  # noqa: E402


def write_manifest(folder: Path, speakers: dict[str, str], n_each: int = 3) -> Path:
    rng = np.random.default_rng(0)
    lines = []
    for speaker, split in speakers.items():
        for number in range(n_each):
            name = f"{speaker}_{number}.wav"
            sf.write(folder / name, 0.1 * rng.standard_normal(12000), 16000)
            row = {"path": name, "speaker": speaker, "split": split, "sample_rate": 16000, "n_samples": 12000}
            lines.append(json.dumps(row))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "manifest.jsonl"


@pytest.fixture
def run_dir(tmp_path):
    log = RunLog(save_run(tmp_path / "run", seed=0))
    log.scalars(1, {"x": 1.0})
    log.close()
    return tmp_path / "run"


def test_the_report_holds_means_per_speaker_and_pairs_to_listen_to(run_dir, tmp_path, capsys):
    assert "n_codebooks: 3" in CONFIG
    manifest = write_manifest(tmp_path, {"a": "train", "es": "test", "el": "test", "da": "val"})
    assert report.main([str(run_dir), str(manifest)]) == 0
    text = (run_dir / "report.md").read_text()
    assert text.strip() in capsys.readouterr().out
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in text.splitlines() if line.startswith("| ")}
    assert {"all", "`es`", "`el`", "1", "2", "3"} < rows.keys() and "`a`" not in rows
    assert rows["all"][0].strip() == "6" and rows["`es`"][0].strip() == "3"
    assert "0 of 2 speakers have other recordings in the training split" in text
    assert "1000 generator updates" in text

    pairs = sorted((run_dir / "samples").glob("*_original.wav"))
    snr = {}
    for path in pairs:
        wav, wav_hat = (
            torch.from_numpy(sf.read(path.with_name(path.name.replace("original", kind)), dtype="float32")[0])
            for kind in ("original", "reconstruction")
        )
        snr.setdefault(path.name[2:4], []).append(metrics.snr_db(wav[None, None], wav_hat[None, None]).item())
        assert Image.open(path.with_name(path.name.replace("_original.wav", ".png"))).mode == "RGB"
    assert len(pairs) == 6 and sorted(snr) == ["el", "es"]
    for speaker, values in snr.items():
        assert abs(np.mean(values) - float(rows[f"`{speaker}`"][2])) < 0.02


def test_a_second_report_leaves_no_samples_of_the_first(run_dir, tmp_path):
    manifest = write_manifest(tmp_path, {"es": "test"})
    assert report.main([str(run_dir), str(manifest)]) == 0
    (run_dir / "samples" / "9_old_original.wav").touch()
    assert report.main([str(run_dir), str(manifest), "--seed", "1"]) == 0
    assert len(list((run_dir / "samples").iterdir())) == 9


def test_absent_packages_are_said(run_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pesq", None)
    monkeypatch.setitem(sys.modules, "pystoi", None)
    assert report.main([str(run_dir), str(write_manifest(tmp_path, {"es": "test"}))]) == 0
    text = (run_dir / "report.md").read_text()
    assert "No PESQ-WB: `pip install pesq`" in text and "No STOI: `pip install pystoi`" in text


@pytest.mark.parametrize("fault", ["no_manifest", "no_utterances", "no_run"])
def test_a_report_on_nothing_is_one_line(run_dir, tmp_path, capsys, fault):
    manifest = write_manifest(tmp_path, {} if fault == "no_utterances" else {"a": "test"})
    if fault == "no_manifest":
        manifest.unlink()
    if fault == "no_run":
        shutil.rmtree(run_dir)
    assert report.main([str(run_dir), str(manifest)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("report: ") and error.count("\n") == 1
    assert not (run_dir / "report.md").exists()


def test_recordings_too_few_for_a_test_split_are_reported_on_and_it_is_said(run_dir, tmp_path):
    assert report.main([str(run_dir), str(write_manifest(tmp_path, {"me": "train"}))]) == 0
    assert "that training used: there were too few for a test split" in (run_dir / "report.md").read_text()


def test_training_time_leaves_out_stops(tmp_path):
    times = [100.0, 160.0, 5000.0, 5060.0]
    lines = [json.dumps({"step": step, "time": time}) for step, time in enumerate(times)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert report.training_minutes(tmp_path) == 2.0


def make_stamps(folder: Path) -> Path:
    for name in ("a/cat_desc_es.ogg", "b/cat_desc_es.ogg", "a/cat_desc_ru.ogg", "a/cat.ogg", "a/cat_desc.ogg",
                 "a/cat_desc_lt.ogg", "a/cat_desc_da.ogg", "a/cat_es.ogg"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_phrases_are_laid_out_by_language_and_the_test_languages_never_train(tmp_path):
    assert fetch_speech.lay_out(make_stamps(tmp_path / "stamps"), tmp_path / "out") == 4
    with open(tmp_path / "out" / "metadata.csv", newline="") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"es/a-cat.ogg", "es/b-cat.ogg", "ru/a-cat.ogg", "da/a-cat.ogg"}
    assert all((tmp_path / "out" / path).is_file() for path in rows)
    assert rows["es/b-cat.ogg"] == {"path": "es/b-cat.ogg", "speaker": "es", "split": "test"}
    assert rows["ru/a-cat.ogg"]["split"] == "train" and rows["da/a-cat.ogg"]["split"] == "val"


def test_fetching_again_does_nothing_and_without_apt_names_the_way_out(tmp_path, monkeypatch, capsys):
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "metadata.csv").touch()
    monkeypatch.setenv("PATH", "/nonexistent")
    assert fetch_speech.main([str(tmp_path / "done")]) == 0
    assert fetch_speech.main([str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert "no apt-get" in error and "make demo DATA=folder" in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_changed_package_is_refused_and_another_version_only_warned_of(tmp_path, monkeypatch, capsys):
    def mirror_with(folder: Path, name: str) -> Path:
        folder.mkdir()
        monkeypatch.setattr(fetch_speech, "_apt", lambda *_, folder: (folder / name).write_bytes(b"x"))
        return folder

    with pytest.raises(ValueError, match="sha256 .* expected 6db6c1bf"):
        fetch_speech.download(mirror_with(tmp_path / "changed", fetch_speech.PINNED_FILE))
    other = "tuxpaint-stamps-default_2030.01.01-1_all.deb"
    assert fetch_speech.download(mirror_with(tmp_path / "other", other)).name == other
    assert "warning" in capsys.readouterr().err
