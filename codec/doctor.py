"""`codec doctor`: whether a run is dying, of what, and what to do; from its log alone, or from values typed in."""

from __future__ import annotations

import argparse
import difflib
import itertools
import json
import logging
import math
import re
import sys
import textwrap
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from codec.health import KNOWN, Diagnosis, Finding, History, Reading, diagnose

EXIT_CODES = {"healthy": 0, "not yet": 0, "warning": 1, "critical": 2}
USER_ERROR = 3
VALIDATION = ("snr_db", "si_sdr_db", "amplitude_ratio", "dc_offset")  # where a name alone means validation's, not train's
ALIASES = {"snr": "snr_db", "amplitude": "amplitude_ratio"}
RESERVED = ("step", "time", "nonfinite")  # keys of a row that are no metrics
MAX_STEP = 2**53  # the numbers of a line are read as floats, which count no further
WIDTH = 120  # columns of the terminal
HEADER = ("metric", "value", "trend", "good", "verdict", "meaning")
WIDEST = (28, 8, 7, 22, 8)  # columns of each but the last, which takes the rest
CONFIDENCE = {0.8: "certain", 0.5: "likely", 0.0: "possible"}  # from so much on
ADVICE = {
    "healthy": "nothing here looks like a failure. Train on.",
    "warning": "train on, but mend the first finding soon.",
    "critical": "mend the first finding before paying for more steps.",
}


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add `codec doctor` to the command line."""
    command = commands.add_parser("doctor", help=run.__doc__, description=run.__doc__, epilog="Exit code: 0 healthy or too "
                                  "early to tell, 1 warning, 2 critical, 3 bad input.")  # fmt: skip
    command.add_argument("log", type=Path, nargs="?", metavar="RUN", help="folder of a run, or its metrics.jsonl, or "
                         "TensorBoard events")  # fmt: skip
    command.add_argument("--values", nargs="+", metavar="NAME=VALUE", help="numbers instead of a run: loss_d=1.97 feat=0.02; "
                         "several, oldest first, with commas: amplitude=53%%,38%%,7%%")  # fmt: skip
    command.add_argument("--until", type=int, metavar="STEP", help="leave out what was logged after this step")
    command.add_argument("--json", action="store_true", help="print JSON, for scripts")
    command.set_defaults(run=run, user_error=USER_ERROR)

    def refuse(message: str) -> None:  # argparse's own exit code would read as critical
        command.print_usage(sys.stderr)
        command.exit(USER_ERROR, f"codec doctor: {message}\n")

    command.error = refuse


def run(options: argparse.Namespace) -> int:
    """What a run's metrics say: is it healthy or dying, of what, and what to change."""
    if (options.log is None) == (options.values is None):
        raise ValueError("doctor: expected either a run or --values; try codec doctor runs/NAME")
    rows = read_rows(options.log) if options.log else parse_values(options.values)
    first = min(row["step"] for row in rows)
    if options.until is not None and options.until < first:
        raise ValueError(f"--until {options.until}: nothing is logged up to there, expected a step from {first} on")
    diagnosis = diagnose(History.from_rows(rows, options.until))
    print(to_json(diagnosis) if options.json else render(diagnosis))
    return EXIT_CODES[diagnosis.verdict]


# ---- what was logged ----------------------------------------------------------------------------------------


def read_rows(path: str | Path) -> list[dict]:
    """What a run logged: metrics.jsonl, or where there is none, TensorBoard events.

    A torn last line is left out. So are lines that are no JSON object with a whole number as step; they are counted on
    stderr. Names that the doctor knows in another spelling, such as "loss_g", become ours, "train/loss_g_step".

    Args:
        path: folder of a run, its metrics.jsonl, a folder with TensorBoard events, or one file of them.
    Returns:
        Rows in the order logged, of events one for each step: {"step": int, "time": Unix s, NAME: number or None, ...,
        "nonfinite": {NAME: what stands for None}}. "time" may be missing.
    Raises:
        ValueError: there are no metrics, or no line in them.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder; give the folder of a run, such as runs/NAME")
    file = path / "metrics.jsonl" if path.is_dir() else path
    if file.is_file() and "tfevents" not in file.name:
        return _read_lines(file)
    return _read_events(path)


def _read_lines(path: Path) -> list[dict]:
    """Rows of a metrics.jsonl."""
    lines = path.read_bytes().decode(errors="replace").split("\n")
    rows, broken = [], []
    for number, line in enumerate(lines, 1):
        row = _parse(line)
        if row:
            rows.append(row)
        elif line.strip() and number < len(lines):  # what follows the last newline was still being written
            broken.append(number)
    if broken:
        what = f"{len(broken)} lines are" if len(broken) > 1 else "1 line is"
        print(f"codec: {path}: {what} no JSON object with a step and left out; see line {broken[0]}", file=sys.stderr)
    if not rows:
        raise ValueError(f"{path}: no metrics in it, expected a line of JSON each logged step; wait for the first")
    return rows


def _parse(line: str) -> dict | None:
    """The row that a line holds, if it holds one."""
    try:
        entry = json.loads(line, parse_int=float)
    except (ValueError, RecursionError):
        return None
    step = entry.get("step") if isinstance(entry, dict) else None
    return _row(int(step), entry) if isinstance(step, float) and step.is_integer() and 0 <= step < MAX_STEP else None


def _read_events(path: Path) -> list[dict]:
    """Rows of TensorBoard's scalars, merged by step."""
    folder = path / "tensorboard" if (path / "tensorboard").is_dir() else path
    if folder.is_dir() and not any("tfevents" in file.name for file in folder.iterdir()):
        raise ValueError(f"{path}: neither metrics.jsonl nor TensorBoard events are there; give the folder of a run")
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it would tell at length of each resume
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 1, "audio": 1})  # 0: all
    events.Reload()
    entries = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            entries.setdefault(event.step, {}).update({tag: event.value, "time": event.wall_time})
    if not entries:
        raise ValueError(f"{folder}: its TensorBoard events hold no scalars; wait for the first logged step")
    return [_row(step, entries[step]) for step in sorted(entries)]


def _row(step: int, entry: dict) -> dict:
    """A row of metrics.jsonl; what is no number, or has a name that could upset a terminal, is left out."""
    row, nonfinite = {"step": step}, {}
    if isinstance(entry.get("time"), float):
        row["time"] = entry["time"]
    if isinstance(entry.get("nonfinite"), dict):
        nonfinite = {_logged_name(name): value for name, value in entry["nonfinite"].items()}
    for name, value in entry.items():
        if name not in RESERVED and name.isprintable() and (value is None or isinstance(value, float)):
            name = _logged_name(name)
            row[name] = value if value is not None and math.isfinite(value) else None
            if value is not None and not math.isfinite(value):
                nonfinite[name] = str(value)
    return row | {"nonfinite": nonfinite} if nonfinite else row


def _logged_name(name: str) -> str:
    """The name that metrics.jsonl has for a metric, where the doctor knows it; else the name as it is."""
    for short, suffix in ((name, "_step"), (name.removesuffix("_step"), "_step"), (name.removesuffix("_epoch"), "_epoch")):
        full = _full_name(short)
        if full in KNOWN:
            return full + suffix
    return name


def _full_name(name: str) -> str:
    """train/X or val/X of X alone."""
    if "/" in name:
        return name
    name = ALIASES.get(name, name)
    return f"val/{name}" if name in VALIDATION or f"train/{name}" not in KNOWN and f"val/{name}" in KNOWN else f"train/{name}"


def parse_values(items: list[str]) -> list[dict]:
    """Rows of values that a user typed in.

    Args:
        items: "NAME=VALUE" or "NAME=VALUE,VALUE,..." each, oldest value first, 53.4% for 0.534. A name alone is train's, but
            SNR, SI-SDR, amplitude ratio and DC offset are validation's; snr, amplitude and recon are understood. What the
            doctor does not know is kept, with a line on stderr.
    Returns:
        One row at step 0, or where there are several values, rows at steps 1, 2, ...; a single value is in each.
    Raises:
        ValueError: an item is no NAME=VALUE, a number is none, a name comes twice, or numbers of values differ.
    """
    columns: dict[str, list[float]] = {}
    for item in items:
        name, _, values = item.partition("=")
        if not name or not values:
            raise ValueError(f"--values {item}: expected NAME=VALUE, such as loss_d=1.97")
        key = _logged_name(name)
        if key in columns:
            raise ValueError(f"--values {item}: {key} is there already; give each name once, commas between its values")
        if re.sub("_(step|epoch)$", "", key) not in KNOWN:
            near = difflib.get_close_matches(_full_name(name), sorted(KNOWN), 1, 0.0)[0]
            print(f"codec: --values {name}: the doctor knows no such metric; did you mean {near}?", file=sys.stderr)
        columns[key] = [_number(text, item) for text in values.split(",")]
    n_rows = max(len(values) for values in columns.values())
    for key, values in columns.items():
        if len(values) not in (1, n_rows):
            raise ValueError(f"--values {key.removesuffix('_step')}: got {len(values)} values, expected {n_rows} as the "
                             "longest has, or 1")  # fmt: skip
    steps = range(1, n_rows + 1) if n_rows > 1 else [0]
    return [_row(step, {key: values[i % len(values)] for key, values in columns.items()}) for i, step in enumerate(steps)]


def _number(text: str, item: str) -> float:
    try:
        return float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise ValueError(f"--values {item}: {text!r} is no number, expected one such as 0.534 or 53.4%") from None


# ---- what the doctor says -----------------------------------------------------------------------------------


def render(diagnosis: Diagnosis) -> str:
    """A diagnosis for the terminal: the sheet, the findings, and in the last line the verdict; at most 120 columns."""
    rows = [HEADER, *map(_cells, diagnosis.readings)]
    widths = [min(max(map(len, column)), widest) for column, widest in zip(zip(*rows), WIDEST)]
    widths.append(WIDTH - sum(widths) - 2 * len(widths))
    lines = [line for row in rows for line in _in_columns(row, widths)]
    for place, finding in enumerate(diagnosis.findings, 1):
        lines += ["", f"{place}. {_headline(finding)}"]
        for label, text in (("seen", finding.evidence), ("do", finding.mend)):
            lines += textwrap.wrap(text, WIDTH, initial_indent=f"   {label + ':':<6}", subsequent_indent=" " * 9)
    if diagnosis.unknown:
        lines += ["", *textwrap.wrap(_unread(diagnosis), WIDTH, max_lines=3)]
    return "\n".join([*lines, "", _summary(diagnosis)])


def _cells(reading: Reading) -> tuple[str, ...]:
    """A reading as text, in the order of HEADER."""
    return reading.name, _figure(reading.value), reading.trend, reading.good, reading.verdict, reading.meaning


def _figure(value: float) -> str:
    """Three significant digits; a power of ten only where there would be many zeros."""
    text = f"{value:.3g}"
    return f"{float(text):.0f}" if "e+" in text and abs(value) < 1e7 else text


def _in_columns(cells: tuple[str, ...], widths: list[int]) -> list[str]:
    """Lines of one row of a table; long cells are wrapped."""
    wrapped = [textwrap.wrap(cell, width) for cell, width in zip(cells, widths)]
    return ["  ".join(f"{part:<{width}}" for part, width in zip(parts, widths)).rstrip()
            for parts in itertools.zip_longest(*wrapped, fillvalue="")]  # fmt: skip


def _headline(finding: Finding) -> str:
    """Which failure, how grave, how sure."""
    sure = next(word for least, word in CONFIDENCE.items() if finding.confidence >= least)
    failure = f"Failure {finding.number}, " if finding.number else ""
    return f"{failure}{finding.title}: {finding.level}, {sure}"


def _summary(diagnosis: Diagnosis) -> str:
    """The verdict in one line."""
    if diagnosis.verdict == "not yet":
        steps = "1 step is" if diagnosis.step == 1 else f"{diagnosis.step} steps are"
        return f"Verdict: not yet: {steps} too few to tell. Ask again later."
    at = f" at step {diagnosis.step}" if diagnosis.step else ""  # values typed in have none
    graded_alone = diagnosis.verdict != "healthy" and not diagnosis.findings
    advice = "see the graded lines of the sheet." if graded_alone else ADVICE[diagnosis.verdict]
    return f"Verdict: {diagnosis.verdict}{at}: {advice}"


def _unread(diagnosis: Diagnosis) -> str:
    return f"Not known to the doctor, so not read: {', '.join(diagnosis.unknown)}"


def to_markdown(diagnosis: Diagnosis, name: str) -> str:
    """A diagnosis as a page, with the name of the run in its title."""
    lines = [f"# Health of {name}", "", _summary(diagnosis), ""]
    for place, finding in enumerate(diagnosis.findings, 1):
        lines += [f"## {place}. {_escape(_headline(finding))}", "", f"- **Seen:** {_escape(finding.evidence)}",
                  f"- **Do:** {_escape(finding.mend)}", ""]  # fmt: skip
    rows = [HEADER, ("---",) * len(HEADER), *(map(_escape, _cells(reading)) for reading in diagnosis.readings)]
    lines += ["## The sheet", "", *(f"| {' | '.join(row)} |" for row in rows)]
    if diagnosis.unknown:
        lines += ["", _escape(_unread(diagnosis))]
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    """Text that Markdown shows as it is, also in a table."""
    return re.sub(r"([\\|*~]|<(?=[a-zA-Z/!?]))", r"\\\1", " ".join(text.split()))


def to_json(diagnosis: Diagnosis) -> str:
    """A diagnosis as a JSON object with the names of Diagnosis, Reading and Finding; NaN and Inf are null."""
    readings = [reading._asdict() | {"value": float(reading.value) if math.isfinite(reading.value) else None}
                for reading in diagnosis.readings]  # fmt: skip
    findings = [finding._asdict() for finding in diagnosis.findings]
    whole = diagnosis._asdict() | {"step": int(diagnosis.step), "readings": readings, "findings": findings}
    return json.dumps(whole, indent=2, allow_nan=False)
