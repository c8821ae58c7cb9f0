"""The two jobs of an evaluation, each of one recording: code it by a family of systems, and judge what came out.

Both run in worker processes, return rows for the ledger, and turn whatever goes wrong into such a row.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codec import delay as alignment
from codec import judges, pitch
from codec import metrics as signal_metrics
from codec.audio import resample_array, save_audio
from codec.delay import compensate, refine_delay
from codec.files import write_atomically
from codec.judges import METRICS, Clip, Undefined, WhisperJudge, open_judges
from codec.systems import System, code_clip
from codec.testset import Recording, read_wav

Wanted = tuple[System, int, frozenset[str]]  # system, its delay in samples, the metrics it lacks
REFINE_S = 0.0002  # 3 samples at 16 kHz
_judges: dict[tuple, tuple[list, dict[str, str]]] = {}  # of this worker process: their models are loaded once


def decoded_path(cache: Path, system: System, recording: Recording) -> Path:
    """Where the cache has a decoded recording; its codes lie beside it, as .npy."""
    return cache / system.key / f"{recording.key}.flac"


def decode_job(systems: list[System], recording: Recording, rate: int, cache: Path) -> list[dict]:
    """Code one recording by systems of one family, and keep what they give at `rate` Hz as 16-bit FLAC.

    Returns:
        a row a system: "n_bytes" of the coded file, "error" where it failed.
    """
    try:
        results = code_clip(systems, read_wav(recording.path), rate)
    except Exception as error:  # one bad file must not end an evaluation of hundreds
        return [_decode_row(system, recording, error=one_line(error)) for system in systems]
    rows = []
    for system in systems:
        coded, path = results[system.name], decoded_path(cache, system, recording)
        wav = resample_array(coded.wav, coded.sample_rate, rate) if coded.sample_rate != rate else coded.wav
        save_audio(path, torch.from_numpy(np.asarray(wav, np.float32)), rate)
        if coded.codes is not None:
            contents = io.BytesIO()
            np.save(contents, coded.codes.astype(np.int32))
            write_atomically(path.with_suffix(".npy"), contents.getvalue())
        rows.append(_decode_row(system, recording, coded.n_bytes, coded.n_payload_bytes))
    return rows


def whole_decode(*job: Any) -> list[tuple]:
    """A family is coded in one go: such a job has no parts."""
    return [job]


def decode_died(systems: list[System], recording: Recording, rate: int, cache: Path) -> list[dict]:
    """The rows of a job whose process died."""
    return [_decode_row(system, recording, error="the process died") for system in systems]


def _decode_row(system: System, recording: Recording, n_bytes: int = 0, n_payload: int = 0, error: str = "") -> dict:
    return {"stage": "decode", "system": system.key, "key": recording.key, "n_bytes": n_bytes, "n_payload_bytes": n_payload,
            "error": error}  # fmt: skip


def measure_job(wanted: list[Wanted], recording: Recording, rate: int, cache: Path, asr_model: str | None) -> list[dict]:
    """Every missing metric of one recording, for all systems: what a judge makes of the original is found out once.

    Returns:
        a row a system: "values" by metric, and why there is none: "undefined" (no value exists), "failed"; "how" each was
        measured.
    """
    reference = read_wav(recording.path)
    outputs = {system.name: _aligned(reference, system, delay, recording, rate, cache) for system, delay, _ in wanted}
    rows = {system.name: _measure_row(system, recording, delay, metrics, asr_model) for system, delay, metrics in wanted}
    opened, broken = _opened(frozenset().union(*(metrics for _, _, metrics in wanted)), rate, asr_model)
    for judge in opened:
        concerned = [(system.name, own) for system, _, metrics in wanted if (own := metrics & set(judge.metrics))]
        kept, problem = _attempt(_prepare, judge, reference, recording.clip, rate)
        for name, metrics in concerned:
            if problem:
                _note(rows[name], metrics, None, problem)
            else:
                _note(rows[name], metrics, *_attempt(_judge, judge, kept, outputs[name], rate))
    for system, _, metrics in wanted:
        rows[system.name]["failed"] |= {metric: why for metric, why in broken.items() if metric in metrics}
    return list(rows.values())


def split_measure(wanted: list[Wanted], *others: Any) -> list[tuple]:
    """A job metric by metric: which of them takes the process with it?"""
    metrics = sorted(frozenset().union(*(metrics for _, _, metrics in wanted)))
    return [([(system, delay, frozenset({metric})) for system, delay, own in wanted if metric in own], *others)
            for metric in metrics]  # fmt: skip


def measure_died(wanted: list[Wanted], recording: Recording, rate: int, cache: Path, asr_model: str | None) -> list[dict]:
    """The rows of a job whose process died."""
    return [_measure_row(system, recording, delay, metrics, asr_model)
            | {"failed": dict.fromkeys(sorted(metrics), "the process died")} for system, delay, metrics in wanted]  # fmt: skip


def _aligned(reference: np.ndarray, system: System, delay: int, recording: Recording, rate: int, cache: Path) -> np.ndarray:
    """What a system made of a recording, in time with it and as long."""
    if system.kind == "uncoded":
        return reference
    wav_hat = read_wav(decoded_path(cache, system, recording))
    if system.kind == "classical":
        delay = refine_delay(reference, wav_hat, delay, round(REFINE_S * rate))
    return compensate(wav_hat, delay, len(reference))


def how(metric: str, recording: Recording, asr_model: str | None) -> str:
    """What a measurement depends on besides the audio: our code, the package, what is known of the words."""
    parts = [_code_version(METRICS[metric].package)]
    if metric in WhisperJudge.metrics:
        parts += [str(recording.clip.text), str(recording.clip.language), str(asr_model)]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]


@functools.lru_cache
def _code_version(package: str) -> str:
    """Of the judges' code, and of a package's version."""
    digest = hashlib.sha256()
    for module in (judges, signal_metrics, pitch, alignment):
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest() + version_of(package)


def version_of(package: str) -> str:
    """Of an installed package, "" of none."""
    try:
        return importlib.metadata.version(package.split("[")[0]) if package else ""
    except importlib.metadata.PackageNotFoundError:
        return ""


def _measure_row(
    system: System, recording: Recording, delay: int, metrics: frozenset[str], asr_model: str | None
) -> dict:
    return {"stage": "measure", "system": system.key, "key": recording.key, "delay": delay, "values": {}, "undefined": {},
            "failed": {}, "how": {metric: how(metric, recording, asr_model) for metric in sorted(metrics)}}  # fmt: skip


def _opened(wanted: frozenset[str], rate: int, asr_model: str | None) -> tuple[list, dict[str, str]]:
    """The judges of some metrics, those of the last call where it asked for the same; why others cannot be opened."""
    if (wanted, rate, asr_model) not in _judges:
        opened, broken = [], {}
        for metric in sorted(wanted):
            if not any(metric in judge.metrics for judge in opened):
                found, problem = _attempt(open_judges, {metric}, rate, asr_model)
                opened += found or []
                broken |= {metric: one_line(problem)} if problem else {}
        _judges.clear()
        _judges[wanted, rate, asr_model] = opened, broken
    return _judges[wanted, rate, asr_model]


def _prepare(judge: Any, reference: np.ndarray, clip: Clip, rate: int) -> Any:
    return judge.prepare(_at_rate(reference, rate, judge.rate_hz), clip)


def _judge(judge: Any, kept: Any, output: np.ndarray, rate: int) -> dict[str, float | str]:
    return judge.judge(kept, _at_rate(output, rate, judge.rate_hz))


def _at_rate(wav: np.ndarray, rate: int, wanted: int | None) -> np.ndarray:
    return wav if wanted in (None, rate) else resample_array(wav, rate, wanted)


def _attempt(action: Callable, *arguments: Any) -> tuple[Any, Exception | None]:
    """What it returns, or what it raises: a metric that fails on one file is a line of the report, not the end."""
    try:
        return action(*arguments), None
    except Exception as error:
        return None, error


def _note(row: dict, metrics: frozenset[str], answer: dict[str, float | str] | None, problem: Exception | None) -> None:
    """Sort a judge's answer into the row: numbers, reasons why there is none, failures."""
    if isinstance(problem, Undefined):
        row["undefined"] |= dict.fromkeys(sorted(metrics), str(problem))
    elif problem:
        row["failed"] |= dict.fromkeys(sorted(metrics), one_line(problem))
    for metric, value in (answer or {}).items():
        if isinstance(value, str):
            row["undefined"][metric] = value
        elif math.isfinite(value):
            row["values"][metric] = float(value)
        else:
            row["undefined"][metric] = f"the metric gave {value}"


def one_line(error: BaseException) -> str:
    """What went wrong, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
