"""Transcripts and word timestamps: reading, checking, and the time of every character.

A words file is JSONL, one line an utterance,

    {"path": "wav/fr/a.wav", "text": "Le chat.", "words": [{"word": "le", "start": 0.12, "end": 0.31}, ...]}

with the seconds counted from the start of that utterance's file; without "text" it is the words joined by
spaces. Or it is a NIST CTM file: lines `NAME CHANNEL START DURATION WORD [CONFIDENCE]`, `;;` for comments.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Iterator
from difflib import SequenceMatcher
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

import numpy as np

from codec.files import write_atomically

T = TypeVar("T")
PAST_END_S = 0.05  # aligners count in frames of 10 to 20 ms, and round up
OVERLAP_S = 0.02  # less is rounding
MIN_MATCH = 0.8  # share of a transcript's letters that its words must hold, in order


class Word(NamedTuple):
    text: str
    start_s: float
    end_s: float


class Transcript(NamedTuple):
    text: str
    words: tuple[Word, ...]


# ---- files ------------------------------------------------------------------------------------------------

def read_words(path: str | Path) -> dict[str, Transcript]:
    """Read a words file; whether the times make sense for the audio is for `check_words` to say.

    Args:
        path: .jsonl (or .json: the same lines, or one list of the same objects) or .ctm, UTF-8.
    Returns:
        {utterance name: transcript}, in the file's order; a name may be the manifest's path, with or without
        suffix, or its stem: see `find_transcript`.
    Raises:
        ValueError: not such a file, or a line that is not as expected, or an utterance twice.
    """
    path = Path(path)
    readers = {".jsonl": read_json_words, ".json": read_json_words, ".ctm": _read_ctm}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: a words file ends in {', '.join(readers)}; got {path.suffix or 'no suffix'}")
    return readers[path.suffix.lower()](path)


def read_json_words(path: Path) -> dict[str, Transcript]:
    """`read_words` of a JSON file, whatever its suffix."""
    transcripts: dict[str, Transcript] = {}
    for place, entry in read_objects(path):
        name = get_value(entry, "path", str, place)
        if name in transcripts:
            raise ValueError(f"{place}: {name} for the second time; give an utterance all its words in one place")
        words = tuple(_parse_word(word, place) for word in get_value(entry, "words", list, place))
        text = get_value(entry, "text", str, place) if "text" in entry else " ".join(word.text for word in words)
        transcripts[name] = Transcript(text, words)
    return transcripts


def write_words(path: str | Path, transcripts: dict[str, Transcript]) -> None:
    """Write transcripts as JSONL that `read_words` reads back, in one step."""
    write_atomically(path, "".join(words_line(name, transcript) for name, transcript in transcripts.items()))


def words_line(name: str, transcript: Transcript) -> str:
    """One line of a words file, with its line feed."""
    words = [{"word": word.text, "start": word.start_s, "end": word.end_s} for word in transcript.words]
    return json.dumps({"path": name, "text": transcript.text, "words": words}, ensure_ascii=False) + "\n"


def find_transcript(transcripts: dict[str, T], name: str) -> T | None:
    """What a file has for an utterance: under its path, its path without suffix, or its stem; else None.

    Args:
        transcripts: as `read_words` returns them.
        name: the manifest's "path". Where two utterances share a stem the file must have paths.
    """
    bare = PurePosixPath(name).with_suffix("")
    return next((transcripts[key] for key in (name, str(bare), bare.name) if key in transcripts), None)


def read_text(path: Path) -> str:
    """The contents of a UTF-8 file, with or without a byte order mark.

    Raises:
        ValueError: no such file, or not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; convert it") from None


def read_objects(path: Path) -> Iterator[tuple[str, dict]]:
    """("file:line", object) of a JSONL file, or ("file: entry number", object) of one JSON list of objects.

    Raises:
        ValueError: as `read_text`, or not JSON objects.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        entries = [(f"{path}: entry {number}", entry) for number, entry in enumerate(_parse_json(text, str(path)), 1)]
    else:
        entries = ((place, _parse_json(line, place)) for place, line in _lines(path, text))
    for place, entry in entries:
        if not isinstance(entry, dict):
            raise ValueError(f"{place}: expected a JSON object, got {type(entry).__name__}")
        yield place, entry


def get_value(entry: dict, key: str, kind: type, place: str) -> Any:
    """`entry[key]`, or one clear line where it is missing or not of the kind."""
    if key not in entry:
        raise ValueError(f'{place}: lacks "{key}"; it has {", ".join(entry) or "nothing"}')
    if not isinstance(entry[key], kind):
        raise ValueError(f'{place}: "{key}" is {entry[key]!r}, expected {kind.__name__}')
    return entry[key]


def _lines(path: Path, text: str) -> Iterator[tuple[str, str]]:
    """("file:line", line) of the lines that are not blank."""
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): JSON may hold U+2028 as it is
        if line.strip():
            yield f"{path}:{number}", line


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place}: not JSON ({error}); expected one object a line") from None


def _parse_word(entry: Any, place: str) -> Word:
    """A word of a JSON words file."""
    if not isinstance(entry, dict):
        raise ValueError(f'{place}: a word is {entry!r}, expected {{"word": ..., "start": ..., "end": ...}}')
    text = get_value(entry, "word", str, place)
    absent = [key for key in ("start", "end") if key not in entry]
    if absent:
        raise ValueError(f'{place}: word "{text}" lacks "{absent[0]}"')
    return Word(text, *(_seconds(entry[key], f'{place}: "{key}" of word "{text}"') for key in ("start", "end")))


def _read_ctm(path: Path) -> dict[str, Transcript]:
    words: dict[str, list[Word]] = {}
    for place, line in _lines(path, read_text(path)):
        if line.lstrip().startswith(";;"):
            continue
        fields = line.split()
        if len(fields) not in (5, 6):
            raise ValueError(f"{place}: expected NAME CHANNEL START DURATION WORD [CONFIDENCE], got {len(fields)} fields")
        start_s = _seconds(_number(fields[2]), f"{place}: start")
        duration_s = _seconds(_number(fields[3]), f"{place}: duration")
        if len(fields) == 6 and fields[5] != "NA":  # a name with a space would shift the fields
            _seconds(_number(fields[5]), f"{place}: confidence")
        end_s = round(start_s + duration_s, 6)  # 0.1 + 0.2 is 0.30000000000000004
        words.setdefault(fields[0], []).append(Word(fields[4], start_s, end_s))
    return {name: Transcript(" ".join(word.text for word in said), tuple(said)) for name, said in words.items()}


def _number(field: str) -> float | str:
    """The number that a field of a CTM line is, else the field for the error to show."""
    try:
        return float(field)
    except ValueError:
        return field


def _seconds(value: Any, place: str) -> float:
    """A finite number from 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{place} is {value!r}, expected a number from 0")
    return float(value)


# ---- times ------------------------------------------------------------------------------------------------

def check_words(transcript: Transcript, name: str, duration_s: float) -> None:
    """Refuse timestamps that cannot be those of the audio.

    Args:
        transcript: its words may overlap by 20 ms and end 50 ms after the audio, which is rounding; a word may
            have no length, and one without words passes.
        name: of the utterance, for the message.
        duration_s: of the audio.
    Raises:
        ValueError: a word that is empty, outside the audio, ends before it starts, starts before the previous
            one starts or well before it ends.
    """
    previous = Word("", 0.0, 0.0)
    for word in transcript.words:
        at = f'{name}: word "{word.text}" at {word.start_s:g} to {word.end_s:g} s'
        if not word.text.strip():
            raise ValueError(f"{at} is empty; leave pauses out of the words")
        if word.start_s < 0 or word.end_s > duration_s + PAST_END_S:
            raise ValueError(f"{at} is outside the audio of {duration_s:.3f} s; count from the start of the utterance's file")
        if word.end_s < word.start_s:
            raise ValueError(f"{at} ends before it starts; align it again")
        if word.start_s < previous.start_s:
            raise ValueError(f'{at} starts before the previous word "{previous.text}"; sort the words by time')
        if word.start_s < previous.end_s - OVERLAP_S - 1e-6:
            raise ValueError(f'{at} overlaps the previous word "{previous.text}", which ends at {previous.end_s:g} s; '
                             "leave out one of them")  # fmt: skip
        previous = Word(word.text, word.start_s, max(word.end_s, previous.end_s))


def character_spans(transcript: Transcript, name: str) -> np.ndarray:
    """When each character of the transcript is spoken.

    The letters, digits and combining marks of the text are matched to those of the words, regardless of case,
    punctuation, spacing and Unicode normal form. The time of a word is spread evenly over its letters.

    Args:
        transcript: text, and words in order of time.
        name: of the utterance, for the message.
    Returns:
        float64 [n_chars, 2] start and end in seconds, NaN where a character belongs to no word.
    Raises:
        ValueError: less than 0.8 of the text's letters are found in the words.
    """
    text, owners = _letters(transcript.text)
    said, times = "", []
    for word in transcript.words:
        letters, _ = _letters(word.text)
        edges = np.linspace(word.start_s, word.end_s, len(letters) + 1)
        said += letters
        times += zip(edges[:-1], edges[1:])
    spans = np.full((len(transcript.text), 2), np.nan)
    for first, first_said, size in _matches(text, said, name):
        for owner, (start_s, end_s) in zip(owners[first : first + size], times[first_said : first_said + size]):
            spans[owner] = np.fmin(spans[owner, 0], start_s), np.fmax(spans[owner, 1], end_s)
    return spans


def _letters(text: str) -> tuple[str, list[int]]:
    """The letters, digits and marks of a text, case and compatibility forms folded, and where each comes from."""
    letters, owners = [], []
    for index, character in enumerate(text):
        # character by character, as folding changes lengths (ß is ss); decomposed, so that é is e and its accent
        folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", character).casefold())
        kept = [letter for letter in folded if unicodedata.category(letter)[0] in "LMN"]
        letters += kept
        owners += [index] * len(kept)
    return "".join(letters), owners


def _matches(text: str, said: str, name: str) -> list[tuple[int, int, int]]:
    """(start in text, start in said, length) of the stretches that agree."""
    if text == said:
        return [(0, 0, len(text))]
    # autojunk would drop the common letters of a text of 200 and more: all of them
    matches = SequenceMatcher(None, text, said, autojunk=False).get_matching_blocks()
    share = sum(match.size for match in matches) / max(len(text), 1)
    if text and share < MIN_MATCH:
        raise ValueError(f"{name}: the transcript does not match its words: {share:.0%} of its letters are in them, expected "
                         f"{MIN_MATCH:.0%}; give it the words that were aligned")  # fmt: skip
    return [tuple(match) for match in matches]
