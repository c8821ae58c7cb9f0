"""Words files: formats, checks of the times, and the time of every character in several scripts."""

import json
from difflib import SequenceMatcher

import numpy as np
import pytest

from codec.words import Transcript, Word, character_spans, check_words, find_transcript, read_words, write_words


def said(*words: tuple[str, float, float], text: str | None = None) -> Transcript:
    words = tuple(Word(*word) for word in words)
    return Transcript(" ".join(word.text for word in words) if text is None else text, words)


def spans(text: str, *words: tuple[str, float, float]) -> np.ndarray:
    return character_spans(said(*words, text=text), "a.wav")


def span_of(part: str, text: str, found: np.ndarray) -> list[float]:
    """First start and last end of a part of the text."""
    rows = found[text.index(part) :][: len(part)]
    return [np.nanmin(rows), np.nanmax(rows)]


# ---- files ------------------------------------------------------------------------------------------------

def test_a_words_file_comes_back_as_it_was_written(tmp_path):
    transcripts = {
        "wav/te/అ.wav": said(("తెలుగు", 0.1, 0.1 + 0.2), ("భాష", 0.3, 1 / 3), text="తెలుగు\u2028భాష."),
        "b.wav": said(text=""),
    }
    write_words(tmp_path / "words.jsonl", transcripts)
    assert read_words(tmp_path / "words.jsonl") == transcripts
    assert [path.name for path in tmp_path.iterdir()] == ["words.jsonl"]


def test_json_may_be_lines_or_a_list_and_lack_the_text(tmp_path):
    lines = [{"path": f"{i}.wav", "words": [{"word": "a", "start": 0, "end": 0.5}, {"word": "b", "start": 1, "end": 2}]}
             for i in range(2)]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, lines)), encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(lines, indent=2))
    expected = said(("a", 0.0, 0.5), ("b", 1.0, 2.0))
    assert expected.text == "a b"
    assert read_words(tmp_path / "a.jsonl") == read_words(tmp_path / "a.json") == {"0.wav": expected, "1.wav": expected}


def test_ctm_gives_start_and_duration(tmp_path):
    (tmp_path / "a.ctm").write_text(";; made by hand\nx 1 0.10 0.20 le 0.98\ny A 0 0.5 oui\nx 1 0.30 0.25 chat NA\n")
    assert read_words(tmp_path / "a.ctm") == {
        "x": said(("le", 0.1, 0.3), ("chat", 0.3, 0.55)), "y": said(("oui", 0.0, 0.5)),
    }  # fmt: skip


def test_an_utterance_is_found_by_its_path_its_path_without_suffix_or_its_stem():
    for key in ("wav/fr/a.b.wav", "wav/fr/a.b", "a.b"):
        assert find_transcript({key: 1}, "wav/fr/a.b.wav") == 1
    assert find_transcript({"a": 1, "fr/a.wav": 2, "fr/a": 3}, "fr/a.wav") == 2
    assert find_transcript({"wav/fr/a": 1, "a.wav": 2}, "wav/es/a.wav") is None


WORD = '{"path": "a.wav", "words": [{"word": "le", "start": 0.1, "end": 0.2}]}'


@pytest.mark.parametrize(("name", "text", "message"), [
    ("w.jsonl", WORD + "\n" + WORD, "w.jsonl:2: a.wav for the second time"),
    ("w.jsonl", WORD + "\n" + WORD[:30], "w.jsonl:2: not JSON"),
    ("w.json", "[" + WORD + ",", "w.json: not JSON"),
    ("w.json", "[" + WORD + ", 3]", "w.json: entry 2: expected a JSON object, got int"),
    ("w.jsonl", '{"words": []}', 'w.jsonl:1: lacks "path"; it has words'),
    ("w.jsonl", '{"path": "a.wav"}', 'lacks "words"'),
    ("w.jsonl", '{"path": "a.wav", "words": {}}', '"words" is {}, expected list'),
    ("w.jsonl", WORD.replace('"words"', '"text": null, "words"'), '"text" is None, expected str'),
    ("w.jsonl", WORD.replace('"end"', '"stop"'), 'word "le" lacks "end"'),
    ("w.jsonl", WORD.replace('{"word": "le", "start": 0.1, "end": 0.2}', '["le", 0.1, 0.2]'), "a word is ['le', 0.1, 0.2]"),
    ("w.jsonl", WORD.replace("0.1", '"0.1"'), "\"start\" of word \"le\" is '0.1', expected a number from 0"),
    ("w.jsonl", WORD.replace("0.1", "-0.1"), '"start" of word "le" is -0.1'),
    ("w.jsonl", WORD.replace("0.2", "NaN"), '"end" of word "le" is nan'),
    ("w.jsonl", WORD.replace("0.1", "true"), '"start" of word "le" is True'),
    ("w.ctm", "x 1 0.1 0.2 le\nx 1 0.3 le", "w.ctm:2: expected NAME CHANNEL START"),
    ("w.ctm", "x 1 soon 0.2 le", "w.ctm:1: start is 'soon'"),
    ("w.ctm", "x 1 0.1 -0.2 le", "w.ctm:1: duration is -0.2"),
    ("w.ctm", "my file 1 0.1 0.2 le", "w.ctm:1: confidence is 'le'"),
    ("w.txt", "", "w.txt: a words file ends in .jsonl, .json, .ctm"),
])  # fmt: skip
def test_a_malformed_file_is_one_line_with_the_place(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as caught:
        read_words(tmp_path / name)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_and_one_in_another_encoding_are_named(tmp_path):
    with pytest.raises(ValueError, match="w.jsonl: no such file"):
        read_words(tmp_path / "w.jsonl")
    (tmp_path / "w.ctm").write_bytes("x 1 0 1 été".encode("latin-1"))
    with pytest.raises(ValueError, match="w.ctm: not UTF-8 at byte 8"):
        read_words(tmp_path / "w.ctm")


# ---- times ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("words", "message"), [
    ([("le", 0.0, 0.3), ("chat", 0.8, 1.06)], "outside the audio of 1.000 s"),
    ([("le", -0.01, 0.3)], "outside the audio"),
    ([("le", 0.3, 0.2)], "ends before it starts"),
    ([("le", 0.3, 0.4), ("chat", 0.2, 0.25)], 'starts before the previous word "le"'),
    ([("le", 0.1, 0.4), ("chat", 0.37, 0.6)], 'overlaps the previous word "le", which ends at 0.4 s'),
    ([("le", 0.1, 0.4), ("a", 0.38, 0.38), ("chat", 0.38, 0.6), ("dort", 0.5, 0.7)], 'overlaps the previous word "chat"'),
    ([("le", 0.1, 0.4), (" ", 0.4, 0.6)], "is empty"),
])  # fmt: skip
def test_times_that_cannot_be_are_refused_with_the_utterance_and_the_word(words, message):
    with pytest.raises(ValueError) as caught:
        check_words(said(*words), "fr/a.wav", 1.0)
    last = next(word for word in words if f'word "{word[0]}" at' in str(caught.value))
    assert str(caught.value).startswith(f'fr/a.wav: word "{last[0]}" at') and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rounding_and_words_without_length_pass():
    check_words(said(("le", 0.0, 0.32), ("a", 0.3, 0.3), ("chat", 0.3, 1.05)), "a.wav", 1.0)
    check_words(said(text="…"), "a.wav", 1.0)


def test_a_word_is_spread_evenly_over_its_letters_and_nothing_else_has_a_time():
    found = spans("Le chat, là!", ("le", 0.0, 0.2), ("chat", 0.4, 0.8), ("là", 1.0, 1.3))
    expected = np.full((12, 2), np.nan)
    expected[:2] = [[0.0, 0.1], [0.1, 0.2]]
    expected[3:7] = [[0.4, 0.5], [0.5, 0.6], [0.6, 0.7], [0.7, 0.8]]
    expected[9:11] = [[1.0, 1.1], [1.1, 1.3]]  # à is a letter and its accent
    np.testing.assert_allclose(found, expected)


VOWEL_SIGNS = "\u0c3e\u0c3f\u0c41\u0c46\u0c02"  # of the Telugu below; str.isalnum() is False for them


@pytest.mark.parametrize(("text", "words"), [
    ("తెలుగు, చాలా బాగుంది.", ["తెలుగు", "చాలా", "బాగుంది"]),
    ("Ὁ ΛΌΓΟΣ τοῦ ἀνθρώπου· λόγος", ["ὁ", "λόγος", "τοῦ", "ἀνθρώπου", "ΛΌΓΟΣ"]),
    ("Die Straße ist groß", ["DIE", "STRASSE", "IST", "GROSS"]),
    ("İstanbul ıslak", ["i̇stanbul", "ıslak"]),
    ("l'été dernier", ["l’e\u0301te\u0301", "dernier"]),
    ("Peut-être 12 fois", ["peut", "être", "12", "fois"]),
    ("peut être", ["peut-être"]),
    ("don’t", ["don't"]),
    ("한국어 말", ["한국어", "말"]),
    ("ﬁn ½", ["fin", "1⁄2"]),
])  # fmt: skip
def test_letters_meet_regardless_of_case_script_punctuation_and_normal_form(text, words):
    found = spans(text, *((word, float(i), i + 0.9) for i, word in enumerate(words)))
    timed = ~np.isnan(found).any(axis=1)
    assert list(timed) == [character.isalnum() or character in VOWEL_SIGNS for character in text]
    assert (np.diff(found[timed, 0]) >= 0).all() and (found[timed, 1] > found[timed, 0]).all()
    if len(text.split()) == len(words):
        for i, part in enumerate(text.split()):
            assert span_of(part, text, found) == pytest.approx([i, i + 0.9])


def test_telugu_vowel_signs_keep_their_time():
    np.testing.assert_allclose(spans("త\u0c46", ("త\u0c46", 0.0, 1.0)), [[0.0, 0.5], [0.5, 1.0]])


def test_a_word_that_was_heard_otherwise_takes_no_time_from_its_neighbours():
    text = "the quick brown fox jumps over 42 lazy dogs"
    heard = "the quick brown fox jumps over forty-two lazy dogs".split()
    found = spans(text, *((word, float(i), i + 1.0) for i, word in enumerate(heard)))
    assert np.isnan(found[text.index("42"):][:2]).all()
    for i, word in enumerate(text.split()):
        if word != "42":
            assert span_of(word, text, found) == [i, i + 1]


def test_a_long_text_with_one_wrong_word_keeps_all_others():
    letters = np.random.default_rng(1).choice(list("aeiou"), size=(60, 5))  # each so common that difflib calls it junk
    text = " ".join(map("".join, letters))
    words = [(word, float(i), i + 1.0) for i, word in enumerate(text.split())]
    words[7] = ("zzz", 7.0, 8.0)
    found = spans(text, *words)
    assert np.isnan(found[:, 0]).sum() == text.count(" ") + 5
    reduced, heard = text.replace(" ", ""), "".join(word for word, _, _ in words)
    wrong = SequenceMatcher(None, reduced, heard).get_matching_blocks()
    assert sum(block.size for block in wrong) < 0.8 * len(reduced)


def test_a_transcript_of_something_else_is_refused():
    words = [("le", 0.0, 0.2), ("chat", 0.2, 0.5), ("dort", 0.5, 1.0)]
    with pytest.raises(ValueError, match=r"^fr/a.wav: the transcript does not match its words: \d+% of its letters"):
        character_spans(said(*words, text="the dog barks loudly"), "fr/a.wav")
    with pytest.raises(ValueError, match="does not match its words: 0%"):
        character_spans(said(text="le chat"), "fr/a.wav")
    assert character_spans(said(text=""), "a.wav").shape == (0, 2)
    assert np.isnan(character_spans(said(text="..."), "a.wav")).all()
