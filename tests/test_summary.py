import math

import numpy as np
import pytest

from codec.report import compare, render_markdown
from codec.summary import (
    Figures,
    codebook_rows,
    differences,
    group_means,
    headline,
    interval,
    judge,
    pooled_snr_db,
    rates_in_words,
    resamples,
    verdicts,
)

POOLED = {"wer": ("word_errors", "words")}
METRICS = {
    "pesq_wb": {"title": "PESQ", "better": "higher", "digits": 2, "absent": ""},
    "wer": {"title": "WER", "better": "lower", "digits": 3, "absent": ""},
    "mel_db": {"title": "mel", "better": "lower", "digits": 2, "absent": ""},
}


def figures(**values) -> Figures:
    return Figures(values, POOLED)


def test_an_interval_of_normal_data_is_that_of_the_t_test_and_covers_the_truth_19_times_of_20():
    rng, covered = np.random.default_rng(1), 0
    for _ in range(200):
        x = rng.normal(3.0, 1.0, 50)
        found = interval(figures(a=list(x)).pairs("a"))
        assert found["mean"] == pytest.approx(x.mean()) and found["n"] == 50
        half = 2.01 * x.std(ddof=1) / math.sqrt(50)
        assert found["high"] - found["low"] == pytest.approx(2 * half, rel=0.15)
        covered += found["low"] <= 3.0 <= found["high"]
    assert 180 <= covered <= 198


@pytest.mark.parametrize("n", [6, 12])
def test_few_files_rarely_tell_apart_what_is_alike(n):
    rng = np.random.default_rng(0)
    draws = [interval(figures(a=list(rng.normal(0, 1, n))).pairs("a")) for _ in range(400)]
    false = np.mean([judge(draw, "higher") != "even" for draw in draws])
    assert 0.02 < false < 0.085
    plain = [np.percentile(rng.normal(0, 1, n)[resamples(n)].mean(1), [2.5, 97.5]) for _ in range(400)]
    assert np.mean([low > 0 or high < 0 for low, high in plain]) > 0.085  # the wrong version: percentiles as they are


def test_fewer_than_six_files_tell_nothing_apart():
    assert judge({"low": 0.1, "high": 0.2, "n": 5}, "higher") == "even"
    assert judge({"low": 0.1, "high": 0.2, "n": 6}, "higher") == "better"


def test_files_without_a_value_are_left_out_and_counted_so_and_none_at_all_is_no_interval():
    found = interval(figures(a=[1.0, None, 3.0]).pairs("a"))
    assert (found["mean"], found["n"]) == (2.0, 2)
    assert interval(figures(a=[None, None]).pairs("a")) is None
    assert interval(figures(a=[2.5]).pairs("a")) == {"mean": 2.5, "low": None, "high": None, "n": 1}


def test_a_rate_of_errors_is_that_of_all_words_not_the_mean_of_the_files():
    own = figures(wer=[1.0, 0.1], word_errors=[1.0, 2.0], words=[1.0, 20.0])
    found = interval(own.pairs("wer"))
    assert found["mean"] == pytest.approx(3 / 21)
    assert found["mean"] != pytest.approx(np.mean([1.0, 0.1]))  # the wrong version: a one-word file counts as much
    undefined = figures(wer=[None, 0.1], word_errors=[1.0, 2.0], words=[1.0, 20.0])  # counts of an earlier measurement
    assert interval(undefined.pairs("wer"))["mean"] == pytest.approx(0.1)
    assert group_means(own, "wer", ["a", "b"]) == {"a": 1.0, "b": 0.1}


def test_paired_differences_see_what_intervals_of_each_side_hide():
    rng = np.random.default_rng(0)
    files = rng.normal(2.5, 0.8, 60)  # files differ by far more than the systems do
    ours, theirs = figures(pesq_wb=list(files + 0.1 + rng.normal(0, 0.05, 60))), figures(pesq_wb=list(files))
    sides = [interval(side.pairs("pesq_wb")) for side in (ours, theirs)]
    assert sides[0]["low"] < sides[1]["high"]  # the intervals overlap: nothing could be said from them
    found = differences(ours, theirs, ["pesq_wb"])["pesq_wb"]
    assert 0.07 < found["low"] < 0.1 < found["high"] < 0.13
    assert judge(found, "higher") == "better" and judge(found, "lower") == "worse" and judge(found, "one") == "even"
    assert judge({"low": -0.1, "high": 0.2, "n": 9}, "higher") == "even"
    assert judge({"low": None, "high": None, "n": 1}, "higher") == "even"


def test_differences_are_over_the_files_that_both_have():
    ours, theirs = figures(a=[1.0, None, 5.0, 2.0]), figures(a=[0.0, 9.0, None, 1.0])
    assert differences(ours, theirs, ["a"])["a"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 2}
    assert differences(ours, figures(a=[None] * 4), ["a"]) == {}
    assert (resamples(7) == resamples(7)).all()


def test_the_snr_of_all_files_is_that_of_their_energies():
    own = figures(signal_energy=[100.0, 1.0, None], error_energy=[1.0, 1.0, None])
    assert pooled_snr_db(own) == pytest.approx(10 * math.log10(101 / 2))
    assert pooled_snr_db(figures(signal_energy=[1.0], error_energy=[0.0])) is None and pooled_snr_db(figures()) is None


def test_codebook_rows_are_those_of_counting_by_hand():
    counts = np.array([[4, 4, 0, 0], [1, 1, 1, 1], [8, 0, 0, 0]])
    first, even, one = codebook_rows(counts)
    assert first == {"used": 0.5, "perplexity": 2.0, "entropy_bits": 1.0, "efficiency": 0.5}
    assert even["perplexity"] == 4.0 and even["efficiency"] == 1.0
    assert one == {"used": 0.25, "perplexity": 1.0, "entropy_bits": 0.0, "efficiency": 0.0}


def system(name: str, kind: str, kbps: float, pesq: float, **more) -> dict:
    values = {"pesq_wb": [pesq, pesq + 0.4, pesq + 0.2] * 2, "wer": [0.1, 0.2, None] * 2, "word_errors": [1.0, 2.0, None] * 2,
              "words": [10.0, 10.0, None] * 2}  # fmt: skip
    own = Figures(values, POOLED)
    means = {key: interval(own.pairs(key)) | {"undefined": 0, "failed": 0} for key in ("pesq_wb", "wer")}
    return {"name": name, "family": name.split("@")[0], "kind": kind, "setting": "", "nominal_kbps": kbps, "kbps": kbps,
            "payload_kbps": kbps, "delay_ms": 0.0, "means": means, "values": values,
            "groups": {"speaker": {"a": {"pesq_wb": pesq}}, "language": {}},
            "problems": [], "codebooks": [], "speed": {}, "snr_bound_db": 9.0} | more  # fmt: skip


def results(*systems: dict) -> dict:
    own = {s["name"]: Figures(s["values"], POOLED) for s in systems}
    test_set = {"manifest": "m.jsonl", "split": "test", "sample_rate": 16000, "seconds": 60.0, "files": list("abcdef"),
                "speakers": ["x", "x", "y"] * 2, "languages": [None] * 6, "file_seconds": [20.0] * 6, "skipped": [],
                "notes": ["0 of 2 speakers"]}  # fmt: skip
    model = {"checkpoint": "runs/x", "parameters": 10**6, "sample_rate": 16000, "steps": 7, "frame_rate_hz": 50.0,
             "n_codebooks": 8, "codebook_size": 1024, "kbps": 4.0}  # fmt: skip
    return {"format": 1, "title": "ours", "created": "now", "command": "c", "machine": "m", "commit": "", "model": model,
            "test_set": test_set, "metrics": METRICS, "systems": list(systems),
            "verdicts": verdicts(list(systems), own, METRICS), "rate_distortion": {}, "doctor": None,
            "published": []}  # fmt: skip


def test_a_verdict_is_against_the_nearest_rate_and_says_what_was_spent():
    found = results(system("ours@3", "ours", 3.0, 2.0), system("ours@6", "ours", 6.0, 3.0),
                    system("opus@6", "classical", 6.3, 2.5), system("opus@12", "classical", 12.0, 4.0),
                    system("uncoded", "uncoded", 256.0, 4.6))["verdicts"]  # fmt: skip
    assert [(v["ours"], v["theirs"]) for v in found] == [("ours@6", "opus@6"), ("ours@3", "opus@6")]
    assert found[0]["better"] == ["pesq_wb"] and found[0]["worse"] == []
    assert found[0]["sentence"] == "At the same rate as opus@6 (6.3 kbps), ours@6 (6.0 kbps on disk) is better in PESQ."
    assert found[1]["worse"] == ["pesq_wb"]
    assert "which spends 2.1 times the bits, ours@3 (3.0 kbps on disk) is worse in PESQ" in found[1]["sentence"]
    assert headline(found) == [verdict["sentence"] for verdict in found]
    words = [rates_in_words(system("a", "ours", kbps, 1.0), system("b", "classical", 6.0, 1.0)) for kbps in (5, 7.5, 12, 5.9)]
    assert [text.split("), ")[-1] for text in words] == ["which spends 20 % more bits,", "which spends 20 % fewer bits,",
                                                         "With 2.0 times the bits of b (6.0 kbps),",
                                                         "At the same rate as b (6.0 kbps),"]  # fmt: skip


def test_the_markdown_holds_every_system_the_verdict_and_what_is_missing():
    problems = [{"file": f, "metric": "wer", "kind": "undefined", "why": "no text"} for f in ("c", "d")]
    metrics = METRICS | {"visqol": {"title": "ViSQOL", "better": "higher", "digits": 2, "absent": "pip install visqol"}}
    codebooks = [{"used": 0.5, "perplexity": 2.0, "entropy_bits": 1.0, "efficiency": 0.5}]
    text = render_markdown(results(system("ours@6", "ours", 6.0, 3.0, problems=problems, codebooks=codebooks),
                                   system("opus@6", "classical", 6.3, 2.5)) | {"metrics": metrics})  # fmt: skip
    assert "| `ours@6` | 6.00 | 6.00 | 3.20 [3." in text and " | 0.150 [0." in text
    assert "not measured: ViSQOL (pip install visqol)" in text and "wer undefined 2 times: no text; the first: ours@6 c" in text
    assert "At the same rate as opus@6 (6.3 kbps)" in text and "| 1 | 50.0 % | 2 | 1.00 | 50.0 % |" in text
    assert "runs/x`, 7 updates" in text


def test_two_evaluations_compare_by_name_or_by_bitrate_over_the_files_of_both():
    a = results(system("old@6", "ours", 6.0, 2.0), system("opus@6", "classical", 6.3, 2.5))
    b = results(system("new@3", "ours", 3.0, 1.0), system("new@6", "ours", 6.1, 2.5), system("opus@6", "classical", 6.3, 2.5))
    b["test_set"]["files"] = list("fedcbz")  # in another order: pairs are by name
    text = compare(a, b, ("a.json", "b.json"), POOLED)
    assert "Paired over 5 files" in text and "new@3" not in text
    row = next(line for line in text.splitlines() if "new@6" in line)
    # of f, e, d, c, b: b has 2.5, 2.9, 2.7, 2.5, 2.9 and a 2.2, 2.4, 2.0, 2.2, 2.4
    assert "`new@6` less `old@6`" in row and "+0.46 [" in row and "**" not in row  # five files tell nothing apart
    b["test_set"]["file_seconds"] = [20.0, 3.0] + [20.0] * 4
    with pytest.raises(ValueError, match="e is of another length"):
        compare(a, b, ("a.json", "b.json"), POOLED)
    b["test_set"]["files"] = list("pqrstu")
    with pytest.raises(ValueError, match="no file was judged in both"):
        compare(a, b, ("a.json", "b.json"), POOLED)
