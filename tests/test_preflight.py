"""What is said before a run: data with known faults, arithmetic by hand, bounds in closed form, forecasts by counting."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import speech_like, tiny_config

from codec import preflight
from codec.audio import read_segment, resample_array
from codec.data import Utterance, read_manifest
from codec.preflight import (
    Check,
    Cost,
    bandwidth_hz,
    check_arithmetic,
    check_config,
    check_data,
    check_precision,
    check_resources,
    envelope,
    flat_samples,
    measure,
    render,
    seconds_until,
    snr_bound_db,
)
from train_codec_gan import rehearse, train

LONG_FILES = [Utterance(Path(f"{i}.wav"), f"s{i % 9}", 2 * 3600 * 8000) for i in range(36)]


def found(checks: list[Check], word: str) -> Check:
    """The one check whose message has a word."""
    matching = [check for check in checks if word in check.message]
    assert len(matching) == 1, [check.message for check in checks]
    return matching[0]


def write(folder: Path, name: str, wav: np.ndarray, speaker: str = "s", n_samples: int = 0) -> Utterance:
    sf.write(folder / f"{name}.wav", wav, 8000, subtype="PCM_16")
    return Utterance(folder / f"{name}.wav", speaker, n_samples or len(wav), f"{name}.wav")


def clean(n_seconds: float, seed: int) -> np.ndarray:
    """Speech-like, at -16 dB or so, and with something in every band."""
    wav = speech_like(round(8000 * n_seconds), seed=seed)
    return (wav + 0.01 * np.random.default_rng(seed).standard_normal(len(wav))).astype(np.float32)


@pytest.fixture(scope="module")
def clean_split(tmp_path_factory) -> list[Utterance]:
    folder = tmp_path_factory.mktemp("clean")
    return [write(folder, f"{i}", clean(2 + 0.5 * i, seed=i), f"s{i}") for i in range(12)]


def signal_of(tmp_path: Path, wavs: list[np.ndarray]) -> list[Check]:
    return check_data([write(tmp_path, f"x{i}", wav, f"s{i}") for i, wav in enumerate(wavs)], [], [], 8000, 600)


def test_speech_of_another_level_than_the_model_will_hear_is_named_with_both_mends(clean_split, tmp_path):
    plain = found(check_data(clean_split, [], [], 8000, 600), "dB RMS")
    level = float(plain.message.split()[1])
    assert plain.level == "ok"  # nothing is wrong with it by itself
    check = found(check_data(clean_split, [], [], 8000, 600, level_db=level + 6), "dB RMS")
    assert check.level == "warning" and f"model.level_db={level + 6:g}" in check.message
    assert f"--target_db {level + 6:g}; or set model.level_db" in check.mend
    assert found(check_data(clean_split, [], [], 8000, 600, level_db=level + 1), "dB RMS").level == "ok"
    quiet = [write(tmp_path, f"q{i}", clean(3, seed=i) / 8, f"s{i}") for i in range(6)]
    assert found(check_data(quiet, [], [], 8000, 600), "dB RMS").level == "warning"
    assert found(check_data(quiet, [], [], 8000, 600, level_db=round(level - 18)), "dB RMS").level == "ok"  # where it is to be
    uneven = quiet + [write(tmp_path, f"u{i}", clean(3, seed=i), f"u{i}") for i in range(3)]
    uneven += [write(tmp_path, f"v{i}", clean(3, seed=i) / 20, f"v{i}") for i in range(3)]
    assert found(check_data(uneven, [], [], 8000, 600, level_db=round(level - 18)), "dB RMS").level == "warning"


# ------------------------------------------------------------------------- arithmetic


def test_an_epoch_of_36_files_is_named_with_its_steps_and_what_to_set():
    sizes = ["data.segments_per_epoch=36", "data.batch_size=16"]
    config = tiny_config([*sizes, "phases.0.steps=51", "phases.1.steps=50"])  # 45 epochs x 36 / 16 = 101.25
    check = found(check_arithmetic(config, LONG_FILES, []), "an epoch of")
    assert check.level == "warning" and "\n" not in check.message + check.mend
    assert "an epoch of 36 segments in batches of 16 is 2.25 steps" in check.message
    assert "h): 45 epochs are about 100 steps" in check.message
    assert "data.segments_per_epoch=16000" in check.mend and "phases of 100,000 steps and more" in check.mend


def test_an_epoch_of_a_hundred_steps_and_a_long_run_pass():
    config = tiny_config(["data.segments_per_epoch=400", "phases.1.steps=5000"])
    checks = check_arithmetic(config, LONG_FILES, [])
    assert found(checks, "an epoch of").level == "ok" and found(checks, "published").level == "ok"


@pytest.mark.parametrize(("cpu", "device", "precision", "warns"), [
    ({"avx512_bf16": False, "amx_bf16": False}, "cpu", "bf16", True), ({"avx512_bf16": True}, "cpu", "bf16", False),
    ({}, "cuda", "bf16", False), ({}, "cpu", "fp32", False),
])  # fmt: skip
def test_bf16_is_warned_of_on_a_cpu_that_has_no_instructions_for_it(cpu, device, precision, warns, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", **cpu}, raising=False)
    checks = check_precision(precision, torch.device(device))
    assert [check.mend for check in checks] == ["train.precision=fp32"] * warns


def test_audio_seen_is_counted_in_hours_and_times_over_the_data():
    config = tiny_config(["phases.0.steps=0", "phases.1.steps=3600"])  # 3600 x 4 x 0.25 s = 1 h
    checks = check_arithmetic(config, [Utterance(Path("a"), "s", 8000 * 1800)], [])
    assert "3,600 steps of 4 x 0.25 s see 1.00 h of audio, 2 times over the data" in checks[0].message


@pytest.mark.parametrize("overrides, level", [([], "warning"), (["train.init_from=runs/a"], "ok")])
def test_few_steps_are_too_few_only_from_scratch(overrides, level):
    check = found(check_arithmetic(tiny_config(overrides), LONG_FILES, []), "published")
    assert check.level == level and "DAC 400,000 steps, 3,040 h" in check.message  # 400,000 x 72 x 0.38 s


@pytest.mark.parametrize("codebook_size, level, strong", [(400, "ok", False), (401, "warning", False), (1601, "warning", True)])
def test_frames_of_an_update_are_compared_with_codebook_entries(codebook_size, level, strong):
    sizes = [f"model.quantizer.codebook_size={codebook_size}", "model.quantizer.kmeans_frames=9000"]
    check = found(check_arithmetic(tiny_config(sizes), LONG_FILES, []), "latent frames")  # 4 x 2000 / 20 = 400
    assert check.level == level and ("most get no frame" in check.message) == strong
    if level == "warning":
        assert f"data.batch_size={math.ceil(codebook_size / 100)} " in check.mend
        frozen = tiny_config([*sizes, "train.freeze=[encoder, quantizer]"])  # codebooks that learn nothing need no frames
        assert found(check_arithmetic(frozen, LONG_FILES, []), "latent frames").level == "ok"


def test_a_segment_shorter_than_the_receptive_field_is_named():
    assert found(check_arithmetic(tiny_config(), LONG_FILES, []), "receptive").level == "ok"
    short = ["model.encoder.dilations=[1,3,9]", "data.segment_samples=400"]
    check = found(check_arithmetic(tiny_config(short), LONG_FILES, []), "receptive")
    reach = 6 + 6 * 13 + 7 + 4 * (6 * 13 + 9) + 20 * 2 + 1  # layer by layer: kernel - 1 times dilation times stride so far
    assert check.level == "warning" and f"{reach / 8000:.2f} s of a segment of 0.05 s" in check.message


def test_an_lstm_has_no_receptive_field_and_that_is_said():
    check = found(check_arithmetic(tiny_config(["model.encoder.lstm_layers=1"]), LONG_FILES, []), "receptive")
    assert check.level == "ok" and "LSTM without limit" in check.message


# -------------------------------------------------------------------- bound on the SNR


def test_white_noise_is_bounded_by_six_db_a_bit():
    noise = [np.random.default_rng(1).standard_normal(512 * 300).astype(np.float32)]
    bounds = [snr_bound_db(noise, 16000, bits * 16) for bits in (1, 2, 4)]
    assert bounds == pytest.approx([6.02, 12.04, 24.08], abs=0.6)
    raw = np.abs(np.fft.rfft(noise[0].reshape(-1, 512))[:, 1:]) ** 2  # wrong: a periodogram gives chance away free too
    assert 10 * math.log10(raw.mean() / np.exp(np.log(raw).mean())) > 2  # so much it would promise at any rate


def test_two_bands_are_bounded_as_computed_by_hand():
    """Half the components 40 dB above the others: at 1 bit a sample, the loud half gets 2 bits and the rest nothing."""
    rng = np.random.default_rng(2)
    spectrum = np.fft.rfft(rng.standard_normal(320_000))
    spectrum[len(spectrum) // 2 :] *= 0.01
    wav = np.fft.irfft(spectrum).astype(np.float32)
    by_hand = 10 * math.log10((1 + 1e-4) / (2**-4 + 1e-4))  # 12.03 dB
    alike = 10 * math.log10(4)  # wrong: 1 bit for every component
    bound = snr_bound_db([wav], 16000, 16)
    assert bound == pytest.approx(by_hand, abs=0.7) and bound > alike + 4
    later = 10 * math.log10((1 + 1e-4) / (2 * 10 ** -((40 + 6.02) / 10)))  # 40 dB takes 6.64 bits; one more for either half
    assert snr_bound_db([wav], 16000, 16 * (6.644 / 2 + 1)) == pytest.approx(later, abs=0.7)


def test_the_envelope_has_as_many_components_as_samples_and_their_power():
    noise = np.random.default_rng(3).standard_normal(80_000).astype(np.float32)
    variances = envelope(noise, 16000)
    assert len(variances) == pytest.approx(len(noise), rel=0.01)
    assert variances.mean() / (np.hanning(513)[:-1] ** 2).sum() == pytest.approx(1, rel=0.02)


def test_bits_go_to_where_the_sound_is():
    """Half of the time silent: as good as twice the bitrate for the rest."""
    noise = np.random.default_rng(4).standard_normal(80_000).astype(np.float32)
    assert snr_bound_db([noise, 0 * noise], 16000, 16) == pytest.approx(snr_bound_db([noise], 16000, 32), abs=0.1)


# ------------------------------------------------------------------------------- data


def test_clean_data_draws_no_remark_but_its_amount(clean_split):
    checks = check_data(clean_split, clean_split[:0] + [clean_split[0]._replace(path=clean_split[0].path)], [], 8000, 600)
    assert [check.message for check in checks if check.level != "ok" and "minutes" not in check.message
            and "another split" not in check.message] == []  # fmt: skip
    assert "12 utterances, 12 speakers" in checks[0].message


def test_amount_is_judged():
    checks = check_data([Utterance(Path("none.wav"), "one", 8000)], [], [], 8000, 60)
    assert {found(checks, word).level for word in ("minutes", "speakers: other", "no val")} == {"warning"}
    assert check_data([], [], [], 8000, 60)[0].level == "stop"


@pytest.mark.parametrize("gain", [1.0, 0.25])
def test_clipping_is_found_whatever_was_done_to_the_level_afterwards(tmp_path, gain):
    wavs = [np.clip(4 * clean(3, seed=i), -0.6, 0.6) * np.float32(gain) for i in range(6)]
    check = found(signal_of(tmp_path, wavs), "clipped")
    assert check.level == "warning" and "x" in check.message
    assert not any((np.abs(wav) >= 0.999).any() for wav in wavs)  # wrong: to look at full scale only


def test_one_clipped_side_is_enough_and_round_tops_are_none():
    t = np.arange(8000)
    sine = np.round(0.5 * 32768 * np.sin(2 * np.pi * 50 * t / 8000)) / 32768
    assert (np.abs(sine) >= 0.999 * 0.5).sum() >= 300  # wrong: to count what is near the peak
    assert flat_samples(sine) == 0
    assert flat_samples(np.minimum(sine, 0.4)) > 1000 and flat_samples(np.maximum(sine, -0.4)) > 1000
    assert flat_samples(np.zeros(8000)) == 0


def test_audio_upsampled_from_half_the_rate_is_named(tmp_path):
    upsampled = [resample_array(clean(3, seed=i), 4000, 8000) for i in range(2)]
    assert 1800 < bandwidth_hz(upsampled[0], 8000) < 2200 and bandwidth_hz(clean(3, seed=0), 8000) > 3800
    checks = signal_of(tmp_path, upsampled + [clean(3, seed=i) for i in range(8)])
    check = found(checks, "bandwidth")
    assert check.level == "warning" and "x0.wav" in check.message or "x1.wav" in check.message
    assert "40 % of the pieces" not in check.message


def test_dc_silence_and_level_are_named(tmp_path):
    shifted = signal_of(tmp_path, [clean(3, seed=i) + np.float32(0.02) for i in range(6)])
    assert found(shifted, "DC offset").level == "warning" and "100 %" in found(shifted, "DC offset").message
    quiet = signal_of(tmp_path, [0.02 * clean(3, seed=i) for i in range(6)])
    assert found(quiet, "RMS").level == "warning"
    pauses = [np.concatenate([clean(1, seed=i), np.zeros(16000, np.float32)]) for i in range(6)]
    check = found(signal_of(tmp_path, pauses), "silent")
    assert check.level == "warning" and 60 < float(check.message.split()[1]) < 80
    assert any(c.level == "stop" and "silent" in c.message for c in signal_of(tmp_path, [np.zeros(24000, np.float32)]))


def test_copies_and_leaks_are_found_by_content_and_not_by_length(tmp_path, clean_split):
    same_length = [write(tmp_path, f"other{i}", clean(2, seed=50 + i)) for i in range(4)]
    copy = write(tmp_path, "copy", read_segment(clean_split[3].path, 0, 10**6))
    leak = write(tmp_path, "leak", read_segment(clean_split[5].path, 0, 10**6))
    train = [*clean_split, *same_length]
    checks = check_data(train, same_length[:0], [], 8000, 600)
    assert found(checks, "copies").message.startswith("0 ") and found(checks, "another split").level == "ok"
    checks = check_data([*train, copy], [leak, *[write(tmp_path, f"v{i}", clean(2, 90 + i)) for i in range(3)]], [], 8000, 600)
    copies, leaks = found(checks, "copies"), found(checks, "another split")
    assert copies.level == "warning" and copies.message.startswith("1 ") and "3.wav and copy.wav" in copies.message
    assert leaks.level == "stop" and leaks.message.startswith("25 %") and "5.wav and leak.wav" in leaks.message


def test_utterances_that_share_their_first_second_only_are_no_copies(tmp_path):
    jingle = clean(1.5, seed=7)
    ads = [write(tmp_path, f"a{i}", np.concatenate([jingle, clean(2, seed=20 + i)])) for i in range(3)]
    assert found(check_data(ads, [], [], 8000, 600), "copies").message.startswith("0 ")


def test_utterances_that_are_silent_in_the_middle_are_no_copies(tmp_path):
    gap = np.zeros(4000, np.float32)
    pauses = [write(tmp_path, f"p{i}", np.concatenate([clean(1, seed=i), gap, clean(1, seed=i + 9)])) for i in range(3)]
    assert found(check_data(pauses, [], [], 8000, 600), "copies").message.startswith("0 ")


def test_leaks_are_looked_for_before_copies_where_not_all_can_be_compared(tmp_path):
    many = [write(tmp_path, f"u{i}", clean(1, seed=i)) for i in range(60)]
    twins = [write(tmp_path, f"twin{i}", clean(1.5, seed=99)) for i in range(2)]
    checks = preflight.check_copies([*many, twins[0]], [twins[1]], [], 8000, 1.0)
    leaks = found(checks, "another split")
    assert leaks.level == "stop" and "42 utterances not compared" in leaks.message


def test_no_more_audio_is_read_than_allowed(tmp_path, monkeypatch):
    long = [write(tmp_path, f"long{i}", clean(40, seed=i)) for i in range(2)]
    many = [write(tmp_path, f"u{i}", clean(1, seed=9)) for i in range(60)]  # all alike
    read = []
    monkeypatch.setattr(preflight, "read_segment", lambda path, start, n: read.append(n) or read_segment(path, start, n))
    check_data(long, [], [], 8000, 24)
    assert 12 <= sum(read) / 8000 <= 24
    read.clear()
    checks = preflight.check_copies(many, [], [], 8000, 1.0)
    assert read.count(400) == 20 and "40 utterances not compared" in found(checks, "copies").message


def test_the_sample_is_spread_over_all_of_a_long_file(tmp_path):
    silence_then_speech = write(tmp_path, "a", np.concatenate([np.zeros(80_000), clean(10, seed=1)]))
    pieces, _ = preflight.read_pieces([silence_then_speech], 8000, 12)
    assert len(pieces) == 4 and [wav.std() > 0 for _, wav in pieces] == [False, False, True, True]


def test_files_that_are_cut_or_missing_are_findings_not_errors(tmp_path, clean_split):
    cut = write(tmp_path, "cut", clean(1, seed=3), n_samples=30_000)
    check = found(check_data([*clean_split, cut], [], [], 8000, 600), "cannot be read")
    assert check.level == "stop" and "cut.wav: ends at sample 8000" in check.message


# ----------------------------------------------------------------------------- config


def test_a_term_that_will_be_drowned_is_named_with_the_weight_that_saves_it():
    grads = {"wave": 0.0005, "mel": 0.2, "feat": 0.1, "adv": 1e-6, "z_signal": 1.0, "z_commit": 0.1}
    checks = check_config(tiny_config(), grads, phase=1)
    (check,) = [check for check in checks if check.level != "ok"]
    assert check.message == "wave will be drowned: its gradient is 0.25 % of mel's"
    assert "loss_weights.wave=40 " in check.mend  # 1.0 x 0.1 x 0.2 / 0.0005


def test_one_large_term_or_a_term_without_weight_is_no_problem():
    grads = {"mel": 3.0, "wave": 0.04, "msspec": 1e-9, "z_signal": 1.0, "z_commit": 2.9}
    assert {check.level for check in check_config(tiny_config(), grads)} == {"ok"}
    assert {check.level for check in check_config(tiny_config(["losses.balancer=true"]), grads | {"wave": 1e-6})} == {"ok"}


FACTORIZED = ["model.quantizer={type: factorized, n_codebooks: 2, codebook_size: 16, codebook_dim: 4}"]
NO_RECONSTRUCTION = ["loss_weights.mel=0", "loss_weights.wave=0", "phases=[{name: a, steps: 9}]"]


@pytest.mark.parametrize(
    "overrides, grads, level, word",
    [
        ([], {"z_signal": 1e-5, "z_commit": 1e-4}, "warning", "commitment pulls 10 times"),
        ([], {"wave": math.nan}, "stop", "wave is not finite"),
        (NO_RECONSTRUCTION, {}, "warning", "adversarial from the first step"),
        (FACTORIZED, {}, "stop", "codebook=0"),
        (["loss_weights.commit=0"], {}, "warning", "commit=0"),
        (["optim.lr_g=0.004"], {}, "warning", "lr_g=0.004"),
        (["optim.max_grad_norm_d=2000", "phases.0.set={}"], {}, "warning", "max_grad_norm_d=2000"),
    ],
)
def test_settings_that_have_ended_runs_are_named(overrides, grads, level, word):
    (check,) = [check for check in check_config(tiny_config(overrides), grads) if check.level != "ok"]
    assert check.level == level and word in check.message and check.mend


def test_adversarial_only_is_fine_from_weights_that_exist():
    checks = check_config(tiny_config([*NO_RECONSTRUCTION, "train.init_from=runs/a"]), {})
    assert {check.level for check in checks} == {"ok"}


# -------------------------------------------------------------------------- resources


def simulated(config, cost: Cost, limit_s: float = math.inf) -> tuple[float, int]:
    """Seconds and steps of the loop as the trainer runs it."""
    passed, step = 0.0, 0
    for phase, step_s in zip(config.phases, cost.step_s):
        for _ in range(phase.steps):
            step, passed = step + 1, passed + step_s
            stop = passed >= limit_s
            if step % config.train.val_every == 0 or step == config.total_steps:
                passed += cost.validation_s
            if stop or passed >= limit_s:
                return passed, step
    return passed, step


@pytest.mark.parametrize("steps, val_every", [((3, 5), 4), ((10, 7), 5), ((0, 9), 100)])
def test_the_forecast_is_what_counting_the_loop_gives(steps, val_every):
    config = tiny_config([f"phases.0.steps={steps[0]}", f"phases.1.steps={steps[1]}", f"train.val_every={val_every}"])
    cost = Cost([0.5, 2.0], 7.0, 2**20)
    assert seconds_until(config, cost, config.total_steps) == pytest.approx(simulated(config, cost)[0])


def test_price_and_the_step_at_which_the_time_is_up():
    config = tiny_config(["phases.0.steps=3000", "phases.1.steps=2000", "train.val_every=500", "train.max_minutes=30"])
    cost = Cost([0.5, 2.0], 30.0, 2**20)
    step = simulated(config, cost, 1800)[1]
    checks = check_resources(config, cost, 3_000_000, price_per_hour=2.5)
    assert f"30.0 min for {step:,} steps, 1.25 at 2.5 an hour" in checks[0].message
    assert f"ends the run at step {step:,} of 5,000" in found(checks, "max_minutes").message
    assert found(checks, "max_minutes").level == "warning"
    free = check_resources(tiny_config(["phases.0.steps=3000", "phases.1.steps=2000", "train.val_every=500"]), cost, 3_000_000)
    assert free[0].message == "1.6 h for 5,000 steps" and {check.level for check in free} == {"ok"}  # 1500 + 4000 + 300 s


def test_what_the_forecast_leaves_out_is_said():
    config = tiny_config()
    config = replace(config, train=replace(config.train, refit_frames=2000))
    first = check_resources(config, Cost([0.1, 0.2], 1.0, 2**20), 3_000_000)[0].message
    assert first.endswith("; fitting codebooks to 2,000 latents before them is not counted")


def test_memory_that_does_not_fit_is_named():
    check = found(check_resources(tiny_config(), Cost([0.1, 0.1], 1.0, 2**50), 3_000_000), "memory")
    assert check.level == "warning" and "batch_size" in check.mend


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when told."""
    now = [0.0]
    monkeypatch.setattr(preflight.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return now


def test_what_the_loader_had_read_ahead_does_not_flatter_the_forecast(clock):
    config = tiny_config(["data.n_workers=3", "phases.0.steps=10000"])
    taken = []

    def take_step(phase: int) -> dict:
        """Computes 0.1 s; a worker takes 1.5 s a batch, so three batches come at once every 1.5 s, but 12 are ready."""
        starved = len(taken) >= 12 and len(taken) % 3 == 0
        clock[0] += 1.5 - 0.2 if starved else 0.1
        taken.append(clock[0])
        return {}

    cost = measure(config, take_step, lambda: None, lambda: None, n_steps=6)
    assert cost.step_s == pytest.approx([0.5, 0.5], rel=0.1)
    early = np.diff(taken[1:9])  # wrong: the six steps after two for warming up
    assert np.median(early) < 0.15 and np.median(np.diff(taken[-9:])) < 0.15  # wrong: a median


def test_first_steps_of_a_phase_are_not_counted_and_empty_phases_not_run(clock):
    config = tiny_config(["phases.0.steps=0", "data.n_workers=0"])
    phases = []

    def take_step(phase: int) -> dict:
        phases.append(phase)
        clock[0] += 20.0 if len(phases) <= 2 else 3.0
        return {}

    validations = []

    def take_validation() -> None:
        validations.append(1)
        clock[0] += 30.0 if len(validations) == 1 else 11.0

    def take_save() -> None:
        clock[0] += 2.0

    cost = measure(config, take_step, take_validation, take_save)
    assert cost.step_s == [0.0, 3.0] and cost.validation_s == 11.0 and cost.save_s == 2.0 and phases == 8 * [1]
    assert 2**20 < cost.peak_bytes < 2**40


# ----------------------------------------------------------------------------- report


def test_the_report_fits_a_terminal_and_the_brief_form_has_what_matters(manifest):
    config = tiny_config(manifest=manifest)
    train, val = (read_manifest(manifest, split, 8000) for split in ("train", "val"))
    wavs = [wav for _, wav in preflight.read_pieces(train, 8000, 60)[0]]
    checks = check_data(train, val, [], 8000, 60) + check_arithmetic(config, train, wavs) + check_config(config, {})
    checks += check_resources(config, Cost([0.1, 0.2], 1.0, 2**20), 3_000_000)
    full, brief = render(checks, brief=False), render(checks, brief=True)
    assert max(map(len, (full + "\n" + brief).splitlines())) <= 120
    assert [line for line in full.splitlines() if line[0] != " "] == ["data", "arithmetic", "config", "resources"]
    assert full.count("\n  warning  ") == brief.count("\n  warning  ") == sum(check.level == "warning" for check in checks)
    assert "  ok       " in full and "  ok  " not in brief
    summary = " ".join(brief.split("\n  warning")[0].split())
    assert "to train on" in summary and "8 steps of 4 x 0.25 s see" in summary and "min for 8 steps" in summary


def test_a_stop_is_written_large():
    assert render([Check("data", "stop", "no data", "make some")], brief=True).endswith("  STOP     no data -> make some")


# ---- in the training script ---------------------------------------------------------------------------------


def test_the_script_rehearses_every_phase_says_what_it_costs_and_writes_nothing(manifest, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = rehearse(tiny_config(["data.n_workers=0"], manifest), torch.device("cpu"), 3.0)
    said = capsys.readouterr().out
    assert code == 0 and "STOP" not in said and not list(tmp_path.iterdir())
    assert all(text in said for text in ("phase warm-up: gradients at the output wave", "phase adversarial", "at 3 an hour",
                                         "8 steps of 4 x 0.25 s"))  # fmt: skip


def test_the_rehearsal_looks_at_the_level_that_the_model_will_hear(manifest, capsys):
    assert rehearse(tiny_config(["data.n_workers=0", "model.level_db=-50"], manifest), torch.device("cpu"), 0.0) == 0
    assert "what is to be coded will be brought to model.level_db=-50" in " ".join(capsys.readouterr().out.split())


def test_a_run_that_should_not_be_started_has_exit_code_1(manifest, capsys):
    overrides = ["model.quantizer={type: factorized, n_codebooks: 2, codebook_size: 16, codebook_dim: 4}", "data.n_workers=0"]
    assert rehearse(tiny_config(overrides, manifest), torch.device("cpu"), 0.0) == 1
    assert "STOP     loss_weights.codebook=0" in capsys.readouterr().out


def test_every_run_begins_with_the_brief_form(manifest, tmp_path, capfd):
    train(tiny_config(["phases=[{name: a, steps: 1}]"], manifest), tmp_path, False, torch.device("cpu"))
    said = capfd.readouterr().err
    assert said.startswith("preflight: ") and "1 steps of 4 x 0.25 s" in said and "minutes are learnt by heart" in said


def test_cuts_that_begin_and_go_on_in_digital_silence_are_no_copies(tmp_path):
    utterances = []
    for i in range(4):
        wav = np.zeros(24000, np.float32)
        wav[20000:] = speech_like(4000, seed=i)
        sf.write(tmp_path / f"{i}.wav", wav, 8000, subtype="PCM_16")
        utterances.append(Utterance(tmp_path / f"{i}.wav", "s", 24000))
    checks = preflight.check_copies(utterances[:3], utterances[3:], [], 8000, 60)
    assert [check.level for check in checks] == ["ok", "ok"]


def test_the_share_of_copies_is_of_those_compared(tmp_path):
    for i in range(3):
        sf.write(tmp_path / f"{i}.wav", speech_like(8000, seed=i), 8000, subtype="PCM_16")
    utterances = [Utterance(tmp_path / f"{i % 3}.wav", "s", 8000) for i in range(600)]
    assert preflight.copied_share(utterances, 8000, 5) > 0.9  # 5 s are a hundred comparisons
    assert preflight.copied_share(utterances[:3], 8000, 5) == 0
