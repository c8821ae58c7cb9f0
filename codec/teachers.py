"""`codec features`: what a teacher makes of every utterance of a manifest, computed once and kept.

Speech: WavLM, HuBERT, wav2vec 2.0 and their kin, or the encoder of Whisper. Text: any model whose hidden states
transformers gives, over the transcripts of a words file. Pitch: no model, but YIN.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from codec.audio import load_audio
from codec.data import Utterance, read_manifest
from codec.features import (
    TEACHER,
    check_names,
    feature_path,
    finish,
    is_written,
    read_header,
    write_frames,
    write_skipped,
    write_tokens,
)
from codec.files import write_atomically
from codec.pitch import N_BINS, pitch_vectors, yin
from codec.pretrained import public_name, read_json
from codec.words import Transcript, character_spans, check_words, find_transcript, read_words

WINDOW_S, CONTEXT_S = 30, 2  # longer audio goes in windows; so much of each is context, on both sides
BUILDING = "building.json"  # what teacher.json will say, while the features are being computed
POINTS_HZ = 100  # of pitch
SUPPORTED = "WavLM, HuBERT, wav2vec 2.0 or Whisper"


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add `codec features` to the command line."""
    command = commands.add_parser("features", help=run.__doc__, description=run.__doc__)
    command.add_argument("manifest", type=Path, help="manifest.jsonl of prepare_speaker_data.py; all its splits")
    command.add_argument("output", type=Path, metavar="OUT", help="folder for the features, one for each teacher and layer")
    teacher = command.add_mutually_exclusive_group(required=True)
    teacher.add_argument("--speech", metavar="FOLDER_OR_HUB_ID", help=f"speech teacher: {SUPPORTED}")
    teacher.add_argument("--text", metavar="FOLDER_OR_HUB_ID", help="text teacher: a language model with a fast tokenizer")
    teacher.add_argument("--pitch", action="store_true", help="the fundamental frequency, by YIN: for prosodic codebooks")
    command.add_argument("--words", type=Path, help="transcripts and times of words, .jsonl or .ctm; --text needs it")
    command.add_argument("--layer", type=_layer, help="hidden state as transformers counts, 0 before the first layer, or mean "
                         "of all (default -1, the last, for speech; -2, the last but one, for text)")  # fmt: skip
    command.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    command.add_argument("--batch_s", type=float, default=120.0, help="seconds of padded audio a batch (default 120)")
    command.add_argument("--shard", type=_shard, default=(1, 1), metavar="I/N", help="do only every N-th utterance from the "
                         "I-th; run once more without it to finish")  # fmt: skip
    command.set_defaults(run=run)


def _layer(text: str) -> int | str:
    if text != "mean" and not text.lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number or mean")
    return text if text == "mean" else int(text)


def _shard(text: str) -> tuple[int, int]:
    index, _, n_shards = text.partition("/")
    if not (index.isdecimal() and n_shards.isdecimal() and 1 <= int(index) <= int(n_shards)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected I/N with I from 1 to N, such as 1/4")
    return int(index), int(n_shards)


def run(options: argparse.Namespace) -> None:
    """Features of a teacher for every utterance of a manifest, for distillation; goes on where it stopped."""
    if (options.text is None) != (options.words is None):
        raise ValueError("--words: belongs to --text, and --text needs it; give both or neither")
    utterances, sample_rate = _read_utterances(options.manifest)
    teacher = _load_teacher(options, sample_rate)
    _claim(options.output, {key: teacher.info[key] for key in ("kind", "teacher", "layer")})
    index, n_shards = options.shard
    mine = utterances[index - 1 :: n_shards]
    newest = options.words.stat().st_mtime if options.words else 0.0
    pending = [u for u in mine if not _is_done(options.output, u, sample_rate, newest)]
    try:
        n_skipped = _compute(teacher, pending, options.output, options.batch_s, sample_rate)
    except torch.OutOfMemoryError:
        raise ValueError(f"--batch_s {options.batch_s:g}: {options.device} is out of memory; halve it") from None
    if 2 * n_skipped > len(mine):
        raise ValueError(f"{options.manifest}: {n_skipped} of {len(mine)} utterances were skipped, expected at most half; "
                         "see the reasons above")  # fmt: skip
    if n_shards > 1:
        print(f"{options.output}: shard {index}/{n_shards}: {len(mine)} utterances, {n_skipped} skipped; once all are done, "
              "run without --shard to finish")  # fmt: skip
        return
    constant_loss = finish(options.output, teacher.info, [u.name for u in utterances])
    (options.output / BUILDING).unlink(missing_ok=True)
    print(f"{options.output}: {_summary(options.output, utterances, sample_rate, teacher.info)}, constant loss "
          f"{constant_loss:.3f}, {n_skipped} skipped")  # fmt: skip


def _read_utterances(manifest: Path) -> tuple[list[Utterance], int]:
    """All splits of a manifest, and its sample rate."""
    splits, sample_rate = {"train"}, 0
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # read_manifest says what is wrong
        with open(manifest, encoding="utf-8") as lines:
            for entry in map(json.loads, lines):
                splits.add(entry["split"])
                sample_rate = sample_rate or entry["sample_rate"]
    utterances = [u for split in sorted(splits) for u in read_manifest(manifest, split, sample_rate)]
    if not utterances:
        raise ValueError(f"{manifest}: holds no utterances; prepare the data again")
    check_names(utterances)
    return utterances, sample_rate


def _load_teacher(options: argparse.Namespace, sample_rate: int) -> Teacher:
    if options.pitch:
        if options.layer is not None:
            raise ValueError("--layer: --pitch has no layers; leave one of them out")
        return PitchTeacher(sample_rate)
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # such as heads that a checkpoint has and we do not use
    warnings.filterwarnings("ignore", "Support for mismatched key_padding_mask")  # transformers' WavLM, with a mask
    if options.speech:
        layer = -1 if options.layer is None else options.layer
        return SpeechTeacher(options.speech, layer, options.device, options.batch_s, sample_rate)
    layer = -2 if options.layer is None else options.layer
    return TextTeacher(options.text, layer, options.device, read_words(options.words), sample_rate)


def _claim(folder: Path, identity: dict) -> None:
    """Take a folder for one teacher and layer, or find it taken for them."""
    for path in (folder / TEACHER, folder / BUILDING):
        if path.is_file():
            there = {key: read_json(path).get(key) for key in identity}
            if there != identity:
                raise ValueError(f"{folder}: holds features of {there}, expected {identity}; name another folder")
            return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / BUILDING, json.dumps(identity) + "\n")


def _is_done(folder: Path, utterance: Utterance, sample_rate: int, newest: float) -> bool:
    """True where the features are there and no older than the words file; what was skipped is tried again."""
    done = is_written(folder, utterance, sample_rate)
    return done and feature_path(folder, utterance.name).stat().st_mtime >= newest


def _compute(
    teacher: Teacher, utterances: list[Utterance], folder: Path, batch_s: float, sample_rate: int
) -> int:
    """Write the features of the utterances; number of those skipped: one bad utterance must not stop the rest."""
    skipped: list[tuple[Utterance, ValueError]] = []
    with tqdm(total=len(utterances), unit="utterance", disable=None) as progress:
        for batch in batches_by_length([u.n_samples / sample_rate for u in utterances], batch_s):
            prepared = []
            for utterance in [utterances[i] for i in batch]:
                try:
                    prepared.append((utterance, teacher.prepare(utterance)))
                except ValueError as error:
                    skipped.append((utterance, error))
            for (utterance, _), features in zip(prepared, teacher.compute([item for _, item in prepared])):
                try:
                    teacher.write(utterance, folder, features)
                except ValueError as error:
                    skipped.append((utterance, error))
            progress.update(len(batch))
    for utterance, error in skipped:
        print(f"codec features: skipped: {error}", file=sys.stderr)
        write_skipped(folder, teacher.info["kind"], teacher.info["dim"], str(error), utterance, sample_rate)
    return len(skipped)


def batches_by_length(lengths_s: list[float], budget_s: float) -> list[list[int]]:
    """Indices from short to long, together as long as the batch, padded to its longest, stays within the budget."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths_s)), key=lengths_s.__getitem__):
        if not batches or lengths_s[i] * (len(batches[-1]) + 1) > budget_s:
            batches.append([])
        batches[-1].append(i)
    return batches


def _summary(folder: Path, utterances: list[Utterance], sample_rate: int, info: dict) -> str:
    """How much there is."""
    paths = [feature_path(folder, u.name) for u in utterances]
    seconds = sum(u.n_samples for u in utterances) / sample_rate
    rate_hz = sum(read_header(path).n_rows for path in paths) / seconds
    size_mb = sum(path.stat().st_size for path in paths) / 1e6
    return (f"{len(utterances)} utterances, {seconds / 3600:.2f} h, dim {info['dim']}, {rate_hz:.1f} {info['kind']} a second, "
            f"{size_mb:.1f} MB")  # fmt: skip


# ---- speech -----------------------------------------------------------------------------------------------

class Window(NamedTuple):
    """A part of long audio that goes through the teacher at once."""

    item: int  # which audio of the batch
    first: int  # teacher frames to keep, of the whole audio
    last: int
    origin: int  # the frame that the part starts with
    end: int  # the sample that it ends before


class SpeechTeacher:
    """Hidden states of a speech encoder.

    Attributes:
        info: what teacher.json tells of it. A frame is centred on the samples that the convolutions see; those of Whisper,
            and its STFT, pad so that frame 0 is centred at 0.
    """

    def __init__(self, source: str, layer: int | str, device: str, batch_s: float, sample_rate: int):
        """Args: source: folder or hub id; sample_rate: the manifest's. Raises: ValueError: it cannot be used; one line."""
        from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

        config = load_pretrained(AutoConfig, source)
        self.is_whisper = config.model_type == "whisper"
        if not self.is_whisper and not hasattr(config, "feat_extract_norm"):
            raise ValueError(f"{source}: model_type {config.model_type!r}, expected {SUPPORTED}")
        _check_layer(source, layer, config.num_hidden_layers)
        self.extractor = load_pretrained(AutoFeatureExtractor, source)
        model = _on_device(load_pretrained(AutoModel, source, dtype=torch.float32), device)
        self.model = model.get_encoder() if self.is_whisper else model
        self.source, self.layer, self.device, self.sample_rate = source, layer, device, sample_rate
        self.rate = self.extractor.sampling_rate
        if self.is_whisper:
            self.stride, self.field = 2 * self.extractor.hop_length, 0
        else:
            self.stride, self.field = receptive_field(config.conv_kernel, config.conv_stride)
        # Group norm averages over time, so that padding would change the features.
        masks = self.is_whisper or config.feat_extract_norm == "layer"
        self.batch_s = batch_s if masks else 0.0
        self.info = {"kind": "frames", "teacher": public_name(source), "layer": layer, "dim": config.hidden_size,
                     "frame_s": self.stride / self.rate, "first_centre_s": self.field / 2 / self.rate}  # fmt: skip

    def prepare(self, utterance: Utterance) -> np.ndarray:
        """The utterance at the teacher's rate and level, float32 [T]. Raises: ValueError: unreadable, or of another length."""
        wav = check_length(load_audio(utterance.path, self.rate)[0].numpy(), utterance, self.rate, self.sample_rate)
        if self._n_frames(len(wav)) < 1:
            raise ValueError(f"{utterance.name}: {len(wav)} samples at {self.rate} Hz, the teacher needs {self.field}")
        if self.is_whisper:
            return wav
        # Of the whole utterance, before it is cut or padded: level is the utterance's.
        return np.asarray(self.extractor(wav, sampling_rate=self.rate)["input_values"][0], np.float32)

    @torch.inference_mode()
    def compute(self, wavs: list[np.ndarray]) -> list[Tensor]:
        """[T] each -> [N, D] each, on the CPU."""
        features = [torch.empty(self._n_frames(len(wav)), self.info["dim"]) for wav in wavs]
        windows = [window for i, wav in enumerate(wavs) for window in self._windows(i, len(wav))]
        cuts = [wavs[w.item][w.origin * self.stride : w.end] for w in windows]
        lengths_s = [WINDOW_S if self.is_whisper else len(cut) / self.rate for cut in cuts]
        for batch in batches_by_length(lengths_s, self.batch_s):
            for i, states in zip(batch, self._encode([cuts[i] for i in batch])):
                w = windows[i]
                features[w.item][w.first : w.last] = states[w.first - w.origin : w.last - w.origin]
        return features

    def write(self, utterance: Utterance, folder: Path, features: Tensor) -> None:
        """Keep what `compute` gave."""
        write_frames(folder, utterance.name, features, utterance, self.sample_rate)

    def _n_frames(self, n_samples: int) -> int:
        """Frames of so much audio; of Whisper's 30 s those that are centred inside it."""
        if self.is_whisper:
            return math.ceil(n_samples / self.stride)
        return max((n_samples - self.field) // self.stride + 1, 0)

    def _windows(self, item: int, n_samples: int) -> list[Window]:
        """One window, or where that would be longer than WINDOW_S, several that start on the teacher's frames."""
        n_frames, context = self._n_frames(n_samples), CONTEXT_S * self.rate // self.stride
        if n_samples <= WINDOW_S * self.rate:
            return [Window(item, 0, n_frames, 0, n_samples)]
        step = WINDOW_S * self.rate // self.stride - 2 * context
        return [
            Window(item, first, min(first + step, n_frames), max(first - context, 0),
                   min((first + step + context) * self.stride, n_samples))
            for first in range(0, n_frames, step)
        ]  # fmt: skip

    def _encode(self, cuts: list[np.ndarray]) -> Tensor:
        """[B, N, D] of parts of at most WINDOW_S, N the frames of the longest or more."""
        if self.is_whisper:
            mels = self.extractor(cuts, sampling_rate=self.rate, return_tensors="pt")["input_features"]
            return _hidden_state(self.model(mels.to(self.device), output_hidden_states=True), self.layer)
        lengths = torch.tensor([len(cut) for cut in cuts])
        wavs = pad_sequence([torch.from_numpy(cut) for cut in cuts], batch_first=True)
        mask = (torch.arange(wavs.shape[1]) < lengths[:, None]).long()
        outputs = self.model(wavs.to(self.device), attention_mask=mask.to(self.device), output_hidden_states=True)
        states = _hidden_state(outputs, self.layer)
        if states.shape[1] != self._n_frames(wavs.shape[1]):
            raise ValueError(f"{self.source}: {states.shape[1]} frames for {wavs.shape[1]} samples, its convolutions make "
                               f"{self._n_frames(wavs.shape[1])}; expected {SUPPORTED}")  # fmt: skip
        return states


def check_length(wav: np.ndarray, utterance: Utterance, rate: int, sample_rate: int) -> np.ndarray:
    """The audio [T] at `rate`, as long as the manifest, of `sample_rate`, says. Raises: ValueError: it is not."""
    if len(wav) != math.ceil(utterance.n_samples * rate / sample_rate):
        raise ValueError(f"{utterance.name}: {len(wav) / rate:.3f} s of audio, the manifest says "
                         f"{utterance.n_samples / sample_rate:.3f} s; prepare the data again")  # fmt: skip
    return wav


def receptive_field(kernels: list[int], strides: list[int]) -> tuple[int, int]:
    """Stride and receptive field, in samples, of convolutions without padding."""
    stride, field = 1, 1
    for kernel, step in zip(kernels, strides):
        field += (kernel - 1) * stride
        stride *= step
    return stride, field


# ---- text -------------------------------------------------------------------------------------------------

class Tokens(NamedTuple):
    """A transcript as the language model gets it."""

    ids: Tensor  # [L], special tokens too
    kept: Tensor  # [M], which of them lie on words
    spans: Tensor  # [M, 2] seconds


class TextTeacher:
    """Hidden states of a language model, one a token that lies on a word.

    Attributes:
        info: what teacher.json tells of it.
    """

    def __init__(self, source: str, layer: int | str, device: str, transcripts: dict[str, Transcript], sample_rate: int):
        """Args: source: folder or hub id; sample_rate: the manifest's. Raises: ValueError: it cannot be used; one line."""
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = load_pretrained(AutoTokenizer, source)
        if not self.tokenizer.is_fast:
            raise ValueError(f"{source}: {type(self.tokenizer).__name__} does not tell which characters a token is of, "
                             "expected a fast tokenizer; save it with a tokenizer.json")  # fmt: skip
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        self.sink = eos if bos is None else bos
        # A large model in float32 may not fit a GPU; few CPUs compute in bfloat16.
        model = load_pretrained(AutoModel, source, dtype=torch.float32 if device == "cpu" else "auto")
        config = model.config.get_text_config()
        _check_layer(source, layer, config.num_hidden_layers)
        self.model = _on_device(model, device)
        self.layer, self.device, self.transcripts, self.sample_rate = layer, device, transcripts, sample_rate
        self.max_tokens = min(self.tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or math.inf)
        self.info = {"kind": "tokens", "teacher": public_name(source), "layer": layer, "dim": config.hidden_size}

    def prepare(self, utterance: Utterance) -> Tokens:
        """The utterance's tokens and their times. Raises: ValueError: no words, or not those of this audio or transcript."""
        transcript = find_transcript(self.transcripts, utterance.name)
        if transcript is None or not transcript.words:
            raise ValueError(f"{utterance.name}: no words")
        check_words(transcript, utterance.name, utterance.n_samples / self.sample_rate)
        encoding = self.tokenizer(transcript.text, return_offsets_mapping=True, verbose=False)
        kept, spans = token_spans(encoding["offset_mapping"], character_spans(transcript, utterance.name))
        if not kept:
            raise ValueError(f"{utterance.name}: no token lies on a word")
        ids, kept = torch.tensor(encoding["input_ids"]), torch.tensor(kept)
        # Whatever stands first in a causal model draws the attention of all others (Xiao et al. 2023), and its state tells
        # nothing of it: no word may stand there.
        if encoding["offset_mapping"][0] != (0, 0) and self.sink is not None:
            ids, kept = torch.cat([torch.tensor([self.sink]), ids]), kept + 1
        return Tokens(ids, kept, torch.tensor(spans))

    @torch.inference_mode()
    def compute(self, items: list[Tokens]) -> list[tuple[Tensor, Tensor]]:
        """Features [M, D] and spans [M, 2] each, on the CPU."""
        if any(len(item.ids) > self.max_tokens for item in items):
            states = [self._long(item.ids) for item in items]
        else:
            states = self._encode([item.ids for item in items]) if items else []
        return [(rows[item.kept], item.spans) for item, rows in zip(items, states)]

    def write(self, utterance: Utterance, folder: Path, features: tuple[Tensor, Tensor]) -> None:
        """Keep what `compute` gave."""
        write_tokens(folder, utterance.name, *features, utterance, self.sample_rate)

    def _encode(self, rows: list[Tensor]) -> Tensor:
        """[L] each -> [B, L, D]; padded at the end, where a mask hides it, so any token will do."""
        ids = pad_sequence(rows, batch_first=True)
        mask = (torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]).long()
        outputs = self.model(
            input_ids=ids.to(self.device), attention_mask=mask.to(self.device), output_hidden_states=True, use_cache=False
        )
        return _hidden_state(outputs, self.layer)

    def _long(self, ids: Tensor) -> Tensor:
        """[L, D] of any length: windows of what the model takes, from the second on with their first half as context."""
        half = int(self.max_tokens) // 2
        parts = [self._encode([ids[start : start + 2 * half]])[0] for start in range(0, max(len(ids) - half, 1), half)]
        return torch.cat([parts[0], *(part[half:] for part in parts[1:])])


def token_spans(offsets: list[tuple[int, int]], character_s: np.ndarray) -> tuple[list[int], list[tuple[float, float]]]:
    """When each token is spoken.

    Args:
        offsets: first and last (exclusive) character of each token; special tokens have none.
        character_s: [n_chars, 2] seconds, NaN off words.
    Returns:
        Indices of the tokens that lie on words, and their (start, end) in seconds.
    """
    kept, spans = [], []
    for i, (first, last) in enumerate(offsets):
        on_words = character_s[first:last][~np.isnan(character_s[first:last, 0])]
        if len(on_words):
            kept.append(i)
            spans.append((on_words[:, 0].min(), on_words[:, 1].max()))
    return kept, spans


# ---- pitch ------------------------------------------------------------------------------------------------

class PitchTeacher:
    """The fundamental frequency every 10 ms, as `pitch_vectors` has it.

    Attributes:
        info: what teacher.json tells of it.
    """

    def __init__(self, sample_rate: int):
        """Args: sample_rate: the manifest's."""
        self.sample_rate = sample_rate
        self.info = {"kind": "frames", "teacher": "yin", "layer": 0, "dim": N_BINS + 1, "frame_s": 1 / POINTS_HZ,
                     "first_centre_s": 0.5 / POINTS_HZ}  # fmt: skip

    def prepare(self, utterance: Utterance) -> np.ndarray:
        """float32 [T] at the manifest's rate. Raises: ValueError: unreadable, or of another length."""
        wav = load_audio(utterance.path, self.sample_rate)[0].numpy()
        return check_length(wav, utterance, self.sample_rate, self.sample_rate)

    def compute(self, wavs: list[np.ndarray]) -> list[Tensor]:
        """[T] each -> [N, D] each."""
        centres_s = [(np.arange(-(-len(wav) * POINTS_HZ // self.sample_rate)) + 0.5) / POINTS_HZ for wav in wavs]
        return [torch.from_numpy(pitch_vectors(yin(wav, self.sample_rate, at))) for wav, at in zip(wavs, centres_s)]

    def write(self, utterance: Utterance, folder: Path, features: Tensor) -> None:
        """Keep what `compute` gave."""
        write_frames(folder, utterance.name, features, utterance, self.sample_rate)


Teacher = SpeechTeacher | TextTeacher | PitchTeacher


# ---- transformers -----------------------------------------------------------------------------------------

def load_pretrained(auto: type, source: str, **arguments: Any) -> Any:
    """auto.from_pretrained(source), or one line."""
    try:
        return auto.from_pretrained(source, **arguments)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{source}: {auto.__name__} did not load it ({reason}); name a folder that holds model, config and "
                         "preprocessor or tokenizer, or a hub id") from None  # fmt: skip


def _on_device(model: torch.nn.Module, device: str) -> torch.nn.Module:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}; try cpu") from None


def _check_layer(source: str, layer: int | str, n_layers: int) -> None:
    if layer != "mean" and not -n_layers - 1 <= layer <= n_layers:
        raise ValueError(f"--layer {layer}: {source} has hidden states 0 to {n_layers}, or {-n_layers - 1} to -1 from the end")


def _hidden_state(outputs: Any, layer: int | str) -> Tensor:
    """[B, N, D] float32 on the CPU; the last is after the final norm, which transformers leaves out for some."""
    states = (*outputs.hidden_states[:-1], outputs.last_hidden_state)
    return (torch.stack(states).float().mean(0) if layer == "mean" else states[layer]).float().cpu()
