"""`codec align`: word timestamps by Whisper's cross-attention, as a words file (see codec/words.py).

Needs the package faster-whisper (extra `align`). Whisper hardly knows some languages, Telugu among them: its
words and times are then of no use. Bring the JSON or CTM file of an aligner that was trained on the language,
such as the Montreal Forced Aligner.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from codec.audio import load_audio
from codec.words import (
    Transcript,
    Word,
    find_transcript,
    get_value,
    read_json_words,
    read_objects,
    read_text,
    words_line,
    write_words,
)

SPLITS = ("train", "val", "test")
SAMPLE_RATE = 16000  # of Whisper
MAX_S = 30.0  # of one pass of Whisper
MAX_TOKENS = 440  # of the 448 positions of Whisper's decoder
FRAMES_PER_S = 100
PAUSE_DB = -35.0  # against the loudest frame of the word
PAUSE_FRAMES = 20  # shorter gaps are stop consonants
CLICK_FRAMES = 3  # no word is as short


class Known(NamedTuple):
    text: str
    language: str | None


# ---- the command ------------------------------------------------------------------------------------------

def add_command(commands: argparse._SubParsersAction) -> None:
    """Add `align` to the `codec` command."""
    command = commands.add_parser(
        "align",
        help="word timestamps of a manifest's utterances by Whisper",
        description="Writes when each word is said, for `codec features --text`. Continues where an earlier run stopped. "
        "Whisper is of no use for Telugu and other languages it hardly knows: there, bring the JSON or CTM file of an "
        "aligner trained on the language, such as the Montreal Forced Aligner.",
    )
    command.add_argument("manifest", type=Path, help="manifest.jsonl of prepare_speaker_data.py")
    command.add_argument("output", type=Path, metavar="OUT.jsonl", help="words file")
    command.add_argument("--model", required=True, metavar="FOLDER_OR_NAME", help="a Whisper in CTranslate2's format")
    command.add_argument("--language", help="code such as es; without it Whisper guesses, utterance by utterance")
    command.add_argument("--transcripts", type=Path, metavar="FILE",
                         help="what is said, where it is known: .jsonl or .csv with path, text and perhaps language; "
                              "utterances of at most 30 s")  # fmt: skip
    command.add_argument("--split", nargs="+", choices=SPLITS, default=SPLITS, help="default all")
    command.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Align what the words file does not have yet; an utterance that fails is a line on stderr.

    Raises:
        ValueError: an argument or a file that cannot be used, or no utterance could be aligned.
    """
    names = _read_names(options.manifest, options.split)
    known = read_known(options.transcripts) if options.transcripts else None
    partial = Path(f"{options.output}.partial")
    finished = _read_finished(options.output, partial)
    todo = [name for name in names if name not in finished]
    model = load_model(options.model, options.device, options.language) if todo else None
    write_words(partial, finished)
    n_skipped = 0
    with open(partial, "a", encoding="utf-8") as file:
        for name in tqdm(todo, "align", unit=" utterances", disable=None):
            try:
                transcript = _align_one(model, options.manifest.parent / name, name, known, options.language)
            except (ValueError, RuntimeError) as error:
                n_skipped += 1
                reason = str(error) if name in str(error) else f"{name}: {error}"
                tqdm.write(f"codec align: {reason.splitlines()[0]}; skipped", file=sys.stderr)
                continue
            file.write(words_line(name, transcript))
            file.flush()
    if not finished and n_skipped == len(todo):
        partial.unlink()
        raise ValueError(f"{options.manifest}: none of {n_skipped} utterances could be aligned; see the lines above")
    os.replace(partial, options.output)
    print(f"{options.output}: {len(todo) - n_skipped} utterances aligned, {len(finished)} kept, {n_skipped} skipped")


def _read_names(manifest: Path, splits: Iterable[str]) -> list[str]:
    """The utterances' names, of any sample rate."""
    lines = list(read_objects(manifest))
    names = [get_value(entry, "path", str, place) for place, entry in lines if get_value(entry, "split", str, place) in splits]
    if not names:
        raise ValueError(f"{manifest}: no utterances of {', '.join(splits)}")
    return names


def _read_finished(output: Path, partial: Path) -> dict[str, Transcript]:
    """The utterances of earlier runs."""
    if output.suffix != ".jsonl":
        raise ValueError(f"{output}: a words file ends in .jsonl")
    finished = read_json_words(output) if output.exists() else {}
    if partial.exists():
        with open(partial, "r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)  # the line during which the earlier run was killed
        finished |= read_json_words(partial)
    return finished


def _align_one(model: Any, path: Path, name: str, known: dict[str, Known] | None, language: str | None) -> Transcript:
    """Words of one utterance."""
    said = None if known is None else find_transcript(known, name)
    if known is not None and (said is None or not said.text.strip()):
        raise ValueError(f"{name}: no text in the transcripts")
    wav = load_audio(path, SAMPLE_RATE)[0].numpy()
    duration_s = len(wav) / SAMPLE_RATE
    if said is None:
        text, words = hear_words(model, wav, language)
    elif duration_s > MAX_S:
        raise ValueError(f"{name}: {duration_s:.1f} s, Whisper aligns a known text within {MAX_S:g} s; cut it first")
    else:
        text, words = said.text, locate_words(model, wav, said.text, said.language or language, name)
    return Transcript(text, mend_words(trim_pauses(words, wav), duration_s))


def read_known(path: Path) -> dict[str, Known]:
    """Transcripts without times.

    Args:
        path: .csv with the header path,text[,language], or JSONL with these keys.
    Returns:
        {utterance name: text and language or None}.
    Raises:
        ValueError: no such file, a line that is not as expected, or an utterance twice.
    """
    known: dict[str, Known] = {}
    for where, row in _csv_rows(path) if path.suffix.lower() == ".csv" else read_objects(path):
        name, text = get_value(row, "path", str, where), get_value(row, "text", str, where)
        if name in known:
            raise ValueError(f"{where}: {name} for the second time")
        known[name] = Known(text, row.get("language") or None)
    return known


def _csv_rows(path: Path) -> Iterable[tuple[str, dict]]:
    """("file:line", row) of a CSV file."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), restkey="more")
    try:
        for row in reader:
            yield f"{path}:{reader.line_num}", row
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: {error}; is a quotation mark left open?") from None


def trim_pauses(words: Iterable[Word], wav: np.ndarray) -> list[Word]:
    """Words without the pause before them, and with it the end of the word before: Whisper gives both to the next word.

    Args:
        words: times in seconds.
        wav: float32 [T] at 16 kHz.
    Returns:
        Words cut to their last stretch within 35 dB of their loudest 10 ms; noise hides pauses from this.
    """
    frame = SAMPLE_RATE // FRAMES_PER_S
    power = np.square(wav[: len(wav) // frame * frame]).reshape(-1, frame).mean(axis=1)
    trimmed = []
    for text, start_s, end_s in words:
        first = int(start_s * FRAMES_PER_S)
        level = power[first : int(np.ceil(end_s * FRAMES_PER_S))]
        loud = first + np.flatnonzero(level > level.max(initial=0.0) * 10 ** (PAUSE_DB / 10))
        if len(loud):
            stretches = np.split(loud, np.flatnonzero(np.diff(loud) > PAUSE_FRAMES) + 1)
            loud = next((stretch for stretch in reversed(stretches) if len(stretch) > CLICK_FRAMES), loud)
            start_s, end_s = max(start_s, loud[0] / FRAMES_PER_S), min(end_s, (loud[-1] + 1) / FRAMES_PER_S)
        trimmed.append(Word(text, start_s, end_s))
    return trimmed


def mend_words(words: Iterable[Word], duration_s: float) -> tuple[Word, ...]:
    """Words in order, without overlap, inside the audio, rounded to milliseconds; punctuation by itself is left out.

    Args:
        words: as Whisper has them.
        duration_s: of the audio.
    Returns:
        Words that `check_words` passes; one that the previous word covered has no length.
    """
    mended, last_s = [], 0.0
    for word in words:
        if any(character.isalnum() for character in word.text):
            start_s = min(max(word.start_s, last_s), duration_s)
            last_s = min(max(word.end_s, start_s), duration_s)
            mended.append(Word(word.text.strip(), round(float(start_s), 3), round(float(last_s), 3)))
    return tuple(mended)


# ---- Whisper ----------------------------------------------------------------------------------------------

def load_model(name: str, device: str, language: str | None) -> Any:
    """faster-whisper's model.

    Raises:
        ValueError: faster-whisper is missing, there is no such model, device, or language of this model.
    """
    try:
        from faster_whisper import WhisperModel
    except ImportError:
        raise ValueError("word timestamps need faster-whisper: pip install faster-whisper") from None
    kind, _, index = device.partition(":")
    try:
        model = WhisperModel(name, device=kind, device_index=int(index or 0))
    except (ValueError, RuntimeError, OSError) as error:
        raise ValueError(f"--model {name} --device {device}: {error}".splitlines()[0]) from None
    if language is not None and language not in model.supported_languages:
        raise ValueError(f"--language {language}: expected a code of {', '.join(model.supported_languages)}")
    return model


def hear_words(model: Any, wav: np.ndarray, language: str | None) -> tuple[str, list[Word]]:
    """Transcribe.

    Args:
        model: faster-whisper's.
        wav: float32 [T] at 16 kHz.
        language: code, or None to let Whisper guess.
    Returns:
        Text, and words with times in seconds.
    """
    # each window by itself: a repetition in one would else go on in the next
    segments, _ = model.transcribe(wav, language=language, word_timestamps=True, condition_on_previous_text=False)
    segments = list(segments)
    words = [Word(word.word, word.start, word.end) for segment in segments for word in segment.words]
    return "".join(segment.text for segment in segments).strip(), words


def locate_words(model: Any, wav: np.ndarray, text: str, language: str | None, name: str) -> list[Word]:
    """When the words of a known text are said: dynamic time warping over Whisper's cross-attention.

    Args:
        model, wav, language: as `hear_words`; at most 30 s.
        text: what is said.
        name: of the utterance, for the message.
    Returns:
        Words with times in seconds, each until the next begins; punctuation that is a token by itself is a word.
    Raises:
        ValueError: a language that the model lacks, or more text than 30 s can hold.
    """
    from faster_whisper.audio import pad_or_trim
    from faster_whisper.tokenizer import Tokenizer

    language = language or model.detect_language(wav)[0]
    if language not in model.supported_languages:
        raise ValueError(f"{name}: language {language} is not one of the model's")
    tokenizer = Tokenizer(model.hf_tokenizer, model.model.is_multilingual, task="transcribe", language=language)
    tokens = [token for token in tokenizer.encode(" " + text.strip()) if token < tokenizer.eot]
    if len(tokens) > MAX_TOKENS:
        raise ValueError(f"{name}: a text of {len(tokens)} tokens, expected at most {MAX_TOKENS}; is it that of this file?")
    features = model.feature_extractor(wav)[:, :-1]
    encoder_output = model.encode(pad_or_trim(features))
    (words,) = model.find_alignment(tokenizer, [tokens], encoder_output, features.shape[-1])
    return [Word(word["word"], word["start"], word["end"]) for word in words]
