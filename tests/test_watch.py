"""What the doctor sees of an update: against hand computation, and told apart from the known wrong quantizers."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import speech_like, tiny_config

from codec.config import phase_config
from codec.losses import MelLoss
from codec.model import Codec
from codec.runlog import read_metrics
from codec.rvq import EMAResidualVQ
from codec.watch import CodebookWatch, gradient_figures, mel_off, over_interval, sound_figures
from train_codec_gan import build, train, train_step

SPLIT = ["model.quantizer.n_semantic=1", "model.quantizer.n_prosodic=1"]
QUANTIZERS = [
    [], SPLIT, [*SPLIT, "model.quantizer.semantic_inputs=own", "model.quantizer.semantic_blocks=1",
                "model.quantizer.semantic_layer_scale=0.5"],
    [*SPLIT, "model.quantizer.semantic_gradient=0", "model.quantizer.semantic_to_encoder=0.2"],
    ["model.quantizer={type: factorized, n_codebooks: 3, codebook_size: 16, codebook_dim: 4}"],
    ["model.quantizer={type: factorized, n_codebooks: 3, codebook_size: 16, codebook_dim: 4, dropout: 1.0}"],
    [*SPLIT, "model.quantizer.n_codebooks=5", "model.quantizer.dropout=1", "model.quantizer.bypass=0.5"],
    [*SPLIT, "model.quantizer.n_codebooks=4", "model.quantizer.semantic_to_encoder=0"],
]  # fmt: skip


def watched(overrides, forward=None):
    codec = Codec(tiny_config(overrides).model).train()
    wav = torch.from_numpy(np.stack([speech_like(2000, seed=i) for i in range(4)]))[:, None]
    if forward:
        codec.quantizer.forward = forward.__get__(codec.quantizer)
    out = codec(wav)
    terms = {"wave": 3 * (wav - out.wav_hat).abs().mean(), "power": out.wav_hat.square().mean()}
    return gradient_figures(terms, out.quantized.commit, out, codec.quantizer), out, wav, codec


@pytest.mark.parametrize("overrides", QUANTIZERS)
def test_every_quantizer_passes_the_gradient_it_should(overrides):
    log, out, wav, _ = watched(overrides)
    assert log["ste_gain"].item() == pytest.approx(1, abs=1e-3)
    assert log["grad_out_wave"].item() == pytest.approx(3 / np.sqrt(wav.numel()), rel=1e-4)  # of a mean of absolute values
    assert log["grad_out_power"].item() == pytest.approx(2 * out.wav_hat.norm().item() / wav.numel(), rel=1e-4)
    assert log["grad_z_signal"] > 0 and log["grad_z_commit"] > 0
    assert log.get("commit_reach", 1) > 0.01


def test_the_adversary_is_weighed_against_all_other_terms_together():
    _, out, wav, codec = watched([])
    y = out.wav_hat
    terms = {"adv": -3 * y.sum(), "feat": 4 * y[0].sum(), "wave": 2 * y.sum(), "mel": 3 * y.sum()}
    n, log = y[0].numel(), gradient_figures(terms, out.quantized.commit, out, codec.quantizer)
    expected = np.sqrt(n * 1**2 + 3 * n * 3**2) / np.sqrt(4 * n * 5**2)  # signs count: the terms may pull against each other
    assert log["adversary_ratio"].item() == pytest.approx(expected, rel=1e-5)
    alone = gradient_figures({"adv": terms["adv"]}, out.quantized.commit, out, codec.quantizer)
    assert "adversary_ratio" not in alone | watched([])[0]


def summed(live: bool):
    """The two known wrong forms: each step's estimator summed over a detached residual, or over a live one."""

    def forward(self: EMAResidualVQ, z, n_codebooks=None):
        right = EMAResidualVQ.forward(self, z, n_codebooks)
        residual, z_q, distances = self.project_in(z.transpose(1, 2)), 0, []
        for i, book in enumerate(self.codebooks):
            q = F.embedding(right.codes[:, i], book)
            distances.append((residual - q).square().mean((1, 2)))
            ste = residual + (q - residual).detach()
            z_q = z_q + ste
            residual = residual - (ste if live else q.detach())
        return right._replace(z_q=self.project_out(z_q).transpose(1, 2), distances=torch.stack(distances, 1))

    return forward


def test_the_known_wrong_straight_through_estimators_are_seen():
    assert watched([], summed(live=False))[0]["ste_gain"].item() == pytest.approx(3, abs=1e-3)  # the number of codebooks
    log = watched([], summed(live=True))[0]
    assert log["ste_gain"].item() == pytest.approx(1, abs=1e-3) and log["commit_reach"] < 1e-6


def test_figures_cost_nothing_that_training_would_notice():
    results = []
    for watch in (None, CodebookWatch()):
        config = tiny_config()
        t = build(config, torch.device("cpu"))
        wav = torch.from_numpy(np.stack([speech_like(2000, seed=i) for i in range(4)]))[:, None]
        for step in range(2):
            train_step(wav, t, phase_config(config, 1), step, watch=watch)
        results.append(t.codec.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_codebooks_that_learn_move_and_those_that_do_not_are_still():
    for update in (True, False):
        *_, out, wav, codec = watched([])
        watch = CodebookWatch()
        assert "codebook_drift" not in watch.figures(out, codec.quantizer)
        if update:
            codec.quantizer.update_codebooks(out.quantized, 0)
        log = watch.figures(out, codec.quantizer)
        assert (log["codebook_drift"] > 1e-4) == update
    x = codec.quantizer.project_in(out.z.transpose(1, 2))
    left = x - sum(F.embedding(out.quantized.codes[:, i], book) for i, book in enumerate(codec.quantizer.codebooks))
    assert log["vq_error"].item() == pytest.approx((left.square().mean() / x.square().mean()).item(), rel=1e-3)
    counts = np.bincount(out.quantized.codes[:, 0].flatten().numpy(), minlength=16)
    share = counts[counts > 0] / counts.sum()
    assert log["perplexity_0"].item() == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-4)


def test_a_factorized_codebook_that_only_decays_stands_still():
    overrides = ["model.quantizer={type: factorized, n_codebooks: 2, codebook_size: 16, codebook_dim: 4}"]
    *_, out, wav, codec = watched(overrides)
    watch = CodebookWatch()
    watch.figures(out, codec.quantizer)
    for level in codec.quantizer.levels:
        level.codebook.weight.data.mul_(0.9)
    assert watch.figures(out, codec.quantizer)["codebook_drift"] < 1e-6


def test_clipped_silent_and_shifted_sound_is_seen_at_any_level():
    clean = torch.from_numpy(np.stack([speech_like(8000, seed=i) for i in range(4)]))[:, None]
    top = 0.3 * clean.abs().amax()
    batches = {"clean": clean, "clipped": clean.clamp(-top, top), "clipped, then quiet": 0.1 * clean.clamp(-top, top),
               "half silent": clean * torch.tensor([1, 0, 1, 0])[:, None, None], "shifted": clean + 0.1}  # fmt: skip
    seen = {name: sound_figures(wav, wav) for name, wav in batches.items()}
    assert seen["clean"]["input_clipped"] < 2e-3
    assert seen["clipped"]["input_clipped"] > 0.02
    cut, quiet = (seen[name]["input_clipped"].item() for name in ("clipped", "clipped, then quiet"))
    assert quiet == pytest.approx(cut, rel=0.05)
    assert seen["half silent"]["input_silent"] == 0.5 and seen["clean"]["input_silent"] == 0
    assert seen["shifted"]["input_dc"].item() == pytest.approx(0.1, abs=0.01) and seen["clean"]["input_dc"] < 0.01


def test_an_interval_tells_its_largest_norm_and_what_was_clipped_or_left_out():
    updates = [{"grad_norm_g": n, "skipped_g": s} for n, s in ((1, 0), (9, 0), (3, 1), (2, 0))]
    config = tiny_config(["optim.max_grad_norm_g=2.5"])
    assert over_interval(updates, config.optim) == {"grad_norm_g_max": 9, "clipped_g": 0.5, "skipped": 0.25}


def test_a_run_logs_what_the_doctor_needs_and_writes_its_health(manifest, tmp_path):
    train(tiny_config(["doctor.watch_every=2"], manifest), tmp_path, False, torch.device("cpu"))
    names = set().union(*read_metrics(tmp_path))
    expected = ["ste_gain", "commit_reach", "grad_out_mel", "grad_out_adv", "grad_z_commit", "codebook_drift", "dead_0",
                "perplexity_2", "logit_real", "grad_norm_d_max", "clipped_g", "skipped", "weight_adv", "loss_d_neutral",
                "steps_per_epoch", "total_steps", "phase_start", "input_clipped", "output_peak"]  # fmt: skip
    assert {f"train/{name}_step" for name in expected} <= names
    name = "train/weight_adv_step"
    explained = [(row["step"], row[name]) for row in read_metrics(tmp_path) if name in row]
    assert explained == [(1, 0.0), (4, 1.0), (4, 1.0), (8, 1.0)]  # where a phase begins, and at validations
    assert (tmp_path / "health.md").read_text().startswith("# Health of")


def test_a_run_that_two_validations_call_critical_is_saved_and_stopped(manifest, tmp_path):
    overrides = ["doctor.stop_on=critical", "train.val_every=2", "data.segments_per_epoch=4"]  # an epoch of one update
    with pytest.raises(ValueError, match="stopped by the doctor at step 5"):
        train(tiny_config(overrides, manifest), tmp_path, False, torch.device("cpu"))
    assert any((tmp_path / "checkpoints").glob("step_*5"))
    assert "Failure 11" in (tmp_path / "health.md").read_text()
    train(tiny_config(["data.segments_per_epoch=4"], manifest), tmp_path, True, torch.device("cpu"))  # never: goes on
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 8


def test_frozen_codebooks_are_not_called_still():
    for part, watched_drift in (("quantizer", False), ("codebooks.0", True)):
        config = tiny_config([f"train.freeze=[{part}]"])
        t, watch = build(config, torch.device("cpu")), CodebookWatch()
        wav = torch.from_numpy(np.stack([speech_like(2000, seed=i) for i in range(4)]))[:, None]
        logs = [train_step(wav, t, phase_config(config, 0), step, watch=watch) for step in range(2)]
        assert ("codebook_drift" in logs[1]) == watched_drift
        assert not watched_drift or logs[1]["codebook_drift"] > 1e-4


def test_a_run_that_took_all_its_steps_was_not_stopped(manifest, tmp_path):
    overrides = ["doctor.stop_on=critical", "train.val_every=4", "data.segments_per_epoch=4"]
    train(tiny_config(overrides, manifest), tmp_path, False, torch.device("cpu"))
    assert "Failure 11" in (tmp_path / "health.md").read_text() and read_metrics(tmp_path)[-1]["step"] == 8


def test_a_phase_without_any_loss_of_the_signal_is_watched_too(manifest, tmp_path):
    overrides = ["loss_weights.wave=0", "loss_weights.mel=0", "phases=[{name: a, steps: 2}]", "doctor.watch_every=1",
                 "loss_weights.adv=0", "loss_weights.feat=0"]  # fmt: skip
    train(tiny_config(overrides, manifest), tmp_path, False, torch.device("cpu"))
    assert "train/codebook_drift_step" in set().union(*read_metrics(tmp_path))


def test_the_end_of_a_long_log_is_read_alone_and_explains_itself(manifest, tmp_path):
    train(tiny_config(["train.val_every=1"], manifest), tmp_path, False, torch.device("cpu"))
    rows, tail = read_metrics(tmp_path), read_metrics(tmp_path, 4000)
    assert tail == rows[-len(tail):] and 0 < len(tail) < len(rows)
    assert "train/weight_mel_step" in set().union(*tail)


def test_pure_tones_tell_mel_filters_from_noise_and_from_reversed_and_linear_ones():
    windows, bins = (256, 1024), (20, 80)
    loss = MelLoss(16000, windows, bins)
    assert mel_off(loss, 16000) < 0.02
    filters = loss.scales[1].filters.clone()
    width = len(filters) // 80 + 1
    linear = F.one_hot((torch.arange(len(filters)) // width).clamp(max=79), 80).float()
    for wrong in (torch.randn_like(filters), filters.flip(1), linear):
        loss.scales[1].filters.copy_(wrong)
        assert mel_off(loss, 16000) > 0.1
