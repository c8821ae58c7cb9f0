"""report.html in a real headless Chromium: it plays, shows, sorts and listens to keys, with no network and no error."""

import base64
import io
import math
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from conftest import speech_like
from PIL import Image

from codec.classical import find_program
from codec.figures import difference_picture, kbps_ticks, log_spectrogram, value_ticks
from codec.page import Example, render_page

RATE = 16000
SECONDS = (1.3, 0.9)
NASTY = '<b>&"quoted"\'</b></script>'  # as the name of a speaker, a file, a system
HEADLINE = f"quick@6 beats opus at 6 kbps in PESQ-WB, {NASTY}."
NO_TEXT = {"metric": "cer", "kind": "undefined", "why": "the file has no text"}
SILENT = {"file": "silent.wav", "metric": "pesq_wb", "kind": "undefined", "why": "a silent reference"}


def mean(value: float, width: float, undefined: int = 0) -> dict:
    return {"mean": value, "low": value - width, "high": value + width, "n": 12 - undefined, "undefined": undefined,
            "failed": 0}  # fmt: skip


def system(name: str, family: str, kind: str, kbps: float, pesq: float) -> dict:
    rng = np.random.default_rng(int(10 * kbps))
    return {
        "name": name, "family": family, "kind": kind, "setting": "its setting", "nominal_kbps": kbps, "kbps": kbps,
        "payload_kbps": None if kind == "uncoded" else kbps - 0.05, "pooled_snr_db": None if kind == "uncoded" else kbps / 2,
        "delay_ms": 6.5, "snr_bound_db": 12.0,
        "means": {"pesq_wb": mean(pesq, 0.06, 1), "wer": mean(0.3 / kbps, 0.02), "snr_db": mean(2 + kbps, 0.5),
                  "amplitude_ratio": mean(1 - 0.1 / kbps, 0.01), "cer": {"mean": None, "undefined": 2, "failed": 0}},
        "groups": {"speaker": {"es": {"pesq_wb": pesq}, NASTY: {"pesq_wb": pesq - 0.1}}, "language": {"es": {"wer": 0.1}}},
        "values": {"pesq_wb": list(pesq + 0.1 * rng.standard_normal(12)), "wer": list(rng.random(12)), "snr_db": [None] * 12},
        "problems": [SILENT, *(NO_TEXT | {"file": f"es/{i}.wav"} for i in range(2))],
        "codebooks": [{"used": 0.9, "perplexity": 200.5, "entropy_bits": 7.6, "efficiency": 0.95}] if kind == "ours" else [],
        "speed": {"encode_rtf_1": 0.01, "encode_rtf_2": None, "decode_rtf_1": 0.02, "decode_rtf_2": 0.015, "peak_mb": 210.0},
    }  # fmt: skip


def metric(title: str, unit: str, better: str, digits: int, absent: str = "") -> dict:
    return {"title": title, "unit": unit, "better": better, "digits": digits, "about": f"About {title}.", "absent": absent}


def verdict(ours: str, against: str, theirs: str) -> dict:
    differences = {
        "pesq_wb": {"mean": 1.02, "low": 0.95, "high": 1.09, "n": 11},
        "wer": {"mean": 0.031, "low": 0.01, "high": 0.05, "n": 12},
        "amplitude_ratio": {"mean": -0.001, "low": -0.004, "high": 0.002, "n": 12},
    }
    return {"against": against, "ours": ours, "theirs": theirs, "sentence": f"{ours} against {theirs}: better in PESQ-WB.",
            "better": ["pesq_wb"], "worse": ["wer"], "even": ["amplitude_ratio"], "differences": differences}  # fmt: skip


def full_results() -> dict:
    """Everything a results.json can hold, with names that would break a page that does not escape them."""
    kbps = [0.5 * 2 ** (i / 4) for i in range(37)]
    return {
        "format": 1, "title": f"quick {NASTY}", "created": "2026-11-21T22:00:00", "machine": "2 cores", "commit": "abc+",
        "headline": [HEADLINE, "A second sentence."], "versions": {"torch": "2.14.1", "pesq": "0.0.4"},
        "command": f"evaluate_codec.py --out {NASTY}",
        "model": {"checkpoint": "runs/quick", "parameters": 9_800_000, "sample_rate": RATE, "frame_rate_hz": 50,
                  "n_codebooks": 12, "codebook_size": 1024, "kbps": [3, 6]},
        "test_set": {"manifest": "test.jsonl", "split": "test", "sample_rate": RATE, "seconds": 63.0, "notes": ["a note"],
                     "files": [f"es/{i}.wav" for i in range(11)] + [NASTY], "speakers": ["es"] * 11 + [NASTY],
                     "languages": ["es"] * 11 + [None], "file_seconds": [5.0] * 12,
                     "skipped": [{"file": "gone.wav", "why": "no such file"}]},
        "metrics": {"pesq_wb": metric("PESQ-WB", "MOS", "higher", 2), "wer": metric("WER", "", "lower", 3),
                    "cer": metric("CER", "", "lower", 3),
                    "snr_db": metric("SNR", "dB", "higher", 1), "amplitude_ratio": metric("Amplitude ratio", "", "one", 3),
                    "visqol": metric("ViSQOL", "", "higher", 2, "pip install visqol-python")},
        "systems": [system("quick@3", "quick", "ours", 3.1, 2.9), system("quick@6", "quick", "ours", 6.2, 3.4),
                    system("opus@6", "opus", "classical", 6.9, 1.9), system("opus@12", "opus", "classical", 12.4, 3.1),
                    system("opus@24", "opus", "classical", 24.6, 4.2), system("codec2@3.2", "codec2", "classical", 3.2, 1.4),
                    system(NASTY, "odd", "hf", 8.0, 2.0), system("uncoded", "uncoded", "uncoded", 256.0, 4.64)],
        "verdicts": [verdict("quick@6", "opus", "opus@6"), verdict("quick@6", "codec2", "codec2@3.2"),
                     verdict("quick@3", "opus", "opus@6"), verdict("quick@3", "odd", NASTY)],
        "rate_distortion": {"kbps": kbps, "bound_db": [9 + 3 * math.log2(rate) for rate in kbps]},
        "doctor": {"verdict": "healthy", "text": f"all is well {NASTY}"},
        "published": [{"system": "DAC", "kbps": 6.0, "wer": 2.0, "stoi": 0.95, "pesq_wb": 4.01, "similarity": 0.95,
                       "utmos": None, "test_set": "LibriSpeech", "source": "Ye 2025, Table 1", "protocol": "p", "note": "n",
                       "url": "https://arxiv.org/abs/2502.04128"}],
    }  # fmt: skip


def examples() -> list[Example]:
    made = []
    for index, seconds in enumerate(SECONDS):
        wav = speech_like(int(seconds * RATE), RATE, seed=index)
        noise = np.random.default_rng(9 + index).standard_normal(len(wav)).astype(np.float32)
        muffled = np.convolve(wav, np.ones(4) / 4, "same").astype(np.float32)
        decoded = {"quick@6": wav + 0.003 * noise, "opus@6": 0.5 * wav, NASTY: muffled}
        made.append(Example(["es/0.wav", NASTY][index], "es", f"words {NASTY}", RATE, wav, decoded))
    return made


def counts() -> dict[str, np.ndarray]:
    return {"quick@6": np.random.default_rng(0).poisson(np.geomspace(200, 0.01, 1024), (12, 1024))}


@pytest.fixture(scope="module")
def html() -> str:
    return render_page(full_results(), examples(), counts())


# ---- without a browser ------------------------------------------------------------------------------------


def test_page_names_nothing_outside_itself(html):
    addresses = re.findall(r'(?:src|href|action|poster)="([^"]*)"', html)
    outside = [address for address in addresses if not address.startswith(("data:", "#"))]
    assert outside == ["https://arxiv.org/abs/2502.04128"] * 2  # a source to follow, in the box of published numbers
    assert "url(" not in html and "@import" not in html


def test_names_are_escaped_everywhere(html):
    assert NASTY not in html and "</b></script>" not in html
    assert NASTY in unescape(html)


def test_pictures_are_small(html):
    pictures = re.findall(r"data:image/webp;base64,([^\"]*)", html)
    assert len(pictures) == 2 * (4 + 3) + 1
    assert max(len(picture) * 3 / 4 for picture in pictures) < 15_000


def test_page_without_audio_says_so_and_keeps_the_pictures():
    page = render_page(full_results(), examples(), counts(), audio=False)
    assert "<audio" not in page and "audio/flac" not in page
    assert "left out of this copy" in page and "data:image/webp" in page


def test_thirty_db_sentence_has_the_numbers_of_the_bound(html):
    # 9 + 3 log2(kbps): 16.75 dB at 6 kbps by interpolation between the listed rates, 30 dB at 2^7 kbps
    assert "is <b>16.7 dB</b>" in html
    assert "30 dB take <b>128 kbps</b>" in html


def test_best_of_a_column_is_marked_and_the_uncoded_audio_is_not_a_codec(html):
    rows = {row.split("<")[0]: row for row in html.split('<th scope="row" data-value="')[1:]}
    cells = {name.split('"')[0]: re.findall(r"<td data-value=[^>]*>", row) for name, row in rows.items()}
    best = {name: ["class=best" in cell for cell in found[3:]] for name, found in cells.items()}
    assert best["opus@24"] == [True, True, True, True]
    assert not any(best["uncoded"]) and not any(best["quick@6"])


def text_of(html: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html)).split())


def test_answer_notes_and_files_left_out_stand_above_the_navigation(html):
    header = html[html.index("<header>") : html.index("<nav")]
    words = unescape(header)
    assert words.index("minutes") < words.index(HEADLINE) < words.index("A second sentence.") < words.index("a note")
    assert text_of(header).endswith("1 file left out gone.wav: no such file")
    assert "<details><summary>1 file left out" in header
    assert "gone.wav" not in html[html.index("<nav") :]


def card(ours_kbps: float, theirs_kbps: float, **changes) -> str:
    """The only card of a page."""
    systems = [system("quick", "quick", "ours", ours_kbps, 3.0), system("opus", "opus", "classical", theirs_kbps, 3.0)]
    verdicts = [verdict("quick", "opus", "opus") | changes]
    page = render_page(full_results() | {"systems": systems, "verdicts": verdicts}, [], {})
    return re.search(r"<article class=.card.*?</article>", page, re.S).group()


@pytest.mark.parametrize(
    "ours, theirs, unlike, words",
    [(6, 6.5, False, "the same rate"), (6.8, 7.548, False, "opus spends 11 % more"), (7, 6, False, "quick spends 17 % more"),
     (6, 9, False, "opus spends 50 % more"), (6, 9.3, True, "opus spends 55 % more, so this does not compare"),
     (1.5, 6.6, True, "opus spends 4.4 times as much, so"), (12, 6, True, "quick spends 2.0 times as much, so")],
)  # fmt: skip
def test_card_says_what_is_spent_and_unlike_rates_are_no_fair_fight(ours, theirs, unlike, words):
    found = card(ours, theirs)
    assert words in text_of(found)
    assert found.startswith('<article class="card unlike">' if unlike else '<article class="card">')


def test_count_of_zero_has_no_colour():
    assert re.findall(r'<div class="(\w+)"><b>(\d)', card(6, 6)) == [("good", "1"), ("bad", "1"), ("even", "1")]
    found = re.findall(r'<div class="(\w+)"><b>(\d)', card(6, 6, better=[], even=[]))
    assert found == [("none", "0"), ("bad", "1"), ("none", "0")]


def test_metric_without_any_value_keeps_its_reasons_and_is_not_called_unmeasured(html):
    table = html[html.index('id="table"') : html.index('id="listen"')]
    measured, footnotes = table.split("<h3>Files without a value</h3>")
    columns, absent = measured.split("<h3>Not measured here</h3>")
    assert text_of(absent) == "ViSQOL: pip install visqol-python"
    assert "CER" not in columns
    assert ("CER: no value for any system undefined: the file has no text: all systems, es/0.wav, es/1.wav"
            in text_of(footnotes))  # fmt: skip


def test_system_that_failed_everywhere_has_a_dash_a_count_and_the_reason():
    results = full_results()
    failed = results["systems"][3]
    failed["means"]["pesq_wb"] = {"mean": None, "undefined": 0, "failed": 12}
    lost = [{"file": file, "metric": "pesq_wb", "kind": "failed", "why": "it died"} for file in results["test_set"]["files"]]
    failed["problems"] = lost
    page = render_page(results, [], {})
    row = re.search(r'<th scope="row" data-value="opus@12">.*?</tr>', page).group()
    assert text_of(row).startswith("opus@12 its setting 12.40 12.35 6.50 – (12)")
    assert "failed: it died: opus@12, all files" in text_of(page)
    failed["problems"] = lost[:7]
    words = text_of(render_page(results, [], {}))
    assert "failed: it died: opus@12, es/0.wav, es/1.wav, es/2.wav, es/3.wav, es/4.wav and 2 more" in words


def test_bound_is_compared_with_one_ratio_over_all_files(html):
    section = html[html.index('id="bound"') : html.index('id="groups"')]
    assert "quick@6 6.20 3.1 12.0" in text_of(section)  # kbps / 2; the mean over files is 2 + kbps
    assert "uncoded" not in section and "8.2" not in text_of(section)
    assert "do not predict the pitch" in section and section.count("predict") == 1


def test_how_to_reproduce_has_every_bitrate_and_version(html):
    words = text_of(html[html.index('id="reproduce"') :])
    assert "versions torch 2.14.1, pesq 0.0.4 commit abc, with changes" in words
    assert "bitrates, kbps 3.1, 6.2 manifest" in words


def test_timing_that_failed_says_why():
    results = full_results()
    results["systems"][1]["speed"] = {"encode_rtf_1": 0.01, "error": f"killed {NASTY}"}
    results["systems"] = [row | {"speed": {}} if row["name"] == "uncoded" else row for row in results["systems"]]
    words = text_of(render_page(results, [], {}))
    assert f"Not timed to the end quick@6: killed {NASTY}" in words
    assert "Not timed" not in text_of(render_page(full_results(), [], {}))


def test_tick_marks_enclose_the_values():
    for low, high in ((1.05, 4.64), (0.0, 0.0), (-14.0, 3.0), (0.9991, 0.9999), (5.0, 5.0)):
        ticks = value_ticks([low, high])
        assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 7
    for low, high in ((0.7, 24.6), (6.0, 6.0), (1.0, 256.0), (0.05, 900.0)):
        ticks = kbps_ticks([low, high])
        assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 7 and ticks == sorted(set(ticks))


def test_log_spectrogram_has_a_full_scale_sine_at_zero_db():
    sine = np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE).astype(np.float32)
    spectrogram = log_spectrogram(sine, RATE)
    assert spectrogram.max() == pytest.approx(0, abs=0.05)
    assert spectrogram[:, 200].argmax() / (len(spectrogram) - 1) == pytest.approx(1000 / (RATE / 2), abs=0.005)
    silence = log_spectrogram(np.zeros(RATE, np.float32), RATE)
    assert silence.max() == -100


def test_louder_is_red_and_weaker_is_blue_in_a_difference():
    def colour(change_db: float) -> np.ndarray:
        reference = np.full((50, 420), -30.0)
        address = difference_picture(reference + change_db, reference, top_db=0.0)
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))))[70, 200].astype(int)

    assert colour(0).min() > 235  # white
    assert colour(15)[0] > colour(15)[2] + 60
    assert colour(-15)[2] > colour(-15)[0] + 60
    assert colour(-60).tolist() == colour(-90).tolist()  # below what anyone hears all is alike


@pytest.mark.parametrize("missing", [*full_results(), "everything", "every second key of a system"])
def test_page_renders_whatever_is_missing(missing):
    results = full_results()
    if missing == "everything":
        results = {}
    elif missing == "every second key of a system":
        kept = ("name", "kind", "means")
        results["systems"] = [{key: value for key, value in s.items() if key in kept} for s in results["systems"]]
        results["systems"][0]["means"] = {"pesq_wb": {"mean": None, "low": None, "high": None, "n": 0}}
        results["systems"][1]["means"] = {"pesq_wb": {"mean": 2.0, "low": None, "high": None, "n": 1}}
    else:
        results[missing] = None
    page = render_page(results, [], {})
    assert "<h1>" in page and "None" not in page and "nan" not in re.sub(r"<script.*", "", page, flags=re.S)


# ---- in Chromium ------------------------------------------------------------------------------------------

BROWSER = find_program("chromium") or find_program("chromium-headless-shell")
ARGUMENTS = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
PLAY_ALL = """async () => {
  const heard = [];
  for (const audio of document.querySelectorAll("audio")) {
    audio.playbackRate = 8;
    const ended = new Promise(resolve => { audio.onended = audio.onerror = resolve; setTimeout(resolve, 4000); });
    await audio.play().then(() => ended, () => null);
    heard.push({duration: audio.duration, position: audio.currentTime, error: audio.error?.message ?? ""});
  }
  return heard;
}"""
CONTRAST = """() => {
  const light = color => {
    const linear = x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = color.match(/[0-9.]+/g).map(x => linear(x / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = node => {
    const color = getComputedStyle(node).backgroundColor;
    return color !== "rgba(0, 0, 0, 0)" || !node.parentElement ? color : behind(node.parentElement);
  };
  const found = {};
  for (const node of document.body.querySelectorAll(":not(script, noscript, path, g, svg, audio, img, option)")) {
    if (![...node.childNodes].some(child => child.nodeType === Node.TEXT_NODE && child.data.trim())) continue;
    const style = getComputedStyle(node), color = node.closest("svg") ? style.fill : style.color;
    const [a, b] = [light(color), light(behind(node))].sort((x, y) => y - x);
    found[node.tagName + " " + color + " on " + behind(node)] = (a + 0.05) / (b + 0.05);
  }
  return found;
}"""


class Watched:
    """A page opened from a file, with no network; keeps what it complained of and asked for."""

    def __init__(self, browser, path: Path, width: int = 1280, scheme: str = "light"):
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
        self.page = context.new_page()
        self.complaints, self.requests = [], []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def focused(self) -> str | None:
        return self.page.evaluate("document.activeElement.getAttribute('aria-label')")

    def first_column(self) -> list[str]:
        return self.page.evaluate("[...document.querySelectorAll('.sortable tbody th')].map(head => head.dataset.value)")


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser: pip install playwright")
    if BROWSER is None:
        pytest.skip("no Chromium: apt-get install chromium, or `make tools`")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def path(html, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(html)
    return path


def test_page_opens_from_disk_without_network_or_complaint(browser, path):
    watched = Watched(browser, path)
    watched.page.wait_for_load_state("networkidle")
    assert watched.complaints == []
    assert [url for url in watched.requests if not url.startswith("data:")] == [path.as_uri()]
    assert watched.page.title().startswith(f"quick {NASTY}")


def mistakes_of_players(heard: list[dict]) -> list[str]:
    """Players that fail, say a wrong length, or stop before their end."""
    lengths = [seconds for seconds in SECONDS for _ in range(4)]
    return [f"{index}: {audio}" for index, (audio, seconds) in enumerate(zip(heard, lengths, strict=True)) if audio["error"]
            or not all(abs((audio[key] or 0) - seconds) < 0.05 for key in ("duration", "position"))]  # fmt: skip


def test_every_player_plays_to_its_end(browser, path):
    assert mistakes_of_players(Watched(browser, path).page.evaluate(PLAY_ALL)) == []


def test_player_with_half_its_sound_is_found(browser, html, tmp_path):
    source = re.findall(r'src="(data:audio[^"]*)"', html)[2]
    broken = tmp_path / "broken.html"
    broken.write_text(html.replace(source, source[: len(source) // 8 * 4]))
    mistakes = mistakes_of_players(Watched(browser, broken).page.evaluate(PLAY_ALL))
    assert len(mistakes) == 1 and mistakes[0].startswith("2:")


def test_every_picture_is_there_and_described(browser, path):
    pictures = Watched(browser, path).page.evaluate("[...document.images].map(image => [image.naturalWidth, image.alt])")
    assert len(pictures) == 15 and all(width == 420 and alt for width, alt in pictures)


def test_table_sorts_by_keyboard_best_first_and_back(browser, path):
    watched = Watched(browser, path)
    heading = watched.page.locator(".sortable th button", has_text="WER")
    heading.focus()
    watched.page.keyboard.press("Enter")
    assert watched.first_column()[0] == "uncoded" and watched.first_column()[-1] == "quick@3"  # WER is 0.3 / kbps
    watched.page.keyboard.press("Enter")
    assert watched.first_column()[0] == "quick@3"
    assert watched.page.locator("th[aria-sort]").evaluate_all("all => all.map(one => one.ariaSort)") == ["descending"]
    watched.page.locator(".sortable th button", has_text="system").focus()
    watched.page.keyboard.press("Space")
    assert watched.first_column() == sorted(watched.first_column(), key=str.lower)


def test_digits_change_the_system_at_the_same_position_and_space_plays(browser, path):
    watched = Watched(browser, path)
    playing = "[...document.querySelectorAll('audio')].map(audio => !audio.paused)"
    watched.page.evaluate("for (const audio of document.querySelectorAll('audio')) audio.playbackRate = 0.1")  # time to look
    watched.page.evaluate("const first = document.querySelector('audio'); first.focus(); first.currentTime = 0.6")
    watched.page.keyboard.press("Space")
    watched.page.wait_for_function("!document.querySelectorAll('audio')[0].paused")
    for digit in (3, 2):
        watched.page.keyboard.press(str(digit))
        alone = "".join("01"[index == digit - 1] for index in range(8))
        watched.page.wait_for_function(f"{playing}.map(Number).join('') === '{alone}'")  # one at a time
        assert 0.6 <= watched.page.evaluate(f"document.querySelectorAll('audio')[{digit - 1}].currentTime") < 1.3
    assert watched.focused() == "es/0.wav, quick@6"
    watched.page.evaluate("document.querySelectorAll('audio')[4].focus()")
    watched.page.keyboard.press("2")  # of the second example
    watched.page.wait_for_function("!document.querySelectorAll('audio')[5].paused")
    assert watched.focused() == f"{NASTY}, quick@6"
    assert watched.complaints == []


def test_arrow_keys_read_the_points_of_a_panel(browser, path):
    watched = Watched(browser, path)
    watched.page.locator("figure.curves svg").first.focus()
    watched.page.keyboard.press("ArrowRight")
    assert watched.page.locator("figure.curves output").first.text_content() == "quick@3: 2.90 [2.84, 2.96] at 3.1 kbps"
    watched.page.keyboard.press("ArrowRight")
    assert watched.page.locator("figure.curves output").first.text_content().startswith("quick@6: 3.40")


def test_worst_files_are_the_worst_by_the_metric_and_link_to_the_examples(browser, path):
    watched = Watched(browser, path)
    values = full_results()["systems"][2]["values"]
    files = full_results()["test_set"]["files"]
    for metric, worst_first in (("PESQ-WB", np.argsort(values["pesq_wb"])), ("WER", np.argsort(values["wer"])[::-1])):
        watched.page.select_option("#worst-metric", label=metric)
        watched.page.select_option("#worst-system", label="opus@6")
        shown = watched.page.locator("#worst-table tbody th").all_text_contents()
        assert shown == [files[index] for index in worst_first[:10]]
    watched.page.select_option("#worst-metric", label="SNR")  # no file has a value
    assert watched.page.locator("#worst-table tbody tr").count() == 0
    watched.page.select_option("#worst-metric", label="PESQ-WB")
    watched.page.select_option("#groups-kind", label="language")
    assert watched.page.locator("#groups-table thead th").all_text_contents() == ["system", "es"]
    links = watched.page.locator("#worst-table a").evaluate_all("all => all.map(a => [a.textContent, a.getAttribute('href')])")
    assert links and all(href == f"#example-{['es/0.wav', NASTY].index(name)}" for name, href in links)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(browser, path, scheme):
    found = Watched(browser, path, scheme=scheme).page.evaluate(CONTRAST)
    assert len(found) > 15
    assert {name: round(ratio, 2) for name, ratio in found.items() if ratio < 4.5} == {}  # WCAG AA


def test_dark_mode_changes_the_background(browser, path):
    colours = [Watched(browser, path, scheme=scheme).page.evaluate("getComputedStyle(document.body).backgroundColor")
               for scheme in ("light", "dark")]  # fmt: skip
    assert colours == ["rgb(255, 255, 255)", "rgb(15, 19, 24)"]


def test_only_cards_of_like_rates_have_red_and_green(browser, path):
    page = Watched(browser, path).page
    colours = """cards => [...new Set(cards.flatMap(card => [...card.querySelectorAll(".good, .bad")]).map(
        node => getComputedStyle(node).backgroundColor + getComputedStyle(node).color))]"""
    assert len(page.locator(".card:not(.unlike)").evaluate_all(colours)) == 2
    assert page.locator(".card.unlike").evaluate_all(colours) == ["rgba(0, 0, 0, 0)rgb(27, 31, 36)"]


@pytest.mark.parametrize("width", [360, 768])
def test_page_is_no_wider_than_the_screen(browser, path, width):
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert Watched(browser, path, width).page.evaluate(overflow) == 0


def test_page_with_tables_outside_their_boxes_is_found_too_wide(browser, path):
    page = Watched(browser, path, 360).page
    page.evaluate("for (const box of document.querySelectorAll('.wide')) box.style.overflow = 'visible'")
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") > 0


def test_empty_page_has_no_error_either(browser, tmp_path):
    empty = tmp_path / "empty.html"
    empty.write_text(render_page({}, [], {}))
    watched = Watched(browser, empty)
    watched.page.keyboard.press("1")
    assert watched.complaints == []
