import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import speech_like

from codec.data import SegmentDataset, StepSampler, Utterance, read_manifest, segment_loader


def test_segments_are_the_samples_of_the_file_at_their_position(manifest):
    dataset = SegmentDataset(read_manifest(manifest, "train", 8000), 2000, seed=0)
    for index in range(20):
        utterance, start, speed = dataset.position(index)
        assert speed == 1
        whole, _ = sf.read(utterance.path, dtype="float32")
        assert np.array_equal(dataset[index][0].numpy(), whole[start : start + 2000])


def test_a_second_is_as_likely_as_any_other_however_long_its_recording():
    utterances = [Utterance(Path("short"), "a", 10_000), Utterance(Path("long"), "a", 190_000)]
    dataset = SegmentDataset(utterances, 1000, seed=0)
    positions = [dataset.position(index) for index in range(20_000)]
    share = sum(utterance.path.name == "long" for utterance, *_ in positions) / len(positions)
    assert share == pytest.approx(0.95, abs=0.01)
    starts = np.array([start for utterance, start, _ in positions if utterance.path.name == "long"])
    tenths = np.histogram(starts, 10, (0, 189_001))[0] / len(starts)
    assert np.abs(tenths - 0.1).max() < 0.01
    # known wrong: an item is a file, so a second of the short one comes up 19 times as often
    by_file = np.random.default_rng(0).integers(2, size=20_000).mean()
    assert abs(by_file - 0.95) > 0.4


def test_speaker_balanced_draws_every_speaker_alike():
    utterances = [Utterance(Path(f"{s}{i}"), s, 5000) for s, n in [("a", 90), ("b", 9), ("c", 1)] for i in range(n)]
    balanced = SegmentDataset(utterances, 1000, 0, speaker_balanced=True)
    shares = Counter(balanced.position(i)[0].speaker for i in range(6000))
    assert all(abs(shares[s] / 6000 - 1 / 3) < 0.03 for s in "abc")
    by_length = Counter(SegmentDataset(utterances, 1000, 0).position(i)[0].speaker for i in range(6000))
    assert by_length["a"] > 5000


def test_segments_depend_on_seed_and_number_only(manifest):
    utterances = read_manifest(manifest, "train", 8000)
    one, again, other = (SegmentDataset(utterances, 2000, seed) for seed in (1, 1, 2))
    assert [one.position(i) for i in (5, 3, 5)] == [again.position(i) for i in (5, 3, 5)]
    assert [one.position(i) for i in range(9)] != [other.position(i) for i in range(9)]


def test_a_segment_at_another_speed_has_its_pitch_moved_and_all_of_its_samples(tmp_path):
    rate, tone = 8000, np.sin(2 * np.pi * 400 / 8000 * np.arange(8000))
    sf.write(tmp_path / "a.wav", tone, rate)
    dataset = SegmentDataset([Utterance(tmp_path / "a.wav", "a", 8000)], 4000, 0, speeds=(0.8, 1.25))
    drawn = Counter()
    for index in range(40):
        *_, speed = dataset.position(index)
        segment = dataset[index][0].numpy()
        spectrum = np.abs(np.fft.rfft(segment * np.hanning(4000)))
        assert spectrum.argmax() * rate / 4000 == pytest.approx(400 * speed, abs=2)  # 320 or 500 Hz
        assert np.square(segment[-200:]).mean() == pytest.approx(0.5, rel=0.2)  # to its end, no zeros
        drawn[speed] += 1
    assert min(drawn[0.8], drawn[1.25]) > 8


def test_speeds_of_one_draw_the_segments_that_no_speeds_draw(manifest):
    utterances = read_manifest(manifest, "train", 8000)
    plain, same = SegmentDataset(utterances, 2000, 0), SegmentDataset(utterances, 2000, 0, speeds=(1.0,))
    assert all(torch.equal(plain[i], same[i]) for i in range(10))


def test_an_utterance_shorter_than_a_fast_segment_is_padded_at_its_end(tmp_path):
    sf.write(tmp_path / "a.wav", np.full(2200, 0.5), 8000)
    segment = SegmentDataset([Utterance(tmp_path / "a.wav", "a", 2200)], 2000, 0, speeds=(1.25,))[0][0]
    assert segment.shape == (2000,) and segment[1760:].eq(0).all() and segment[100:1600].sub(0.5).abs().max() < 0.01


def test_ranks_share_out_the_batches_of_a_single_process_in_order():
    single = list(StepSampler(0, 6, 8, 0, 1))
    ranks = [list(StepSampler(0, 6, 8, rank, 2)) for rank in range(2)]
    assert single == [a + b for a, b in zip(*ranks)]
    assert list(StepSampler(4, 6, 8, 0, 1)) == single[4:]  # resumed
    assert len({index for batch in single for index in batch}) == 48
    with pytest.raises(ValueError, match="batch_size=8 does not divide among 3 processes; try 6"):
        StepSampler(0, 1, 8, 0, 3)


def test_loader_workers_give_what_the_main_process_gives(manifest):
    dataset = SegmentDataset(read_manifest(manifest, "train", 8000), 2000, seed=0)
    sampler = StepSampler(2, 8, 4, 0, 1)
    worked = list(segment_loader(dataset, sampler, 2, pin_memory=False))
    plain = [torch.stack([dataset[i] for i in indices]) for indices in sampler]
    assert len(worked) == 6 and all(torch.equal(a, b) for a, b in zip(worked, plain))


def test_an_utterance_shorter_than_a_segment_is_padded_at_its_end(tmp_path):
    sf.write(tmp_path / "a.wav", speech_like(700), 8000, subtype="FLOAT")
    segment = SegmentDataset([Utterance(tmp_path / "a.wav", "a", 700)], 2000, 0)[3]
    assert segment.shape == (1, 2000)
    assert np.array_equal(segment[0, :700].numpy(), speech_like(700)) and not segment[0, 700:].any()


def test_a_file_shorter_than_its_manifest_line_is_named_not_fatal(tmp_path):
    sf.write(tmp_path / "a.wav", speech_like(1500), 8000)
    with pytest.warns(UserWarning, match="a.wav: 1500 samples, the manifest says 2000"):
        assert SegmentDataset([Utterance(tmp_path / "a.wav", "a", 2000)], 2000, 0)[0].shape == (1, 2000)


def test_an_unreadable_file_is_named_and_does_not_end_the_run(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"not audio")
    dataset = SegmentDataset([Utterance(tmp_path / "a.wav", "a", 2000)], 2000, 0)
    with pytest.warns(UserWarning, match="a.wav.*silence in its place"):
        assert not dataset[0].any()


def line(**changes) -> str:
    return json.dumps({"path": "a.wav", "speaker": "a", "split": "train", "sample_rate": 8000, "n_samples": 9} | changes)


@pytest.mark.parametrize(
    "text, said",
    [
        (line(sample_rate=16000), "m.jsonl:1: sample_rate=16000, the model's is 8000; prepare the data with"),
        ("{oops", "m.jsonl:1: not a JSON object"),
        ('{"path": "a.wav"}', "m.jsonl:1: lacks speaker, split, sample_rate, n_samples"),
        ("[1]", "m.jsonl:1: lacks"),
        (line(n_samples="9"), "m.jsonl:1: n_samples='9', expected int"),
        (line(path=None), "m.jsonl:1: path=None, expected str"),
        (line(), "1 of 1 audio files are missing, the first is"),
    ],
)
def test_a_bad_manifest_is_one_line(tmp_path, text, said):
    (tmp_path / "m.jsonl").write_text(text + "\n")
    with pytest.raises(ValueError) as error:
        read_manifest(tmp_path / "m.jsonl", "train", 8000)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_missing_manifest_and_an_empty_split_are_named(tmp_path):
    with pytest.raises(ValueError, match="no such manifest"):
        read_manifest(tmp_path / "none.jsonl", "train", 8000)
    with pytest.raises(ValueError, match="no utterances"):
        SegmentDataset([], 2000, 0)
