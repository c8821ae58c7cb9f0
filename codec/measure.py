"""The two jobs of an evaluation, each of one recording: code it by a family of systems, and judge what came out.

Both run in worker processes, return rows for the ledger, and turn whatever goes wrong into such a row.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codec.audio import resample_array, save_audio
from codec.delay import compensate
from codec.files import write_atomically
from codec.judges import Undefined, open_judges
from codec.systems import System, code_clip
from codec.testset import Recording, read_wav

Wanted = tuple[System, int, frozenset[str]]  # system, its delay in samples, the metrics it lacks
_judges: dict[tuple, list] = {}  # of this worker process: their models are loaded once


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
        rows.append(_decode_row(system, recording, coded.n_bytes))
    return rows


def decode_died(systems: list[System], recording: Recording, rate: int, cache: Path) -> list[dict]:
    """The rows of a job whose process died."""
    return [_decode_row(system, recording, error="the process died") for system in systems]


def _decode_row(system: System, recording: Recording, n_bytes: int = 0, error: str = "") -> dict:
    return {"stage": "decode", "system": system.key, "key": recording.key, "n_bytes": n_bytes, "error": error}


def measure_job(wanted: list[Wanted], recording: Recording, rate: int, cache: Path, asr_model: str | None) -> list[dict]:
    """Every missing metric of one recording, for all systems: what a judge makes of the original is found out once.

    Returns:
        a row a system: "values" by metric, and why there is none: "undefined" (no value exists), "failed".
    """
    reference = read_wav(recording.path)
    outputs = {system.name: reference if system.kind == "uncoded" else
               compensate(read_wav(decoded_path(cache, system, recording)), delay, len(reference))
               for system, delay, _ in wanted}  # fmt: skip
    rows = {system.name: _measure_row(system, recording, delay) for system, delay, _ in wanted}
    for judge in _opened(frozenset().union(*(metrics for _, _, metrics in wanted)), rate, asr_model):
        concerned = [(system.name, own) for system, _, metrics in wanted if (own := metrics & set(judge.metrics))]
        kept, problem = _attempt(judge.prepare, _at_rate(reference, rate, judge.rate_hz), recording.clip)
        for name, metrics in concerned:
            if problem:
                _note(rows[name], metrics, None, problem)
            else:
                _note(rows[name], metrics, *_attempt(judge.judge, kept, _at_rate(outputs[name], rate, judge.rate_hz)))
    return list(rows.values())


def measure_died(wanted: list[Wanted], recording: Recording, rate: int, cache: Path, asr_model: str | None) -> list[dict]:
    """The rows of a job whose process died."""
    return [_measure_row(system, recording, delay) | {"failed": dict.fromkeys(sorted(metrics), "the process died")}
            for system, delay, metrics in wanted]  # fmt: skip


def _measure_row(system: System, recording: Recording, delay: int) -> dict:
    return {"stage": "measure", "system": system.key, "key": recording.key, "delay": delay,
            "values": {}, "undefined": {}, "failed": {}}  # fmt: skip


def _opened(metrics: frozenset[str], rate: int, asr_model: str | None) -> list:
    """The judges of some metrics; those of the last call where it asked for the same."""
    if (metrics, rate, asr_model) not in _judges:
        _judges.clear()
        _judges[metrics, rate, asr_model] = open_judges(set(metrics), rate, asr_model)
    return _judges[metrics, rate, asr_model]


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
