import argparse
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import speech_like, tiny_config

from codec import probe as module
from codec.audio import load_audio
from codec.config import EMAQuantizerConfig, FactorizedQuantizerConfig
from codec.data import Utterance, read_manifest
from codec.model import Codec
from codec.probe import (
    BLANK,
    Frames,
    Reader,
    add_command,
    baseline,
    codebook_groups,
    collect,
    frame_labels,
    group_inputs,
    probe,
    read_out,
    read_prosody,
    shared_classes,
    speaker_accuracy,
    swap,
    table,
)
from codec.rvq import EMAResidualVQ
from codec.words import Transcript, Word

K = 24


def synthetic(seed: int, n_utterances: int = 30, n_frames: int = 120) -> Frames:
    """Frames whose codebook 0 tells pitch, voicing, energy and label; codebook 1 tells nothing."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(K, (n_utterances * n_frames, 2), generator=generator)
    code = codes[:, 0].float()
    return Frames(
        codes=codes,
        latent=torch.zeros(len(codes), 1),
        log_f0=torch.where(code < 18, 4.5 + 0.05 * code, torch.nan),
        energy_db=-10 - code,
        labels=[BLANK if i < 8 else chr(ord("a") + i % 5) for i in codes[:, 0].tolist()],
        utterance=torch.arange(n_utterances).repeat_interleave(n_frames),
        speakers=[f"s{i % 3}" for i in range(n_utterances)],
    )


@pytest.fixture(scope="module")
def synthetic_rows() -> dict[str, dict[str, float]]:
    train, test = synthetic(0), synthetic(1)
    codebooks = torch.randn(2, K, 16, generator=torch.Generator().manual_seed(2))
    classes = shared_classes(train, test)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STEPS", 500)
        rows = {str(i): read_out(*(group_inputs(part.codes, codebooks, [range(i, i + 1)]) for part in (train, test)),
                                 train, test, classes) for i in (0, 1)}  # fmt: skip
    return rows | {"baseline": baseline(train, test, classes)}


def test_what_the_codes_determine_is_read(synthetic_rows):
    row = synthetic_rows["0"]
    assert row["f0_rmse_semitones"] < 0.25 * synthetic_rows["baseline"]["f0_rmse_semitones"]
    assert row["f0_rmse_semitones"] == pytest.approx(12 / math.log(2) * row["log_f0_rmse"])
    assert row["voicing_error"] < 0.1 * synthetic_rows["baseline"]["voicing_error"]
    assert row["energy_rmse_db"] < 0.3 * synthetic_rows["baseline"]["energy_rmse_db"]
    assert row["class_error"] < 0.01 and row["class_error_in_words"] < 0.01


def test_random_codes_read_as_the_baseline_does_so_nothing_leaks_and_nothing_is_memorised(synthetic_rows):
    row, constant = synthetic_rows["1"], synthetic_rows["baseline"]
    for key in ("log_f0_rmse", "contour_rmse_semitones", "energy_rmse_db", "voicing_error", "class_error",
                "class_error_in_words"):  # fmt: skip
        assert 0.95 * constant[key] < row[key] < 1.1 * constant[key], key


def test_the_baseline_is_the_best_constant():
    train, test = synthetic(0), synthetic(1)
    row, voiced = baseline(train, test, shared_classes(train, test)), test.log_f0[test.log_f0.isfinite()]
    constant = train.log_f0.nanmean()
    assert row["log_f0_rmse"] == pytest.approx((voiced - constant).square().mean().sqrt().item(), rel=1e-5)
    assert row["voicing_error"] == pytest.approx(test.log_f0.isnan().float().mean().item())
    in_words = [label for label in test.labels if label != BLANK]
    assert row["class_error"] == pytest.approx(len(in_words) / len(test.labels))
    rights = [1 - in_words.count(label) / len(in_words) for label in "abcde"]
    assert any(row["class_error_in_words"] == pytest.approx(share) for share in rights)


def test_probes_never_see_what_they_are_judged_on(monkeypatch):
    monkeypatch.setattr(module, "STEPS", 50)
    train, test = synthetic(0), synthetic(1)
    codebooks = torch.randn(2, K, 16)
    x_train, x_test = (group_inputs(part.codes, codebooks, [range(1)]) for part in (train, test))
    order = torch.randperm(len(x_test))
    shuffled = test._replace(log_f0=test.log_f0[order], energy_db=test.energy_db[order])
    state = torch.get_rng_state()
    outputs = [read_prosody(Reader(x_train, x_test, train, part), train) for part in (test, shuffled)]
    for first, second in zip(*outputs):
        assert torch.equal(first, second)
    assert torch.get_rng_state().equal(state)
    other = read_prosody(Reader(x_train, x_test[order], train, test), train)[0]
    assert not torch.equal(other, outputs[0][0])


def test_context_stays_inside_the_utterance():
    near = module._neighbours(torch.tensor([0, 0, 0, 1, 1]))
    assert near.tolist() == [[0, 0, 0, 1, 2], [1, 0, 1, 2, 1], [0, 1, 2, 2, 2], [3, 3, 3, 4, 3], [4, 3, 4, 4, 4]]


def test_a_level_offset_of_an_utterance_is_an_error_of_pitch_but_none_of_its_contour():
    test = synthetic(1)
    offset = torch.randn(len(test.speakers))[test.utterance]
    figures = module.prosody_figures(test, test.log_f0 + offset, torch.zeros_like(offset), test.energy_db)
    assert figures["f0_rmse_semitones"] > 5 and figures["contour_rmse_semitones"] < 1e-3


# ---- groups -------------------------------------------------------------------------------------------------


def test_groups_are_named_by_what_they_are_for():
    def lists(config) -> dict[str, list[list[int]]]:
        return {name: [list(part) for part in parts] for name, parts in codebook_groups(config).items()}

    ema = EMAQuantizerConfig("ema", 4, 16, 8)
    assert lists(ema) == {"0": [[0]], "1": [[1]], "rest": [[2, 3]], "0+1": [[0], [1]], "all": [[0], [1], [2, 3]]}
    assert lists(FactorizedQuantizerConfig("factorized", 2, 16, 8)) == {"0": [[0]], "1": [[1]], "all": [[0], [1]]}
    assert lists(EMAQuantizerConfig("ema", 1, 16, 8)) == {"0": [[0]]}
    split = EMAQuantizerConfig("ema", 4, 16, 8, n_semantic=1)
    assert lists(split) == {"semantic": [[0]], "acoustic": [[1, 2, 3]], "all": [[0], [1, 2, 3]]}


def test_prosodic_codebooks_are_a_group_and_join_the_semantic_ones():
    config = EMAQuantizerConfig("ema", 5, 16, 8, n_semantic=1, n_prosodic=2)
    assert codebook_groups(config) == {
        "semantic": [range(0, 1)],
        "prosodic": [range(1, 3)],
        "acoustic": [range(3, 5)],
        "semantic+prosodic": [range(0, 1), range(1, 3)],
        "all": [range(0, 1), range(1, 3), range(3, 5)],
    }


def test_the_sum_of_a_residual_is_what_its_decoder_gets_and_wide_inputs_keep_their_distances():
    quantizer = EMAResidualVQ(EMAQuantizerConfig("ema", 4, 16, 8), latent_dim=8)
    codes = torch.randint(16, (50, 4))
    summed = group_inputs(codes, quantizer.codebooks, [range(4)])
    torch.testing.assert_close(summed, quantizer.decode(codes.T[None])[0].T)

    wide = torch.randn(4, 16, 200)
    aside = torch.cat([wide[i][codes[:, i]] for i in range(4)], 1)
    projected = group_inputs(codes, wide, [range(i, i + 1) for i in range(4)])
    assert projected.shape[1] == module.WIDTH
    ratio = torch.pdist(projected) / torch.pdist(aside)
    assert 0.75 < ratio.min() and ratio.max() < 1.25


def test_speakers_are_named_where_the_codes_name_them_and_guessed_where_not():
    frames = synthetic(3, n_utterances=60)
    x = torch.randn(len(frames.utterance), 8)
    guessed = speaker_accuracy(x, frames)
    told = speaker_accuracy(x + 2 * torch.eye(8)[frames.utterance % 3], frames)
    assert told == 1 and guessed < 0.65
    assert math.isnan(speaker_accuracy(x, frames._replace(speakers=["one"] * 60)))
    assert math.isnan(speaker_accuracy(x, frames._replace(speakers=[str(i) for i in range(60)])))


# ---- labels -------------------------------------------------------------------------------------------------


def test_a_frame_is_labelled_by_what_is_said_at_its_centre():
    spoken = {"a.wav": Transcript("Ab, c", (Word("ab", 0.1, 0.3), Word("c", 0.46, 0.56)))}
    assert frame_labels(spoken, "a.wav", 7, 0.1, "character") == [BLANK, "a", "b", BLANK, BLANK, "c", BLANK]
    assert frame_labels(spoken, "a.wav", 7, 0.1, "word") == [BLANK, "ab", "ab", BLANK, BLANK, "c", BLANK]
    assert frame_labels(spoken, "b.wav", 3, 0.1, "character") == [None] * 3
    late = {"a.wav": Transcript("ab", (Word("ab", 5.0, 6.0),))}
    assert frame_labels(late, "a.wav", 3, 0.1, "word") == [None] * 3


def test_classes_are_the_frequent_labels_that_both_splits_have(monkeypatch):
    monkeypatch.setattr(module, "N_CLASSES", 3)
    train, test = synthetic(0, 1, 9), synthetic(1, 1, 4)
    train = train._replace(labels=["x", "x", "x", "a", "a", BLANK, "b", None, None])
    classes = shared_classes(train, test._replace(labels=["b", BLANK, "a", "c"]))
    assert list(classes) == ["a", BLANK, "b"] and list(classes.values()) == [0, 1, 2]


# ---- swap ---------------------------------------------------------------------------------------------------


def test_a_swap_with_oneself_changes_nothing_and_others_change_the_chosen_codebooks_only():
    codes_a, codes_b = torch.arange(12).view(1, 3, 4), 100 + torch.arange(24).view(1, 3, 8)
    assert torch.equal(swap(codes_a, codes_a, [0, 1, 2]), codes_a)
    swapped = swap(codes_a, codes_b, [1])
    assert torch.equal(swapped[:, [0, 2]], codes_a[:, [0, 2]])
    assert swapped[0, 1].tolist() == [109, 111, 113, 115]  # of two frames of B the one at or after A's centre
    assert swap(codes_b, codes_a, [1])[0, 1].tolist() == [4, 4, 5, 5, 6, 6, 7, 7]
    assert codes_a[0, 1].tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_codebook_that_is_not_there_cannot_be_swapped(wrong):
    codes = torch.zeros(1, 3, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="3 codebooks; give 0 to 2"):
        swap(codes, codes, [0, wrong])


# ---- with a codec -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def codec_dir(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("codec") / "tiny"
    Codec(tiny_config().model).save_pretrained(folder)
    return folder


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(module, "STEPS", 60)


@pytest.fixture
def words(tmp_path, manifest):
    path = tmp_path / "words.jsonl"
    names = [json.loads(line)["path"] for line in manifest.read_text().splitlines()]
    said = [{"word": "ab", "start": 0.05, "end": 0.2}, {"word": "a", "start": 0.25, "end": 0.4}]
    path.write_text("".join(json.dumps({"path": name, "text": "ab a", "words": said}) + "\n" for name in names))
    return path


def run(*arguments) -> None:
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    options = parser.parse_args(["probe", *map(str, arguments)])
    options.run(options)


def test_the_command_prints_a_table_and_writes_the_same_figures(codec_dir, manifest, words, tmp_path, capsys, quick):
    out = tmp_path / "probe.json"
    run(codec_dir, manifest, "--test_split", "val", "--words", words, "--out", out)
    result, captured = json.loads(out.read_text()), capsys.readouterr()
    assert captured.out.strip() == table(result)
    assert list(result["rows"]) == ["baseline", "0", "1", "rest", "0+1", "all", "latent"]
    assert result["codebooks"]["rest"] == [2] and result["n_classes"] == 3
    assert result["train"]["utterances"] == 10 and result["test"]["utterances"] == 2
    assert "2 test speakers are in the training split too" in captured.err
    for row in result["rows"].values():
        assert row["speaker_accuracy"] is None  # one utterance a speaker
        assert all(math.isfinite(value) for key, value in row.items() if key != "speaker_accuracy")
    assert "speaker" not in captured.out
    run(codec_dir, manifest, "--test_split", "val", "--words", words, "--out", tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == out.read_text()


def test_without_words_no_classes_are_read_and_few_utterances_are_enough(codec_dir, manifest, capsys, quick):
    run(codec_dir, manifest, "--test_split", "val", "--max_utterances", 2)
    assert "class" not in capsys.readouterr().out


def test_frames_are_those_of_encode_and_unreadable_files_are_counted(codec_dir, tmp_path):
    codec = Codec.from_pretrained(codec_dir)
    wav = speech_like(4013)
    sf.write(tmp_path / "a.wav", wav, 8000, subtype="FLOAT")
    (tmp_path / "bad.wav").write_bytes(b"not audio")
    sf.write(tmp_path / "short.wav", wav[:19], 8000)
    utterances = [Utterance(tmp_path / f"{name}.wav", "s", n, name) for name, n in
                  (("bad", 4000), ("a", 4013), ("short", 19))]  # fmt: skip
    frames = collect(codec, utterances)
    assert frames.n_unreadable == 2 and frames.speakers == ["s"]
    assert torch.equal(frames.codes, codec.encode_long(torch.from_numpy(wav[:4000])[None, None])[0].T)
    frame = wav[100 * 20 : 101 * 20].astype(np.float64)
    assert frames.energy_db[100].item() == pytest.approx(max(20 * math.log10(np.sqrt((frame**2).mean())), -80), abs=1e-3)
    with pytest.raises(ValueError, match="none of 1 utterances is readable"):
        collect(codec, utterances[:1])
    levelled = Codec.from_pretrained(codec_dir)
    levelled.config = replace(codec.config, level_db=-40.0)
    x = torch.from_numpy(wav[:4000])[None, None]
    brought = collect(levelled, utterances)
    assert torch.equal(brought.codes, codec.encode(levelled.gain(x) * x)[0].T) and not torch.equal(brought.codes, frames.codes)
    assert brought.energy_db[100] < frames.energy_db[100] - 10


def test_utterances_without_a_fitting_transcript_are_counted_and_their_frames_left_out(codec_dir, manifest, quick):
    codec = Codec.from_pretrained(codec_dir)
    train, test = (read_manifest(manifest, split, 8000) for split in ("train", "val"))
    good, late = Transcript("ab", (Word("ab", 0.1, 0.4),)), Transcript("ab", (Word("ab", 50.0, 60.0),))
    transcripts = {u.name: late if u is train[0] else good for u in train[:-1] + test}
    result = probe(codec, train, test, transcripts, unit="word")
    assert result["train"]["untranscribed"] == 2 and result["test"]["untranscribed"] == 0 and result["n_classes"] == 2
    with pytest.raises(ValueError, match="no transcript fits any of 10 utterances, the first is 0.wav"):
        probe(codec, train, test, {"other": good})
    with pytest.raises(ValueError, match="1 training utterance, expected 2"):
        probe(codec, train[:1], test)


def test_a_file_swapped_with_itself_is_its_reconstruction(codec_dir, manifest, tmp_path, capsys):
    wavs, out = [manifest.parent / "0.wav", manifest.parent / "3.wav"], tmp_path / "out.wav"
    codec, wav = Codec.from_pretrained(codec_dir), load_audio(wavs[0], 8000)
    run(codec_dir, "--swap", wavs[0], wavs[0], out, "--codebooks", 1)
    with torch.no_grad():
        expected = codec.decode_long(codec.encode_long(wav[None]), wav.shape[-1])[0]
    torch.testing.assert_close(load_audio(out, 8000), expected, atol=1e-4, rtol=0)
    run(codec_dir, "--swap", *wavs, out, "--codebooks", 0, 1)
    assert load_audio(out, 8000).shape == wav.shape
    assert "codebooks 0, 1 of" in capsys.readouterr().out


def test_prosodic_codebooks_are_probed_and_swapped_unless_others_are_named(manifest, tmp_path, capsys, quick):
    sizes = ["model.quantizer.n_codebooks=4", "model.quantizer.n_semantic=1", "model.quantizer.n_prosodic=2"]
    codec, out = Codec(tiny_config(sizes).model).eval(), tmp_path / "out.wav"
    codec.save_pretrained(tmp_path / "codec")
    run(tmp_path / "codec", "--swap", manifest.parent / "0.wav", manifest.parent / "3.wav", out)
    assert "codebooks 1, 2 of" in capsys.readouterr().out
    result = probe(codec, *(read_manifest(manifest, split, 8000) for split in ("train", "val")))
    assert list(result["codebooks"].items())[1] == ("prosodic", [1, 2])
    assert result["rows"].keys() == {"baseline", "semantic", "prosodic", "acoustic", "semantic+prosodic", "all", "latent"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "either a manifest or --swap"),
        (["MANIFEST", "--swap", "a", "b", "c"], "either a manifest or --swap"),
        (["MANIFEST"], "0 utterances in split test"),
        (["MANIFEST", "--test_split", "val", "--max_utterances", "0"], "--max_utterances 0"),
        (["MANIFEST", "--test_split", "train"], "speakers not heard"),
        (["--swap", "a.wav", "b.wav", "c.wav"], "no prosodic codebooks to swap; name some"),
        (["--swap", "a.wav", "b.wav", "c.wav", "--codebooks", "1"], "a.wav"),
        (["MANIFEST", "--device", "nowhere"], "--device nowhere"),
    ],
)
def test_bad_input_fails_in_one_line(codec_dir, manifest, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        run(codec_dir, *(manifest if argument == "MANIFEST" else argument for argument in arguments))
    assert "\n" not in str(error.value)
