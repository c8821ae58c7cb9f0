import argparse
import json
import math
import time

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from codec import doctor
from codec.cli import main
from codec.doctor import add_command, parse_values, read_rows, render, to_json, to_markdown
from codec.health import Diagnosis, Finding, History, Reading
from codec.runlog import RunLog, read_metrics

READINGS = [
    Reading("loss_d", 1.9731, "flat", "1.5 to 2", "good", "hinge: 2 knows nothing, 0 has won"),
    Reading("wavlm", math.nan, "", "0 to 0.2", "critical", "1 - cosine of codebooks 0+1 and WavLM | a long story " * 5),
    Reading("a_name_that_is_longer_than_any_column_of_the_sheet", np.float32(123456.0), "rising", "", "", "no range"),
]
FINDINGS = [
    Finding(9, "distillation stuck", "critical", 0.9, "wavlm 0.668 | flat, 500 steps " * 6, "raise loss_weights.wavlm to 2-5"),
    Finding(0, "odd data", "warning", 0.3, "input_dc 0.1", "prepare the data again"),
]


def diagnosis(verdict="critical", findings=FINDINGS, step=300, unknown=()) -> Diagnosis:
    return Diagnosis(step, verdict, READINGS, list(findings), list(unknown))


def write(folder, *lines: str):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    return parser.parse_args(["doctor", *map(str, arguments)])


# ---- what was logged


def merged(rows: list[dict]) -> dict[int, dict]:
    by_step: dict[int, dict] = {}
    for row in rows:
        nonfinite = by_step.get(row["step"], {}).get("nonfinite", {}) | row.get("nonfinite", {})
        by_step.setdefault(row["step"], {}).update(row | {"nonfinite": nonfinite})
    return by_step


@pytest.fixture
def logged(tmp_path):
    """A run of ours: NaN, Inf, validation and epoch means included."""
    log = RunLog(tmp_path / "run")
    for step in range(10, 70, 10):
        log.scalars(step, {"train/loss_d_step": 2 - step / 100, "train/mel_step": math.nan if step == 30 else 1 / step,
                           "train/steps_per_epoch_step": 30.0})  # fmt: skip
        if step % 30 == 0:
            log.scalars(step, {"val/snr_db_step": -math.inf if step == 60 else 0.5})
            log.scalars(step, {"epoch": step / 30, "train/mel_epoch": 0.25, "val/snr_db_epoch": 0.125})
    log.close()
    return tmp_path / "run"


def test_events_alone_give_the_rows_of_metrics_jsonl(logged):
    expected = merged(read_metrics(logged))
    (logged / "metrics.jsonl").unlink()
    rows = read_rows(logged)
    assert [row["step"] for row in rows] == sorted(expected)
    for row in rows:
        row, line = {"nonfinite": {}} | row, expected[row["step"]]
        assert row.keys() == line.keys() and row["nonfinite"] == line["nonfinite"]
        assert all(value is None or abs(value - line[name]) < 1e-6 * max(1, abs(value))
                   for name, value in row.items() if name not in ("time", "nonfinite"))  # fmt: skip
        assert all(line[name] is None for name, value in row.items() if value is None)
    events = next((logged / "tensorboard").iterdir())
    assert read_rows(logged / "tensorboard") == read_rows(events) == rows


def test_all_three_ways_to_name_a_log_agree(logged):
    assert read_rows(logged) == read_rows(logged / "metrics.jsonl") == read_metrics(logged)


def test_events_of_a_resumed_run_hold_no_trace_of_what_it_dropped(tmp_path, monkeypatch, caplog):
    for resume_step, values in ((None, [5, 4, 9, 9]), (2, [3])):
        clock = time.time() + 10 * (resume_step or 0)  # TensorBoard orders its files by the second they were opened in
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        log = RunLog(tmp_path, resume_step=resume_step)
        for step, value in enumerate(values, 1 + (resume_step or 0)):
            log.scalars(step, {"train/mel_step": value})
        log.close()
    (tmp_path / "metrics.jsonl").unlink()
    assert [(row["step"], row["train/mel_step"]) for row in read_rows(tmp_path)] == [(1, 5), (2, 4), (3, 3)]
    assert not caplog.records  # TensorBoard told of it at length


def test_events_cut_off_in_the_middle_give_what_came_before(logged):
    (logged / "metrics.jsonl").unlink()
    whole = read_rows(logged)
    events = next((logged / "tensorboard").iterdir())
    events.write_bytes(events.read_bytes()[: events.stat().st_size * 2 // 3])
    rows = read_rows(logged)
    assert rows[:-1] == whole[: len(rows) - 1] and 0 < len(rows) < len(whole)


def test_events_of_another_trainer_are_understood_by_name(tmp_path):
    writer = SummaryWriter(str(tmp_path))
    for tag in ("loss_g", "train/loss_d", "val/snr_db", "amplitude_ratio", "mel_epoch", "steps_per_epoch", "gpu/heat", "step"):
        writer.add_scalar(tag, 0.5, 7)
    writer.add_text("about", "words", 7)
    writer.close()
    (row,) = read_rows(tmp_path)
    assert row.pop("time") > 0
    assert row == {"step": 7, "train/loss_g_step": 0.5, "train/loss_d_step": 0.5, "val/snr_db_step": 0.5,
                   "val/amplitude_ratio_step": 0.5, "train/mel_epoch": 0.5, "train/steps_per_epoch_step": 0.5,
                   "gpu/heat": 0.5}  # fmt: skip


def test_a_torn_last_line_is_left_out_without_a_word_and_a_whole_one_is_read(tmp_path, capsys):
    run = write(tmp_path / "run", '{"step": 1, "train/mel_step": 2}')
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "train/mel_step": 1.')
    assert read_rows(run) == [{"step": 1, "train/mel_step": 2.0}]
    with open(run / "metrics.jsonl", "a") as file:
        file.write("5}")
    assert [row["train/mel_step"] for row in read_rows(run)] == [2.0, 1.5]
    assert capsys.readouterr().err == ""


def test_broken_lines_are_left_out_and_counted_in_one_line(tmp_path, capsys):
    steps = ('"3"', "true", "1.5", "null", "NaN", "-1", "1e300", "9" * 5000)
    broken = ['{"step": 2, "train', "7", "[1]", "null", "{}", "[" * 100_000, "\0" * 40, *(f'{{"step": {x}}}' for x in steps)]
    run = write(tmp_path / "run", '{"step": 1}', "", *broken, '{"step": 4}')
    assert [row["step"] for row in read_rows(run)] == [1, 4]
    (said,) = capsys.readouterr().err.splitlines()
    assert f": {len(broken)} lines are no JSON object with a step" in said and said.endswith("line 3")


def test_what_is_not_finite_is_none_however_it_was_written(tmp_path):
    run = write(tmp_path / "run", '{"step": 1, "train/mel_step": null, "nonfinite": {"train/mel_step": "inf"}}',
                '{"step": 2, "train/mel_step": NaN}', '{"step": 3, "mel": -Infinity}', '{"step": 4, "train/mel_step": 1e999}',
                '{"step": 5, "train/mel_step": ' + "1" * 400 + "}")  # fmt: skip
    rows = read_rows(run)
    assert [row["train/mel_step"] for row in rows] == [None] * 5
    assert [row["nonfinite"]["train/mel_step"] for row in rows] == ["inf", "nan", "-inf", "inf", "inf"]
    steps, values = History.from_rows(rows).series("train/mel")
    assert steps.tolist() == [1, 2, 3, 4, 5] and np.isnan(values).all()


def test_where_a_resumed_run_overlaps_the_later_line_counts(tmp_path):
    course = [(1, 5), (2, 4), (3, 9), (2, 3), (3, 2), (4, 1)]
    lines = [f'{{"step": {step}, "train/mel_step": {value}}}' for step, value in course]
    rows = read_rows(write(tmp_path / "run", *lines))
    steps, values = History.from_rows(rows).series("train/mel")
    assert steps.tolist() == [1, 2, 3, 4] and values.tolist() == [5, 3, 2, 1]
    first_counts = {row["step"]: row["train/mel_step"] for row in reversed(rows)}  # the wrong version
    assert [first_counts[step] for step in steps] != values.tolist()


def test_lines_of_another_version_are_kept(tmp_path):
    line = '''{"step": 10.0, "loss_g": 3, "steps_per_epoch": 2, "train/mel": 1, "fresh_idea": 4, "time": "noon", "note": "x",
        "ok": true, "list": [1], "nonfinite": "?", "a\\u001b[2J": 1, "\\ud800": 1}'''
    run = write(tmp_path / "run", line.replace("\n", ""))
    assert read_rows(run) == [{"step": 10, "train/loss_g_step": 3.0, "train/steps_per_epoch_step": 2.0, "train/mel_step": 1.0,
                               "fresh_idea": 4.0}]  # fmt: skip
    history = History.from_rows(read_rows(run))
    assert history.last("train/steps_per_epoch") == 2 and history.last("train/loss_g") == 3


def test_a_log_without_metrics_is_refused_in_one_line(tmp_path):
    for name in ("empty_folder", "no_scalars", "empty_log", "blank_log", "torn_log", "other_file"):
        (tmp_path / name).mkdir()
    writer = SummaryWriter(str(tmp_path / "no_scalars" / "tensorboard"))
    writer.add_text("about", "words", 1)
    writer.close()
    (tmp_path / "empty_events").mkdir()
    (tmp_path / "empty_events" / "events.out.tfevents.1.host").touch()
    (tmp_path / "empty_log" / "metrics.jsonl").touch()
    (tmp_path / "blank_log" / "metrics.jsonl").write_text("\n\n")
    (tmp_path / "torn_log" / "metrics.jsonl").write_text('{"step": 1, "tr')
    for name in ("absent", "empty_folder", "no_scalars", "empty_events", "empty_log", "blank_log", "torn_log"):
        with pytest.raises(ValueError, match=f"^{tmp_path}/{name}.*; ") as error:
            read_rows(tmp_path / name)
        assert "\n" not in str(error.value)


# ---- values typed in


def test_values_become_one_row_with_full_names(capsys):
    assert parse_values(["adv_g=.322", "val/mel=5", "snr=-1.5", "amplitude=53.4%", "recon=0.189", "used_0=0.5", "mel_epoch=2",
                         "steps_per_epoch=2", "train/snr_db=1"]) == [
        {"step": 0, "train/adv_g_step": 0.322, "val/mel_step": 5.0, "val/snr_db_step": -1.5,
         "val/amplitude_ratio_step": pytest.approx(0.534), "train/recon_step": 0.189, "val/used_0_step": 0.5,
         "train/mel_epoch": 2.0, "train/steps_per_epoch_step": 2.0, "train/snr_db_step": 1.0}]  # fmt: skip
    assert capsys.readouterr().err == ""


def test_a_course_of_values_becomes_rows_and_a_single_value_is_in_each():
    rows = parse_values(["amplitude_ratio=53.4%,0.38,nan", "vq=2.54"])
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["val/amplitude_ratio_step"] for row in rows] == [pytest.approx(0.534), 0.38, None]
    assert [row["train/vq_step"] for row in rows] == [2.54] * 3


def test_an_unknown_name_is_kept_and_the_nearest_named(capsys):
    (row,) = parse_values(["los_d=2", "feat=1", "codec_heat=3"])
    assert row == {"step": 0, "los_d": 2.0, "train/feat_step": 1.0, "codec_heat": 3.0}
    first, second = capsys.readouterr().err.splitlines()
    assert "los_d" in first and "did you mean train/loss_d?" in first and "codec_heat" in second


@pytest.mark.parametrize("items, said", [
    (["feat"], "feat: expected NAME=VALUE"), (["feat="], "feat=: expected"), (["=1"], "=1: expected"),
    (["feat=low"], "'low' is no number"), (["feat=1,,2"], "'' is no number"), (["feat=%"], "'%' is no number"),
    (["feat=1", "feat=2"], "there already"), (["snr=1", "snr_db=2"], "there already"),
    (["mel=1,2,3", "feat=1,2"], "train/feat: got 2 values, expected 3"),
])  # fmt: skip
def test_bad_values_are_refused_in_one_line(items, said):
    with pytest.raises(ValueError) as error:
        parse_values(items)
    assert said in str(error.value) and str(error.value).startswith("--values ") and "\n" not in str(error.value)


# ---- what the doctor says


def test_the_terminal_gets_sheet_findings_and_verdict_within_120_columns():
    text = render(diagnosis(unknown=[f"metric_{i}" for i in range(100)]))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[0].split() == ["metric", "value", "trend", "good", "verdict", "meaning"]
    assert lines[1].split()[:7] == ["loss_d", "1.97", "flat", "1.5", "to", "2", "good"]
    assert "1. Failure 9, distillation stuck: critical, certain" in lines and "2. odd data: warning, possible" in lines
    assert "raise loss_weights.wavlm to 2-5" in text and "metric_0, metric_1" in text and "metric_99" not in text
    assert lines[-1].startswith("Verdict: critical at step 300: ")
    words = " ".join(text.split())
    assert all(" ".join(finding.evidence.split()[:5]) in words for finding in FINDINGS)


@pytest.mark.parametrize("value, text", [
    (1.9731, "1.97"), (0.00012345, "0.000123"), (12345.0, "12300"), (999.6, "1000"), (-0.5, "-0.5"), (math.nan, "nan"),
    (1.2e-7, "1.2e-07"), (3.4e12, "3.4e+12"), (math.inf, "inf"),
])  # fmt: skip
def test_figures_have_three_significant_digits(value, text):
    assert render(Diagnosis(1, "healthy", [Reading("x", value, "", "", "", "y")], [], [])).splitlines()[1].split()[1] == text


@pytest.mark.parametrize("confidence, word", [(1.0, "certain"), (0.8, "certain"), (0.79, "likely"), (0.5, "likely"),
                                              (0.49, "possible"), (0.0, "possible")])  # fmt: skip
def test_confidence_is_a_word(confidence, word):
    finding = FINDINGS[0]._replace(confidence=confidence)
    assert f"1. Failure 9, distillation stuck: critical, {word}" in render(diagnosis(findings=[finding])).splitlines()


def test_too_few_steps_is_a_verdict_of_its_own():
    assert render(diagnosis("not yet", [], 40)).splitlines()[-1].startswith("Verdict: not yet: 40 steps are too few to tell")
    assert render(diagnosis("not yet", [], 1)).splitlines()[-1].startswith("Verdict: not yet: 1 step is too few to tell")


def test_the_advice_fits_what_was_found():
    assert render(diagnosis("warning", [], 0)).splitlines()[-1] == "Verdict: warning: see the graded lines of the sheet."
    assert render(diagnosis("healthy", [], 7)).splitlines()[-1].startswith("Verdict: healthy at step 7: nothing")
    assert "first finding" in render(diagnosis("warning")).splitlines()[-1]


def test_markdown_tables_stay_whole_whatever_the_text():
    page = to_markdown(diagnosis(unknown=["a|b"]), "telugu")
    assert page.startswith("# Health of telugu\n\nVerdict: critical at step 300")
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(READINGS)
    n_bars = [line.replace("\\|", "").count("|") for line in rows]
    assert set(n_bars) == {7}
    assert len({line.count("|") for line in rows}) > 1  # the wrong version, bars as they come
    assert "## 1. Failure 9, distillation stuck: critical, certain" in page and "loss_weights.wavlm" in page


def test_json_is_strict_and_whole():
    given = diagnosis(unknown=["x"])._replace(step=np.int64(300))

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    whole = json.loads(to_json(given), parse_constant=refuse)
    assert whole["step"] == 300 and whole["verdict"] == "critical" and whole["unknown"] == ["x"]
    assert [reading["value"] for reading in whole["readings"]] == [1.9731, None, 123456.0]
    assert whole["findings"] == [finding._asdict() for finding in FINDINGS]
    with pytest.raises(AssertionError, match="NaN is not JSON"):  # the wrong version, json.dumps as it comes
        json.loads(json.dumps(READINGS[1]), parse_constant=refuse)


# ---- the command


@pytest.mark.parametrize("verdict, code", [("healthy", 0), ("not yet", 0), ("warning", 1), ("critical", 2)])
def test_the_exit_code_is_the_verdict(verdict, code, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "diagnose", lambda history: diagnosis(verdict))
    chosen = options("--values", "loss_d=1.9", "snr_db=-1,-2", "--json")
    assert chosen.run(chosen) == code and chosen.user_error == 3
    assert json.loads(capsys.readouterr().out)["verdict"] == verdict


def test_until_leaves_out_what_came_later(logged, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(doctor, "diagnose", lambda history: seen.append(history.step) or diagnosis("healthy"))
    for arguments in ([logged], [logged, "--until", 30], [logged, "--until", 35]):
        chosen = options(*arguments)
        chosen.run(chosen)
    assert seen == [60, 30, 30] and "Verdict: healthy" in capsys.readouterr().out
    chosen = options(logged, "--until", 9)
    with pytest.raises(ValueError, match="--until 9: .* from 10 on"):
        chosen.run(chosen)


def test_a_run_and_values_exclude_each_other(logged):
    for chosen in (options(), options(logged, "--values", "feat=1")):
        with pytest.raises(ValueError, match="either a run or --values"):
            chosen.run(chosen)


def test_help_can_be_printed(capsys):
    with pytest.raises(SystemExit, match="0"):
        options("--help")
    assert "amplitude=53%,38%,7%" in " ".join(capsys.readouterr().out.split())


def test_a_wrong_option_is_bad_input_and_not_critical(capsys):
    with pytest.raises(SystemExit) as left:
        main(["doctor", "runs/x", "--until", "soon"])
    assert left.value.code == 3 and "codec doctor: " in capsys.readouterr().err
