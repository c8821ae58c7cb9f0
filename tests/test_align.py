"""`codec align` around its model: which utterances, which text, continuation, skips, and the mending of Whisper's times."""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile as sf

from codec import align
from codec.words import Transcript, Word, check_words, read_words


class Whisper:
    """Stands for faster-whisper's model: hears two words, with a comma and an overlap, and counts its calls."""

    def __init__(self):
        self.languages = []

    def transcribe(self, wav, language, word_timestamps, condition_on_previous_text):
        assert wav.dtype == np.float32 and wav.ndim == 1 and word_timestamps
        self.languages.append(language)
        words = [SimpleNamespace(word=" le", start=0.0, end=0.3), SimpleNamespace(word=" chat,", start=0.2, end=0.9)]
        return iter([SimpleNamespace(text=" le chat,", words=words)]), None


@pytest.fixture
def whisper(monkeypatch) -> Whisper:
    model = Whisper()
    monkeypatch.setattr(align, "load_model", lambda name, device, language: model)
    return model


@pytest.fixture
def manifest(tmp_path) -> Path:
    """Four utterances of 1 s: two rates, two splits."""
    (tmp_path / "wav").mkdir()
    lines = []
    for i, (rate, split) in enumerate([(24000, "train"), (8000, "train"), (24000, "train"), (24000, "test")]):
        sf.write(tmp_path / f"wav/{i}.wav", 0.1 * np.random.default_rng(i).standard_normal(rate), rate)
        lines.append({"path": f"wav/{i}.wav", "speaker": "s", "split": split, "sample_rate": rate, "n_samples": rate})
    path = tmp_path / "manifest.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(*arguments) -> None:
    parser = argparse.ArgumentParser()
    align.add_command(parser.add_subparsers())
    options = parser.parse_args(["align", *map(str, arguments), "--model", "base"])
    options.run(options)


# ---- the command ------------------------------------------------------------------------------------------

def test_every_utterance_is_written_with_times_that_pass_the_check(tmp_path, manifest, whisper, capsys):
    out = tmp_path / "words.jsonl"
    run(manifest, out, "--language", "fr")
    found = read_words(out)
    assert list(found) == [f"wav/{i}.wav" for i in range(4)] and whisper.languages == ["fr"] * 4
    for name, transcript in found.items():
        check_words(transcript, name, 1.0)
        assert transcript == Transcript("le chat,", (Word("le", 0.0, 0.3), Word("chat,", 0.3, 0.9)))
    assert "4 utterances aligned, 0 kept, 0 skipped" in capsys.readouterr().out
    assert not Path(f"{out}.partial").exists()


def test_only_the_splits_asked_for_are_aligned(tmp_path, manifest, whisper):
    run(manifest, tmp_path / "words.jsonl", "--split", "test")
    assert list(read_words(tmp_path / "words.jsonl")) == ["wav/3.wav"]
    with pytest.raises(ValueError, match="manifest.jsonl: no utterances of val"):
        run(manifest, tmp_path / "words.jsonl", "--split", "val")


def test_a_killed_run_goes_on_and_drops_the_torn_line(tmp_path, manifest, whisper, monkeypatch, capsys):
    out, alone = tmp_path / "words.jsonl", tmp_path / "alone.jsonl"
    run(manifest, alone)
    real, calls = align.hear_words, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(align, "hear_words", killed)
    with pytest.raises(KeyboardInterrupt):
        run(manifest, out)
    assert not out.exists()
    partial = Path(f"{out}.partial")
    assert partial.read_text().count("\n") == 2
    partial.write_bytes(alone.read_bytes()[: len(partial.read_bytes()) + 40])
    run(manifest, out)
    assert len(calls) == 5  # 2 + the one that was killed + 2
    assert out.read_bytes() == alone.read_bytes()
    assert "2 utterances aligned, 2 kept" in capsys.readouterr().out


def test_what_the_words_file_has_is_kept_and_needs_no_model(tmp_path, manifest, whisper, monkeypatch, capsys):
    out = tmp_path / "words.jsonl"
    out.write_text('{"path": "wav/3.wav", "text": "by hand", "words": []}\n')
    run(manifest, out)
    assert read_words(out)["wav/3.wav"].text == "by hand" and len(whisper.languages) == 3
    before = out.read_bytes()
    monkeypatch.setattr(align, "load_model", None)
    run(manifest, out)
    assert out.read_bytes() == before and "0 utterances aligned, 4 kept" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"words.json: a words file ends in .jsonl"):
        run(manifest, tmp_path / "words.json")


def test_bad_utterances_are_skipped_counted_and_tried_again(tmp_path, manifest, whisper, monkeypatch, capsys):
    out, good = tmp_path / "words.jsonl", (tmp_path / "wav/1.wav").read_bytes()
    (tmp_path / "wav/1.wav").write_bytes(good[:100])
    (tmp_path / "wav/2.wav").unlink()
    real = whisper.transcribe

    def out_of_memory(wav, **options):
        if len(whisper.languages) == 1:
            whisper.languages.append("failed")
            raise RuntimeError("CUDA out of memory\nat line 3")
        return real(wav, **options)

    monkeypatch.setattr(whisper, "transcribe", out_of_memory)
    run(manifest, out)
    captured = capsys.readouterr()
    assert list(read_words(out)) == ["wav/0.wav"] and "1 utterances aligned, 0 kept, 3 skipped" in captured.out
    lines = captured.err.splitlines()
    assert len(lines) == 3 and all(line.startswith("codec align: ") and line.endswith("; skipped") for line in lines)
    assert "wav/1.wav" in lines[0] and "wav/2.wav: no such file" in lines[1] and "wav/3.wav: CUDA out of memory" in lines[2]
    (tmp_path / "wav/1.wav").write_bytes(good)
    run(manifest, out)
    assert sorted(read_words(out)) == ["wav/0.wav", "wav/1.wav", "wav/3.wav"]
    run(manifest, out)  # the only one left fails: that is no reason to fail
    assert "0 utterances aligned, 3 kept, 1 skipped" in capsys.readouterr().out


def test_a_run_in_which_everything_fails_is_an_error_and_leaves_nothing(tmp_path, manifest, whisper):
    for path in (tmp_path / "wav").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="none of 4 utterances could be aligned"):
        run(manifest, tmp_path / "words.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.jsonl", "wav"]


def test_known_texts_are_placed_in_their_own_language(tmp_path, manifest, whisper, monkeypatch, capsys):
    placed = []

    def locate(model, wav, text, language, name):
        placed.append((name, text, language))
        return [Word(" " + text, 0.1, 0.5), Word(".", 0.5, 0.9)]

    monkeypatch.setattr(align, "locate_words", locate)
    sf.write(tmp_path / "wav/3.wav", np.zeros(31 * 8000), 8000)
    known = tmp_path / "known.csv"
    rows = 'path,text,language\nwav/0.wav,"Oui, ""non""",\n1,né,pt\nwav/2.wav, ,fr\nwav/3,long,fr\n'
    known.write_text(rows, encoding="utf-8-sig")
    run(manifest, tmp_path / "words.jsonl", "--transcripts", known, "--language", "fr")
    assert placed == [("wav/0.wav", 'Oui, "non"', "fr"), ("wav/1.wav", "né", "pt")] and not whisper.languages
    assert read_words(tmp_path / "words.jsonl")["wav/1.wav"] == Transcript("né", (Word("né", 0.1, 0.5),))
    lines = capsys.readouterr().err.splitlines()
    assert "wav/2.wav: no text in the transcripts" in lines[0]
    assert "wav/3.wav: 31.0 s, Whisper aligns a known text within 30 s; cut it first" in lines[1]


def test_transcripts_may_be_jsonl_and_must_be_well_formed(tmp_path):
    path = tmp_path / "known.jsonl"
    path.write_text('{"path": "a", "text": "x", "language": "es"}\n{"path": "b", "text": "y"}\n')
    assert align.read_known(path) == {"a": align.Known("x", "es"), "b": align.Known("y", None)}
    for name, text, message in (
        ("k.jsonl", '{"path": "a"}', 'k.jsonl:1: lacks "text"; it has path'),
        ("k.csv", "a.wav,oui\nb.wav,non\n", 'k.csv:2: lacks "path"; it has a.wav, oui'),
        ("k.csv", "path,text\na.wav\n", 'k.csv:2: "text" is None'),
        ("k.csv", "path,text\na,x\na,y\n", "k.csv:3: a for the second time"),
        ("k.csv", 'path,text\na,"' + "x" * 140000, "is a quotation mark left open"),
        ("none.csv", None, "none.csv: no such file"),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(ValueError) as caught:
            align.read_known(tmp_path / name)
        assert message in str(caught.value)


def test_without_faster_whisper_one_line_says_what_to_install(tmp_path, manifest, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(ValueError, match="pip install faster-whisper$"):
        run(manifest, tmp_path / "words.jsonl")
    assert not list(tmp_path.glob("words*"))


@pytest.mark.parametrize(("arguments", "message"), [
    (("none", "cpu", None), "--model none --device cpu: no such model"),
    (("base", "cuda:one", None), "--model base --device cuda:one: "),
    (("base", "cuda:1", "tel"), "--language tel: expected a code of en, es"),
])  # fmt: skip
def test_a_model_device_or_language_that_is_not_there_is_one_line(monkeypatch, arguments, message):
    def model(name, device, device_index):
        if name == "none":
            raise RuntimeError("no such model\nlook elsewhere")
        assert (device, device_index) == ("cuda", 1)
        return SimpleNamespace(supported_languages=["en", "es"])

    monkeypatch.setitem(sys.modules, "faster_whisper", SimpleNamespace(WhisperModel=model))
    with pytest.raises(ValueError) as caught:
        align.load_model(*arguments)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


# ---- times ------------------------------------------------------------------------------------------------

def test_mended_words_are_in_order_inside_the_audio_and_hold_letters():
    words = [Word(" a", -0.1, 0.5), Word("-", 0.5, 0.6), Word(" b", 0.4, 0.45), Word(" తె,", 0.7, 0.6), Word(" 7", 0.9, 1.4),
             Word(" c", 2.0, 3.0), Word(" ", 0.0, 0.0)]  # fmt: skip
    mended = align.mend_words(words, 1.0)
    assert mended == (Word("a", 0.0, 0.5), Word("b", 0.5, 0.5), Word("తె,", 0.7, 0.7), Word("7", 0.9, 1.0), Word("c", 1.0, 1.0))
    check_words(Transcript("", mended), "a.wav", 1.0)
    with pytest.raises(ValueError, match="is outside the audio"):
        check_words(Transcript("", tuple(words)), "a.wav", 1.0)


def noise(*sounds: tuple[float, float]) -> np.ndarray:
    """2 s at 16 kHz, loud from start to end in seconds, 60 dB lower elsewhere."""
    level = np.full(32000, 1e-4)
    for start_s, end_s in sounds:
        level[round(start_s * 16000) : round(end_s * 16000)] = 0.1
    return (level * np.random.default_rng(0).standard_normal(32000)).astype(np.float32)


@pytest.mark.parametrize(("sounds", "expected"), [
    ([(0.8, 1.2)], (0.8, 1.2)),
    ([(0.5, 0.6), (0.9, 1.2)], (0.9, 1.2)),  # what is left of the word before, and the pause
    ([(0.8, 0.95), (1.05, 1.2)], (0.8, 1.2)),  # a stop consonant
    ([(0.8, 1.0), (1.4, 1.42)], (0.8, 1.0)),  # a click
    ([(0.0, 2.0)], (0.5, 1.5)),
])  # fmt: skip
def test_a_word_loses_the_pauses_around_it_and_nothing_of_itself(sounds, expected):
    (word,) = align.trim_pauses([Word("a", 0.5, 1.5)], noise(*sounds))
    assert word[1:] == pytest.approx(expected)


def test_digital_silence_and_words_without_length_stay_as_they_are():
    words = [Word("a", 0.5, 1.5), Word("b", 1.5, 1.5), Word("c", 1.9, 2.5)]
    assert align.trim_pauses(words, np.zeros(32000, np.float32)) == words
    assert align.trim_pauses(words[1:2], noise((0.0, 2.0)))[0].end_s == 1.5
