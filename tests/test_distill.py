"""Heads, their loss, the gradients they send, and the loop with teachers."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.data import default_collate

from codec.config import parse_config, phase_config
from codec.data import SegmentDataset, read_manifest
from codec.distill import DistilledSegments, Heads, codebook_gradients, masked_mean, open_teachers
from codec.features import FeatureStore, Targets, finish, write_frames, write_tokens
from codec.model import Codec
from codec.rvq import kmeans, nearest
from tests.conftest import TINY, speech_like
from train_codec_gan import build, freeze, load_initial, train, train_step, validate

SPLIT = TINY.replace("n_codebooks: 3, codebook_size: 16, codebook_dim: 8,",
                     "n_codebooks: 4, codebook_size: 16, codebook_dim: 8, n_semantic: 1, n_prosodic: 1,")  # fmt: skip


def write_teachers(folder, manifest, seed=0):
    """Two small teachers over every utterance: frames at 50 Hz that follow the level, and three tokens each."""
    rng = np.random.default_rng(seed)
    names = []
    for split in ("train", "val"):
        for u in read_manifest(manifest, split, 8000):
            names.append(u.name)
            duration_s = u.n_samples / 8000
            frames = torch.from_numpy(rng.standard_normal((int(duration_s * 50), 6)).astype(np.float32)) + 2
            write_frames(folder / "wavlm", u.name, frames, u, 8000)
            third = duration_s / 3
            spans = torch.tensor([[0, 0.9 * third], [third, 1.9 * third], [2 * third, 2.9 * third]])
            write_tokens(folder / "llm", u.name, torch.randn(3, 5) + 1, spans, u, 8000)
    finish(folder / "wavlm", {"kind": "frames", "teacher": "t", "layer": -1, "dim": 6, "frame_s": 0.02,
                              "first_centre_s": 0.01}, names)  # fmt: skip
    finish(folder / "llm", {"kind": "tokens", "teacher": "t", "layer": -2, "dim": 5}, names)


@pytest.fixture(scope="module")
def features(tmp_path_factory, manifest):
    folder = tmp_path_factory.mktemp("features")
    write_teachers(folder, manifest)
    return folder


def distilled(features, manifest, overrides=(), head="mlp"):
    teachers = []
    for name, dim, n in (("llm", 5, 1), ("wavlm", 6, 2)):
        teacher = {"features": str(features / name), "dim": dim, "n_codebooks": n, "head": head, "hidden_dim": 8}
        teachers.append(f"distill.{name}={json.dumps(teacher)}")
    weights = ["loss_weights.llm=1", "loss_weights.wavlm=1"]
    return parse_config(SPLIT.replace("MANIFEST", str(manifest)), "amy.yaml", [*teachers, *weights, *overrides])


def set_up(config):
    teachers = open_teachers(config.distill)
    utterances = read_manifest(config.data.manifest, "train", 8000)
    segments = DistilledSegments(SegmentDataset(utterances, config.data.segment_samples, 0), teachers, 20, 8000)
    return build(config, torch.device("cpu"), teachers), segments


@pytest.mark.parametrize("head", ["linear", "mlp", "conv"])
def test_the_loss_is_one_minus_cosine_of_the_codebooks_that_the_teacher_reads(features, manifest, head):
    config = distilled(features, manifest, head=head)
    heads = Heads(config.distill, 8, open_teachers(config.distill))
    prefixes = (torch.randn(2, 7, 8), torch.randn(2, 7, 8))
    targets = {"llm": Targets(torch.randn(2, 7, 5), torch.ones(2, 7)), "wavlm": Targets(torch.randn(2, 7, 6), torch.ones(2, 7))}
    losses = heads(prefixes, targets)
    for prefix, (name, loss) in zip(prefixes, losses.items()):
        a, b = heads.heads[name](prefix).detach().numpy(), targets[name].values.numpy()
        by_hand = 1 - (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        np.testing.assert_allclose(loss.detach().numpy(), by_hand, atol=1e-5)


def test_frames_without_a_target_move_nothing(features, manifest):
    t, segments = set_up(distilled(features, manifest))
    wav, targets = default_collate([segments[i] for i in range(3)])
    values, mask = targets["llm"]
    assert 0 < mask.mean() < 1

    def gradient(values: torch.Tensor, masked: bool) -> torch.Tensor:
        losses = t.heads(t.codec(wav).quantized.prefixes, targets | {"llm": Targets(values, mask)})["llm"]
        (grad,) = torch.autograd.grad(masked_mean(losses, mask) if masked else losses.mean(), t.heads.heads["llm"].out.weight)
        return grad

    noise = values + (1 - mask)[..., None] * torch.randn_like(values)
    assert torch.equal(gradient(values, True), gradient(noise, True))
    assert not torch.equal(gradient(values, False), gradient(noise, False))  # known wrong: the mean over all frames


def test_the_constant_loss_is_what_the_best_constant_reaches(features, manifest):
    store = FeatureStore(features / "wavlm")
    vectors = []
    for utterance in [*read_manifest(manifest, "train", 8000), *read_manifest(manifest, "val", 8000)]:
        values, mask = store.targets(utterance, 0, utterance.n_samples // 160, 160, 8000)
        vectors.append(values[mask > 0])
    vectors = torch.cat(vectors)
    at_the_mean = (1 - F.cosine_similarity(store.mean[None], vectors, -1)).mean().item()
    assert at_the_mean == pytest.approx(store.constant_loss, abs=0.01)
    constants = torch.nn.Parameter(torch.randn(6))
    optimizer = torch.optim.Adam([constants], 0.05)
    for _ in range(300):
        loss = (1 - F.cosine_similarity(constants[None], vectors, -1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() == pytest.approx(at_the_mean, abs=0.003)


def test_each_teacher_reaches_the_codebooks_it_reads_and_no_other(features, manifest):
    t, segments = set_up(distilled(features, manifest))
    wav, targets = default_collate([segments[i] for i in range(3)])
    out = t.codec(wav)
    taught = t.heads(out.quantized.prefixes, targets)
    losses = {name: loss.mean() for name, loss in taught.items()} | {"wave": out.wav_hat.square().mean()}
    log = codebook_gradients(losses, out.quantized.entries)
    assert log["grad_llm_to_0"] > 0 and log["grad_llm_to_1"] == 0  # codebook 0 alone is read by the language model's head
    assert log["grad_wavlm_to_0"] == log["grad_wavlm_to_1"] > 0  # their sum moves with each of them alike
    assert log["grad_wave_to_0"] == log["grad_wave_to_1"] > 0
    assert all(-1.001 <= log[name] <= 1.001 for name in ("pull_llm_wavlm", "pull_llm_rest", "pull_wavlm_rest"))


def test_gradients_into_codebooks_equal_finite_differences(features, manifest):
    t, segments = set_up(distilled(features, manifest))
    wav, targets = default_collate([segments[i] for i in range(2)])
    codec, heads = t.codec.double().eval(), t.heads.double()
    targets = {name: Targets(values.double(), mask.double()) for name, (values, mask) in targets.items()}
    z = codec.encoder(wav.double())

    def wavlm(moved: int, step: torch.Tensor) -> float:
        prefixes = list(codec.quantizer(z).prefixes)
        for i in range(moved, 2):  # a codebook's entry is part of every prefix that holds it
            prefixes[i] = prefixes[i] + step
        return heads(tuple(prefixes), targets)["wavlm"].mean()

    quantized = codec.quantizer(z)
    log = codebook_gradients({"wavlm": heads(quantized.prefixes, targets)["wavlm"].mean()}, quantized.entries)
    for level in (0, 1):
        zero = torch.zeros_like(quantized.entries[0], requires_grad=True)
        (exact,) = torch.autograd.grad(wavlm(level, zero), zero)
        direction = exact / exact.norm()
        slope = (wavlm(level, 1e-5 * direction) - wavlm(level, -1e-5 * direction)) / 2e-5
        assert slope.item() == pytest.approx(log[f"grad_wavlm_to_{level}"].item(), rel=1e-5)


def test_a_stopped_gradient_keeps_reconstruction_out_of_the_first_group_but_not_the_teachers(features, manifest):
    received = {}
    for share in (0.0, 0.25, 1.0):
        t, segments = set_up(distilled(features, manifest, [f"model.quantizer.semantic_gradient={share}"]))
        wav, targets = default_collate([segments[i] for i in range(2)])
        out = t.codec(wav)
        weight = t.codec.quantizer.semantic.project_in.weight
        taught = t.heads(out.quantized.prefixes, targets)["wavlm"].mean()
        for name, loss in (("wave", out.wav_hat.square().mean()), ("wavlm", taught)):
            (grad,) = torch.autograd.grad(loss, weight, retain_graph=True, allow_unused=True)
            received[name, share] = grad.norm().item()
    assert received["wave", 0.0] == 0 and received["wavlm", 0.0] == pytest.approx(received["wavlm", 1.0], rel=1e-4)
    assert received["wave", 0.25] == pytest.approx(0.25 * received["wave", 1.0], rel=1e-4)


def test_a_step_logs_every_figure_of_a_distillation_and_moves_the_heads(features, manifest):
    config = distilled(features, manifest)
    t, segments = set_up(config)
    before = {name: value.clone() for name, value in t.heads.state_dict().items()}
    wav, targets = default_collate([segments[i] for i in range(4)])
    log = train_step(wav, t, phase_config(config, 1), 4, targets=targets)
    for name in ("llm", "wavlm", "wavlm_llm_ratio", "llm_frames", "grad_mel_to_0", "grad_adv_to_1", "pull_wavlm_rest"):
        assert torch.isfinite(log[name]), name
    assert log["wavlm_similarity"] == 1 - log["wavlm"]
    assert all((t.heads.state_dict()[name] != value).any() for name, value in before.items())  # in the optimizer, all of them


def test_a_batch_without_words_trains_on_and_logs_no_number(features, manifest):
    config = distilled(features, manifest)
    t, segments = set_up(config)
    wav, targets = default_collate([segments[i] for i in range(4)])
    targets["llm"] = Targets(targets["llm"].values * 0, targets["llm"].mask * 0)
    log = train_step(wav, t, phase_config(config, 0), 0, targets=targets)
    assert log["skipped_g"] == 0 and torch.isnan(log["llm"]) and torch.isfinite(log["wavlm"]) and torch.isfinite(log["loss_g"])


def test_heads_learn_at_their_own_rate(features, manifest):
    config = distilled(features, manifest, ["optim.lr_scale_heads=5", "optim.lr_scale_projections=0.5"])
    t, segments = set_up(config)
    wav, targets = default_collate([segments[i] for i in range(2)])
    train_step(wav, t, phase_config(config, 0), 0, targets=targets)
    rates = {p: group["lr"] for group in t.optimizer_g.param_groups for p in group["params"]}
    assert {rates[p] for p in t.heads.parameters()} == {5e-3}
    assert {rates[p] for p in t.codec.quantizer.parameters()} == {5e-4}
    assert {rates[p] for p in t.codec.encoder.parameters()} == {1e-3}


@pytest.mark.parametrize("parts", [
    ("encoder",), ("decoder", "quantizer.acoustic"), ("codebooks.0", "quantizer.semantic.project_in")
])  # fmt: skip
def test_frozen_parts_stay_as_they_are_and_the_others_move(features, manifest, parts):
    config = distilled(features, manifest, [f"train.freeze={json.dumps(parts)}"])
    t, segments = set_up(config)
    before = {name: value.clone() for name, value in t.codec.state_dict().items()}
    for step in range(2):
        wav, targets = default_collate([segments[step + i] for i in range(4)])
        train_step(wav, t, phase_config(config, 0), step, targets=targets)
    for name, value in t.codec.state_dict().items():
        if name == "quantizer.semantic.codebooks":
            frozen = [False, False] if "codebooks.0" not in parts else [True, False]
            assert [torch.equal(value[i], before[name][i]) for i in (0, 1)] == frozen
        elif "ema_" not in name:
            moved = not torch.equal(value, before[name])
            assert moved != any(name.startswith(part) for part in parts), name


def test_a_part_that_is_none_is_refused(features, manifest):
    with pytest.raises(ValueError, match="train.freeze: 'encodr' names no part"):
        freeze(Codec(distilled(features, manifest).model), ("encodr",))


def test_a_run_with_teachers_trains_validates_saves_and_resumes_to_the_bit(features, manifest, tmp_path):
    config = distilled(features, manifest)
    train(config, tmp_path / "whole", False, torch.device("cpu"))
    first = replace(config, train=replace(config.train, max_minutes=1e-6))
    while not (tmp_path / "parts" / "checkpoints" / "step_00000008").is_dir():
        train(first, tmp_path / "parts", (tmp_path / "parts").exists(), torch.device("cpu"))
    whole, parts = (tmp_path / name / "checkpoints" / "step_00000008" for name in ("whole", "parts"))
    assert (whole / "heads.safetensors").read_bytes() == (parts / "heads.safetensors").read_bytes()
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()
    assert (whole / "optimizers.safetensors").read_bytes() == (parts / "optimizers.safetensors").read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert any("val/wavlm_step" in line for line in lines) and any("train/llm_epoch" in line for line in lines)


def test_a_grown_codec_keeps_every_code_it_had_and_its_new_codebook_codes_the_residual(features, manifest, tmp_path):
    small = parse_config(SPLIT.replace(", n_prosodic: 1", "").replace("n_codebooks: 4", "n_codebooks: 5"), "mimi.yaml")
    torch.manual_seed(3)
    old = Codec(small.model)
    wav = torch.from_numpy(speech_like(4000))[None, None]
    old.quantizer.init_codebooks(old.encoder(wav).detach(), 100)
    old.eval().save_pretrained(tmp_path / "mimi")
    config = distilled(features, manifest, [f"train.init_from={tmp_path / 'mimi'}", "phases.0.steps=0", "phases.1.steps=1"])
    t, _ = set_up(config)
    assert load_initial(tmp_path / "mimi", t, config) == (False, range(1, 2))
    codes = old.encode(wav)
    t.codec.eval()
    grown = t.codec.encode(wav)
    assert torch.equal(grown[:, 0], codes[:, 0]) and torch.equal(grown[:, 2:], codes[:, 1:3])  # acoustic ones: the first two
    z = t.codec.encoder(wav)
    t.codec.quantizer.init_codebooks(z, 100, range(1, 2))
    part = t.codec.quantizer.semantic
    x = part.project_in(z.transpose(1, 2))
    residual = x - F.embedding(part.encode(z, 1)[:, 0], part.codebooks[0])
    after = residual - F.embedding(part.encode(z, 2)[:, 1], part.codebooks[1])
    assert after.square().mean() < 0.6 * residual.square().mean()
    means, _ = kmeans(x.flatten(0, 1), 16, torch.Generator().manual_seed(0))  # known wrong: of the latent, not of what is left
    wrong = residual - F.embedding(nearest(residual, means), means)
    assert wrong.square().mean() > 1.2 * after.square().mean()
    assert torch.equal(t.codec.encode(wav)[:, 0], codes[:, 0])


@pytest.mark.parametrize("override, message", [
    ("loss_weights.llm=1", "phase 'warm-up' weighs llm, but distill.llm is not there"),
    ("model.quantizer.n_prosodic=1", "model.quantizer.n_prosodic=1 without semantic codebooks"),
    ("distill.llm={features: x, dim: 4, n_codebooks: 9}", "distill.llm.n_codebooks=9, expected at most n_codebooks=3"),
    ("distill.wavlm={features: x, dim: 4, n_codebooks: 1, head: deep}", "distill.wavlm.head='deep', expected linear | mlp"),
    ("phases.0.set={optim.lr_scale_heads: 0.1}", "phases.0.set.optim.lr_scale_heads cannot change between phases"),
    ("distill.wavlm={features: x, n_codebooks: 1}", "distill.wavlm.dim is missing"),
])  # fmt: skip
def test_what_a_config_gets_wrong_is_named(override, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|").replace(".", r"\.")):
        parse_config(TINY, "a.yaml", [override])


def test_a_teacher_of_another_width_is_refused_before_training(features, manifest):
    config = distilled(features, manifest, ["distill.wavlm.dim=7"])
    with pytest.raises(ValueError, match="features of width 6, distill.wavlm.dim=7; set it to 6"):
        open_teachers(config.distill)


def test_with_inputs_of_their_own_reconstruction_shapes_the_second_input_and_the_teachers_both(features, manifest):
    overrides = ["model.quantizer.semantic_inputs=own", "model.quantizer.semantic_gradient=0"]
    t, segments = set_up(distilled(features, manifest, overrides))
    wav, targets = default_collate([segments[i] for i in range(2)])
    out = t.codec(wav)
    group = t.codec.quantizer.semantic
    weights = [group.project_in.weight, group.own_inputs[0].weight]
    llm, wavlm = (loss.mean() for loss in t.heads(out.quantized.prefixes, targets).values())
    received = {}
    for name, loss in (("wave", out.wav_hat.square().mean()), ("llm", llm), ("wavlm", wavlm)):
        grads = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        received[name] = [0 if grad is None else grad.norm().item() for grad in grads]
    assert received["wave"][0] == 0 and received["wave"][1] > 0
    assert received["llm"][0] > 0 and received["llm"][1] == 0
    assert min(received["wavlm"]) > 0


def test_with_inputs_of_their_own_the_sum_of_codebooks_codes_the_last_input(features, manifest):
    t, segments = set_up(distilled(features, manifest, ["model.quantizer.semantic_inputs=own"]))
    codec = t.codec.eval()
    z = codec.encoder(torch.stack([segments.segments[i] for i in range(8)])).detach()
    group = codec.quantizer.semantic
    group.init_codebooks(z, 100)
    out = group(z)
    second = group.own_inputs[0](z.transpose(1, 2))
    alone = (second - out.prefixes[0]).square().mean()
    assert (second - out.prefixes[1]).square().mean() < 0.5 * alone
    assert torch.equal(out.codes, group.encode(z))
    torch.testing.assert_close(group.decode(out.codes), out.z_q)


def test_validation_weighs_frames_and_says_nothing_of_a_teacher_without_words(features, manifest):
    config = distilled(features, manifest)
    t, _ = set_up(config)
    utterances = read_manifest(manifest, "val", 8000)
    val = DistilledSegments(SegmentDataset(utterances, 2000, 1), open_teachers(config.distill), 20, 8000)
    items = [default_collate([val[i]]) for i in range(4)]
    silent = [items[0], (items[1][0], items[1][1] | {"llm": Targets(*(x * 0 for x in items[1][1]["llm"]))}), *items[2:]]
    total, n_frames = 0.0, 0.0
    t.codec.eval()
    for wav, targets in silent:
        with torch.no_grad():
            loss = t.heads(t.codec(wav).quantized.prefixes, targets)["llm"]
        total, n_frames = total + (loss * targets["llm"].mask).sum(), n_frames + targets["llm"].mask.sum()

    class Fixed:
        teachers = val.teachers

        def __init__(self, items):
            self.items = items

        def __getitem__(self, index):
            wav, targets = self.items[index]
            return wav[0], {name: Targets(*(x[0] for x in target)) for name, target in targets.items()}

    scores = validate(t, Fixed(silent), config, torch.device("cpu"), None, 0)
    assert scores["val/llm"] == pytest.approx((total / n_frames).item(), rel=1e-5)
    none = [(wav, targets | {"llm": Targets(*(x * 0 for x in targets["llm"]))}) for wav, targets in items]
    scores = validate(t, Fixed(none), config, torch.device("cpu"), None, 0)
    assert "val/llm" not in scores and "val/llm_gain" not in scores and "val/wavlm" in scores


def test_a_manifest_without_validation_split_is_validated_on_its_training_data(features, manifest, tmp_path):
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    lone = manifest.parent / "lone.jsonl"
    lone.write_text("".join(json.dumps(line) + "\n" for line in lines if line["split"] == "train"))
    config = distilled(features, lone, ["phases.0.steps=1", "phases.1.steps=0"])
    train(config, tmp_path / "run", False, torch.device("cpu"))
    assert (tmp_path / "run" / "checkpoints" / "step_00000001").is_dir()


def test_a_codec_for_use_gives_audio_without_gradient(features, manifest):
    codec = Codec(distilled(features, manifest).model).eval().requires_grad_(False)
    assert not codec(torch.randn(1, 1, 2000)).wav_hat.requires_grad


def test_a_run_resumes_with_other_rates_but_not_with_other_frozen_parts(features, manifest, tmp_path):
    config = distilled(features, manifest, ["phases.0.steps=2", "phases.1.steps=0"])
    train(config, tmp_path / "run", False, torch.device("cpu"))
    faster = replace(config, optim=replace(config.optim, lr_scale_heads=3.0))
    train(replace(faster, phases=(replace(config.phases[0], steps=3),)), tmp_path / "run", True, torch.device("cpu"))
    frozen = replace(config, train=replace(config.train, freeze=("encoder",)))
    with pytest.raises(ValueError, match="train.freeze=.* there"):
        train(replace(frozen, phases=(replace(config.phases[0], steps=4),)), tmp_path / "run", True, torch.device("cpu"))


def test_the_heads_of_a_distilled_run_come_along(features, manifest, tmp_path):
    config = distilled(features, manifest, ["phases.0.steps=2", "phases.1.steps=0"])
    train(config, tmp_path / "run", False, torch.device("cpu"))
    t, _ = set_up(replace(config, train=replace(config.train, seed=9)))
    folder = tmp_path / "run" / "checkpoints" / "step_00000002"
    load_initial(folder, t, config)
    saved = load_file(folder / "heads.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in t.heads.state_dict().items())


def test_a_weakened_pull_reaches_the_encoder_by_its_share_and_the_projections_whole(features, manifest):
    received = {}
    for share in (0.0, 0.2, 1.0):
        t, segments = set_up(distilled(features, manifest, [f"model.quantizer.semantic_to_encoder={share}"]))
        wav, targets = default_collate([segments[i] for i in range(2)])
        loss = t.heads(t.codec(wav).quantized.prefixes, targets)["wavlm"].mean()
        first = t.codec.encoder.local[0].conv.parametrizations.weight.original1
        grads = torch.autograd.grad(loss, [t.codec.quantizer.semantic.project_in.weight, first], allow_unused=True)
        received[share] = [0.0 if grad is None else grad.norm().item() for grad in grads]
    assert received[0.0][0] == received[0.2][0] == received[1.0][0] > 0
    assert received[0.0][1] == 0 and received[0.2][1] == pytest.approx(0.2 * received[1.0][1], rel=1e-4)


def test_a_teacher_of_what_is_left_over_teaches_the_second_input_alone(features, manifest):
    own = "model.quantizer.semantic_inputs=own"
    received = {}
    for detach_first in (0, 1):
        t, segments = set_up(distilled(features, manifest, [own, f"distill.wavlm.detach_first={detach_first}"]))
        wav, targets = default_collate([segments[i] for i in range(2)])
        out = t.codec(wav)
        losses = t.heads(out.quantized.prefixes, targets)
        group = t.codec.quantizer.semantic
        weights = [group.project_in.weight, group.own_inputs[0].weight]
        grads = torch.autograd.grad(losses["wavlm"].mean(), weights, allow_unused=True)
        received[detach_first] = [0 if grad is None else grad.norm().item() for grad in grads], losses["wavlm"]
    assert min(received[0][0]) > 0
    assert received[1][0][0] == 0 and received[1][0][1] == pytest.approx(received[0][0][1], rel=1e-4)
    torch.testing.assert_close(received[1][1], received[0][1])  # it reads the same


@pytest.mark.parametrize("overrides, message", [
    (["data.speeds=[0.9,1.1]"], r"data.speeds=\[0.9, 1.1\] beside distill: features tell of recordings as they are"),
    (["distill.wavlm.detach_first=1"], "distill.wavlm.detach_first=1 with semantic_inputs=shared, expected own"),
    (["model.quantizer.semantic_inputs=own", "distill.wavlm.detach_first=2"], "expected less than its n_codebooks=2"),
])  # fmt: skip
def test_a_teacher_that_would_teach_nothing_is_refused(features, manifest, overrides, message):
    with pytest.raises(ValueError, match=message):
        distilled(features, manifest, overrides)
