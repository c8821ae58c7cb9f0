"""The zoo of failures: complete, readable, and every fault does what its failure is described by."""

import json
import math
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import speech_like, tiny_config

from codec.data import SegmentDataset, Utterance
from codec.health import Diagnosis, Finding
from codec.model import Codec

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks/failures"))
import curves  # noqa: E402
import zoo  # noqa: E402

DATA, OUT = Path("/data"), Path("/out")


def seconds(config) -> float:
    return config.total_steps * config.data.batch_size * config.data.segment_samples / config.model.sample_rate


# ------------------------------------------------------------------------------------ runs


def test_all_fifteen_failures_and_a_healthy_run_of_every_other_config_are_there():
    assert {failure.number for failure in zoo.FAILURES} == set(range(1, 16)) == set(zoo.PANELS)
    configs = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert set(zoo.HEALTHY) == configs - {"telugu_prescribed"}
    assert len(zoo.RUNS) == len(zoo.FAILURES) + len(zoo.HEALTHY)  # no name twice


@pytest.mark.parametrize("name", zoo.RUNS)
def test_every_run_has_a_config_of_its_own_that_is_valid_and_minutes_long(name):
    config = zoo.config_of(zoo.RUNS[name], DATA, OUT, 7)
    assert config.train.seed == 7 and config.model.sample_rate == 16000
    assert config.total_steps <= 600 and seconds(config) <= 4800
    assert config.total_steps % config.train.val_every == 0
    features = [teacher.features for teacher in (config.distill.llm, config.distill.wavlm) if teacher]
    places = [config.data.manifest, config.train.init_from, *features]
    assert all(place.startswith(("/data/", "/out/")) and "SEED" not in place for place in places if place)


@pytest.mark.parametrize("name", zoo.HEALTHY)
def test_a_healthy_run_keeps_the_weights_and_the_kind_of_losses_of_its_recipe(name):
    recipe = zoo.load_config(ROOT / "configs" / f"{name}.yaml")
    config = zoo.config_of(zoo.RUNS[name], DATA, OUT, 0)
    assert (config.losses, config.optim.betas, config.optim.lr_g) == (recipe.losses, recipe.optim.betas, recipe.optim.lr_g)
    sums = ("commit", "codebook") if name.startswith("dac") else ("whisper",)  # fewer codebooks to sum over; no recogniser
    kept = {key: value for key, value in vars(config.loss_weights).items() if key not in sums}
    assert kept == {key: value for key, value in vars(recipe.loss_weights).items() if key not in sums}


def test_failing_runs_differ_from_the_quickstart_only_where_their_overrides_or_faults_say():
    healthy = zoo.config_of(zoo.RUNS["quickstart"], DATA, OUT, 0)
    for failure in zoo.FAILURES:
        if failure.fault and failure.config == "quickstart" and failure.fault not in zoo.DAMAGES:
            config = zoo.config_of(failure, DATA, OUT, 0)
            assert config.model.encoder == healthy.model.encoder and config.data == healthy.data, failure.name


# ---------------------------------------------------------------------------------- faults


def encoder_gradient(term: str) -> float:
    """Norm of what a term sends into z of a fresh tiny quantizer; the same weights and z every time."""
    torch.manual_seed(3)
    codec = Codec(tiny_config().model)
    z = torch.randn(2, 16, 5, requires_grad=True)
    out = codec.quantizer(z)
    (out.z_q.sum() if term == "signal" else out.commit).backward()
    return z.grad.norm().item()


def test_the_gradient_fault_passes_n_times_the_signals_gradient_and_leaves_commitment_alone():
    right = encoder_gradient("signal"), encoder_gradient("commit")
    with zoo.gradient_n_times():
        wrong = encoder_gradient("signal"), encoder_gradient("commit")
    assert wrong == pytest.approx((3 * right[0], right[1]), rel=1e-5)
    assert encoder_gradient("signal") == right[0]  # undone


def test_the_commitment_fault_keeps_the_value_and_loses_all_gradients_but_the_firsts():
    def gradients() -> tuple[float, list[float]]:
        torch.manual_seed(3)
        codec = Codec(tiny_config().model)
        z = torch.randn(2, 16, 5, requires_grad=True)
        out = codec.quantizer(z)
        levels = [level for level in out.distances.unbind(1)]
        grads = [torch.autograd.grad(level.sum(), z, retain_graph=True)[0].norm().item() for level in levels]
        return out.commit.item(), grads

    value, grads = gradients()
    with zoo.commitment_of_the_first():
        wrong_value, wrong = gradients()
    assert all(grad > 0 for grad in grads)
    assert wrong_value == value and wrong == [grads[0], 0.0, 0.0]
    assert gradients() == (value, grads)


def test_the_output_fault_starts_beyond_full_scale_with_an_offset():
    with zoo.output_scale_3():
        codec = Codec(tiny_config().model)
    assert codec.decoder.to_wav[-1](torch.zeros(1)).item() == pytest.approx(-1.38, abs=0.01)  # as the real run's offset
    assert codec(torch.zeros(1, 1, 2000)).wav_hat.abs().max() > 1
    assert Codec(tiny_config().model)(torch.zeros(1, 1, 2000)).wav_hat.abs().max() < 1


def test_the_codebook_faults_start_tiny_and_far_away():
    quantizer = "model.quantizer={type: factorized, n_codebooks: 3, codebook_size: 16, codebook_dim: 8}"
    with zoo.tiny_codebooks():
        tiny = Codec(tiny_config([quantizer]).model).quantizer.codebooks
    assert tiny.abs().max() <= 1 / 16 < Codec(tiny_config([quantizer]).model).quantizer.codebooks.abs().max()
    codec = Codec(tiny_config().model)
    before = codec.quantizer.codebooks.clone()
    with zoo.far_codebooks():
        zoo.trainer.start_codebooks(codec, None, None, None)
    assert torch.equal(codec.quantizer.codebooks, 30 * before)
    assert torch.equal(codec.quantizer.ema_sum, codec.quantizer.codebooks)  # else the first EMA update brings them back


def test_the_mel_fault_gives_the_training_loss_filters_of_both_signs_and_leaves_the_measure_alone():
    wav = torch.from_numpy(speech_like(4000))[None, None]
    measure = zoo.trainer.metrics.mel_distance(wav, 0.5 * wav, 8000)
    with zoo.random_mel_filters():
        filters = zoo.losses.MelLoss(8000, [256], [20]).scales[0].filters
        assert torch.equal(zoo.trainer.metrics.mel_distance(wav, 0.5 * wav, 8000), measure)
    assert 0.4 < (filters < 0).float().mean() < 0.6
    assert (zoo.losses.MelLoss(8000, [256], [20]).scales[0].filters >= 0).all()


def test_one_segment_in_forty_is_nan_and_only_gradients_overflow_and_only_from_the_hundredth_update_on(tmp_path):
    sf.write(tmp_path / "a.wav", speech_like(4000), 8000)
    dataset = SegmentDataset([Utterance(tmp_path / "a.wav", "s", 4000)], 2000, 0)
    with zoo.nan_data():
        bad = [index for index in range(120) if dataset[index].isnan().all()]
        assert bad == [0, 40, 80] and dataset[1].isfinite().all()
    wav, overflows = torch.ones(1, 1, 4), []
    with zoo.inf_gradients():
        for update in range(1, 121):
            wav_hat = torch.zeros(1, 1, 4, requires_grad=True)
            loss = zoo.trainer.waveform_loss(wav, wav_hat)
            loss.backward()
            assert loss.item() == 1
            overflows += [] if wav_hat.grad.isfinite().all() else [update]
    assert overflows == [104, 108, 112, 116, 120]


def test_damaged_recordings_show_their_damage_and_duplicates_are_for_training_only(manifest, tmp_path):
    def statistics(kind: str, split: str) -> tuple[float, float, float, int]:
        lines = [json.loads(line) for line in (tmp_path / kind / "manifest.jsonl").read_text().splitlines()]
        wavs = [sf.read(tmp_path / kind / line["path"], dtype="float32")[0] for line in lines if line["split"] == split]
        assert [len(wav) for wav in wavs] == [line["n_samples"] for line in lines if line["split"] == split]
        flat = np.mean([np.mean(np.abs(wav) >= 0.98) for wav in wavs])
        return (flat, np.mean([not wav.any() for wav in wavs]), np.mean([wav.mean() for wav in wavs]),
                len({wav.tobytes() for wav in wavs}))  # fmt: skip

    many = manifest.parent / "many.jsonl"  # of which a tenth is taken
    many.write_text("".join(10 * f"{line}\n" for line in manifest.read_text().splitlines()))
    for kind in zoo.DAMAGES:
        zoo.damage(kind, many, tmp_path / kind)
    assert statistics("clipped", "train")[0] > 0.02 > statistics("shifted", "train")[0]
    assert statistics("silent", "train")[1] == 0.8
    assert statistics("shifted", "val")[2] == pytest.approx(0.2, abs=0.02)
    assert [statistics(kind, "train")[3] for kind in ("shifted", "duplicated")] == [10, 3]
    assert [statistics(kind, "val")[3] for kind in ("shifted", "duplicated")] == [2, 2]


# ---------------------------------------------------------------------------------- report


def diagnosis(step: int, *numbers: int) -> Diagnosis:
    findings = [Finding(number, f"title {number}", "critical", 0.9, "evidence", "mend") for number in numbers]
    return Diagnosis(step, "critical" if numbers else "healthy", [], findings, [])


def test_a_failure_counts_as_named_where_it_leads_the_findings_and_not_before():
    told = zoo.Told([], [diagnosis(50), diagnosis(100, 8, 3), diagnosis(150, 3, 8), diagnosis(200, 3)])
    assert told.first(3) == 150 and told.first(8) == 100 and told.first(5) == math.inf
    assert told.titles("critical") == ["title 3", "title 8"]


def test_the_tables_tell_what_was_named_when_and_what_a_healthy_run_was_accused_of():
    rows = [{"step": 400, "train/total_steps_step": 4000}]
    told = {"codebook_collapse_0": zoo.Told(rows, [diagnosis(50, 1), diagnosis(100, 8)]),
            "telugu_0": zoo.Told(rows, [diagnosis(50, 6), diagnosis(300)])}  # fmt: skip
    (line,) = [line for line in zoo.failure_table(told)[2:]]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:6] == ["8", "codebook_collapse_0", "100", "100", "400", "1"]
    (line,) = [line for line in zoo.healthy_table(told)[2:]]
    assert [cell.strip() for cell in line.strip("|").split("|")] == ["telugu_0", "300", "healthy", "title 6", "–"]


def test_the_doctor_is_asked_after_every_validation_with_the_log_up_to_it(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(zoo, "diagnose", lambda history: asked.append(history.step) or diagnosis(history.step))
    lines = [{"step": step, "time": 0.0, "train/mel_step": 1.0} for step in (10, 20, 30, 40)]
    lines[1:1] = [{"step": 10, "time": 0.0, "val/mel_step": 5.0}]
    lines.append({"step": 40, "time": 0.0, "val/mel_step": 4.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [d.step for d in zoo.consult(tmp_path).diagnoses] == asked == [10, 40]


def points(svg: str, colour: str) -> list[list[tuple[float, float]]]:
    lines = [node for node in ElementTree.fromstring(svg).iter() if node.tag.endswith("polyline")]
    return [[tuple(map(float, pair.split(","))) for pair in node.get("points").split()]
            for node in lines if node.get("stroke") == colour]  # fmt: skip


def test_a_picture_is_well_formed_and_a_rising_curve_rises_with_a_gap_where_a_value_is_missing():
    steps = np.arange(6) * 10
    panels = {"a & <b>": {"failing": (steps, np.array([0, 1, 2, np.nan, 4, 5.0])), "healthy": (steps, np.zeros(6))},
              "empty": {"failing": (np.zeros(0, int), np.zeros(0))}}  # fmt: skip
    svg = curves.draw(panels, "title & more", [(20, "named")])
    before, after = points(svg, curves.COLOURS[0])
    assert [len(before), len(after)] == [3, 2]
    xs, ys = zip(*before, *after)
    assert list(xs) == sorted(xs) and list(ys) == sorted(ys, reverse=True)  # y points downward
    assert np.diff(xs[:3]) == pytest.approx(curves.PANEL_WIDTH / 5, abs=0.1)
    assert len(points(svg, curves.GREY)) == 1
    assert any(np.allclose(line, [(before[2][0], curves.TOP), (before[2][0], curves.TOP + curves.PANEL_HEIGHT)])
               for line in points(svg, curves.INK))  # fmt: skip


@pytest.mark.parametrize("values", [[1e-3, 2.0, 1e4], [5.0, 5.0], [-1.4, 0.0], [1e5, 1.00001e5], [0.0, 0.0]], ids=str)
def test_ticks_are_few_distinct_and_enclose_the_values(values):
    values = np.array(values)
    ticks = curves._ticks(values, bool(values.min() > 0 and values.max() > 100 * values.min()))
    assert 2 <= len(ticks) <= 7 and len(set(ticks)) == len(ticks)
    assert ticks[0] <= values.min() and values.max() <= ticks[-1]
