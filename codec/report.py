"""results.json as Markdown: report.md, and the paired differences of two evaluations."""

from __future__ import annotations

import math

from codec.summary import LEVEL, Figures, differences, judge

HEADLINE = ("pesq_wb", "stoi", "visqol", "distillmos", "dnsmos", "speaker_similarity", "wer", "wer_uncoded", "phoneme_error",
            "mel_db", "snr_db", "si_sdr_db", "amplitude_ratio")  # fmt: skip
ARROWS = {"higher": "↑", "lower": "↓", "one": "→1", "zero": "→0", "": ""}


def render_markdown(results: dict) -> str:
    """report.md of results.json."""
    metrics = results["metrics"]
    shown = [key for key in HEADLINE if any(has_mean(system, key) for system in results["systems"])]
    lines = [f"# {results['title']}, judged", "", test_line(results), "", model_line(results["model"]), ""]
    lines += [f"- {note}" for note in results["test_set"]["notes"]]
    lines += [f"- {verdict['sentence']}" for verdict in results["verdicts"]] + [""] * bool(results["verdicts"])
    about = f"Means over files, with bootstrap {LEVEL:.0f} % intervals. kbps: files on disk, and the frames in them alone."
    lines += ["## Quality", "", about, "", _row(["system", "kbps", "frames alone", *(title(metrics[key]) for key in shown)]),
              _row(["---"] + ["---:"] * (2 + len(shown)))]  # fmt: skip
    for system in results["systems"]:
        cells = [cell(system["means"].get(key), metrics[key]["digits"]) for key in shown]
        payload = "-" if system["payload_kbps"] is None else f"{system['payload_kbps']:.2f}"
        lines.append(_row([f"`{system['name']}`", f"{system['kbps']:.2f}", payload, *cells]))
    lines += ["", *_absent(metrics), *_problems(results["systems"])]
    lines += _codebooks(results["systems"]) + _speed(results["systems"]) + _groups(results, shown)
    lines += ["", "## How to repeat it", "", f"`{results['command']}`", "", f"{results['machine']}; {results['created']}"]
    return "\n".join(lines) + "\n"


def title(metric: dict) -> str:
    """With an arrow to where it is better."""
    return f"{metric['title']} {ARROWS[metric['better']]}".strip()


def has_mean(system: dict, key: str) -> bool:
    return (system["means"].get(key) or {}).get("mean") is not None


def test_line(results: dict) -> str:
    """What was tested on what, in one line."""
    test = results["test_set"]
    skipped = f"; {len(test['skipped'])} files left out" if test["skipped"] else ""
    return (f"{len(test['files'])} recordings, {test['seconds'] / 60:.1f} minutes, {len(set(test['speakers']))} speakers, "
            f"{test['sample_rate']} Hz: `{test['manifest']}`, {test['split']}{skipped}.")  # fmt: skip


def model_line(model: dict) -> str:
    """Size and rates of the checkpoint, in one line."""
    steps = f", {model['steps']} updates" if model["steps"] else ""
    return (f"`{model['checkpoint']}`{steps}: {model['parameters'] / 1e6:.2f}M parameters, {model['sample_rate']} Hz, "
            f"{model['frame_rate_hz']:g} frames/s x {model['n_codebooks']} codebooks of {model['codebook_size']} entries = "
            f"{model['kbps']:.2f} kbps.")  # fmt: skip


def cell(mean: dict | None, digits: int) -> str:
    """Mean with its interval."""
    if not mean or mean.get("mean") is None:
        return "-"
    if mean["low"] is None:
        return f"{mean['mean']:.{digits}f}"
    return f"{mean['mean']:.{digits}f} [{mean['low']:.{digits}f}, {mean['high']:.{digits}f}]"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _absent(metrics: dict[str, dict]) -> list[str]:
    """Lines that say which metrics could not be computed, and what brings them."""
    ways: dict[str, list[str]] = {}
    for metric in metrics.values():
        if metric["absent"]:
            ways.setdefault(metric["absent"], []).append(metric["title"])
    return [f"- not measured: {', '.join(titles)} ({way})" for way, titles in ways.items()]


def _problems(systems: list[dict]) -> list[str]:
    """One line for each reason why files have no value of a metric."""
    found: dict[tuple[str, str, str], set[str]] = {}
    for system in systems:
        for problem in system["problems"]:
            where = found.setdefault((problem["kind"], problem["metric"], problem["why"]), set())
            where.add(f"{system['name']} {problem['file']}")
    return [f"- {metric} {kind} {len(where)} times: {why}; the first: {min(where)}"
            for (kind, metric, why), where in found.items()]  # fmt: skip


def _codebooks(systems: list[dict]) -> list[str]:
    """A table for the checkpoint at its highest bitrate."""
    systems = [system for system in systems if system["kind"] == "ours" and system["codebooks"]]
    if not systems:
        return []
    rows = [_row([str(level), f"{100 * row['used']:.1f} %", f"{row['perplexity']:.0f}", f"{row['entropy_bits']:.2f}",
                  f"{100 * row['efficiency']:.1f} %"]) for level, row in enumerate(systems[-1]["codebooks"], 1)]  # fmt: skip
    return ["", f"## Codebooks of `{systems[-1]['name']}`", "", _row(["codebook", "entries used", "perplexity", "entropy, bits",
            "bitrate efficiency"]), _row(["---:"] * 5), *rows]  # fmt: skip


def _speed(systems: list[dict]) -> list[str]:
    """Real-time factors."""
    keys = ("encode_rtf_1", "encode_rtf_2", "decode_rtf_1", "decode_rtf_2")
    rows = [_row([f"`{system['name']}`", *("-" if speed.get(key) is None else f"{speed[key]:.4f}" for key in keys),
                  "-" if speed.get("peak_mb") is None else f"{speed['peak_mb']:.0f}"])
            for system in systems if (speed := system["speed"])]  # fmt: skip
    if not rows:
        return []
    head = ["system", "encode, 1 thread", "2 threads", "decode, 1 thread", "2 threads", "peak memory, MB"]
    about = "Seconds of work per second of audio (classical codecs: processor seconds of their programs)."
    return ["", "## Speed", "", about, "", _row(head), _row(["---"] + ["---:"] * 5), *rows]  # fmt: skip


def _groups(results: dict, shown: list[str]) -> list[str]:
    """Means by speaker and by language, where there are several."""
    lines: list[str] = []
    for kind in ("speaker", "language"):
        names = sorted({name for system in results["systems"] for name in system["groups"][kind]})
        if len(names) < 2:
            continue
        lines += ["", f"## By {kind}", "", _row([kind, "system", *(results["metrics"][key]["title"] for key in shown)]),
                  _row(["---"] * 2 + ["---:"] * len(shown))]  # fmt: skip
        for name in names:
            for system in results["systems"]:
                means = system["groups"][kind].get(name, {})
                cells = ["-" if key not in means else f"{means[key]:.{results['metrics'][key]['digits']}f}" for key in shown]
                lines.append(_row([name.replace("|", "\\|"), f"`{system['name']}`", *cells]))
    return lines


# -------------------------------------------------------------------------------------- compare


def compare(a: dict, b: dict, names: tuple[str, str], pooled: dict[str, tuple[str, str]]) -> str:
    """Paired differences, second less first, of two results.json over the files both judged, as Markdown.

    Systems of the same name are compared; the checkpoints under test, whatever their names, by nearest nominal bitrate.

    Raises:
        ValueError: no file in common.
    """
    common = [name for name in a["test_set"]["files"] if name in set(b["test_set"]["files"])]
    if not common:
        raise ValueError(f"--compare {names[0]} {names[1]}: no file was judged in both; evaluate the same manifest twice")
    lengths = [dict(zip(r["test_set"]["files"], r["test_set"]["file_seconds"])) for r in (a, b)]
    other = [name for name in common if abs(lengths[0][name] - lengths[1][name]) > 0.01]
    if other or a["test_set"]["sample_rate"] != b["test_set"]["sample_rate"]:
        what = f"{other[0]} is of another length" if other else "their sample rates differ"
        raise ValueError(f"--compare {names[0]} {names[1]}: not the same recordings, {what}; evaluate the same manifest twice")
    metrics = {key: metric for key, metric in a["metrics"].items() if key in b["metrics"]}
    lines = [f"# {names[1]} less {names[0]}", "", f"Paired over {len(common)} files that both judged; bootstrap {LEVEL:.0f} % "
             "intervals. **Bold**: 0 lies outside; + better, - worse.", ""]  # fmt: skip
    matched = _matches(a["systems"], b["systems"])
    found = {(x["name"], y["name"]): differences(_figures(b, y, common, pooled), _figures(a, x, common, pooled), list(metrics))
             for x, y in matched}  # fmt: skip
    shown = [key for key in metrics if any(key in result for result in found.values())]
    lines += [_row(["systems", *(title(metrics[key]) for key in shown)]),
              _row(["---"] + ["---:"] * len(shown))]  # fmt: skip
    for (x, y), result in found.items():
        cells = [_difference_cell(result.get(key), metrics[key]) for key in shown]
        lines.append(_row([f"`{y}`" if x == y else f"`{y}` less `{x}`", *cells]))
    return "\n".join(lines) + "\n"


def _matches(first: list[dict], second: list[dict]) -> list[tuple[dict, dict]]:
    """Systems of two evaluations that correspond."""
    by_name = {system["name"]: system for system in second}
    ours = [system for system in second if system["kind"] == "ours"]
    pairs = []
    for system in first:
        if system["kind"] == "ours" and ours:
            pairs.append((system, min(ours, key=lambda other: abs(math.log(other["nominal_kbps"] / system["nominal_kbps"])))))
        elif system["name"] in by_name:
            pairs.append((system, by_name[system["name"]]))
    return pairs


def _figures(results: dict, system: dict, files: list[str], pooled: dict[str, tuple[str, str]]) -> Figures:
    """A system's measures of some files, in their order."""
    place = {name: i for i, name in enumerate(results["test_set"]["files"])}
    return Figures({key: [column[place[name]] for name in files] for key, column in system["values"].items()}, pooled)


def _difference_cell(difference: dict | None, metric: dict) -> str:
    if not difference:
        return "-"
    digits, side = metric["digits"], judge(difference, metric["better"])
    text = f"{difference['mean']:+.{digits}f}"
    if difference["low"] is not None:
        text += f" [{difference['low']:+.{digits}f}, {difference['high']:+.{digits}f}]"
    return text if side == "even" else f"**{text}** {'+' if side == 'better' else '-'}"
