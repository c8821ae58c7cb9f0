"""report.html: an evaluation as one page to look at and listen to, from disk, with no network."""

from __future__ import annotations

import json
import math
import string
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from codec.figures import (
    Point,
    bound_chart,
    codes_picture,
    curve_panel,
    difference_picture,
    log_spectrogram,
    mark,
    sound,
    spectrogram_picture,
)
from codec.summary import SAME_RATE

ARROWS = {"higher": "↑", "lower": "↓", "one": "→ 1", "zero": "→ 0"}
GOOD = {"higher": "higher is better", "lower": "lower is better", "one": "best at 1", "zero": "best at 0"}
SIDES = (("good", "▲", "better", "better"), ("bad", "▼", "worse", "worse"), ("even", "≈", "even", "not told apart"))
NO_AUDIO = "The recordings are left out of this copy: they are not ours to pass on. Run the command at the end to hear them."
BOUND_ABOUT = ("The bound is reverse water-filling: the components of this audio taken as Gaussian, their spectral envelopes "
               "given away free; only a codec that predicts the pitch well could come above it. A codec may sound good far "
               "below: ears forgive a wrong phase, this ratio does not.")  # fmt: skip
EMPTY = {"title": "codec", "model": {}, "test_set": {}, "metrics": {}, "systems": [], "verdicts": [], "rate_distortion": {},
         "doctor": {}, "published": [], "command": ""}  # fmt: skip


class Example(NamedTuple):
    """An utterance to listen to: its sound before and after each system."""

    name: str  # as in results["test_set"]["files"]
    speaker: str
    text: str
    sample_rate: int
    reference: np.ndarray  # float32 [T]
    decoded: dict[str, np.ndarray]  # float32 [T] by system name


def render_page(results: dict, examples: list[Example], code_counts: dict[str, np.ndarray], audio: bool = True) -> str:
    """The whole report as one HTML file without addresses outside itself.

    Args:
        results: contents of results.json; whatever is missing or null is left out of the page.
        examples: utterances to show and play, in the page's order.
        code_counts: system name -> [N, K] how often each code of each level was used.
        audio: False leaves the recordings out, and says so; the pictures stay.
    Returns:
        HTML text.
    """
    results = EMPTY | {key: value for key, value in results.items() if value is not None}
    sections = {
        "curves": ("Quality over bitrate", _curves(results)),
        "table": ("All numbers", _scores(results)),
        "listen": ("Listen and look", _examples(results, examples, audio)),
        "codes": ("Codebook use", _codebooks(results, code_counts)),
        "worst": ("Worst files", _worst(results)),
        "bound": ("Why not 30 dB", _bound(results)),
        "groups": ("By speaker and language", _groups(results)),
        "speed": ("Speed and memory", _speed(results)),
        "doctor": ("Doctor", _doctor(results)),
        "published": ("Published numbers", _published(results)),
        "reproduce": ("How to reproduce", _reproduce(results)),
    }
    sections = {key: section for key, section in sections.items() if section[1]}
    links = "".join(f'<a href="#{key}" title="{title}">{key.capitalize()}</a>' for key, (title, _) in sections.items())
    body = "\n".join([
        f"<header><h1>{escape(results['title'])}</h1>{_tested(results)}</header>",
        f'<nav aria-label="Sections"><div><a href="#verdicts">Verdict</a>{links}</div></nav>',
        f'<main><section id="verdicts" aria-label="Verdict">{_verdicts(results)}</section>',
        *(f'<section id="{key}"><h2>{title}</h2>{html}</section>' for key, (title, html) in sections.items()),
        "</main>",
    ])  # fmt: skip
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    data = json.dumps(_data(results, examples), allow_nan=False).replace("<", "\\u003c")
    return string.Template(template).substitute(title=escape(results["title"]), body=body, data=data)


# ---- the first screen ---------------------------------------------------------------------------------------


def _tested(results: dict) -> str:
    """One line: what was tested on what."""
    model, test_set = results["model"], results["test_set"]
    parameters, rate = model.get("parameters"), model.get("sample_rate")
    what = [f"{parameters / 1e6:.1f} M parameters" if parameters else "", f"{rate / 1000:g} kHz" if rate else "",
            _join(model.get("n_codebooks"), " codebooks of ", model.get("codebook_size"))]  # fmt: skip
    speakers = {speaker for speaker in test_set.get("speakers") or [] if speaker}
    languages = sorted({language for language in test_set.get("languages") or [] if language})
    on = [f"{len(test_set.get('files') or [])} files", f"{(test_set.get('seconds') or 0) / 60:.1f} minutes",
          f"{len(speakers)} speakers" if len(speakers) > 1 else "", ", ".join(languages)]  # fmt: skip
    return (f'<p class="soft">{escape(", ".join(filter(None, what)) or "systems")}, tested on '
            f"{escape(', '.join(filter(None, on)))}.</p>")  # fmt: skip


def _join(first: object, words: str, second: object) -> str:
    return f"{first}{words}{second}" if first and second else ""


def _verdicts(results: dict) -> str:
    """Cards by rival, in the order given; the first rival's show their differences at once."""
    if not results["verdicts"]:
        return "<p>No verdict: nothing to compare with. Add <code>--against opus</code>, or another run.</p>"
    rivals: dict[str, list[str]] = {}
    for verdict in results["verdicts"]:
        opened = verdict["against"] == results["verdicts"][0]["against"]
        rivals.setdefault(verdict["against"], []).append(_verdict(results, verdict, opened))
    parts = [f'<div class="rival{" many" * (len(cards) > 1)}"><h2>Against {escape(rival)}</h2>'
             f'<div class="cards">{"".join(cards)}</div></div>' for rival, cards in rivals.items()]  # fmt: skip
    how = "Differences: ours minus theirs, paired over the files, with 95 % intervals; not told apart: the interval holds 0."
    return f'<div class="rivals">{"".join(parts)}</div><p class="soft"><small>{how}</small></p>'


def _verdict(results: dict, verdict: dict, opened: bool) -> str:
    """One card: who against whom at which rates, three counts, the differences."""
    counts = "".join(f'<div class="{kind}"><b>{len(verdict.get(side) or [])}</b> {sign} {words}</div>'
                     for kind, sign, side, words in SIDES)
    tags = "".join(_tag(results, verdict, key, kind, sign) for kind, sign, side, _ in SIDES for key in verdict.get(side) or [])
    return (f'<article class="card"><h3>{escape(verdict["ours"])} against {escape(verdict["theirs"])}</h3>'
            f'{_rates(results, verdict)}<div class="counts">{counts}</div>'
            f'<details{" open" if opened else ""}><summary>Differences</summary><ul class="tags">{tags}</ul></details>'
            "</article>")  # fmt: skip


def _rates(results: dict, verdict: dict) -> str:
    """What both spend: a verdict at another rate is another verdict."""
    rates = {system["name"]: system.get("kbps") for system in results["systems"]}
    ours, theirs = rates.get(verdict["ours"]), rates.get(verdict["theirs"])
    if not ours or not theirs:
        return ""
    ratio = max(ours, theirs) / min(ours, theirs)
    spender = escape(verdict["ours"] if ours > theirs else verdict["theirs"])
    words = "the same rate" if ratio <= SAME_RATE else f"{spender} spends {ratio:.1f} times as much"
    return f'<p class="soft">{ours:.3g} against {theirs:.3g} kbps on disk: <b>{words}</b></p>'


def _tag(results: dict, verdict: dict, key: str, kind: str, sign: str) -> str:
    """The paired difference of one metric: PESQ +0.31 [0.25, 0.37]."""
    metric = results["metrics"].get(key) or {}
    difference = (verdict.get("differences") or {}).get(key) or {}
    title = f"{difference.get('n', '?')} files; {GOOD.get(metric.get('better'), '')}"
    value = f"<b>{_number(difference.get('mean'), metric, sign=True)}</b> {_interval(difference, metric)}"
    return f'<li class="tag {kind}" title="{title}">{sign} {escape(metric.get("title") or key)} {value}</li>'


# ---- curves and the table -----------------------------------------------------------------------------------


def _families(results: dict) -> dict[str, list[dict]]:
    """Coded systems by family; the order gives the colours, in every picture."""
    families: dict[str, list[dict]] = {}
    for system in results["systems"]:
        if system.get("kind") != "uncoded":
            families.setdefault(system.get("family") or system["name"], []).append(system)
    return families


def _points(results: dict, key: str) -> dict[str, list[Point]]:
    """What can be drawn of a metric: family -> points."""
    metric = results["metrics"].get(key) or {"unit": "dB", "digits": 1}
    curves = {}
    for family, systems in _families(results).items():
        curves[family] = []
        for system in systems:
            mean = _mean(system, key)
            if _finite(mean.get("mean")) and (system.get("kbps") or 0) > 0:
                low, high = (mean[end] if _finite(mean.get(end)) else mean["mean"] for end in ("low", "high"))
                words = f"{_number(mean['mean'], metric)} {_interval(mean, metric)}"
                curves[family].append(Point(system["name"], system["kbps"], mean["mean"], low, high, words))
    return curves


def _curves(results: dict) -> str:
    panels = [_panel(results, key, metric) for key, metric in results["metrics"].items()]
    if not any(panels):
        return ""
    how = ("Bitrates are bytes on disk. Bars are 95 % intervals; dashed: the uncoded recording. Point at a mark, or go to a "
           "panel with <kbd>Tab</kbd> and through it with <kbd>←</kbd> <kbd>→</kbd>.")  # fmt: skip
    return f'{_legend(results)}<p class="soft">{how}</p><div class="panels">{"".join(panels)}</div>'


def _panel(results: dict, key: str, metric: dict) -> str:
    """One metric's curves; nothing where no system with a bitrate has it."""
    curves = _points(results, key)
    if not any(curves.values()):
        return ""
    uncoded = next((system for system in results["systems"] if system.get("kind") == "uncoded"), {})
    level = _mean(uncoded, key).get("mean")
    title = f"{metric['title']}{_unit(metric)} {ARROWS.get(metric.get('better'), '')}"
    chart = curve_panel(f"{title} over bitrate; arrow keys read the points", curves, level if _finite(level) else None)
    return (f'<figure class="curves"><figcaption title="{escape(metric.get("about") or "")}">{escape(title)}</figcaption>'
            f"{chart}<output>{GOOD.get(metric.get('better'), '')}</output></figure>")  # fmt: skip


def _legend(results: dict) -> str:
    entries = "".join(f"<li>{mark(index)} {escape(family)}</li>" for index, family in enumerate(_families(results)))
    return f'<ul class="legend">{entries}</ul>'


def _scores(results: dict) -> str:
    """The table of everything, its footnotes, and what is absent."""
    systems, metrics = results["systems"], results["metrics"]
    keys = [key for key in metrics if any(_mean(system, key) for system in systems)]
    absent = [f"<li>{escape(metric['title'])}: {escape(metric.get('absent') or 'no system has it')}</li>"
              for key, metric in metrics.items() if key not in keys]  # fmt: skip
    best = {key: _best(systems, key, metrics[key]) for key in keys}
    heads = ['<th scope="col" data-first="ascending"><button>system</button></th>',
             '<th scope="col" data-first="ascending"><button>kbps</button><small>on disk</small></th>',
             '<th scope="col" data-first="ascending"><button>delay</button><small>ms</small></th>',
             *(_head(metrics[key]) for key in keys)]  # fmt: skip
    rows = [_row(system, keys, metrics, best) for system in systems]
    notes = [note for key in keys if (note := _note(systems, key, metrics[key]))]
    caption = "Means with 95 % intervals. ★ best of the coded systems at any rate. Press a heading to sort, best first."
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="Table of all numbers"><table class="sortable">'
        f"<caption><span>{caption}</span></caption><thead><tr>{''.join(heads)}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        + (f"<h3>Not measured here</h3><ul>{''.join(absent)}</ul>" if absent else "")
        + (f"<h3>Files without a value</h3><ul>{''.join(notes)}</ul>" if notes else "")
        + f'<details><summary>What the metrics mean</summary><dl class="facts">{_meanings(metrics)}</dl></details>'
    )


def _head(metric: dict) -> str:
    first = "descending" if metric.get("better") == "higher" else "ascending"
    unit = f"<small>{escape(metric.get('unit') or '')} {ARROWS.get(metric.get('better'), '')}</small>"
    return (f'<th scope="col" data-first="{first}" title="{escape(metric.get("about") or "")}">'
            f"<button>{escape(metric['title'])}</button>{unit}</th>")  # fmt: skip


def _row(system: dict, keys: list[str], metrics: dict, best: dict[str, float | None]) -> str:
    cells = [f'<td data-value="{_sortable(value)}">{_number(value, {})}</td>'
             for value in (system.get("kbps"), system.get("delay_ms"))]  # fmt: skip
    for key in keys:
        mean, metric = _mean(system, key), metrics[key]
        value = _distance(mean.get("mean"), metric)
        is_best = value is not None and system.get("kind") != "uncoded" and _rounded(value, metric) == best[key]
        lost = (mean.get("undefined") or 0) + (mean.get("failed") or 0)
        note = f'<sup><a href="#note-{key}" title="{lost} files without a value">({lost})</a></sup>' if lost else ""
        text = f"<b>{_number(mean.get('mean'), metric)}</b>{note}<small>{_interval(mean, metric)}</small>"
        cells.append(f'<td data-value="{_sortable(value)}"{" class=best" if is_best else ""}>{text}</td>')
    name, setting = escape(system["name"]), escape(system.get("setting") or "")
    return f'<tr><th scope="row" data-value="{name}">{name}<small>{setting}</small></th>{"".join(cells)}</tr>'


def _best(systems: list[dict], key: str, metric: dict) -> float | None:
    """The best mean of the coded systems, as `_distance` and rounded as shown; None if nobody has one."""
    means = [_mean(system, key).get("mean") for system in systems if system.get("kind") != "uncoded"]
    values = [_distance(mean, metric) for mean in means if _finite(mean)]
    choose = max if metric.get("better") == "higher" else min
    return _rounded(choose(values), metric) if values else None


def _distance(value: float | None, metric: dict) -> float | None:
    """What a metric is sorted by: the value, or how far it is from 1 or 0 where that is best."""
    if not _finite(value):
        return None
    return abs(value - 1) if metric.get("better") == "one" else abs(value) if metric.get("better") == "zero" else value


def _rounded(value: float, metric: dict) -> float:
    return round(value, metric.get("digits", 2))


def _note(systems: list[dict], key: str, metric: dict) -> str:
    """Why files have no value of a metric: reason, then which files of which systems."""
    reasons: dict[tuple[str, str], dict[str, list[str]]] = {}
    for system in systems:
        for problem in system.get("problems") or []:
            if problem["metric"] == key:
                files = reasons.setdefault((problem["kind"], problem["why"]), {})
                files.setdefault(problem["file"], []).append(system["name"])
    lines = []
    for (kind, why), files in reasons.items():
        named = [f"{file} ({'all systems' if len(names) == len(systems) else ', '.join(names)})"
                 for file, names in files.items()]  # fmt: skip
        more = f" and {len(named) - 5} more" if len(named) > 5 else ""
        lines.append(f"<li>{escape(kind)}: {escape(why)}: {escape('; '.join(named[:5]))}{more}</li>")
    return f'<li id="note-{key}">{escape(metric["title"])}<ul>{"".join(lines)}</ul></li>' if lines else ""


def _meanings(metrics: dict) -> str:
    return "".join(f"<dt>{escape(metric['title'])}</dt><dd>{escape(metric.get('about') or '')}</dd>"
                   for metric in metrics.values())  # fmt: skip


# ---- sounds, codes, single files ----------------------------------------------------------------------------


def _examples(results: dict, examples: list[Example], audio: bool) -> str:
    if not examples:
        return ""
    how = ("Go to a player with <kbd>Tab</kbd>; <kbd>Space</kbd> plays. <kbd>1</kbd> is the original, <kbd>2</kbd> to "
           "<kbd>9</kbd> are the systems: a digit changes to that one at the same position, to compare by ear.")  # fmt: skip
    legend = ("Above: level, 80 dB from dark to bright, 0 Hz at the bottom. Below: decoded minus original, red too loud, blue "
              "too weak, white alike, full colour at 20 dB.")  # fmt: skip
    parts = [_example(index, example, audio) for index, example in enumerate(examples)]
    return f'<p>{how if audio else NO_AUDIO}</p><p class="soft">{legend}</p>{"".join(parts)}'


def _example(index: int, example: Example, audio: bool) -> str:
    """Original and systems side by side: player, spectrogram, difference."""
    reference = log_spectrogram(example.reference, example.sample_rate)
    figures = []
    for number, (name, wav) in enumerate({"original": example.reference, **example.decoded}.items(), 1):
        spectrogram, label = log_spectrogram(wav, example.sample_rate), f"{example.name}, {name}"
        parts = [f"<figcaption>{f'<kbd>{number}</kbd> ' if audio and number <= 9 else ''}{escape(name)}</figcaption>"]
        if audio:
            address = sound(wav, example.sample_rate)
            parts.append(f'<audio controls preload="metadata" aria-label="{escape(label)}" src="{address}"></audio>')
        parts.append(_image(spectrogram_picture(spectrogram, reference.max()), f"Spectrogram: {label}"))
        if number > 1:
            difference = difference_picture(spectrogram, reference, reference.max())
            parts.append(_image(difference, f"Level difference to the original: {label}"))
        figures.append(f"<figure>{''.join(parts)}</figure>")
    title = f"{escape(example.name)} <small>{escape(example.speaker or '')}</small>"
    return (f'<article class="example" id="example-{index}"><h3>{title}</h3><p class="soft">{escape(example.text or "")}</p>'
            f'<div class="sounds">{"".join(figures)}</div></article>')  # fmt: skip


def _image(address: str, alt: str) -> str:
    return f'<img src="{address}" alt="{escape(alt)}">'


def _codebooks(results: dict, code_counts: dict[str, np.ndarray]) -> str:
    parts = []
    for system in results["systems"]:
        name, levels, counts = system["name"], system.get("codebooks") or [], code_counts.get(system["name"])
        if not levels and counts is None:
            continue
        parts.append(f"<h3>{escape(name)}</h3>")
        if counts is not None:
            alt = f"Codebook use of {name}: {len(counts)} levels of {counts.shape[1]} codes"
            parts.append(f'<img class="codes" src="{codes_picture(counts)}" alt="{escape(alt)}">')
        rows = [[str(index), _percent(level.get("used")), _number(level.get("perplexity"), {"digits": 1}),
                 _number(level.get("entropy_bits"), {"digits": 2}), _percent(level.get("efficiency"))]
                for index, level in enumerate(levels, 1)]  # fmt: skip
        if rows:
            table = _table(f"{name}, per level", ["level", "used", "perplexity", "entropy, bits", "efficiency"], rows)
            parts.append(f"<details><summary>Per level</summary>{table}</details>")
    if not parts:
        return ""
    legend = ("A row is a level, the first on top; its codes are sorted by use. Bright: used 100 times as often as an even "
              "share; black: a hundredth of it, or never.")  # fmt: skip
    return f"<p>{legend}</p>{''.join(parts)}"


def _worst(results: dict) -> str:
    if not any(any((system.get("values") or {}).values()) for system in results["systems"]):
        return ""
    choices = (_select("worst-metric", "Metric", _metric_titles(results))
               + _select("worst-system", "System", [system["name"] for system in results["systems"]]))  # fmt: skip
    caption = "The ten files this system does worst; a link leads to the example, where the file is one."
    return f"{choices}{_script_table('worst-table', caption)}"


def _groups(results: dict) -> str:
    groups = [system.get("groups") or {} for system in results["systems"]]
    kinds = [kind for kind in ("speaker", "language") if any(group.get(kind) for group in groups)]
    if not kinds:
        return ""
    choices = _select("groups-metric", "Metric", _metric_titles(results)) + _select("groups-kind", "By", kinds, kinds)
    return f"{choices}{_script_table('groups-table', 'Means over the files of each.')}"


def _script_table(name: str, caption: str) -> str:
    """An empty table that the page's script fills."""
    return (f'<div class="wide"><table id="{name}"><caption><span>{caption}</span></caption><thead></thead><tbody></tbody>'
            "</table></div><noscript><p>This table needs JavaScript; results.json has its numbers.</p></noscript>")  # fmt: skip


def _select(name: str, label: str, titles: list[str], values: list[str] | None = None) -> str:
    """A choice; its values are the positions of the titles unless given."""
    chosen = values or [str(index) for index in range(len(titles))]
    options = "".join(f'<option value="{escape(value)}">{escape(title)}</option>' for value, title in zip(chosen, titles))
    return f'<label>{label} <select id="{name}">{options}</select></label>'


def _metric_titles(results: dict) -> list[str]:
    return [metric["title"] for metric in results["metrics"].values()]


def _data(results: dict, examples: list[Example]) -> dict:
    """What the page's script reads."""
    test_set = results["test_set"]
    metrics = [{"key": key, "title": metric["title"], "better": metric.get("better") or "higher",
                "digits": metric.get("digits", 2)} for key, metric in results["metrics"].items()]  # fmt: skip
    systems = [{"name": system["name"], "values": system.get("values") or {}, "groups": system.get("groups") or {}}
               for system in results["systems"]]  # fmt: skip
    return {
        "metrics": metrics,
        "systems": systems,
        "files": test_set.get("files") or [],
        "seconds": test_set.get("file_seconds") or [],
        "speakers": test_set.get("speakers") or [],
        "examples": {example.name: index for index, example in enumerate(examples)},
    }


# ---- the bound, speed, and where it all comes from ----------------------------------------------------------


def _bound(results: dict) -> str:
    """The bound and the systems against it, and what both say of 30 dB."""
    kbps, bound_db = results["rate_distortion"].get("kbps") or [], results["rate_distortion"].get("bound_db") or []
    if len(kbps) < 2 or len(kbps) != len(bound_db):
        return ""
    at_6, for_30 = float(np.interp(6.0, kbps, bound_db)), float(np.interp(30.0, bound_db, kbps))
    needed = f"{for_30:.0f} kbps" if bound_db[-1] >= 30 else f"more than {kbps[-1]:.0f} kbps"
    answer = " So 30 dB at 6 kbps are out of reach, whatever the network." if at_6 < 30 else ""
    points = _points(results, "snr_db")
    chart = bound_chart("SNR over bitrate; arrow keys read the points", kbps, bound_db, points)
    one, bounds = {"digits": 1}, {system["name"]: system.get("snr_bound_db") for system in results["systems"]}
    rows = [[escape(point.name), _number(point.kbps, {}), _number(point.mean, one), _number(bounds[point.name], one)]
            for line in points.values() for point in line]  # fmt: skip
    table = _table("SNR of each system, mean over files, and the bound at its rate, over all files.",
                   ["system", "kbps", "SNR, dB", "bound, dB"], rows) if rows else ""  # fmt: skip
    return (f"<p>At 6 kbps the bound on the signal-to-noise ratio of these recordings is <b>{at_6:.1f} dB</b>, and 30 dB take "
            f"<b>{needed}</b>.{answer} {BOUND_ABOUT}</p>{_legend(results)}"
            f'<figure class="curves">{chart}<output>SNR in dB; thick: the bound</output></figure>{table}')  # fmt: skip


def _speed(results: dict) -> str:
    keys = {"encode_rtf_1": "encode, 1 thread", "encode_rtf_2": "encode, 2 threads", "decode_rtf_1": "decode, 1 thread",
            "decode_rtf_2": "decode, 2 threads"}  # fmt: skip
    rows = []
    for system in results["systems"]:
        if speed := system.get("speed"):
            rows.append([escape(system["name"]), *(_number(speed.get(key), {"digits": 3}) for key in keys),
                         _number(speed.get("peak_mb"), {"digits": 0})])  # fmt: skip
    caption = ("Seconds of work per second of audio: below 1 is faster than real time. Classical codecs: processor seconds of "
               "their programs.")  # fmt: skip
    return _table(caption, ["system", *keys.values(), "peak memory, MB"], rows) if rows else ""


def _doctor(results: dict) -> str:
    if not (doctor := results["doctor"]):
        return ""
    return (f"<p>The training run: <b>{escape(doctor.get('verdict') or '')}</b></p>"
            f"<pre>{escape(doctor.get('text') or '')}</pre>")  # fmt: skip


def _published(results: dict) -> str:
    """Others' numbers, in a box of their own, with the protocols they were measured by."""
    if not results["published"]:
        return ""
    keys = ("kbps", "wer", "stoi", "pesq_wb", "similarity", "utmos")
    rows, protocols = [], {}
    for entry in results["published"]:
        source = _link(entry.get("url") or "", entry.get("source") or "source")
        rows.append([escape(entry["system"]), *(_number(entry.get(key), {}) for key in keys),
                     escape(entry.get("test_set") or ""), source])  # fmt: skip
        protocols[source] = " ".join(filter(None, [entry.get("protocol"), entry.get("note")]))
    heads = ["system", "kbps", "WER, %", "STOI", "PESQ-WB", "similarity", "UTMOS", "test set", "source"]
    listed = "".join(f"<li>{source}: {escape(protocol)}</li>" for source, protocol in protocols.items() if protocol)
    warning = "Not measured here, other test sets and protocols: do not compare with the table above."
    return f'<div class="apart"><p><b>{warning}</b></p>{_table("As published.", heads, rows)}<ul>{listed}</ul></div>'


def _link(url: str, words: str) -> str:
    return f'<a href="{escape(url)}">{escape(words)}</a>' if url.startswith("https://") else escape(words)


def _reproduce(results: dict) -> str:
    model, test_set = results["model"], results["test_set"]
    facts = {"made": results.get("created"), "machine": results.get("machine"), "commit": results.get("commit"),
             "checkpoint": model.get("checkpoint"), "frames per second": model.get("frame_rate_hz"),
             "bitrates, kbps": model.get("kbps"), "manifest": test_set.get("manifest"), "split": test_set.get("split"),
             "judged at, Hz": test_set.get("sample_rate")}  # fmt: skip
    listed = "".join(f"<dt>{key}</dt><dd>{escape(_plain(value))}</dd>" for key, value in facts.items() if value)
    notes = "".join(f"<li>{escape(note)}</li>" for note in test_set.get("notes") or [])
    skipped = [[escape(entry["file"]), escape(entry["why"])] for entry in test_set.get("skipped") or []]
    return (
        f'<pre>{escape(results["command"])}</pre><dl class="facts">{listed}</dl>'
        + (f"<ul>{notes}</ul>" if notes else "")
        + (_table(f"{len(skipped)} files skipped", ["file", "why"], skipped) if skipped else "")
    )


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


# ---- small things -------------------------------------------------------------------------------------------


def _table(caption: str, heads: list[str], rows: list[list[str]]) -> str:
    """A table of HTML cells; the first cell of a row is its heading."""
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in heads)
    body = "".join(f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows)
    return (f'<div class="wide"><table><caption><span>{escape(caption)}</span></caption><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>")  # fmt: skip


def _mean(system: dict, key: str) -> dict:
    return (system.get("means") or {}).get(key) or {}


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _number(value: float | None, metric: dict, sign: bool = False) -> str:
    """A value with the metric's digits and a real minus; a dash where there is none."""
    return f"{value:{'+' if sign else ''}.{metric.get('digits', 2)}f}".replace("-", "−") if _finite(value) else "–"


def _interval(mean: dict, metric: dict) -> str:
    if not (_finite(mean.get("low")) and _finite(mean.get("high"))):
        return ""
    return f"[{_number(mean['low'], metric)}, {_number(mean['high'], metric)}]"


def _percent(share: float | None) -> str:
    return f"{100 * share:.0f} %" if _finite(share) else "–"


def _sortable(value: float | None) -> str:
    return f"{value:.9g}" if _finite(value) else ""


def _unit(metric: dict) -> str:
    return f", {metric['unit']}" if metric.get("unit") else ""
