import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import speech_like, tiny_config
from test_cli import save_run
from test_convert import tiny

import evaluate_codec
from codec import measure
from codec.classical import missing
from codec.delay import compensate
from codec.judges import METRICS, Clip, Undefined
from codec.ledger import Ledger
from codec.measure import decode_job, decoded_path, measure_job
from codec.metrics import snr_db
from codec.model import Codec
from codec.systems import UNCODED, System, code_clip, distinct, neural_systems, parse_against, trained_counts
from codec.testset import Recording, read_test_set

RATE = 16000
pytest.importorskip("pesq")
pytest.importorskip("pystoi")
QUICK = "snr_db,amplitude_ratio,si_sdr_db,mel_db,log_f0_rmse,pesq_wb,stoi"


def write_set(folder: Path) -> Path:
    """Two speakers, three recordings each; and one each that is silent, short, missing, and of another rate."""
    lines = []

    def add(name: str, wav: np.ndarray | None, speaker: str, rate: int = RATE) -> None:
        if wav is not None:
            sf.write(folder / name, wav, rate, subtype="PCM_16")
        lines.append({"path": name, "speaker": speaker, "split": "test", "sample_rate": RATE, "n_samples": 20000})

    for i in range(6):
        add(f"{'ab'[i % 2]}{i}.wav", speech_like(20000 + 1111 * i, RATE, seed=i), "ab"[i % 2])
    add("silent.wav", np.zeros(20000), "a")
    damaged = io.BytesIO()
    sf.write(damaged, speech_like(20000, RATE), RATE, format="FLAC")
    (folder / "damaged.flac").write_bytes(damaged.getvalue()[: len(damaged.getvalue()) // 2])
    add("damaged.flac", None, "a")
    holed = speech_like(20000, RATE)
    holed[5] = np.nan
    sf.write(folder / "holed.wav", holed, RATE, subtype="FLOAT")
    add("holed.wav", None, "a")
    add("short.wav", speech_like(2000, RATE), "a")
    add("missing.wav", None, "b")
    add("other.wav", speech_like(20000, 8000), "b", 8000)
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "manifest.jsonl"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    return save_run(tmp_path_factory.mktemp("run") / "tiny", seed=0)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def evaluated(run_dir, manifest, tmp_path_factory) -> Path:
    """OUT of a small evaluation."""
    out = tmp_path_factory.mktemp("out")
    against = "opus@6" if not missing("opus") else ""
    arguments = ["--checkpoint", str(run_dir), "--manifest", str(manifest), "--out", str(out), "--metrics", QUICK]
    arguments += ["--against", against, "--codebooks", "1,3", "--examples", "2", "--workers", "0", "--no_speed"]
    assert evaluate_codec.main(arguments) == 0
    return out


def results_of(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def test_every_bitrate_is_judged_as_by_hand(evaluated, run_dir, manifest):
    results = results_of(evaluated)
    codec = Codec.from_pretrained(run_dir)
    files = results["test_set"]["files"]
    for system in results["systems"][:2]:
        n = int(system["setting"].split()[0])
        for name, value in zip(files, system["values"]["snr_db"]):
            wav = torch.from_numpy(sf.read(manifest.parent / name, dtype="float32")[0])[None, None]
            if wav.any():
                wav_hat = codec.decode(codec.encode(wav, n), wav.shape[-1])
                assert value == pytest.approx(snr_db(wav, wav_hat).item(), abs=0.01)
        assert system["nominal_kbps"] == pytest.approx(400 * n * np.log2(20) / 1000)
        assert system["kbps"] > system["nominal_kbps"]  # a header, and 5 bits for 20 entries
        counts = [row["used"] for row in system["codebooks"]]
        assert len(counts) == n and all(0 < used <= 1 for used in counts)
        assert system["delay_ms"] == 0
    assert [system["name"] for system in results["systems"][:2]] == ["tiny@1.73", "tiny@5.19"]


def test_the_uncoded_audio_has_the_scores_of_an_identity(evaluated):
    uncoded = next(s for s in results_of(evaluated)["systems"] if s["name"] == "uncoded")
    assert uncoded["means"]["pesq_wb"]["mean"] == pytest.approx(4.64, abs=0.01)
    assert uncoded["means"]["stoi"]["mean"] == pytest.approx(1, abs=1e-6) and uncoded["means"]["amplitude_ratio"]["mean"] == 1
    assert uncoded["means"]["mel_db"]["mean"] == 0 and uncoded["means"]["log_f0_rmse"]["mean"] == 0
    assert uncoded["kbps"] == 256


def test_what_cannot_be_judged_is_said_and_not_averaged(evaluated):
    results = results_of(evaluated)
    skipped = {entry["file"]: entry["why"] for entry in results["test_set"]["skipped"]}
    assert set(skipped) == {"short.wav", "missing.wav", "other.wav", "damaged.flac", "holed.wav"}
    assert "NaN" in skipped["holed.wav"] and "damaged" in skipped["damaged.flac"]
    assert "missing" in skipped["missing.wav"] and "shorter than" in skipped["short.wav"] and "8000 Hz" in skipped["other.wav"]
    place = results["test_set"]["files"].index("silent.wav")
    for system in results["systems"]:
        for metric in ("pesq_wb", "stoi", "amplitude_ratio"):
            values = system["values"][metric]
            assert values[place] is None and system["means"][metric]["undefined"] == 1
            assert system["means"][metric]["mean"] == pytest.approx(np.mean([v for v in values if v is not None]))
    text = (evaluated / "report.md").read_text()
    assert "pesq_wb undefined" in text and "silent" in text and "5 files left out" in text


def test_files_csv_and_the_page_are_whole(evaluated):
    results = results_of(evaluated)
    with open(evaluated / "files.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7 * len(results["systems"])
    first = next(row for row in rows if row["system"] == "tiny@1.73" and row["file"] == "a0.wav")
    assert float(first["snr_db"]) == pytest.approx(results["systems"][0]["values"]["snr_db"][0], rel=1e-5)
    page = (evaluated / "report.html").read_text()
    assert page.count("<audio") >= 2 * (len(results["systems"]) - 1) and "tiny@5.19" in page


def test_a_second_call_does_nothing_again_and_a_new_metric_only_itself(evaluated, run_dir, manifest, capsys, monkeypatch):
    before = (evaluated / "cache" / "done.jsonl").read_text()
    arguments = ["--checkpoint", str(run_dir), "--manifest", str(manifest), "--out", str(evaluated), "--codebooks", "1,3",
                 "--no_audio", "--workers", "0", "--no_speed"]  # fmt: skip
    assert evaluate_codec.main([*arguments, "--metrics", "snr_db,stoi"]) == 0
    assert (evaluated / "cache" / "done.jsonl").read_text() == before
    assert "<audio" not in (evaluated / "report.html").read_text()
    assert evaluate_codec.main([*arguments, "--metrics", "snr_db,phoneme_error"]) == 0
    new = [json.loads(line) for line in (evaluated / "cache" / "done.jsonl").read_text()[len(before) :].splitlines()]
    assert {row["stage"] for row in new} == {"measure"} and len(new) == 3 * 7
    monkeypatch.setenv("PATH", "")  # without git too
    assert not any("snr_db" in row["values"] for row in new)
    capsys.readouterr()
    assert evaluate_codec.main(["--compare", *[str(evaluated / "results.json")] * 2]) == 0
    assert "+0.0 [+0.0, +0.0]" in capsys.readouterr().out


def test_after_a_kill_only_the_rest_is_done(run_dir, manifest, tmp_path):
    arguments = ["--checkpoint", str(run_dir), "--manifest", str(manifest), "--out", str(tmp_path), "--metrics", "mel_db,stoi",
                 "--no_speed", "--workers"]  # fmt: skip
    command = [sys.executable, "evaluate_codec.py", *arguments, "1"]
    root, log = Path(__file__).parents[1], tmp_path / "cache" / "done.jsonl"
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while process.poll() is None and (not log.exists() or log.read_text().count('"measure"') < 2):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = log.read_text()
    before = before[: before.rfind("\n") + 1]
    assert 2 <= before.count('"measure"') < 2 * 7  # something was left to do
    assert evaluate_codec.main([*arguments, "0"]) == 0
    after = log.read_text()
    assert after.startswith(before)
    done = [(row["stage"], row["system"], row["key"]) for row in map(json.loads, after.splitlines())]
    assert len(done) == len(set(done)) == 7 + 2 * 7  # coded, measured: each once
    assert not [path for path in tmp_path.rglob("*.tmp")]


def test_speed_is_that_of_a_process_of_its_own_and_kept_for_this_machine(run_dir, manifest, tmp_path):
    systems, found = neural_systems("ours", str(run_dir)), read_test_set(manifest)
    plan = evaluate_codec.Plan(systems, found.recordings, RATE, [], tmp_path, Ledger(tmp_path / "done.jsonl"))
    evaluate_codec.time_all(plan)
    row = plan.ledger.get("speed", systems[0].key)
    assert all(0 < row[f"{way}_rtf_{n}"] < 5 for way in ("encode", "decode") for n in (1, 2)) and 100 < row["peak_mb"] < 5000
    assert row["machine"] == evaluate_codec.machine()
    evaluate_codec.time_all(plan)
    assert plan.ledger.get("speed", systems[0].key) is row


def planned(folder: Path, wav: np.ndarray, output: np.ndarray) -> tuple[System, Recording, evaluate_codec.Plan]:
    """A recording of which some codec's output is in the cache."""
    system = System("fake@6", "fake", "classical", "", 0, 6.0, "", "f")
    sf.write(folder / "a.wav", wav, RATE, subtype="PCM_16")
    recording = Recording(Clip("a.wav", None, None), folder / "a.wav", "s", len(wav) / RATE, "k")
    path = decoded_path(folder, system, recording)
    path.parent.mkdir()
    sf.write(path, output, RATE, subtype="PCM_16")
    ledger = Ledger(folder / "done.jsonl")
    ledger.add({"stage": "decode", "system": system.key, "key": "k", "n_bytes": 1, "error": ""})
    return system, recording, evaluate_codec.Plan([system], [recording], RATE, ["amplitude_ratio"], folder, ledger)


@pytest.mark.parametrize("late", [431, -97])
def test_a_known_gain_and_delay_are_measured_and_compensated(tmp_path, late):
    wav = speech_like(30000, RATE)
    output = 10 ** (-6 / 20) * np.concatenate([np.zeros(max(late, 0)), wav[max(-late, 0) :], np.zeros(50)])
    system, recording, plan = planned(tmp_path, wav, output)
    delays = evaluate_codec.find_delays(plan)
    assert delays == {"fake@6": late}
    metrics = frozenset({"amplitude_ratio", "si_sdr_db", "snr_db"})
    (row,) = measure_job([(system, late, metrics)], recording, RATE, tmp_path, None)
    assert row["values"]["amplitude_ratio"] == pytest.approx(0.501, abs=0.002)
    if late > 0:
        assert row["values"]["si_sdr_db"] > 40
        (wrong,) = measure_job([(system, 0, metrics)], recording, RATE, tmp_path, None)
        assert wrong["values"]["si_sdr_db"] < 10  # not compensated


def test_a_metric_that_crashes_on_a_file_is_recorded_and_the_others_go_on(tmp_path, monkeypatch):
    class Crashes:
        metrics, rate_hz = ("visqol",), None

        def prepare(self, wav, clip):
            return wav

        def judge(self, kept, wav_hat):
            raise RuntimeError("no\nway")

    class Refuses(Crashes):
        metrics = ("pesq_wb",)

        def prepare(self, wav, clip):
            raise Undefined("no speech")

    class Half(Crashes):
        metrics = ("stoi", "snr_db", "dc_offset")

        def judge(self, kept, wav_hat):
            return {"stoi": 0.5, "snr_db": "without limit", "dc_offset": float("nan")}

    wav = speech_like(20000, RATE)
    system, recording, _ = planned(tmp_path, wav, wav)
    def open_one(wanted: set[str], *_):
        found = [judge() for judge in (Crashes, Refuses, Half) if wanted & set(judge.metrics)]
        if not found:
            raise ImportError("its library is broken")
        return found

    monkeypatch.setattr(measure, "open_judges", open_one)
    wanted = frozenset({"visqol", "pesq_wb", "stoi", "snr_db", "dc_offset", "distillmos"})
    (row,) = measure_job([(system, 0, wanted)], recording, RATE, tmp_path, None)
    assert row["values"] == {"stoi": 0.5}
    assert row["failed"] == {"visqol": "RuntimeError: no way", "distillmos": "ImportError: its library is broken"}
    assert row["undefined"] == {"pesq_wb": "no speech", "snr_db": "without limit", "dc_offset": "the metric gave nan"}


def test_another_text_or_recogniser_measures_word_errors_again_and_nothing_else(tmp_path, monkeypatch):
    jobs = []
    monkeypatch.setattr(evaluate_codec, "run_jobs", lambda function, split, dead, todo, *_: jobs.extend(todo))
    system, recording, plan = planned(tmp_path, speech_like(20000, RATE), speech_like(20000, RATE))
    plan = plan._replace(metrics=["wer", "stoi"])
    row = {"stage": "measure", "system": system.key, "key": "k", "delay": 0, "values": {"wer": 0.5, "stoi": 1.0},
           "undefined": {}, "failed": {}, "how": {m: measure.how(m, recording, "base") for m in ("wer", "stoi")}}  # fmt: skip
    plan.ledger.add(row)
    evaluate_codec.measure_all(plan, {system.name: 0}, "base", 1)
    assert jobs == []
    evaluate_codec.measure_all(plan, {system.name: 0}, "small", 1)
    ((wanted, *_),) = jobs
    assert wanted == [(system, 0, frozenset({"wer"}))]
    jobs.clear()
    told = recording._replace(clip=recording.clip._replace(text="another"))
    evaluate_codec.measure_all(plan._replace(recordings=[told]), {system.name: 0}, "base", 1)
    assert jobs[0][0] == [(system, 0, frozenset({"wer"}))]
    jobs.clear()
    evaluate_codec.measure_all(plan, {system.name: 3}, "base", 1)  # at another delay everything is another
    assert jobs[0][0] == [(system, 3, frozenset({"wer", "stoi"}))]
    jobs.clear()
    monkeypatch.setattr(measure, "_code_version", lambda package: package + "another version")
    evaluate_codec.measure_all(plan, {system.name: 0}, "base", 1)
    assert jobs[0][0] == [(system, 0, frozenset({"wer", "stoi"}))]


def test_a_process_that_dies_loses_the_metric_that_killed_it_and_no_other(tmp_path):
    system, recording, _ = planned(tmp_path, speech_like(20000, RATE), np.zeros(10))
    job = ([(system, 0, frozenset({"stoi", "wer"})), (UNCODED, 0, frozenset({"wer"}))], recording, RATE, tmp_path, "base")
    first, second = measure.split_measure(*job)
    assert first[0] == [(system, 0, frozenset({"stoi"}))] and first[1:] == job[1:]
    assert second[0] == [(system, 0, frozenset({"wer"})), (UNCODED, 0, frozenset({"wer"}))]
    rows = measure.measure_died(*second)
    assert [row["failed"] for row in rows] == [{"wer": "the process died"}] * 2
    (row,) = measure.decode_died([system], recording, RATE, tmp_path)
    assert row["error"] == "the process died"


def test_a_codec_whose_delay_changes_by_a_sample_with_the_file_is_aligned_file_by_file(tmp_path):
    wav = speech_like(30000, RATE)
    system, recording, _ = planned(tmp_path, wav, np.concatenate([np.zeros(41), wav]))
    metrics = frozenset({"snr_db"})
    for delay, aligned in ((40, True), (43, True), (30, False)):  # 3 samples around the system's own
        (row,) = measure_job([(system, delay, metrics)], recording, RATE, tmp_path, None)
        assert (row["values"]["snr_db"] > 60) == aligned, delay


def test_a_codec_that_fails_on_a_file_is_recorded(tmp_path, monkeypatch):
    _, recording, _ = planned(tmp_path, speech_like(20000, RATE), np.zeros(10))
    monkeypatch.setattr(measure, "code_clip", lambda *_: 1 / 0)
    (row,) = decode_job([UNCODED], recording, RATE, tmp_path)
    assert row["error"].startswith("ZeroDivisionError") and row["n_bytes"] == 0


def test_a_recording_is_coded_at_the_models_level_and_another_level_or_beam_is_another_system(tmp_path):
    torch.manual_seed(0)
    codec, wav = Codec(tiny_config().model).eval(), speech_like(8000, 8000)
    x, systems, outs = torch.from_numpy(wav).float()[None, None], [], []
    for name, config in {"plain": codec.config, "level": replace(codec.config, level_db=-40.0),
                         "beam": replace(codec.config, quantizer=replace(codec.config.quantizer, beam=4))}.items():  # fmt: skip
        other = Codec(config).eval()
        other.load_state_dict(codec.state_dict())
        other.save_pretrained(tmp_path / name)
        systems += neural_systems("ours", str(tmp_path / name), [3])
        gain = other.gain(x)
        coded = code_clip(systems[-1:], wav.astype(np.float32), 8000)[systems[-1].name]
        outs.append(coded.wav)
        np.testing.assert_allclose(coded.wav, (other(gain * x).wav_hat / gain)[0, 0].detach(), atol=1e-5)
    assert len({system.key.split("-")[-1] for system in systems}) == 3
    assert np.abs(outs[0] - outs[1]).max() > 1e-3


# ---------------------------------------------------------------------------------- who takes part


@pytest.mark.parametrize("family", ["dac", "encodec", "mimi"])
def test_peers_of_transformers_are_coded_as_by_their_own_classes(tmp_path, family):
    model = tiny(family).eval()
    model.save_pretrained(tmp_path / family)
    systems = parse_against(f"hf:{tmp_path / family}", [])
    assert [system.family for system in systems] == [family] * len(systems) and len(systems) > 1
    wav = speech_like(24000, 24000)
    coded = code_clip(systems, wav, 24000)
    x = torch.from_numpy(wav)[None, None]
    with torch.no_grad():
        for system in systems:
            n = system.n_codebooks
            if family == "encodec":
                frame = model.encode(x, bandwidth=system.nominal_kbps)
                own = model.decode(frame.audio_codes, [None]).audio_values
                codes = frame.audio_codes[0, 0]
            elif family == "mimi":
                codes = model.encode(x, num_quantizers=n).audio_codes[0]
                own = model.decode(codes[None]).audio_values
            else:
                codes = model.encode(x, n_quantizers=n).audio_codes[0]
                own = model.decode(audio_codes=codes[None]).audio_values[:, None]
            result = coded[system.name]
            assert np.array_equal(result.codes, codes.numpy())
            length = min(own.shape[-1], 24000)
            assert np.allclose(result.wav[:length], own[0, 0, :length].numpy(), atol=1e-5)
            assert 8 * result.n_bytes > 1000 * system.nominal_kbps


def test_bitrates_are_those_a_model_was_trained_for(run_dir):
    from dataclasses import replace

    config = Codec.from_pretrained(run_dir).config
    assert trained_counts(config) == [3]
    assert trained_counts(replace(config, quantizer=replace(config.quantizer, dropout=0.5))) == [1, 3]
    many = replace(config.quantizer, n_codebooks=12, dropout=1.0)
    assert trained_counts(replace(config, quantizer=many)) == [1, 3, 6, 12]


def test_two_runs_of_one_name_stay_apart_and_one_given_twice_is_refused(run_dir, tmp_path):
    other = save_run(tmp_path / "tiny", seed=1)
    systems = distinct([*neural_systems("ours", str(run_dir)), *neural_systems("run", str(other)), UNCODED])
    assert [system.name for system in systems] == ["tiny@5.19", "tiny-2@5.19", "uncoded"]
    assert systems[0].fingerprint != systems[1].fingerprint and systems[0].key != systems[1].key
    with pytest.raises(ValueError, match="tiny@5.19 given twice"):
        distinct([*neural_systems("ours", str(run_dir)), *neural_systems("run", str(run_dir))])


@pytest.mark.parametrize(
    "change, message",
    [
        (["--manifest", "none.jsonl"], "no such manifest"),
        (["--checkpoint", "none"], "none"),
        (["--codebooks", "9"], "expected some of 1 to 3"),
        (["--split", "validation"], "no recordings of split 'validation'; it has test"),
        (["--against", "opus@six"], "'six' after @"),
        (["--against", "mp3"], "mp3"),
        (["--against", "opus@7.5"], "the nearest is 7"),
        (["--against", "hf:/nonexistent"], "hf:/nonexistent"),
        (["--transcripts", "none.jsonl"], "none.jsonl"),
        (["--compare", "a.json", "b.json"], "a.json"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(run_dir, manifest, tmp_path, capsys, change, message):
    arguments = ["--checkpoint", str(run_dir), "--manifest", str(manifest), "--out", str(tmp_path / "out")]
    capsys.readouterr()
    assert evaluate_codec.main(arguments + change) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("evaluate_codec: ") and message in error[-1], error
    assert not list(tmp_path.glob("out/*.*"))


def test_an_unknown_metric_names_those_there_are(capsys):
    with pytest.raises(SystemExit):
        evaluate_codec.main(["--metrics", "pesq"])
    assert "'pesq' is no metric" in capsys.readouterr().err and "pesq_wb" in METRICS


def test_without_a_test_split_others_are_taken_and_it_is_said(tmp_path):
    lines = []
    for name, split in (("a", "train"), ("b", "val")):
        sf.write(tmp_path / f"{name}.wav", speech_like(20000, RATE), RATE)
        lines.append({"path": f"{name}.wav", "speaker": "me", "split": split, "sample_rate": RATE, "n_samples": 20000,
                      "language": "te"})  # fmt: skip
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_test_set(tmp_path / "m.jsonl")
    assert found.split == "val" and found.notes == ["1 speaker, of whom training heard 1 in other recordings"]
    assert found.recordings[0].clip == Clip("b.wav", None, "te")
    (tmp_path / "m.jsonl").write_text(json.dumps(lines[0]) + "\n")
    assert "training used these recordings" in read_test_set(tmp_path / "m.jsonl").notes[0]
    (tmp_path / "t.jsonl").write_text('{"path": "a.wav", "text": "one two", "language": "en"}\n')
    found = read_test_set(tmp_path / "m.jsonl", transcripts=str(tmp_path / "t.jsonl"))
    assert found.recordings[0].clip == Clip("a.wav", "one two", "en")
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line | {"split": "test", "sample_rate": rate}) + "\n"
                                              for line, rate in zip(lines, (8000, 16000))))  # fmt: skip
    with pytest.raises(ValueError, match=r"sample rates \[8000, 16000\]"):
        read_test_set(tmp_path / "m.jsonl")


def test_an_output_longer_or_shorter_than_the_reference_is_brought_to_its_length():
    assert compensate(np.ones(7, np.float32), 2, 4).tolist() == [1, 1, 1, 1]
    assert compensate(np.ones(3, np.float32), 0, 5).tolist() == [1, 1, 1, 0, 0]
