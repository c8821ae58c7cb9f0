"""The doctor's judgement: each failure by its figures, each healthy neighbour left in peace, contradictory readings apart."""

import json
import math

import numpy as np
import pytest

from codec.cli import main
from codec.health import FAILURES, KNOWN, RANGES, TITLES, TOLD, Finding, History, diagnose, found, trend

HEALTHY = {  # of a quickstart run in its adversarial phase
    "train/loss_g": 2.0, "train/mel": 0.3, "train/wave": 0.05, "train/commit": 0.03, "train/vq": 0.06, "train/loss_d": 1.8,
    "train/adv_g": 0.2, "train/feat": 0.5, "train/acc_real": 0.6, "train/acc_fake": 0.7, "train/logit_real": 0.4,
    "train/logit_fake": -0.2, "train/grad_norm_g": 1.0, "train/grad_norm_d": 0.3, "train/grad_norm_g_max": 1.5,
    "train/grad_norm_d_max": 0.6, "train/clipped_g": 0.0, "train/clipped_d": 0.0, "train/skipped": 0.0, "train/lr_g": 1e-3,
    "train/input_rms": 0.14, "train/input_dc": 0.001, "train/input_clipped": 2e-4, "train/input_silent": 0.0,
    "train/output_dc": 0.001, "train/output_peak": 0.8, "train/grad_z_signal": 0.01, "train/grad_z_commit": 0.001,
    "train/ste_gain": 1.0, "train/commit_reach": 0.3, "train/codebook_drift": 0.02, "train/weight_adv": 1.0,
    "train/weight_mel": 1.0, "train/weight_wave": 5.0, "train/loss_d_neutral": 2.0, "train/steps_per_epoch": 500.0,
    "train/total_steps": 2000.0, "train/phase_start": 0.0, "train/codebook_size": 1024.0, "train/frames_per_step": 400.0,
    "val/mel": 4.4, "val/snr_db": 4.0, "val/amplitude_ratio": 0.85, "val/perplexity_0": 200.0, "val/perplexity_1": 180.0,
}  # fmt: skip
STEPS = range(20, 620, 20)


def rows(**changes):
    """A log of 30 lines; a change is a value, or a function of the share of the run that is over."""
    table = HEALTHY | {name.replace("__", "/"): value for name, value in changes.items()}
    return [{"step": step, "time": 0.0} | {f"{name}_step": value(i / 29) if callable(value) else value
                                           for name, value in table.items()} for i, step in enumerate(STEPS)]  # fmt: skip


def named(**changes):
    return [finding.number for finding in diagnose(History.from_rows(rows(**changes))).findings]


def rising(a, b):
    return lambda x: a + (b - a) * x


FAILING = {
    1: {"train__grad_z_commit": 0.1, "val__amplitude_ratio": rising(0.5, 0.1)},
    2: {"val__amplitude_ratio": 4.0, "train__output_peak": 2.6, "train__output_dc": 1.38},
    3: {"train__codebook_drift": 0.0},
    4: {"train__ste_gain": 12.0},
    5: {"train__loss_d": 1.995, "train__feat": 0.012, "train__logit_real": 0.01, "train__logit_fake": 0.0},
    6: {"train__loss_d": 0.2, "train__acc_real": 0.99, "train__acc_fake": 0.99, "train__adv_g": rising(1, 3)},
    7: {"train__grad_norm_d_max": lambda x: 900.0 if x > 0.9 else 1.0},
    8: {"val__perplexity_0": lambda x: 200.0 if x < 0.5 else 1.1},
    9: {"val__wavlm_gain": 0.07, "train__grad_msspec_to_1": 0.05, "train__grad_wavlm_to_1": 0.001},
    10: {"train__weight_mel": 0.0, "train__weight_wave": 0.0, "val__mel": rising(9.6, 9.3)},
    11: {"train__steps_per_epoch": 2.0},
    12: {"train__skipped": 0.3},
    13: {"train__mel": rising(0.3, 0.9), "val__mel": rising(4.4, 9), "train__grad_norm_g_max": rising(1, 90)},
    14: {"train__input_clipped": 0.08},
    15: {"train__mel": rising(0.5, 0.2), "val__mel": 9.0, "val__snr_db": 0.3},
}  # fmt: skip
NEIGHBOURS = {  # what looks a little like it and is none
    1: {"train__grad_z_commit": 0.1, "val__amplitude_ratio": 0.9},  # strong commitment, and the level holds
    2: {"val__amplitude_ratio": 3.0, "train__output_peak": 0.6, "train__output_dc": rising(0.4, 0.2)},  # young
    3: {"train__codebook_drift": 1e-4},  # the end of a cosine
    4: {"train__ste_gain": 0.98, "train__commit_reach": 0.02},
    5: {"train__loss_d": 1.98, "train__logit_real": 0.3, "train__logit_fake": -0.3},
    6: {"train__loss_d": 0.9, "train__acc_real": 0.93, "train__acc_fake": 0.95},
    7: {"train__grad_norm_d_max": lambda x: 900.0 if x > 0.9 else 1.0, "train__clipped_d": lambda x: 0.1 if x > 0.9 else 0.0},
    8: {"val__perplexity_0": 40.0},
    9: {"val__wavlm_gain": rising(0.05, 0.15), "train__grad_msspec_to_1": 0.05, "train__grad_wavlm_to_1": 0.001},
    10: {"train__weight_mel": 0.0, "train__weight_wave": 0.0, "val__mel": rising(6, 5)},  # fine-tuning that gets better
    11: {"train__steps_per_epoch": 100.0},
    12: {"train__skipped": 0.0005},
    13: {"train__mel": rising(0.5, 0.3), "train__loss_g": rising(1, 4)},  # loss_g rises as the adversary learns
    14: {"train__input_clipped": 0.002},
    15: {"train__mel": rising(0.5, 0.2), "val__mel": rising(9, 5)},
}  # fmt: skip


def test_a_healthy_run_is_left_in_peace():
    diagnosis = diagnose(History.from_rows(rows()))
    assert diagnosis.verdict == "healthy" and not diagnosis.findings and not diagnosis.unknown


@pytest.mark.parametrize("number", FAILING)
def test_each_failure_is_the_first_finding_of_its_figures(number):
    assert named(**FAILING[number])[:1] == [number]


@pytest.mark.parametrize("number", NEIGHBOURS)
def test_what_only_looks_like_a_failure_is_none(number):
    assert number not in named(**NEIGHBOURS[number])


@pytest.mark.parametrize("number", FAILING)
def test_a_log_that_lacks_other_figures_upsets_no_rule(number):
    changed = {name.replace("__", "/") for name in FAILING[number]}
    bare = [{key: value for key, value in row.items() if key in ("step", "time") or key.removesuffix("_step") in changed}
            for row in rows(**FAILING[number])]  # fmt: skip
    for failure in FAILURES:
        finding = failure(History.from_rows(bare))
        assert finding is None or finding.evidence.count("nan") == 0


def test_every_failure_has_a_title_a_mend_and_a_rule():
    assert set(TITLES) == set(range(16)) and set(FAILING) | {0} == set(TITLES)
    assert found(7, "e", 0.5) == Finding(7, *TITLES[7][:1], "critical", 0.5, "e", TITLES[7][1])


def test_the_known_names_hold_every_figure_that_a_rule_or_the_sheet_reads():
    assert {line.name for line in RANGES} | set(TOLD) | set(HEALTHY) <= KNOWN


# ---- the worked examples ------------------------------------------------------------------------------------


def spoken(capsys, *values):
    code = main(["doctor", "--values", *values, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_worked_example_has_seven_verdicts_and_wavlm_as_its_one_critical_finding(capsys):
    code, said = spoken(capsys, "adv_g=.322", "feat=.0169", "llm=.0796", "loss_d=1.973", "loss_g=2.256", "msspec=.0746",
                        "wavlm=.668")  # fmt: skip
    verdicts = {reading["name"].removeprefix("train/"): reading["verdict"] for reading in said["readings"]}
    assert verdicts == dict.fromkeys(("adv_g", "feat", "llm", "loss_d", "loss_g", "msspec"), "good") | {"wavlm": "critical"}
    assert code == 2 and [(f["number"], f["level"]) for f in said["findings"]] == [(9, "critical")]
    assert all(word in said["findings"][0]["mend"] for word in ("loss_weights.wavlm", "2 to 5", "mlp", "not adversarial only"))


def test_the_collapsing_run_is_named_from_its_five_epochs(capsys):
    code, said = spoken(capsys, "amplitude=53.4%,38.0%,7.1%,11.0%,28.5%", "snr=-1.11,-0.61,-0.03,0.03,0.53", "recon=0.189",
                        "vq=2.54")  # fmt: skip
    assert code == 2 and said["findings"][0]["number"] == 1 and "13 times" in said["findings"][0]["evidence"]
    code, said = spoken(capsys, "amplitude=53.4%,68.0%,87.1%,91.0%,98.5%", "snr=1,2,3,4,5", "recon=0.189", "vq=0.1")
    assert code == 0 and not said["findings"]


def test_the_two_contradictory_readings_of_loss_d_are_told_apart(capsys):
    overpowers, knows_nothing = spoken(capsys, "loss_d=0.3")[1], spoken(capsys, "loss_d=1.995", "feat=0.012")[1]
    assert overpowers["findings"][0]["number"] == 6  # below 0.5 the discriminator is too strong, not too weak
    assert knows_nothing["findings"][0]["number"] == 5
    assert spoken(capsys, "loss_d=3.4")[1]["findings"][0]["title"] == "discriminator is being fooled"
    code, said = spoken(capsys, "loss_d=1.9", "feat=0.012")  # a small feat is healthy where the discriminator tells apart
    assert code == 0 and not said["findings"]


def test_least_squares_is_read_by_its_own_neutral_value():
    assert 6 not in named(train__loss_d=0.44, train__loss_d_neutral=0.5)
    assert 6 in named(train__loss_d=0.1, train__loss_d_neutral=0.5, train__acc_real=0.99, train__acc_fake=0.99)


# ---- the log ------------------------------------------------------------------------------------------------


def test_too_few_steps_are_not_yet_and_a_certain_failure_is_named_all_the_same():
    assert diagnose(History.from_rows(rows(), until=60)).verdict == "not yet"
    assert diagnose(History.from_rows(rows(train__ste_gain=12.0), until=60)).verdict == "critical"


def test_of_overlapping_steps_the_later_line_counts():
    before, after = [(step, 1.0) for step in (10, 20, 30)], [(step, 2.0) for step in (20, 30, 40)]
    log = [{"step": step, "train/mel_step": value} for step, value in before + after]
    steps, values = History.from_rows(log).series("train/mel")
    assert steps.tolist() == [10, 20, 30, 40] and values.tolist() == [1, 2, 2, 2]


def test_epoch_means_and_steps_are_kept_apart_and_null_is_nan():
    h = History.from_rows([{"step": 5, "train/mel_step": None, "train/mel_epoch": 3.0, "epoch": 1.0}])
    assert math.isnan(h.series("train/mel")[1][0]) and h.last("epoch/train/mel") == 3 and h.last("epoch/epoch") == 1
    assert math.isnan(h.last("train/mel")) and h.step == 5 and not len(h.series("nothing")[0])


def test_a_nan_loss_is_named_although_no_update_was_counted_as_skipped():
    assert named(train__loss_g=lambda x: None if x > 0.9 else 1.0)[0] == 12


@pytest.mark.parametrize("values, expected", [
    (np.arange(10.0), "rising"), (-np.arange(10.0), "falling"), (np.ones(10), "flat"), (np.arange(5.0), ""),
    (np.tile([0.0, 5.0], 10) + 0.01 * np.arange(20), "flat"),  # its own noise is larger
])  # fmt: skip
def test_a_trend_is_more_than_the_noise(values, expected):
    assert trend(values) == expected


# ---- healthy runs that look worse than they are -------------------------------------------------------------


def noisy(n, spread, seed=0):
    return np.exp(spread * np.random.default_rng(seed).standard_normal(n))


@pytest.mark.parametrize("spread", [0.1, 0.2, 0.3])
def test_the_noise_of_single_batches_is_no_divergence_however_long_the_log(spread):
    """Known wrong: the last values against the smallest of thousands."""
    for seed in range(8):
        mel = 0.3 * noisy(3000, spread, seed)
        log = rows()[:1] + [{"step": 20 * (i + 2), "train/mel_step": value, "val/mel_step": 4.0 if i < 2000 else 4.5}
                            for i, value in enumerate(mel)]  # fmt: skip
        assert 13 not in [f.number for f in diagnose(History.from_rows(log)).findings]


@pytest.mark.parametrize("number, changes", [
    (5, {"train__loss_d": 1.9, "train__acc_real": 0.55, "train__acc_fake": 0.55, "val__snr_db": -0.3,
         "val__mel": rising(8, 3)}),
    (15, {"train__mel": rising(0.5, 0.3), "val__mel": rising(5.0, 5.2)}),  # learning by heart
    (6, {"train__loss_d": 0.2, "train__acc_real": 0.99, "train__acc_fake": 0.99, "train__adv_g": math.nan,
         "train__total_steps": 1e6}),  # discriminators warmed up alone: the generator has no loss yet
    (11, {"train__steps_per_epoch": 10.0, "train__total_steps": 1e6}),
    (3, {"train__codebook_drift": 0.0, "train__lr_g": lambda x: 1e-9 if x > 0.8 else 1e-3}),
    (12, {"train__loss_g": lambda x: math.nan if x == 1 else 1.0}),
])  # fmt: skip
def test_a_healthy_run_that_looks_bad_at_one_place_is_not_critical(number, changes):
    findings = diagnose(History.from_rows(rows(**changes))).findings
    assert number not in [finding.number for finding in findings if finding.level == "critical"]


def test_fine_tuning_by_the_adversary_alone_is_watched_and_not_condemned():
    changes = {"train__weight_mel": 0.0, "train__weight_wave": 0.0, "val__mel": rising(4.0, 4.25), "train__phase": 1.0}
    assert 10 not in named(**changes)
    findings = diagnose(History.from_rows(rows(**changes | {"val__mel": rising(4.0, 5.5)}))).findings
    assert [(f.number, f.level) for f in findings] == [(10, "warning")]


def test_a_least_squares_discriminator_that_says_0_knows_nothing():
    dead = {"train__loss_d": 1.0, "train__loss_d_neutral": 0.5, "train__logit_real": 0.002, "train__logit_fake": 0.001}
    assert named(**dead)[0] == 5
    assert not named(train__loss_d=0.8, train__loss_d_neutral=0.5, train__logit_real=0.6, train__logit_fake=0.3)
    assert named(train__loss_d=1.7, train__loss_d_neutral=0.5) == [0]


def test_a_discriminator_that_begins_to_learn_is_given_time():
    slow = {"train__loss_d": 1.995, "train__feat": 0.2, "train__logit_real": rising(-0.15, -0.4),
            "train__logit_fake": rising(-0.152, -0.41), "train__loss_g": 1.0}  # fmt: skip
    young = [row for row in rows(**slow) if row["step"] <= 300]
    assert 5 not in [f.number for f in diagnose(History.from_rows(young)).findings]
    assert named(**slow)[:1] == [5]  # 600 updates on


def test_a_stuck_teacher_is_seen_in_logs_without_gains_and_beside_any_reconstruction():
    rng = np.random.default_rng(0)
    plain = {"train__wavlm": lambda x: 0.69 + 0.005 * rng.standard_normal(), "train__llm": rising(0.4, 0.08)}
    assert named(**plain) == [9]
    assert named(**plain | {"train__wavlm": rising(0.7, 0.4)}) == []
    balanced = {"val__wavlm_gain": 0.07, "train__grad_balanced_to_1": 0.05, "train__grad_wavlm_to_1": 0.001}
    assert named(**balanced) == [9]


def test_a_run_that_learns_nothing_is_named_by_its_rate_where_that_is_high():
    flat = {"train__mel": 0.6, "val__mel": 11.4, "val__snr_db": -1.0, "val__amplitude_ratio": 0.5}
    assert named(**flat | {"train__lr_g": 0.1}) == [13]
    (finding,) = diagnose(History.from_rows(rows(**flat))).findings
    assert (finding.number, finding.level, finding.title) == (0, "warning", "nothing is learnt")
    assert named(**flat | {"val__mel": rising(11.4, 9.0)}) == []


def test_a_validation_that_falls_apart_while_training_stands_is_said():
    # as it was where latents grew thirtyfold in 2000 updates: the averaged weights no longer fitted together
    fallen = {"val__snr_db": lambda x: 10.2 if x < 0.6 else -5.4, "val__amplitude_ratio": 2.74}
    blown = fallen | {"train__snr_db": rising(8.3, 8.9)}
    (finding,) = diagnose(History.from_rows(rows(**blown))).findings
    assert (finding.number, finding.level, finding.title) == (0, "warning", "validation left behind")
    assert "was 10.2 dB and is -5.4" in finding.evidence
    assert named(**blown | {"train__snr_db": rising(8.3, -4)}) == []  # training falls too: another matter
    assert named(**blown | {"val__snr_db": rising(10.2, 7)}) == []


def test_one_entry_in_every_codebook_is_a_collapse_and_few_in_a_young_one_are_watched():
    collapse = {"val__perplexity_0": 1.0, "val__perplexity_1": 1.01}
    assert named(**collapse) == [8]
    (finding,) = diagnose(History.from_rows(rows(val__perplexity_0=1.9))).findings
    assert (finding.number, finding.level, finding.title) == (0, "warning", "few codes in use yet")
    late = [row | {"step": row["step"] + 6000} for row in rows(val__perplexity_0=1.9)]
    assert diagnose(History.from_rows(late)).findings[0].level == "critical"


def test_filters_that_are_no_mel_filters_are_named_by_pure_tones():
    assert named(train__mel_off=0.35) == [15] and named(train__mel_off=0.03) == []


@pytest.mark.parametrize("changes", [
    {"train__input_rms": 0.0, "train__input_dc": 0.0, "train__input_silent": 1.0}, {"train__grad_z_signal": 0.0},
    {"val__wavlm_gain": 0.1, "train__grad_wavlm_to_1": 0.0, "train__grad_msspec_to_1": 0.1}, {"train__grad_norm_d": 0.0},
    {"train__mel": 0.0, "val__mel": 0.0}, {name.replace("/", "__"): 0.0 for name in HEALTHY},
])  # fmt: skip
def test_zeros_upset_no_rule(changes):
    diagnose(History.from_rows(rows(**changes)))


def test_typed_values_are_judged_by_the_sheet_and_unknown_figures_are_not_healthy(capsys):
    assert spoken(capsys, "llm=0.9")[0] == 2 and spoken(capsys, "recon=0", "vq=1", "amplitude=0.1")[0] == 2
    diagnosis = diagnose(History.from_rows([{"step": 6000, "foo": 2.0}]))
    assert diagnosis.verdict == "not yet" and diagnosis.unknown == ["foo"]
