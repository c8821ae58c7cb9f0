"""Data preparation: cuts, levels, split, continuation, and every kind of bad input."""

import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

import prepare_speaker_data as prepare
from codec.audio import resample_array, rms, rms_db, true_peak

ROOT = Path(__file__).resolve().parents[1]


def speech(words: list[tuple[float, float]], seconds: float, sample_rate: int = 16000, seed: int = 0,
           level: float = 0.1) -> np.ndarray:
    """Noise bursts from start to end in seconds, over a noise floor 60 dB below them."""
    rng = np.random.default_rng(seed)
    envelope = np.full(round(seconds * sample_rate), level / 1000)
    for start, end in words:
        envelope[round(start * sample_rate):round(end * sample_rate)] = level
    return (envelope * rng.standard_normal(len(envelope))).astype(np.float32)


def random_words(seconds: float, seed: int, shortest_pause: float = 0.25, longest_pause: float = 0.9):
    rng, words, position = np.random.default_rng(seed), [], 0.3
    while position + 0.8 < seconds:
        end = position + rng.uniform(0.2, 0.7)
        words.append((position, end))
        position = end + rng.uniform(shortest_pause, longest_pause)
    return words


def spans_of(wav: np.ndarray, min_s: float, max_s: float, sample_rate: int = 16000):
    """[N, 2] seconds of the utterances and of what stays too short."""
    n = sample_rate // 100
    power = np.square(wav[:len(wav) // n * n].reshape(-1, n).astype(np.float64)).mean(axis=1)
    kept, short = prepare.find_utterances(power, round(min_s * 100), round(max_s * 100))
    return kept / 100, short / 100


def run(*arguments) -> int:
    return prepare.main([*map(str, arguments), "--jobs", "1"])


def manifest(out_dir: Path) -> list[dict]:
    text = (out_dir / "manifest.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def stats(out_dir: Path) -> dict:
    return json.loads((out_dir / "stats.json").read_text(encoding="utf-8"))


def contents(out_dir: Path) -> dict[str, bytes]:
    """The manifest, the statistics and every utterance, byte by byte."""
    files = [*out_dir.glob("wav/*/*.wav"), out_dir / "manifest.jsonl", out_dir / "stats.json"]
    return {file.relative_to(out_dir).as_posix(): file.read_bytes() for file in files}


@pytest.fixture
def data_dir(tmp_path) -> Path:
    """Three speakers with two recordings of about 8 s each, at 16 kHz."""
    for index in range(6):
        path = tmp_path / "data" / f"speaker {index % 3}" / f"{index}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        sf.write(path, speech(random_words(8, index), 8, seed=index), 16000)
    return tmp_path / "data"


# ---- where to cut -----------------------------------------------------------------------------------------

def words_cut(spans, words, tolerance=0.02):
    """Words that are neither wholly inside one utterance nor outside all."""
    inside = [any(s <= a + tolerance and b - tolerance <= e for s, e in spans) for a, b in words]
    outside = [all(b <= s + tolerance or a >= e - tolerance for s, e in spans) for a, b in words]
    return sum(not i and not o for i, o in zip(inside, outside, strict=True))


@pytest.mark.parametrize("max_s", [3.0, 6.0, 20.0])
def test_no_word_is_cut_where_there_are_pauses(max_s):
    words = random_words(120, seed=1)
    spans, _ = spans_of(speech(words, 120), 1.0, max_s)
    lengths = spans[:, 1] - spans[:, 0]
    assert words_cut(spans, words) == 0
    assert lengths.min() >= 1.0 and lengths.max() <= max_s
    assert (spans[1:, 0] >= spans[:-1, 1]).all()
    assert sum(any(s <= a + 0.02 and b <= e + 0.02 for s, e in spans) for a, b in words) >= 0.97 * len(words)
    every_three_seconds = [(t, t + 3.0) for t in np.arange(0, 120, 3.0)]  # what must fail this test
    assert words_cut(every_three_seconds, words) > 5


def test_without_a_pause_the_cut_is_at_the_quietest_place():
    wav = speech([(0.5, 12.5)], 13)
    wav[round(6.20 * 16000):round(6.30 * 16000)] *= 0.2  # a stop consonant: too short for a pause
    spans, _ = spans_of(wav, 1.0, 10.0)
    assert len(spans) == 2 and 6.19 <= spans[0, 1] <= 6.31 and spans[0, 1] == spans[1, 0]


def test_a_long_phrase_is_halved_at_its_longest_pause():
    words = [(0.5, 3.0), (3.25, 5.0), (5.4, 8.0), (8.25, 11.0)]
    spans, _ = spans_of(speech(words, 12), 1.0, 8.0)
    assert len(spans) == 2 and 5.0 <= spans[0, 1] <= spans[1, 0] <= 5.4


def test_silence_is_dropped_and_a_margin_stays():
    spans, _ = spans_of(speech([(3.0, 5.0), (9.0, 11.0)], 14), 1.0, 20.0)
    assert np.allclose(spans, [[2.9, 5.1], [8.9, 11.1]], atol=0.03)


def test_a_short_word_is_joined_to_its_neighbour_or_widened_into_silence_or_reported():
    joined, short = spans_of(speech([(2.0, 2.5), (3.2, 4.5)], 7), 1.0, 20.0)
    assert np.allclose(joined, [[1.9, 4.6]], atol=0.03) and len(short) == 0
    widened, short = spans_of(speech([(2.0, 2.5), (5.0, 7.0)], 9), 1.0, 20.0)
    assert np.allclose(widened, [[1.75, 2.75], [4.9, 7.1]], atol=0.03) and len(short) == 0
    kept, short = spans_of(speech([(0.0, 0.4)], 0.6), 1.0, 20.0)
    assert len(kept) == 0 and len(short) == 1


@pytest.mark.parametrize("floor_db", [-80, -60, -40])
def test_the_threshold_follows_the_noise_of_the_recording(floor_db):
    words = random_words(60, seed=2, shortest_pause=0.3)
    wav = speech(words, 60) + 10 ** (floor_db / 20) * np.random.default_rng(3).standard_normal(60 * 16000)
    spans, _ = spans_of(wav, 1.0, 5.0)
    assert words_cut(spans, words) == 0 and len(spans) > 10


def test_digital_silence_and_silence_give_nothing_and_steady_noise_gives_all():
    assert len(spans_of(np.zeros(48000), 1.0, 20.0)[0]) == 0
    assert len(spans_of(1e-4 * np.random.default_rng(0).standard_normal(48000), 1.0, 20.0)[0]) == 0
    assert np.allclose(spans_of(speech([(0, 3)], 3), 1.0, 20.0)[0], [[0, 3]], atol=0.03)


# ---- levels -----------------------------------------------------------------------------------------------

SETTINGS = prepare.Settings(sample_rate=24000, target_db=-16.0, min_s=1.0, max_s=20.0)


def written(path, wav):
    facts = prepare.write_utterance(path, wav.astype(np.float32), SETTINGS)
    samples, sample_rate = sf.read(path, dtype="float32")
    assert sample_rate == 24000 and sf.info(path).subtype == "PCM_16" and len(samples) == facts["n_samples"]
    return samples, facts


@pytest.mark.parametrize("level", [1e-3, 0.05, 0.9])
def test_an_utterance_is_levelled_to_the_target(tmp_path, level):
    wav = level * np.sin(2 * np.pi * 440 * np.arange(24000) / 24000)
    samples, facts = written(tmp_path / "a.wav", wav)
    assert rms(samples) == pytest.approx(10 ** (-16 / 20), rel=2e-3)
    assert facts["rms_db"] == pytest.approx(-16, abs=0.02) and not facts["peak_limited"]
    assert facts["source_db"] == pytest.approx(rms_db(wav), abs=0.01)


def test_a_peaky_utterance_stops_at_the_true_peak_ceiling(tmp_path):
    wav = 0.01 * np.random.default_rng(0).standard_normal(24000)
    # the peak lies between two samples, so that limiting the samples alone would overshoot
    wav[5000:5100] += 0.5 * np.sin(np.pi / 2 * np.arange(100) + np.pi / 4) * np.hanning(100)
    samples, facts = written(tmp_path / "a.wav", wav)
    ceiling = 10 ** (-1 / 20)
    assert facts["peak_limited"] and facts["rms_db"] < -16.5
    assert ceiling * 0.999 < true_peak(samples) < ceiling * 1.001
    limited_by_samples = (wav / np.abs(wav).max() * ceiling).astype(np.float32)
    assert true_peak(limited_by_samples) > 1.2 * ceiling


def test_an_utterance_is_the_slice_of_its_source_that_the_manifest_says(tmp_path):
    source = speech(random_words(30, 5), 30, sample_rate=22050)
    (tmp_path / "data").mkdir()
    sf.write(tmp_path / "data" / "a.wav", source, 22050, subtype="FLOAT")
    assert run(tmp_path / "data", tmp_path / "out", "--max_s", 5) == 0
    whole = resample_array(source, 22050, 24000)
    rows = manifest(tmp_path / "out")
    assert len(rows) > 4
    for row in rows:
        samples = sf.read(tmp_path / "out" / row["path"], dtype="float32")[0]
        start = round(row["start_s"] * 24000)  # known to a millisecond, 24 samples
        near = [whole[max(0, start + shift):][:len(samples)] for shift in range(-13, 14)]
        likeness = max(np.dot(samples, x) / np.linalg.norm(samples) / np.linalg.norm(x) for x in near)
        assert likeness > 0.9999 and row["n_samples"] == len(samples) and row["sample_rate"] == 24000


def test_dc_and_clipping_are_measured_and_dc_is_removed(tmp_path):
    (tmp_path / "data").mkdir()
    wav = speech(random_words(10, 1), 10)
    sf.write(tmp_path / "data" / "clean.wav", wav, 16000)
    sf.write(tmp_path / "data" / "dc.wav", wav + 0.1, 16000)
    sf.write(tmp_path / "data" / "clipped.wav", 50 * wav, 16000)
    assert run(tmp_path / "data", tmp_path / "out") == 0
    facts = stats(tmp_path / "out")
    assert facts["dc_shifted"] == {"dc.wav": pytest.approx(0.1, abs=0.002)}
    assert list(facts["clipped"]) == ["clipped.wav"] and facts["clipped"]["clipped.wav"] > 0.1
    for row in manifest(tmp_path / "out"):
        samples = sf.read(tmp_path / "out" / row["path"])[0]
        assert abs(samples.mean()) < 0.01 and np.abs(samples).max() < 1.0


@pytest.mark.parametrize("suffix,subtype,rate,channels", [
    (".wav", "PCM_U8", 44100, 1), (".wav", "PCM_24", 96000, 2), (".wav", "FLOAT", 48000, 6),
    (".flac", "PCM_16", 16000, 1), (".mp3", None, 44100, 2), (".ogg", "OPUS", 48000, 1),
], ids=str)
def test_every_format_and_channel_count_is_prepared(tmp_path, suffix, subtype, rate, channels):
    (tmp_path / "data" / "deep" / "er").mkdir(parents=True)
    wav = speech([(0.5, 2.5), (4.0, 6.0)], 7, sample_rate=rate)
    path = tmp_path / "data" / "deep" / "er" / f"A{suffix.upper()}"
    sf.write(path, np.repeat(wav[:, None], channels, axis=1), rate, subtype=subtype)
    assert run(tmp_path / "data", tmp_path / "out") == 0
    rows = manifest(tmp_path / "out")
    assert [row["speaker"] for row in rows] == ["deep", "deep"]
    assert [row["start_s"] for row in rows] == pytest.approx([0.4, 3.9], abs=0.06)


# ---- split and balance ------------------------------------------------------------------------------------

def parts_of(n_speakers, n_recordings):
    """Parts as the merge reads them; the lengths differ."""
    return [
        {"source": f"{speaker}/{recording}.wav", "speaker": str(speaker), "settings": {"sample_rate": 24000},
         "utterances": [{"n_samples": 120000 * (1 + (speaker + recording + k) % 3)} for k in range(20)]}
        for speaker in range(n_speakers) for recording in range(n_recordings)
    ]


def shares(parts, split_of):
    seconds = defaultdict(float)
    for part in parts:
        seconds[split_of[part["source"]]] += prepare.part_seconds(part)
    return {split: value / sum(seconds.values()) for split, value in seconds.items()}


@pytest.mark.parametrize("n_speakers,n_recordings", [(40, 3), (3, 20), (1, 36)])
def test_the_split_has_the_shares_that_were_asked_for(n_speakers, n_recordings):
    parts = parts_of(n_speakers, n_recordings)
    split_of, warnings = prepare.assign_splits(parts, {}, 0.1, 0.05, seed=0)
    got = shares(parts, split_of)
    assert got["val"] == pytest.approx(0.1, abs=0.03) and got["test"] == pytest.approx(0.05, abs=0.03)
    assert not warnings
    assert (split_of, warnings) == prepare.assign_splits(parts[::-1], {}, 0.1, 0.05, seed=0)
    assert split_of != prepare.assign_splits(parts, {}, 0.1, 0.05, seed=1)[0]


def test_no_speaker_is_on_two_sides_where_there_are_ten():
    for n_speakers, together in ((10, True), (9, False)):
        parts = parts_of(n_speakers, 10)
        split_of, _ = prepare.assign_splits(parts, {}, 0.2, 0.2, seed=0)
        sides = defaultdict(set)
        for part in parts:
            sides[part["speaker"]].add(split_of[part["source"]])
        assert all(len(side) == 1 for side in sides.values()) == together


def test_no_recording_is_on_two_sides(data_dir, tmp_path):
    assert run(data_dir, tmp_path / "out", "--val", 0.2, "--test", 0.2, "--max_s", 3, "--no_balance") == 0
    rows = manifest(tmp_path / "out")

    def sides(split):
        by_source = defaultdict(set)
        for index, row in enumerate(rows):
            by_source[row["source"]].add(split(index, row))
        return by_source.values()

    assert {"train", "val", "test"} == {row["split"] for row in rows}
    assert all(len(side) == 1 for side in sides(lambda _, row: row["split"]))
    by_utterance = ("train", "val", "test")
    assert any(len(side) > 1 for side in sides(lambda index, _: by_utterance[index % 3]))  # the usual mistake


@pytest.mark.parametrize("n_recordings,expected", [
    (1, {"train": 1}), (2, {"train": 1, "val": 1}), (3, {"train": 1, "val": 1, "test": 1}),
])
def test_few_recordings_go_to_training_first_with_a_warning(n_recordings, expected):
    parts = parts_of(1, n_recordings)
    split_of, warnings = prepare.assign_splits(parts, {}, 0.05, 0.05, seed=0)
    assert {split: list(split_of.values()).count(split) for split in set(split_of.values())} == expected
    assert warnings


def test_large_shares_leave_something_for_training():
    split_of, _ = prepare.assign_splits(parts_of(1, 3), {}, 0.5, 0.45, seed=0)
    assert "train" in split_of.values()


def test_a_split_from_the_metadata_wins(data_dir, tmp_path):
    split = {4: "test", 1: "val"}
    lines = [f"speaker {i % 3}/{i}.wav\tSpeaker-{i}\t{split.get(i, '')}" for i in range(5)]
    (tmp_path / "meta.tsv").write_text("\n".join(["path\tspeaker\tsplit", *lines, "gone.wav\tx\t"]))
    assert run(data_dir, tmp_path / "out", "--metadata", tmp_path / "meta.tsv", "--no_balance") == 0
    split_of = {row["speaker"]: row["split"] for row in manifest(tmp_path / "out")}
    assert split_of == {"Speaker-0": "train", "Speaker-1": "val", "Speaker-2": "train", "Speaker-3": "train",
                        "Speaker-4": "test"}
    skipped = stats(tmp_path / "out")["skipped"]
    assert skipped == {"gone.wav": "in the metadata, but missing", "speaker 2/5.wav": "not in the metadata"}


def rows_of(seconds_of):
    return [
        {"path": f"{speaker}/{split}{k}", "speaker": speaker, "split": split,
         "sample_rate": 100, "n_samples": 500}
        for speaker, splits in seconds_of.items()
        for split, seconds in splits.items()
        for k in range(seconds // 5)
    ]


def test_balancing_caps_training_seconds_at_the_median_and_touches_nothing_else():
    rows = rows_of({"a": {"train": 1000, "val": 500}, "b": {"train": 100}, "c": {"train": 60, "test": 900}})
    kept, dropped_s = prepare.balance(rows, None, seed=0)
    seconds = defaultdict(float)
    for row in kept:
        seconds[row["speaker"], row["split"]] += prepare.row_seconds(row)
    assert seconds == {("a", "train"): 100, ("a", "val"): 500, ("b", "train"): 100, ("c", "train"): 60,
                       ("c", "test"): 900}
    assert dropped_s == {"a": 900}
    assert (kept, dropped_s) == prepare.balance(rows, None, seed=0)
    assert kept != prepare.balance(rows, None, seed=1)[0]


def test_balancing_never_drops_a_speaker():
    kept, _ = prepare.balance(rows_of({"a": {"train": 50}, "b": {"train": 5}}), max_speaker_s=2.0, seed=0)
    assert sorted(row["speaker"] for row in kept) == ["a", "b"]


def test_balance_can_be_turned_off(data_dir, tmp_path):
    for index in range(6, 9):
        wav = speech(random_words(8, index), 8, seed=index)
        sf.write(data_dir / "speaker 0" / f"{index}.wav", wav, 16000)
    assert run(data_dir, tmp_path / "a") == 0 and run(data_dir, tmp_path / "b", "--no_balance") == 0
    hours = [stats(tmp_path / name)["speakers"]["speaker 0"]["hours"] for name in "ab"]
    assert hours[0] < 0.7 * hours[1] and stats(tmp_path / "b")["balanced_s"] == {}


# ---- going on, sharing the work ---------------------------------------------------------------------------

def note_what_is_prepared(monkeypatch) -> list[str]:
    """A list that grows by each recording that is prepared."""
    sources, prepare_recording = [], prepare.prepare_recording

    def noting(recording, *rest):
        sources.append(recording.source)
        prepare_recording(recording, *rest)

    monkeypatch.setattr(prepare, "prepare_recording", noting)
    return sources


def test_an_interrupted_run_continues_to_the_same_result(data_dir, tmp_path, monkeypatch, capsys):
    assert run(data_dir, tmp_path / "whole") == 0
    sources, write_utterance = note_what_is_prepared(monkeypatch), prepare.write_utterance

    def interrupted_in_the_fourth(*arguments):
        if len(sources) == 4:
            raise KeyboardInterrupt
        return write_utterance(*arguments)

    monkeypatch.setattr(prepare, "write_utterance", interrupted_in_the_fourth)
    assert run(data_dir, tmp_path / "out") == 130
    assert len(list(tmp_path.glob("out/parts/*.json"))) == 3
    assert not (tmp_path / "out" / "manifest.jsonl").exists()
    # what a kill in the middle of a recording leaves: utterances without a part, a half-written part
    part = next(tmp_path.glob("out/parts/*.json"))
    utterance = tmp_path / "out" / json.loads(part.read_text())["utterances"][0]["path"]
    utterance.with_name(utterance.name.rsplit("_", 1)[0] + "_99999999.wav").write_bytes(b"RIFF")
    part.write_text(part.read_text()[:50])
    monkeypatch.setattr(prepare, "write_utterance", write_utterance)
    assert run(data_dir, tmp_path / "out") == 0
    assert len(sources) == 4 + 4 and len(set(sources)) == 6  # one interrupted, one half-written
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert run(data_dir, tmp_path / "out") == 0 and len(sources) == 8
    assert "6 of 6 done before" in capsys.readouterr().out


def test_a_changed_recording_a_lost_utterance_and_other_settings_are_noticed(data_dir, tmp_path, monkeypatch):
    assert run(data_dir, tmp_path / "out") == 0
    lost = next(row["path"] for row in manifest(tmp_path / "out") if row["source"] == "speaker 1/1.wav")
    (tmp_path / "out" / lost).unlink()
    sf.write(data_dir / "speaker 0" / "0.wav", speech(random_words(9, 77), 9), 16000)
    sources = note_what_is_prepared(monkeypatch)
    assert run(data_dir, tmp_path / "out") == 0
    assert sorted(sources) == ["speaker 0/0.wav", "speaker 1/1.wav"]
    fresh = tmp_path / "fresh"
    assert run(data_dir, fresh) == 0 and contents(tmp_path / "out") == contents(fresh)
    sources.clear()
    assert run(data_dir, tmp_path / "out", "--max_s", 4) == 0 and len(sources) == 6


def test_shards_and_a_merge_equal_a_single_run(data_dir, tmp_path, monkeypatch):
    assert run(data_dir, tmp_path / "whole") == 0
    for index in (2, 0, 1):
        assert run(data_dir, tmp_path / "out", "--shard", f"{index}/3") == 0
        assert not (tmp_path / "out" / "manifest.jsonl").exists()
    assert len(list(tmp_path.glob("out/parts/*.json"))) == 6
    monkeypatch.setattr(prepare, "prepare_recording", None)  # only the merge is left
    assert run(data_dir, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_several_workers_give_the_same_result_as_one(data_dir, tmp_path):
    for jobs in "12":  # as commands, since the rounding depends on the threads of this process
        script = ROOT / "prepare_speaker_data.py"
        command = [sys.executable, script, data_dir, tmp_path / jobs, "--jobs", jobs]
        assert subprocess.run(command, capture_output=True).returncode == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_exact_duplicates_are_dropped_whatever_their_format(data_dir, tmp_path):
    wav, rate = sf.read(data_dir / "speaker 1" / "1.wav", dtype="int16")
    sf.write(data_dir / "speaker 2" / "copy.flac", wav, rate)
    sf.write(data_dir / "speaker 2" / "stereo.wav", np.stack([wav, wav], axis=1), rate)
    assert run(data_dir, tmp_path / "out") == 0
    assert stats(tmp_path / "out")["duplicates"] == {
        "speaker 2/copy.flac": "speaker 1/1.wav", "speaker 2/stereo.wav": "speaker 1/1.wav"
    }
    sources = {row["source"] for row in manifest(tmp_path / "out")}
    assert sources == {f"speaker {i % 3}/{i}.wav" for i in range(6)}


def test_names_of_any_script_and_equal_names_do_not_collide(tmp_path):
    names = ["తెలుగు/ఒకటి.wav", "తెలుగు/x/ఒకటి.wav", "తమిళం/a b.wav", "తమిళం/a_b.wav", "solo.wav"]
    for index, name in enumerate(names):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        sf.write(path, speech([(0.5, 2.5)], 3, seed=index), 16000)
    assert run(tmp_path / "data", tmp_path / "out", "--no_balance") == 0
    rows = manifest(tmp_path / "out")
    assert {row["speaker"] for row in rows} == {"తెలుగు", "తమిళం", "default"}
    assert len({row["path"] for row in rows}) == len({row["path"].split("/")[1] for row in rows}) + 2 == 5
    assert all(row["path"].isascii() and " " not in row["path"] for row in rows)
    folder_of = {row["speaker"]: row["path"].split("/")[1] for row in rows}
    assert len(set(folder_of.values())) == 3


# ---- bad input --------------------------------------------------------------------------------------------

def test_bad_files_are_skipped_counted_and_listed(data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    good = (data_dir / "speaker 0" / "0.wav").read_bytes()
    (data_dir / "zero.wav").write_bytes(b"")
    (data_dir / "text.mp3").write_bytes(b"no audio " * 100)
    (data_dir / "truncated.wav").write_bytes(good[:30000])
    (data_dir / "movie.m4a").write_bytes(b"anything")
    (data_dir / "notes.txt").write_text("not looked at")
    sf.write(data_dir / "nan.wav", np.where(np.arange(32000) == 20000, np.nan, 0.1), 16000, subtype="FLOAT")
    sf.write(data_dir / "silent.wav", np.zeros(32000), 16000)
    sf.write(data_dir / "short.wav", speech([(0, 0.5)], 0.5), 16000)
    sf.write(data_dir / "tiny.wav", np.full(50, 0.1), 16000)
    assert run(data_dir, tmp_path / "out") == 0
    skipped = stats(tmp_path / "out")["skipped"]
    expected = {"zero.wav": "empty", "text.mp3": "cannot read", "truncated.wav": "truncated",
                "movie.m4a": "needs ffmpeg", "nan.wav": "sample 20000", "silent.wav": "silent",
                "short.wav": "shorter", "tiny.wav": "shorter"}
    assert skipped.keys() == expected.keys()
    assert all(expected[name] in reason and "\n" not in reason for name, reason in skipped.items())
    reasons = stats(tmp_path / "out")["skipped_reasons"]
    assert reasons["shorter than min_s"] == 2 and reasons["needs ffmpeg, which is not installed"] == 1
    assert len({row["source"] for row in manifest(tmp_path / "out")}) == 6


def test_what_lacked_ffmpeg_is_tried_again_when_there_is_one(data_dir, tmp_path, monkeypatch):
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    (data_dir / "a.m4a").write_bytes(b"anything")
    assert run(data_dir, tmp_path / "out") == 0
    assert "needs ffmpeg" in stats(tmp_path / "out")["skipped"]["a.m4a"]
    (tmp_path / "bin").mkdir()
    sf.write(tmp_path / "bin" / "stream.au", speech([(0.5, 2.5)], 3), 16000, subtype="FLOAT", endian="BIG")
    (tmp_path / "bin" / "ffmpeg").write_text(f"#!/bin/sh\ncat {tmp_path}/bin/stream.au\n")
    (tmp_path / "bin" / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{path}")
    assert run(data_dir, tmp_path / "out") == 0
    rows = [row for row in manifest(tmp_path / "out") if row["source"] == "a.m4a"]
    assert [row["n_samples"] for row in rows] == pytest.approx([2.2 * 24000], rel=0.02)


@pytest.mark.parametrize("flags,message", [
    (("--min_s", 30), "--min_s"), (("--min_s", 0), "--min_s"), (("--val", 0.6, "--test", 0.4), "--val"),
    (("--val", -0.1), "--val"), (("--shard", "3/2"), "--shard"), (("--shard", "0/0"), "--shard"),
    (("--shard", "half"), "--shard"), (("--sample_rate", 0), "--sample_rate"),
    (("--target_db", 3), "--target_db"), (("--max_speaker_s", 0), "--max_speaker_s"),
    (("--metadata", "nowhere.csv"), "nowhere.csv"),
], ids=str)
def test_flags_that_do_not_fit_are_one_line_and_code_2(data_dir, tmp_path, capsys, flags, message):
    assert run(data_dir, tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text,message", [
    ("path;speaker\n", "header"), ("", "header"), ("path,speaker,split\na.wav,x,dev\n", "line 2"),
    ("path,speaker\na.wav\n", "line 2"),
], ids=["semicolon", "empty", "unknown split", "missing speaker"])
def test_malformed_metadata_is_one_line_and_code_2(data_dir, tmp_path, capsys, text, message):
    (tmp_path / "meta.csv").write_text(text)
    assert run(data_dir, tmp_path / "out", "--metadata", tmp_path / "meta.csv") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_folder_with_nothing_usable_is_one_line_and_code_2(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.wav").write_bytes(b"")
    (tmp_path / "bad" / "b.wav").write_bytes(b"text")
    expected = {"missing": "no such folder", "empty": "no audio", "bad": "no utterance in 2 files"}
    for name, message in expected.items():
        assert run(tmp_path / name, tmp_path / f"out {name}") == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert not (tmp_path / f"out {name}" / "manifest.jsonl").exists()


def test_an_output_folder_inside_the_data_is_refused(data_dir, tmp_path, capsys):
    for out_dir in (data_dir, data_dir / "out", data_dir / ".." / "data" / "deep" / "out"):
        assert run(data_dir, out_dir) == 2
        assert "inside DATA_DIR" in capsys.readouterr().err


def test_a_disk_that_refuses_is_an_error_and_not_a_skipped_recording(data_dir, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare, "write_utterance", full)
    assert run(data_dir, tmp_path / "out") == 2
    assert "No space left" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/parts/*")) and not (tmp_path / "out" / "manifest.jsonl").exists()


def test_measurement_does_not_depend_on_where_blocks_end(tmp_path, monkeypatch):
    wav = speech(random_words(11, 3), 11.003, sample_rate=44100)
    sf.write(tmp_path / "a.wav", wav, 44100, subtype="FLOAT")
    whole = prepare.measure(tmp_path / "a.wav")
    monkeypatch.setattr(prepare, "BLOCK_FRAMES", 7)
    blocks = prepare.measure(tmp_path / "a.wav")
    assert blocks.content_hash == whole.content_hash and np.allclose(blocks.frame_power, whole.frame_power)
    assert blocks.rms == pytest.approx(math.sqrt(np.mean(np.square(wav, dtype=np.float64))), rel=1e-3)
