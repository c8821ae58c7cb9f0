"""Judges of coded speech: each hears the uncoded audio of a file once, then what any number of codecs make of it.

A judge has `metrics` (the keys it gives), `rate_hz` (the sample rate it wants; None: the one it was built for),
`prepare(wav, clip)`, which returns what it keeps of the uncoded audio, and `judge(kept, wav_hat)`, which returns a
number for each of its metrics, or the reason (str) why the metric has none; and for POOLED metrics the counts behind
the number. Both raise Undefined where no metric of the judge has a value. Audio is float32 [T], full scale 1, an
output as long as its uncoded audio and aligned with it. Packages are imported, and models loaded, by the constructors;
nothing here computes on more than one thread once `torch.set_num_threads(1)` is set.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from codec import metrics
from codec.pitch import yin

# that Whisper may write, so that it does not repeat itself for long over noise; its window of 30 s holds 448. Telugu
# costs it 1.8 a letter, 20 letters are a second of fast speech.
TOKENS, TOKENS_PER_S, MOST_TOKENS = 20, 60, 430
QUIET_S = 0.5  # around what Whisper hears: it loses the first words of a recording that begins with speech
POINT_S = 0.01  # from one measurement of the pitch to the next
DNSMOS_SAMPLES = 144160  # of its model's input, 9.01 s
PESQ_S = 20.0
MIN_SAMPLES = 1600  # 0.1 s at 16 kHz, with less some packages fail
MIN_VOICE_S = 0.4  # a speaker cannot be told from less
LEVEL = 0.05  # RMS, -26 dB


class Metric(NamedTuple):
    title: str
    unit: str
    better: str  # the good way: "higher", "lower", "one" or "zero"
    digits: int  # behind the point
    package: str  # what `pip install` brings it; "" needs none
    about: str


class Clip(NamedTuple):
    """What is known of a file besides its sound."""

    name: str
    text: str | None  # what is said
    language: str | None  # code such as es


class Undefined(ValueError):
    """A metric has no value for this audio; the message says why."""


METRICS = {
    "pesq_wb": Metric("PESQ-WB", "MOS", "higher", 2, "pesq",
                      "ITU-T P.862.2 against the uncoded audio, 1 to 4.64 (the same)."),
    "stoi": Metric("STOI", "", "higher", 3, "pystoi", "Short-time objective intelligibility, 0 to 1."),
    "estoi": Metric("ESTOI", "", "higher", 3, "pystoi", "Extended STOI, 0 to 1; stricter, it hears noise that comes and goes."),
    "visqol": Metric("ViSQOL", "MOS", "higher", 2, "visqol-python[lattice]",
                     "Likeness to the uncoded audio's spectrogram, 1 to about 4.6; speech mode, lattice model."),
    "distillmos": Metric("DistillMOS", "MOS", "higher", 2, "distillmos",
                         "Quality, 1 to 5, that a network guesses from the output alone."),
    "dnsmos": Metric("DNSMOS", "MOS", "higher", 2, "speechmos",
                     "Overall quality (P.835), 1 to 5, that a network guesses from the output alone."),
    "dnsmos_sig": Metric("DNSMOS SIG", "MOS", "higher", 2, "speechmos", "As DNSMOS, of the speech itself."),
    "dnsmos_bak": Metric("DNSMOS BAK", "MOS", "higher", 2, "speechmos", "As DNSMOS, of the background: 5 is free of noise."),
    "speaker_similarity": Metric("Speaker similarity", "", "higher", 3, "Resemblyzer",
                                 "Cosine of the voices' embeddings, output against uncoded audio; 1 is the same voice."),
    "wer": Metric("WER", "", "lower", 3, "faster-whisper",
                  "Share of the words said that Whisper gets wrong, its own errors on uncoded audio included."),
    "cer": Metric("CER", "", "lower", 3, "faster-whisper", "As WER, of characters."),
    "wer_uncoded": Metric("WER vs uncoded", "", "lower", 3, "faster-whisper",
                          "Share of words that Whisper hears otherwise than in the uncoded audio; 0 is no change."),
    "cer_uncoded": Metric("CER vs uncoded", "", "lower", 3, "faster-whisper", "As WER vs uncoded, of characters."),
    "phoneme_error": Metric("Phoneme error", "", "lower", 3, "hama",
                            "Share of phonemes heard otherwise than in the uncoded audio; 0 is no change; any language."),
    "log_f0_rmse": Metric("F0 error", "semitones", "lower", 2, "", "RMS error of the pitch where both sides are voiced."),
    "voicing_error": Metric("Voicing error", "", "lower", 3, "", "Share of the time that is voiced on one side only."),
    "mel_db": Metric("Mel distance", "dB", "lower", 2, "",
                     "Mean absolute difference of log mel spectra, over windows of 8 to 64 ms."),
    "stft_db": Metric("STFT distance", "dB", "lower", 2, "", "As mel distance, of plain spectra: high frequencies weigh most."),
    "snr_db": Metric("SNR", "dB", "higher", 1, "",
                     "Power of the uncoded audio over power of the error; codecs that resynthesise sound well at 0 dB."),
    "si_sdr_db": Metric("SI-SDR", "dB", "higher", 1, "", "As SNR, whatever the level and the offset."),
    "amplitude_ratio": Metric("Amplitude ratio", "", "one", 3, "", "RMS of the output over RMS of the uncoded audio."),
    "dc_offset": Metric("DC offset", "", "zero", 4, "", "Mean sample of the output; full scale is 1."),
}  # fmt: skip

# metric -> counts that `judge` also returns: summed over files, the first over the second is the rate of them all
POOLED = {
    "wer": ("word_errors", "words"),
    "cer": ("char_errors", "chars"),
    "wer_uncoded": ("word_errors_uncoded", "words_uncoded"),
    "cer_uncoded": ("char_errors_uncoded", "chars_uncoded"),
    "phoneme_error": ("phoneme_errors", "phonemes"),
}

NEEDS = {  # of a package: the modules that must be there, and what to tell `pip install`
    "pesq": (("pesq",), "pesq"),
    "pystoi": (("pystoi",), "pystoi"),
    # without its second module the scores are a MOS too high
    "visqol-python[lattice]": (("visqol", "ai_edge_litert"), "'visqol-python[lattice]'"),
    "distillmos": (("distillmos", "xls_r_sqa"), "distillmos"),
    "speechmos": (("speechmos", "onnxruntime", "librosa", "requests"), "speechmos onnxruntime librosa requests"),
    # by itself it asks for a webrtcvad that must be compiled and does not run with a new setuptools
    "Resemblyzer": (("resemblyzer", "webrtcvad", "librosa"), "--no-deps -r requirements-eval.txt"),
    "faster-whisper": (("faster_whisper",), "faster-whisper"),
    "hama": (("hama",), "hama"),
}


def absent(metric: str, asr_model: str | None) -> str:
    """What is missing for a metric of METRICS.

    Args:
        metric: key.
        asr_model: folder of a Whisper, None without one.
    Returns:
        "" where it can be computed, else how to get it: `pip install pesq`.
    """
    modules, pip_arguments = NEEDS.get(METRICS[metric].package, ((), ""))
    needs = []
    if not all(importlib.util.find_spec(module) for module in modules):
        needs.append(f"pip install {pip_arguments}")
    if metric in WhisperJudge.metrics and asr_model is None:
        needs.append("--asr_model FOLDER")
    return ", and ".join(needs)


def open_judges(wanted: set[str], sample_rate: int, asr_model: str | None) -> list[Any]:
    """The judges that give the metrics; one that gives several comes once, and gives them all.

    Args:
        wanted: keys of METRICS of which nothing is `absent`.
        sample_rate: Hz, of the audio that judges without a `rate_hz` get.
        asr_model: folder of a Whisper in CTranslate2's format, for WER and CER.
    Raises:
        ValueError: no Whisper in the folder.
    """
    judges = {
        PesqJudge: (), StoiJudge: (), VisqolJudge: (), DistillMosJudge: (), DnsmosJudge: (), SpeakerJudge: (),
        WhisperJudge: (asr_model,), PhonemeJudge: (), PitchJudge: (sample_rate,), SignalJudge: (sample_rate,),
    }  # fmt: skip
    return [kind(*arguments) for kind, arguments in judges.items() if wanted & set(kind.metrics)]


# ---- what judges share ------------------------------------------------------------------------------------


def _finite(wav: np.ndarray, whose: str) -> np.ndarray:
    """The audio, where there is some and all of it is numbers."""
    if len(wav) < MIN_SAMPLES:
        raise Undefined(f"the {whose} is too short ({len(wav)} samples)")
    if not np.isfinite(wav).all():
        raise Undefined(f"the {whose} holds NaN or infinity")
    return wav


def _audible(wav: np.ndarray, whose: str) -> np.ndarray:
    """The audio, where it is more than a constant too."""
    if np.ptp(_finite(wav, whose)) == 0:
        raise Undefined(f"the {whose} is silent")
    return wav


def _tensor(wav: np.ndarray) -> Tensor:
    """[T] -> [1, 1, T]."""
    return torch.from_numpy(np.ascontiguousarray(wav, np.float32))[None, None]


def _levelled(wav: np.ndarray) -> np.ndarray:
    """As loud as all others, for models that hear another voice or word where only the level changes."""
    return (wav * (LEVEL / max(np.sqrt(np.square(wav).mean()), 1e-6))).clip(-1, 1)


def _or_reason(value: float, reason: str) -> float | str:
    """The value where it is a number, else why it is none."""
    if value == math.inf:
        return "without limit: there is no error"
    return float(value) if math.isfinite(value) else reason


def edit_distance(expected: Sequence, got: Sequence) -> int:
    """Insertions, deletions and substitutions that lead from one sequence to the other (Levenshtein)."""
    ids = {item: number for number, item in enumerate({*expected, *got})}
    columns = np.array([ids[item] for item in got], np.int64)
    steps = np.arange(len(got) + 1)
    row = steps
    for item in expected:
        best = np.append(row[0] + 1, np.minimum(row[1:] + 1, row[:-1] + (columns != ids[item])))
        row = np.minimum.accumulate(best - steps) + steps  # insertions, from anywhere to the left
    return int(row[-1])


# ---- signals ----------------------------------------------------------------------------------------------


class SignalJudge:
    """Arithmetic of the two signals, by `codec.metrics`."""

    metrics = ("mel_db", "stft_db", "snr_db", "si_sdr_db", "amplitude_ratio", "dc_offset")
    rate_hz = None

    def __init__(self, sample_rate: int):
        self.sample_rate = sample_rate

    def prepare(self, wav: np.ndarray, clip: Clip) -> Tensor:
        shortest_s = metrics.SCALES[-1][0]
        if len(wav) < shortest_s * self.sample_rate:
            raise Undefined(f"the uncoded audio is shorter than {shortest_s:g} s")
        return _tensor(_finite(wav, "uncoded audio"))

    def judge(self, kept: Tensor, wav_hat: np.ndarray) -> dict[str, float | str]:
        output = _tensor(_finite(wav_hat, "output"))
        silent, flat = "the uncoded audio is silent", "one side is silent"
        # float32 rounds the mean of a constant, so that something of it is left
        is_flat = min((kept.max() - kept.min()).item(), (output.max() - output.min()).item()) == 0
        return {
            "mel_db": metrics.multi_scale_mel_db(kept, output, self.sample_rate).item(),
            "stft_db": metrics.multi_scale_stft_db(kept, output, self.sample_rate).item(),
            "snr_db": _or_reason(metrics.snr_db(kept, output).item(), silent),
            "si_sdr_db": flat if is_flat else _or_reason(metrics.si_sdr_db(kept, output).item(), flat),
            "amplitude_ratio": _or_reason(metrics.amplitude_ratio(kept, output).item(), silent),
            "dc_offset": metrics.dc_offset(output).item(),
            "signal_energy": kept.square().sum().item(),
            "error_energy": (output - kept).square().sum().item(),
        }


class PitchJudge:
    """F0 and voicing by YIN."""

    metrics = ("log_f0_rmse", "voicing_error")
    rate_hz = None

    def __init__(self, sample_rate: int):
        self.sample_rate = sample_rate

    def prepare(self, wav: np.ndarray, clip: Clip) -> np.ndarray:
        return self._semitones(_audible(wav, "uncoded audio"))

    def judge(self, kept: np.ndarray, wav_hat: np.ndarray) -> dict[str, float | str]:
        output = self._semitones(_finite(wav_hat, "output"))
        voiced, voiced_hat = np.isfinite(kept), np.isfinite(output)
        both = voiced & voiced_hat
        rmse = np.sqrt(np.square(output[both] - kept[both]).mean()) if both.any() else "nothing is voiced on both sides"
        error = float((voiced != voiced_hat).mean()) if voiced.any() else "the uncoded audio has nothing voiced"
        return {"log_f0_rmse": rmse if isinstance(rmse, str) else float(rmse), "voicing_error": error}

    def _semitones(self, wav: np.ndarray) -> np.ndarray:
        """[M] every 10 ms, NaN where unvoiced."""
        centres_s = (np.arange(int(len(wav) / self.sample_rate / POINT_S)) + 0.5) * POINT_S
        return 12 * np.log2(yin(wav, self.sample_rate, centres_s))


# ---- perception -------------------------------------------------------------------------------------------


class PesqJudge:
    """Wide-band PESQ; above 20 s the mean over equal parts of at most that, as the package crashes at 50 pauses."""

    metrics = ("pesq_wb",)
    rate_hz = 16000

    def __init__(self):
        import pesq  # noqa: F401

    def prepare(self, wav: np.ndarray, clip: Clip) -> Tensor:
        return _tensor(_audible(wav, "uncoded audio"))

    def judge(self, kept: Tensor, wav_hat: np.ndarray) -> dict[str, float | str]:
        output = _tensor(_audible(wav_hat, "output"))
        n_parts = math.ceil(kept.shape[-1] / (PESQ_S * 16000))
        parts = zip(kept.tensor_split(n_parts, -1), output.tensor_split(n_parts, -1))
        values = torch.cat([metrics.pesq_wb(*part, 16000) for part in parts])
        return {"pesq_wb": _or_reason(values.nanmean().item(), "PESQ finds no speech, or too little")}


class StoiJudge:
    """STOI and ESTOI."""

    metrics = ("stoi", "estoi")
    rate_hz = 16000

    def __init__(self):
        import pystoi  # noqa: F401

    def prepare(self, wav: np.ndarray, clip: Clip) -> Tensor:
        return _tensor(_audible(wav, "uncoded audio"))

    def judge(self, kept: Tensor, wav_hat: np.ndarray) -> dict[str, float | str]:
        output = _tensor(_finite(wav_hat, "output"))
        reason = "the uncoded audio has less than 0.4 s of sound"
        return {
            "stoi": _or_reason(metrics.stoi(kept, output, 16000).item(), reason),
            "estoi": _or_reason(metrics.stoi(kept, output, 16000, extended=True).item(), reason),
        }


class VisqolJudge:
    """ViSQOL's speech mode with its lattice model, as Google's program has it by default."""

    metrics = ("visqol",)
    rate_hz = 16000

    def __init__(self):
        import visqol

        self.api = visqol.VisqolApi()
        self.api.create(mode="speech", use_lattice_model=True)

    def prepare(self, wav: np.ndarray, clip: Clip) -> np.ndarray:
        # its own score of any output against silence is high
        return _audible(wav, "uncoded audio").astype(np.float64)

    def judge(self, kept: np.ndarray, wav_hat: np.ndarray) -> dict[str, float | str]:
        output = _audible(wav_hat, "output").astype(np.float64)
        try:
            return {"visqol": float(self.api.measure_from_arrays(kept, output, 16000).moslqo)}
        except IndexError:  # no patch of a spectrogram
            raise Undefined("ViSQOL finds too little speech in the uncoded audio") from None


class DistillMosJudge:
    """DistillMOS of the output alone. Ignores the level; pads audio below 7.7 s, and so marks short audio down."""

    metrics = ("distillmos",)
    rate_hz = 16000

    def __init__(self):
        import distillmos

        with contextlib.redirect_stdout(io.StringIO()):  # it prints where its weights are
            self.model = distillmos.ConvTransformerSQAModel().eval()

    def prepare(self, wav: np.ndarray, clip: Clip) -> None:
        return None

    @torch.no_grad()
    def judge(self, kept: None, wav_hat: np.ndarray) -> dict[str, float | str]:
        return {"distillmos": self.model(_tensor(_audible(wav_hat, "output"))[0]).item()}


class DnsmosJudge:
    """DNSMOS P.835 of the output alone, clipped to full scale as on its way to a loudspeaker.

    Audio below 9.01 s is repeated up to just that and judged once. The package doubles it until it is long enough,
    then judges the same sound again at every second: the same score to 0.03, in up to nine times the time.
    """

    metrics = ("dnsmos", "dnsmos_sig", "dnsmos_bak")
    rate_hz = 16000

    def __init__(self):
        import onnxruntime
        from speechmos import dnsmos

        folder = Path(dnsmos.__file__).parent / "dnsmos_models"
        self.model = dnsmos.DNSMOS(str(folder / "sig_bak_ovr.onnx"), str(folder / "model_v8.onnx"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.model.onnx_sess = onnxruntime.InferenceSession(folder / "sig_bak_ovr.onnx", options)
        self.model.p808_onnx_sess = onnxruntime.InferenceSession(folder / "model_v8.onnx", options)

    def prepare(self, wav: np.ndarray, clip: Clip) -> None:
        return None

    def judge(self, kept: None, wav_hat: np.ndarray) -> dict[str, float | str]:
        output = _audible(wav_hat, "output").clip(-1, 1)
        scores = self.model(np.resize(output, max(len(output), DNSMOS_SAMPLES)), 16000, False)
        return {metric: float(scores[key]) for metric, key in zip(self.metrics, ("ovrl_mos", "sig_mos", "bak_mos"))}


class SpeakerJudge:
    """Cosine of Resemblyzer's embeddings, each of the voice that its detector finds."""

    metrics = ("speaker_similarity",)
    rate_hz = 16000

    def __init__(self):
        import resemblyzer

        self.preprocess, self.encoder = resemblyzer.preprocess_wav, resemblyzer.VoiceEncoder("cpu", verbose=False)

    def prepare(self, wav: np.ndarray, clip: Clip) -> np.ndarray:
        return self._embed(wav, "uncoded audio")

    def judge(self, kept: np.ndarray, wav_hat: np.ndarray) -> dict[str, float | str]:
        return {"speaker_similarity": float(kept @ self._embed(wav_hat, "output"))}

    def _embed(self, wav: np.ndarray, whose: str) -> np.ndarray:
        """[256] of length 1."""
        reason = f"the {whose} has less than {MIN_VOICE_S:g} s of voice"
        if len(_audible(wav, whose)) < MIN_VOICE_S * 16000:
            raise Undefined(reason)
        voice = self.preprocess(_levelled(wav))
        if len(voice) < MIN_VOICE_S * 16000:
            raise Undefined(reason)
        return self.encoder.embed_utterance(voice)


# ---- recognition ------------------------------------------------------------------------------------------


class Heard(NamedTuple):
    said: str  # the clip's text, normalised; "" without one
    heard: str  # in the uncoded audio, normalised
    language: str


class WhisperJudge:
    """Errors of Whisper's transcript, greedy and thus the same every time, windows of 30 s each by itself.

    In the clip's language where Whisper knows it, else in the one it detects in the uncoded audio; with half a second of
    silence on both sides, for without it Whisper loses words of phrases that were cut close, as `prepare_speaker_data.py`
    cuts them: docs/evaluation.md has how many.
    """

    metrics = ("wer", "cer", "wer_uncoded", "cer_uncoded")
    rate_hz = 16000

    def __init__(self, asr_model: str):
        from faster_whisper import WhisperModel

        try:
            self.model = WhisperModel(asr_model, device="cpu", compute_type="float32", cpu_threads=1)
        except (ValueError, RuntimeError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"--asr_model {asr_model}: {reason}; expected a Whisper in CTranslate2's format") from None

    def prepare(self, wav: np.ndarray, clip: Clip) -> Heard:
        language = clip.language if clip.language in self.model.supported_languages else None
        heard, language = self._transcribe(_audible(wav, "uncoded audio"), language)
        return Heard(said_once(normalise_text(clip.text or "")), heard, language)

    def judge(self, kept: Heard, wav_hat: np.ndarray) -> dict[str, float | str]:
        heard, _ = self._transcribe(_finite(wav_hat, "output"), kept.language)
        return (error_rates(kept.said, heard, "", "the file has no text")
                | error_rates(kept.heard, heard, "_uncoded", "Whisper hears nothing in the uncoded audio"))  # fmt: skip

    def _transcribe(self, wav: np.ndarray, language: str | None) -> tuple[str, str]:
        """(text, language); without the usual second try at a higher temperature, which draws at random."""
        most = min(round(TOKENS + TOKENS_PER_S * len(wav) / 16000), MOST_TOKENS)
        segments, info = self.model.transcribe(
            np.pad(wav, round(QUIET_S * 16000)), language=language, beam_size=1, temperature=0.0,
            condition_on_previous_text=False, max_new_tokens=most,
        )  # fmt: skip
        return said_once(normalise_text("".join(segment.text for segment in segments))), info.language


def said_once(text: str) -> str:
    """A normalised transcript without what Whisper repeats: words said four times and more in a row are left there once.

    Decoded greedily, it goes round in circles now and then, to the end of its tokens, and one such sentence can be half of all
    errors of a test set. OpenAI's code then draws another transcript at random, which is another one every time. Where words
    have no spaces between them (ja, th, zh) nothing is found.
    """
    # whole words by the spaces around them: \b would end one before an Indic vowel sign
    return re.sub(r"(?<!\S)(\S.{0,99}?)(?: \1(?!\S)){3,}", r"\1", text)


def normalise_text(text: str) -> str:
    """What two transcripts are compared by: words of lower-case letters, marks and digits with single spaces.

    NFKC; apostrophes and stress marks (a plus before a letter, an acute that no letter contains) vanish, other
    punctuation and symbols part words; ё is е. Numbers stay as written: 7 is not seven.
    """
    text = unicodedata.normalize("NFKC", text.lower()).replace("ё", "е")
    text = re.sub(r"['’ʼ\u0301]|\+(?=[^\W\d_])", "", text)
    # marks are kept, as vowels of Indic scripts are marks; \w lacks them
    return " ".join("".join(letter if unicodedata.category(letter)[0] in "LMN" else " " for letter in text).split())


def error_rates(expected: str, got: str, suffix: str, reason: str) -> dict[str, float | str]:
    """Rates of errors and their counts, by the keys of POOLED.

    Args:
        expected: normalised transcript; "" for none.
        got: normalised transcript.
        suffix: of the keys: "" or "_uncoded".
        reason: in place of the rates where none is expected.
    Returns:
        wer, words, word_errors, cer, chars, char_errors, each with the suffix. Rates may exceed 1. Characters are code
        points and count the spaces between words (as jiwer and torchmetrics do).
    """
    if not expected:
        return {f"wer{suffix}": reason, f"cer{suffix}": reason}
    rates = {}
    for metric, unit, items, items_got in (("wer", "word", expected.split(), got.split()), ("cer", "char", expected, got)):
        errors = edit_distance(items, items_got)
        rates[f"{metric}{suffix}"] = errors / len(items)
        rates[f"{unit}_errors{suffix}"], rates[f"{unit}s{suffix}"] = float(errors), float(len(items))
    return rates


class PhonemeJudge:
    """Errors of hama's phonemes against those it hears in the uncoded audio.

    It writes any language with the phonemes of those it knows: no transcript, but changes show.
    """

    metrics = ("phoneme_error",)
    rate_hz = 16000

    def __init__(self):
        from hama.asr import ASRModel

        self.model = ASRModel()

    def prepare(self, wav: np.ndarray, clip: Clip) -> list[str]:
        phonemes = self.model(_levelled(_audible(wav, "uncoded audio")), 16000).phonemes
        if not phonemes:
            raise Undefined("no phoneme is heard in the uncoded audio")
        return phonemes

    def judge(self, kept: list[str], wav_hat: np.ndarray) -> dict[str, float | str]:
        errors = edit_distance(kept, self.model(_levelled(_finite(wav_hat, "output")), 16000).phonemes)
        return {"phoneme_error": errors / len(kept), "phoneme_errors": float(errors), "phonemes": float(len(kept))}
