"""Judge a codec: every bitrate of a checkpoint, beside classical codecs and other models, on the same recordings.

    python evaluate_codec.py --checkpoint runs/telugu --manifest data/telugu/manifest.jsonl --against opus,speex --out eval
    python evaluate_codec.py --compare eval_a/results.json eval_b/results.json

OUT gets report.html (to look at and to listen to), report.md, results.json, files.csv, and cache/. A second call with the
same OUT does only what is missing: after a kill, or for a metric or a codec that is new.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from codec import judges
from codec.classical import CODECS
from codec.delay import compensate, estimate_delay
from codec.doctor import read_rows, render
from codec.files import write_atomically
from codec.health import History, diagnose
from codec.judges import METRICS, POOLED
from codec.ledger import Ledger, run_jobs
from codec.measure import (
    decode_died,
    decode_job,
    decoded_path,
    how,
    measure_died,
    measure_job,
    one_line,
    split_measure,
    version_of,
    whole_decode,
)
from codec.page import Example, render_page
from codec.preflight import snr_bounds_db
from codec.pretrained import fetch
from codec.published import PUBLISHED
from codec.report import compare, render_markdown
from codec.summary import Figures, codebook_rows, group_means, headline, interval, pooled_snr_db, verdicts
from codec.systems import UNCODED, System, describe, distinct, measure_speed, neural_systems, open_neural, parse_against
from codec.testset import Recording, read_test_set, read_wav

MAX_DELAY_S = 0.1
DELAY_CLIPS = 12  # recordings that a system's delay is estimated from
SPEED_SECONDS = 10.0
EXAMPLE_SECONDS = 8.0  # that the page lets one hear of a recording
BOUND_SECONDS = 300.0  # of audio that the rate-distortion bound is computed from
BOUND_KBPS = [round(0.5 * 2 ** (i / 4), 3) for i in range(37)]  # 0.5 to 256


class Plan(NamedTuple):
    """What is judged, and where it is kept."""

    systems: list[System]
    recordings: list[Recording]
    rate: int  # Hz of the recordings: everything decoded is brought to it
    metrics: list[str]  # those that can be computed here
    cache: Path
    ledger: Ledger

    def decoded(self, system: System) -> list[Recording]:
        """Recordings that a system has coded."""
        rows = [(recording, self.ledger.get("decode", system.key, recording.key)) for recording in self.recordings]
        return [recording for recording, row in rows if row and not row["error"]]

    def output(self, system: System, recording: Recording) -> np.ndarray:
        """[T'] as decoded, with the codec's delay."""
        return read_wav(decoded_path(self.cache, system, recording))


# ---------------------------------------------------------------------------- code, align, measure, time


def decode_all(plan: Plan, n_workers: int) -> None:
    """Every recording through every system; a job is a recording and the bitrates of one family that are not cached."""
    jobs = []
    for recording in plan.recordings:
        families: dict[str, list[System]] = {}
        for system in plan.systems:
            row = plan.ledger.get("decode", system.key, recording.key)
            if system.kind != "uncoded" and (row is None or row["error"]):
                families.setdefault(system.family, []).append(system)
        jobs += [(group, recording, plan.rate, plan.cache) for group in families.values()]
    jobs.sort(key=lambda job: plan.systems.index(job[0][0]))  # a worker opens one model after the other
    run_jobs(decode_job, whole_decode, decode_died, jobs, plan.ledger, n_workers, "code")


def find_delays(plan: Plan) -> dict[str, int]:
    """Samples that each classical codec's output comes late, from the longest recordings; neural codecs have none by design."""
    delays = {system.name: 0 for system in plan.systems}
    for system in plan.systems:
        if system.kind != "classical":
            continue
        row = plan.ledger.get("delay", system.key)
        chosen = sorted(plan.decoded(system), key=lambda recording: (-recording.seconds, recording.key))[:DELAY_CLIPS]
        keys = [recording.key for recording in chosen]
        if chosen and (row is None or row["of"] != keys):
            pairs = [(read_wav(recording.path), plan.output(system, recording)) for recording in chosen]
            delay = estimate_delay(pairs, round(MAX_DELAY_S * plan.rate))
            row = {"stage": "delay", "system": system.key, "key": "", "delay": delay, "of": keys}
            plan.ledger.add(row)
        delays[system.name] = row["delay"] if row else 0
    return delays


def measure_all(plan: Plan, delays: dict[str, int], asr_model: str | None, n_workers: int) -> None:
    """Every metric of every output; a job is a recording and what it lacks. What failed before is tried again."""
    jobs = []
    for recording in plan.recordings:
        wanted = []
        for system in plan.systems:
            decoded = plan.ledger.get("decode", system.key, recording.key)
            if system.kind != "uncoded" and (not decoded or decoded["error"]):
                continue
            row = plan.ledger.get("measure", system.key, recording.key)
            stale = row is None or row["delay"] != delays[system.name]
            known = set() if stale else {metric for metric in {*row["values"], *row["undefined"]} & set(plan.metrics)
                                         if row["how"].get(metric) == how(metric, recording, asr_model)}  # fmt: skip
            if set(plan.metrics) - known:
                wanted.append((system, delays[system.name], frozenset(plan.metrics) - known))
        if wanted:
            jobs.append((wanted, recording, plan.rate, plan.cache, asr_model))
    run_jobs(measure_job, split_measure, measure_died, jobs, plan.ledger, n_workers, "measure")


def time_all(plan: Plan) -> None:
    """Real-time factors on one and two threads, each in a process of its own, one after the other."""
    wav = np.zeros(0, np.float32)
    for recording in plan.recordings:
        if len(wav) < SPEED_SECONDS * plan.rate:
            wav = np.concatenate([wav, read_wav(recording.path)])
    wav = wav[: round(SPEED_SECONDS * plan.rate)]
    here, rows = machine(), {system: plan.ledger.get("speed", system.key) for system in plan.systems}
    systems = [system for system, row in rows.items()
               if system.kind != "uncoded" and (row is None or row["machine"] != here or "error" in row)]  # fmt: skip
    for system in tqdm(systems, desc="time", unit="system", disable=not systems):
        row = {"stage": "speed", "system": system.key, "key": "", "machine": here}
        for n_threads in (1,) if system.kind == "classical" else (1, 2):
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                try:
                    result = pool.submit(measure_speed, system, wav, plan.rate, n_threads).result()
                except Exception as error:
                    row["error"] = one_line(error)
                    break
            row |= {f"encode_rtf_{n_threads}": result["encode_rtf"], f"decode_rtf_{n_threads}": result["decode_rtf"]}
            row.setdefault("peak_mb", result["peak_mb"])
        plan.ledger.add(row)


# ---------------------------------------------------------------------------------- what it comes to


def summarise(plan: Plan, system: System, delay: int) -> tuple[dict, Figures, np.ndarray | None]:
    """A system as results.json has it; its figures by file; how often it used each code."""
    blank = {"values": {}, "undefined": {}, "failed": {}}
    measured = [plan.ledger.get("measure", system.key, recording.key) or blank for recording in plan.recordings]
    keys = [*plan.metrics, *sorted({key for pair in POOLED.values() for key in pair}), "signal_energy", "error_energy"]
    figures = Figures({key: [row["values"].get(key) for row in measured] for key in keys}, POOLED)
    problems = list(find_problems(plan, system, measured))
    means = {key: interval(figures.pairs(key)) or {"mean": None, "low": None, "high": None, "n": 0} for key in plan.metrics}
    for key, mean in means.items():
        mean |= {kind: sum(p["metric"] == key and p["kind"] == kind for p in problems) for kind in ("undefined", "failed")}
    kbps, counts = disk_kbps(plan, system), count_codes(plan, system)
    groups = {"speaker": [r.speaker for r in plan.recordings], "language": [r.clip.language for r in plan.recordings]}
    speed = plan.ledger.get("speed", system.key) or {}
    row = {
        "name": system.name, "family": system.family, "kind": system.kind, "setting": system.setting,
        "nominal_kbps": system.nominal_kbps or kbps, "kbps": kbps,
        "payload_kbps": disk_kbps(plan, system, "n_payload_bytes") if system.kind != "uncoded" else None,
        "file_kbps": file_kbps(plan, system), "pooled_snr_db": pooled_snr_db(figures), "delay_ms": 1000 * delay / plan.rate,
        "means": means,
        "groups": {kind: by_group(figures, plan.metrics, names) for kind, names in groups.items()},
        "values": {key: [row["values"].get(key) for row in measured] for key in keys},
        "problems": problems, "codebooks": [] if counts is None else codebook_rows(counts),
        "speed": {key: value for key, value in speed.items() if key not in ("stage", "system", "key", "machine")},
    }  # fmt: skip
    return row, figures, counts


def by_group(figures: Figures, metrics: list[str], names: list[str | None]) -> dict[str, dict[str, float]]:
    """{group: {metric: mean}}."""
    groups: dict[str, dict[str, float]] = {}
    for metric in metrics:
        for name, mean in group_means(figures, metric, names).items():
            groups.setdefault(name, {})[metric] = mean
    return groups


def find_problems(plan: Plan, system: System, measured: list[dict]) -> Iterator[dict]:
    """Every value that is not there, and why."""
    for recording, row in zip(plan.recordings, measured):
        decoded = plan.ledger.get("decode", system.key, recording.key)
        found = {"undefined": row["undefined"], "failed": row["failed"]}
        if decoded and decoded["error"]:
            found["failed"] = dict.fromkeys(plan.metrics, f"not coded: {decoded['error']}")
        for kind, reasons in found.items():
            for metric, why in reasons.items():
                lossless = system.kind == "uncoded" and why.startswith("without limit")
                if metric in plan.metrics and not lossless:
                    yield {"file": recording.clip.name, "metric": metric, "kind": kind, "why": why}


def disk_kbps(plan: Plan, system: System, which: str = "n_bytes") -> float:
    """Bits of the files on disk per second of audio, or of the frames in them; of the uncoded audio, 16 bits a sample."""
    recordings = plan.decoded(system)
    if not recordings:
        return system.nominal_kbps or 16 * plan.rate / 1000
    n_bytes = sum(plan.ledger.get("decode", system.key, recording.key)[which] for recording in recordings)
    return 8 * n_bytes / sum(recording.seconds for recording in recordings) / 1000


def file_kbps(plan: Plan, system: System) -> list[float | None]:
    """Of each recording, on disk."""
    rows = [plan.ledger.get("decode", system.key, recording.key) for recording in plan.recordings]
    return [8 * row["n_bytes"] / recording.seconds / 1000 if row and not row["error"] else None
            for row, recording in zip(rows, plan.recordings)]  # fmt: skip


def count_codes(plan: Plan, system: System) -> np.ndarray | None:
    """[N, K] how often each entry was chosen, over all recordings; None for codecs without codebooks."""
    if not system.n_codebooks:
        return None
    size = open_neural(system.kind, system.source).codebook_size
    counts = np.zeros((system.n_codebooks, size), np.int64)
    for recording in plan.decoded(system):
        codes = np.load(decoded_path(plan.cache, system, recording).with_suffix(".npy"))
        counts += np.stack([np.bincount(level, minlength=size) for level in codes])
    return counts


def some_audio(recordings: list[Recording]) -> list[np.ndarray]:
    """Minutes of the test set, evenly over it; silent recordings left out."""
    step = max(1, math.ceil(sum(recording.seconds for recording in recordings) / BOUND_SECONDS))
    wavs = [read_wav(recording.path) for recording in recordings[::step]]
    return [wav for wav in wavs if wav.any()]


def pick_examples(plan: Plan, delays: dict[str, int], n: int) -> list[Example]:
    """Recordings to listen to: speakers take turns, of each those nearest 4 s first."""
    turns: dict[str, int] = {}
    order = []
    for recording in sorted(plan.recordings, key=lambda recording: (abs(recording.seconds - 4), recording.key)):
        turns[recording.speaker] = turns.get(recording.speaker, 0) + 1
        order.append((turns[recording.speaker], len(order), recording))
    coded, longest = {system: plan.decoded(system) for system in plan.systems}, round(EXAMPLE_SECONDS * plan.rate)
    examples = []
    for _, _, recording in sorted(order)[:n]:
        reference = read_wav(recording.path)
        outputs = {system.name: compensate(plan.output(system, recording), delays[system.name], len(reference))[:longest]
                   for system in plan.systems if recording in coded[system]}  # fmt: skip
        clip, reference = recording.clip, reference[:longest]
        examples.append(Example(clip.name, recording.speaker, clip.text or "", plan.rate, reference, outputs))
    return examples


def doctor_says(checkpoint: str) -> dict[str, str] | None:
    """The verdict on the training run that the checkpoint lies in, where its log is there."""
    folder = fetch(checkpoint).resolve()
    folders = (folder, *folder.parents[:2])
    log = next((folder / "metrics.jsonl" for folder in folders if (folder / "metrics.jsonl").is_file()), None)
    if log is None:
        return None
    try:
        diagnosis = diagnose(History.from_rows(read_rows(log)))
    except ValueError as error:
        return {"verdict": "not read", "text": str(error)}
    return {"verdict": diagnosis.verdict, "text": render(diagnosis)}


def notes(systems: list[System], rate: int) -> list[str]:
    """What a reader must know about sample rates."""
    families: dict[int, list[str]] = {}
    for system in systems:
        if system.n_codebooks:
            own = open_neural(system.kind, system.source).sample_rate
        else:
            own = CODECS[system.family].input_hz if system.kind == "classical" else None
        if own not in (None, rate) and system.family not in families.setdefault(own, []):
            families[own].append(system.family)
    return [f"{', '.join(names)} at {own} Hz, the recordings at {rate} Hz: "
            + (f"what lies above {own // 2} Hz is lost" if own < rate else "resampled, and back")
            for own, names in sorted(families.items())]  # fmt: skip


def files_csv(rows: list[dict], recordings: list[Recording], metrics: list[str]) -> str:
    """files.csv: a line a recording and system."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["file", "speaker", "language", "seconds", "system", "kbps", *metrics, "problems"])
    for index, recording in enumerate(recordings):
        name, speaker, language = recording.clip.name, recording.speaker, recording.clip.language or ""
        for row in rows:
            values = [row["file_kbps"][index], *(row["values"][metric][index] for metric in metrics)]
            problems = [f"{p['metric']} {p['kind']}: {p['why']}" for p in row["problems"] if p["file"] == name]
            writer.writerow([name, speaker, language, f"{recording.seconds:.3f}", row["name"],
                             *("" if value is None else f"{value:.6g}" for value in values), "; ".join(problems)])  # fmt: skip
    return text.getvalue()


def machine() -> str:
    """Processor and versions, for the report."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{os.cpu_count()} CPU cores ({model}), {platform.system()}, {versions}"


def commit() -> str:
    """Of this code, with + where it was changed since; "" where git does not know."""
    if shutil.which("git") is None:
        return ""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def versions() -> dict[str, str]:
    """Of every package that a metric comes from."""
    packages = sorted({metric.package for metric in METRICS.values()} - {""})
    return {package: version for package in packages if (version := version_of(package))}


# --------------------------------------------------------------------------------------------- main


def evaluate(options: argparse.Namespace) -> dict:
    """All stages and all files; the results as results.json has them.

    Raises:
        ValueError: a manifest, checkpoint or codec that cannot be used; one line.
    """
    # who is judged, on what, by whom
    test_set = read_test_set(
        options.manifest, options.split, options.n_files, options.seed, options.transcripts, options.language
    )
    recordings, rate = test_set.recordings, test_set.sample_rate
    for entry in test_set.skipped:
        print(f"left out: {entry['why']}", file=sys.stderr)
    ours = neural_systems("ours", options.checkpoint, options.codebooks)
    rivals = parse_against(options.against, [system.nominal_kbps for system in ours])
    systems = distinct([*ours, *rivals, UNCODED])
    wanted = [key for key in METRICS if key in (options.metrics or METRICS) and key not in options.without]
    described = {key: METRICS[key]._asdict() | {"absent": judges.absent(key, options.asr_model)} for key in wanted}
    metrics = [key for key in wanted if not described[key]["absent"]]
    if set(metrics) & set(judges.WhisperJudge.metrics):
        judges.open_judges({"wer"}, rate, options.asr_model)  # says at once what is wrong with it
    cache = options.out / "cache"
    plan = Plan(systems, recordings, rate, metrics, cache, Ledger(cache / "done.jsonl"))

    # the work, each piece once
    decode_all(plan, options.workers)
    delays = find_delays(plan)
    measure_all(plan, delays, options.asr_model, options.workers)
    if not options.no_speed:
        time_all(plan)

    # what it comes to
    wavs = some_audio(recordings)
    summaries = [summarise(plan, system, delays[system.name]) for system in systems]
    rows = [row for row, _, _ in summaries]
    figures = {row["name"]: own for row, own, _ in summaries}
    code_counts = {row["name"]: counts for row, _, counts in summaries if counts is not None}
    found = verdicts(rows, figures, described)
    bounds = snr_bounds_db(wavs, rate, BOUND_KBPS + [row["kbps"] for row in rows]) if wavs else []
    for row, bound in zip(rows, bounds[len(BOUND_KBPS) :]):
        row["snr_bound_db"] = bound if row["kind"] != "uncoded" else None
    results = {
        "format": 1,
        "title": systems[0].family,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "evaluate_codec.py", *options.arguments]),
        "machine": machine(),
        "commit": commit(),
        "versions": versions(),
        "model": describe(options.checkpoint),
        "test_set": {
            "manifest": str(options.manifest),
            "split": test_set.split,
            "sample_rate": rate,
            "seconds": sum(recording.seconds for recording in recordings),
            "files": [recording.clip.name for recording in recordings],
            "speakers": [recording.speaker for recording in recordings],
            "languages": [recording.clip.language for recording in recordings],
            "file_seconds": [recording.seconds for recording in recordings],
            "skipped": test_set.skipped,
            "notes": test_set.notes + notes(systems, rate),
        },
        "metrics": described,
        "systems": rows,
        "headline": headline(found),
        "verdicts": found,
        "rate_distortion": {"kbps": BOUND_KBPS, "bound_db": bounds[: len(BOUND_KBPS)]},
        "doctor": doctor_says(options.checkpoint),
        "published": PUBLISHED,
    }
    examples = pick_examples(plan, delays, options.examples)
    contents = {
        "files.csv": files_csv(rows, recordings, metrics),
        "report.md": render_markdown(results),
        "report.html": render_page(results, examples, code_counts, audio=not options.no_audio),
        "results.json": json.dumps(results, allow_nan=False) + "\n",
    }
    for name, text in contents.items():
        write_atomically(options.out / name, text)
    return results


def parse_options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", help="run, checkpoint or pretrained folder, hub id, or base: the package's own model")
    add("--manifest", help="manifest.jsonl of prepare_speaker_data.py")
    add("--out", type=Path, help="folder of the report and of the cache")
    add("--split", default="", help="of the manifest (default: test, else val, else train)")
    add("--against", default="", help="comma-separated: opus, codec2, speex (at bitrates near the checkpoint's, or opus@6+12), "
        "another run, hf:ID of an EnCodec, DAC or Mimi")  # fmt: skip
    add("--codebooks", type=numbers, default=[], metavar="N,...", help="bitrates of the checkpoint (default: as trained)")
    add("--n_files", type=count, default=0, help="judge a seeded choice of so many recordings (default: all)")
    add("--seed", type=int, default=0, help="of that choice")
    add("--metrics", type=metric_names, default=[], metavar="NAME,...", help="only these (default: all that can be computed)")
    add("--without", type=metric_names, default=[], metavar="NAME,...", help="not these")
    add("--transcripts", help='JSONL of {"path", "text"[, "language"]}: what was said, for wer and cer')
    add("--asr_model", help="folder of a Whisper model for faster-whisper, or a name that it downloads, such as base")
    add("--language", help="for the recogniser, such as te (default: the transcripts', the manifest's, or detected)")
    add("--examples", type=count, default=4, help="recordings to listen to in report.html (default: 4)")
    add("--no_audio", action="store_true", help="report.html without players, for recordings that must not be passed on")
    add("--no_speed", action="store_true", help="no real-time factors")
    add("--workers", type=count, default=os.cpu_count() or 1, help="processes of one thread (default: one a core; 0: this one)")
    add("--compare", nargs=2, type=Path, metavar="JSON", help="paired differences of two evaluations, and nothing else")
    options = parser.parse_args(arguments)
    options.arguments = arguments
    lacking = [f"--{name}" for name in ("checkpoint", "manifest", "out") if getattr(options, name) is None]
    if lacking and not options.compare:
        parser.error(f"{', '.join(lacking)} missing; or --compare A.json B.json")
    return options


def count(text: str) -> int:
    """A whole number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number from 0 on")
    return int(text)


def numbers(text: str) -> list[int]:
    """"1,2,4" as a list."""
    return [int(number) for number in text.split(",")]


def metric_names(text: str) -> list[str]:
    """Names of METRICS."""
    names = text.split(",")
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no metric; there are {', '.join(METRICS)}")
    return names


def read_results(path: Path) -> dict:
    """A results.json.

    Raises:
        ValueError: it is none.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        results = None
    if not isinstance(results, dict) or results.get("format") != 1:
        raise ValueError(f"{path}: not a results.json of evaluate_codec.py")
    return results


def main(arguments: list[str] | None = None) -> int:
    """Command line; 0, or 2 after one line on stderr."""
    options = parse_options(sys.argv[1:] if arguments is None else arguments)
    try:
        if options.compare:
            first, second = options.compare
            print(compare(read_results(first), read_results(second), (str(first), str(second)), POOLED))
        else:
            print(render_markdown(evaluate(options)))
            print(f"Look and listen: {options.out / 'report.html'}")
    except KeyboardInterrupt:
        print("evaluate_codec: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"evaluate_codec: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
