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
from codec.report import ARROWS
from codec.summary import MIN_FILES, SAME_RATE

LIKE_RATE = 1.5  # a codec that spends more than so many times another's rate is no rival at that rate
GOOD = {"higher": "higher is better", "lower": "lower is better", "one": "best at 1", "zero": "best at 0"}
SIDES = (("good", "▲", "better", "better"), ("bad", "▼", "worse", "worse"), ("even", "≈", "even", "not told apart"))
NO_AUDIO = "The recordings are left out of this copy: they are not ours to pass on. Run the command at the end to hear them."
BOUND_ABOUT = ("The bound is of codecs that do not predict the pitch: it takes the components of this audio as Gaussian, and "
               "gives their spectral envelopes away free (reverse water-filling).")  # fmt: skip
BELOW_BOUND = "A codec may sound good far below the bound: ears forgive a wrong phase, this ratio does not."
PAYLOAD_ABOUT = "coded frames alone, without file headers; on short files the header is a large part of the kbps on disk"
EMPTY = {"title": "codec", "headline": [], "model": {}, "test_set": {}, "metrics": {}, "systems": [], "verdicts": [],
         "rate_distortion": {}, "doctor": {}, "published": [], "command": "", "versions": {}}  # fmt: skip


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
        "curves": ("Curves", "Quality over bitrate", _curves(results)),
        "table": ("Table", "All numbers", _scores(results)),
        "listen": ("Listen", "Listen and look", _examples(results, examples, audio)),
        "codes": ("Codes", "Codebook use", _codebooks(results, code_counts)),
        "worst": ("Worst", "Worst files", _worst(results)),
        "bound": ("30 dB", "Why not 30 dB", _bound(results)),
        "groups": ("Groups", "By speaker and language", _groups(results)),
        "speed": ("Speed", "Speed and memory", _speed(results)),
        "doctor": ("Doctor", "Doctor", _doctor(results)),
        "published": ("Published", "Published numbers", _published(results)),
        "reproduce": ("Reproduce", "How to reproduce", _reproduce(results)),
    }
    sections = {key: (link, title, html) for key, (link, title, html) in sections.items() if html}
    links = "".join(f'<a href="#{key}" title="{title}">{link}</a>' for key, (link, title, _) in sections.items())
    body = "\n".join([
        f"<header><h1>{escape(results['title'])}</h1>{_tested(results)}{_headline(results)}{_limits(results)}</header>",
        f'<nav aria-label="Sections"><div><a href="#verdicts">Verdict</a>{links}</div></nav>',
        f'<main><section id="verdicts" aria-label="Verdict">{_verdicts(results)}</section>',
        *(f'<section id="{key}"><h2>{title}</h2>{html}</section>' for key, (_, title, html) in sections.items()),
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


def _headline(results: dict) -> str:
    """The answer in words: better or worse than what, at which rate."""
    return "".join(f'<p class="lead">{escape(sentence)}</p>' for sentence in results["headline"])


def _limits(results: dict) -> str:
    """What a reader must know of the test set before the numbers, and which files were left out."""
    test_set = results["test_set"]
    notes = "".join(f"<li>{escape(note)}</li>" for note in test_set.get("notes") or [])
    skipped = [f"<li>{escape(entry['file'])}: {escape(entry['why'])}</li>" for entry in test_set.get("skipped") or []]
    left_out = f"{len(skipped)} file{'s' * (len(skipped) > 1)} left out"
    return ((f'<ul class="notes soft">{notes}</ul>' if notes else "")
            + (f'<details><summary>{left_out}</summary><ul class="notes">{"".join(skipped)}</ul></details>' if skipped else ""))


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
    how = ("Differences: ours minus theirs, paired over the files, with 95 % intervals; not told apart: the interval holds 0. "
           "Files of one speaker are not independent: with few speakers the intervals are too narrow. With fewer than "
           f"{MIN_FILES} files nothing is told apart.")  # fmt: skip
    return f'<div class="rivals">{"".join(parts)}</div><p class="soft"><small>{how}</small></p>'


def _verdict(results: dict, verdict: dict, opened: bool) -> str:
    """One card: who against whom at which rates, three counts, the differences."""
    sides = [(kind, sign, words, verdict.get(side) or []) for kind, sign, side, words in SIDES]
    counts = "".join(f'<div class="{kind if keys else "none"}"><b>{len(keys)}</b> {sign} {words}</div>'
                     for kind, sign, words, keys in sides)
    tags = "".join(_tag(results, verdict, key, kind, sign) for kind, sign, _, keys in sides for key in keys)
    unlike, rates = _rates(results, verdict)
    return (f'<article class="card{" unlike" * unlike}"><h3>{escape(verdict["ours"])} against {escape(verdict["theirs"])}</h3>'
            f'{rates}<div class="counts">{counts}</div>'
            f'<details{" open" if opened else ""}><summary>Ours minus theirs [95 %]</summary>'
            f'<ul class="tags">{tags}</ul></details></article>')  # fmt: skip


def _rates(results: dict, verdict: dict) -> tuple[bool, str]:
    """Whether the rates are too unlike for a fair comparison, and what both spend, in words."""
    rates = {system["name"]: system.get("kbps") for system in results["systems"]}
    ours, theirs = rates.get(verdict["ours"]), rates.get(verdict["theirs"])
    if not ours or not theirs:
        return False, ""
    ratio = max(ours, theirs) / min(ours, theirs)
    more = f"{ratio:.1f} times as much" if ratio >= 2 else f"{100 * (ratio - 1):.0f} % more"
    words = f"{escape(verdict['ours'] if ours > theirs else verdict['theirs'])} spends {more}"
    if ratio > LIKE_RATE:
        words += ", so this does not compare them at one rate"
    elif ratio <= SAME_RATE:
        words = "the same rate"
    return ratio > LIKE_RATE, f'<p class="soft">{ours:.3g} against {theirs:.3g} kbps on disk: <b>{words}</b></p>'


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
    keys = list(_with_values(results))
    absent = [f"<li>{escape(metric['title'])}: {escape(metric['absent'])}</li>"
              for metric in metrics.values() if metric.get("absent")]  # fmt: skip
    best = {key: _best(systems, key, metrics[key]) for key in keys}
    heads = ['<th scope="col" data-first="ascending"><button>system</button></th>',
             '<th scope="col" data-first="ascending"><button>kbps</button><small>on disk</small></th>',
             f'<th scope="col" data-first="ascending" title="{PAYLOAD_ABOUT}"><button>payload</button><small>kbps</small></th>',
             '<th scope="col" data-first="ascending"><button>delay</button><small>ms</small></th>',
             *(_head(metrics[key]) for key in keys)]  # fmt: skip
    rows = [_row(system, keys, metrics, best) for system in systems]
    notes = [_note(results, key, metric, key in keys) for key, metric in metrics.items() if not metric.get("absent")]
    caption = "Means with 95 % intervals. ★ best of the coded systems at any rate. Press a heading to sort, best first."
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="Table of all numbers"><table class="sortable">'
        f"<caption><span>{caption}</span></caption><thead><tr>{''.join(heads)}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        + (f"<h3>Not measured here</h3><ul>{''.join(absent)}</ul>" if absent else "")
        + (f"<h3>Files without a value</h3><ul>{''.join(notes)}</ul>" if any(notes) else "")
        + f'<details><summary>What the metrics mean</summary><dl class="facts">{_meanings(metrics)}</dl></details>'
    )


def _head(metric: dict) -> str:
    first = "descending" if metric.get("better") == "higher" else "ascending"
    unit = f"<small>{escape(metric.get('unit') or '')} {ARROWS.get(metric.get('better'), '')}</small>"
    return (f'<th scope="col" data-first="{first}" title="{escape(metric.get("about") or "")}">'
            f"<button>{escape(metric['title'])}</button>{unit}</th>")  # fmt: skip


def _row(system: dict, keys: list[str], metrics: dict, best: dict[str, float | None]) -> str:
    cells = [f'<td data-value="{_sortable(value)}">{_number(value, {})}</td>'
             for value in (system.get("kbps"), system.get("payload_kbps"), system.get("delay_ms"))]  # fmt: skip
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


def _note(results: dict, key: str, metric: dict, shown: bool) -> str:
    """Why files have no value of a metric: reason, then which systems' files; shown: it has a column all the same."""
    reasons: dict[tuple[str, str], dict[str, list[str]]] = {}
    for system in results["systems"]:
        for problem in system.get("problems") or []:
            if problem["metric"] == key:
                files = reasons.setdefault((problem["kind"], problem["why"]), {})
                files.setdefault(problem["file"], []).append(system["name"])
    lines = []
    for (kind, why), files in reasons.items():
        groups: dict[str, list[str]] = {}
        for file, names in files.items():
            who = "all systems" if len(names) == len(results["systems"]) else ", ".join(names)
            groups.setdefault(who, []).append(file)
        where = "; ".join(f"{who}, {_some(names, results['test_set'])}" for who, names in groups.items())
        lines.append(f"<li>{escape(f'{kind}: {why}: {where}')}</li>")
    if not lines and shown:
        return ""
    title = escape(metric["title"]) + ("" if shown else ": no value for any system")
    return f'<li id="note-{key}">{title}<ul>{"".join(lines)}</ul></li>'


def _some(names: list[str], test_set: dict) -> str:
    """A few of these files, and how many more."""
    if len(names) > 1 and len(names) == len(test_set.get("files") or []):
        return "all files"
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


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
    if not _with_values(results) or not any(any((system.get("values") or {}).values()) for system in results["systems"]):
        return ""
    choices = (_select("worst-metric", "Metric", _metric_titles(results))
               + _select("worst-system", "System", [system["name"] for system in results["systems"]]))  # fmt: skip
    caption = "The ten files this system does worst; a link leads to the example, where the file is one."
    return f"{choices}{_script_table('worst-table', caption)}"


def _groups(results: dict) -> str:
    groups = [system.get("groups") or {} for system in results["systems"]]
    kinds = [kind for kind in ("speaker", "language") if any(group.get(kind) for group in groups)]
    if not kinds or not _with_values(results):
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
    return [metric["title"] for metric in _with_values(results).values()]


def _data(results: dict, examples: list[Example]) -> dict:
    """What the page's script reads."""
    test_set = results["test_set"]
    metrics = [{"key": key, "title": metric["title"], "better": metric.get("better") or "higher",
                "digits": metric.get("digits", 2)} for key, metric in _with_values(results).items()]  # fmt: skip
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
    answer = " For such codecs 30 dB at 6 kbps are out of reach." if at_6 < 30 else ""
    one, bounds = {"digits": 1}, {system["name"]: system.get("snr_bound_db") for system in results["systems"]}
    points = _pooled_points(results)
    chart = bound_chart("SNR over bitrate; arrow keys read the points", kbps, bound_db, points)
    rows = [[escape(point.name), _number(point.kbps, {}), _number(point.mean, one), _number(bounds[point.name], one)]
            for line in points.values() for point in line]  # fmt: skip
    table = _table("SNR of each system and the bound at its rate, both over the energy of all files.",
                   ["system", "kbps", "SNR, dB", "bound, dB"], rows) if rows else ""  # fmt: skip
    return (f"<p>At 6 kbps the bound on the signal-to-noise ratio of these recordings is <b>{at_6:.1f} dB</b>, and 30 dB take "
            f"<b>{needed}</b>. {BOUND_ABOUT}{answer} {BELOW_BOUND}</p>{_legend(results)}"
            f'<figure class="curves">{chart}<output>SNR in dB; thick: the bound</output></figure>{table}')  # fmt: skip


def _pooled_points(results: dict) -> dict[str, list[Point]]:
    """One ratio over all files, as the bound is: family -> points, without intervals."""
    return {family: [Point(system["name"], system["kbps"], snr_db, snr_db, snr_db, f"{_number(snr_db, {'digits': 1})} dB")
                     for system in systems
                     if _finite(snr_db := system.get("pooled_snr_db")) and (system.get("kbps") or 0) > 0]
            for family, systems in _families(results).items()}  # fmt: skip


def _speed(results: dict) -> str:
    keys = {"encode_rtf_1": "encode, 1 thread", "encode_rtf_2": "encode, 2 threads", "decode_rtf_1": "decode, 1 thread",
            "decode_rtf_2": "decode, 2 threads"}  # fmt: skip
    rows = []
    for system in results["systems"]:
        if speed := system.get("speed"):
            rows.append([escape(system["name"]), *(_number(speed.get(key), {"digits": 3}) for key in keys),
                         _number(speed.get("peak_mb"), {"digits": 0})])  # fmt: skip
    caption = ("Seconds of work per second of audio: below 1 is faster than real time. Classical codecs: processor seconds of "
               "their programs. Peak memory is of the whole process: of neural codecs with Python and torch, of classical ones "
               "the program alone.")  # fmt: skip
    errors = "".join(f"<li>{escape(system['name'])}: {escape(error)}</li>" for system in results["systems"]
                     if (error := (system.get("speed") or {}).get("error")))  # fmt: skip
    table = _table(caption, ["system", *keys.values(), "peak memory, MB"], rows) if rows else ""
    return table + (f"<h3>Not timed to the end</h3><ul>{errors}</ul>" if errors else "")


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
    model, test_set, commit = results["model"], results["test_set"], results.get("commit") or ""
    rates = [system.get("nominal_kbps") for system in results["systems"] if system.get("kind") == "ours"]
    facts = {"made": results.get("created"), "machine": results.get("machine"),
             "versions": ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
             "commit": f"{commit[:-1]}, with changes" if commit.endswith("+") else commit,
             "checkpoint": model.get("checkpoint"), "frames per second": _plain(model.get("frame_rate_hz")),
             "bitrates, kbps": ", ".join(_plain(rate) for rate in rates if rate),
             "manifest": test_set.get("manifest"), "split": test_set.get("split"),
             "judged at, Hz": _plain(test_set.get("sample_rate"))}  # fmt: skip
    listed = "".join(f"<dt>{key}</dt><dd>{escape(value)}</dd>" for key, value in facts.items() if value)
    return f'<pre>{escape(results["command"])}</pre><dl class="facts">{listed}</dl>'


def _plain(number: float | None) -> str:
    return "" if number is None else f"{number:.6g}"


# ---- small things -------------------------------------------------------------------------------------------


def _table(caption: str, heads: list[str], rows: list[list[str]]) -> str:
    """A table of HTML cells; the first cell of a row is its heading."""
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in heads)
    body = "".join(f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows)
    return (f'<div class="wide"><table><caption><span>{escape(caption)}</span></caption><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>")  # fmt: skip


def _mean(system: dict, key: str) -> dict:
    return (system.get("means") or {}).get(key) or {}


def _with_values(results: dict) -> dict[str, dict]:
    """The metrics that some system has a mean of."""
    return {key: metric for key, metric in results["metrics"].items()
            if any(_finite(_mean(system, key).get("mean")) for system in results["systems"])}  # fmt: skip


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
