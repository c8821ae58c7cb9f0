"""Starting from another run's weights, and discriminators that warm up alone where they are new."""

import dataclasses
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, speech_like, tiny_config
from safetensors.torch import load_file, save_file

import train_codec_gan
from codec import cli
from codec.checkpoint import find_checkpoint, load_state
from codec.config import disc_warmup, phase_config
from codec.model import Codec
from codec.pretrained import resolve
from codec.runlog import read_metrics
from codec.watch import sound_figures
from train_codec_gan import build, load_initial, start_codebooks, train, train_step

CPU = torch.device("cpu")
OTHER_DISCRIMINATORS = "discriminators.sets=[{type: mrd, windows: [128], channels: 4}]"


@pytest.fixture(scope="module")
def source(manifest, tmp_path_factory) -> Path:
    """A run of six updates, four of them adversarial, that kept averages."""
    run_dir = tmp_path_factory.mktemp("source") / "run"
    train(settings(manifest, "optim.ema_decay=0.5", "phases.0.steps=2", "phases.1.steps=4"), run_dir, False, CPU)
    return run_dir


def settings(manifest: Path, *more: str):
    return tiny_config(["data.n_workers=0", "train.keep_last=9", "train.checkpoint_every=1", *more], manifest)


def batch(seed: int = 0) -> torch.Tensor:
    return torch.stack([torch.from_numpy(speech_like(2000, seed=seed + i))[None] for i in range(4)])


def saved(checkpoint: Path, name: str = "*") -> dict[str, torch.Tensor]:
    return {f"{path.stem}.{key}": value for path in sorted(checkpoint.glob(f"{name}.safetensors"))
            for key, value in load_file(path).items()}  # fmt: skip


def at_step(run_dir: Path, step: int, name: str = "*") -> dict[str, torch.Tensor]:
    return saved(run_dir / "checkpoints" / f"step_{step:08d}", name)


def differing(a: dict, b: dict) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def stopped_at(run_dir: Path, step: int, copy_dir: Path) -> None:
    shutil.copytree(run_dir, copy_dir)
    for folder in (copy_dir / "checkpoints").glob("step_*"):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)


def copy(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


# ------------------------------------------------------------------------ the start


@pytest.mark.parametrize("where", ["run", "checkpoints", "checkpoint"])
def test_a_new_run_starts_from_the_averaged_weights_the_codebooks_and_the_discriminators_of_another(manifest, source, where):
    folder = {"run": source, "checkpoints": source / "checkpoints", "checkpoint": find_checkpoint(source)}[where]
    config = settings(manifest, "optim.ema_decay=0.9", "train.seed=5")
    t = build(config, CPU)
    assert load_initial(find_checkpoint(folder), t, config)[0] is True
    there = {group: {name[len(group) + 1 :]: value for name, value in saved(find_checkpoint(source), group).items()}
             for group in ("model", "ema", "discriminators")}  # fmt: skip
    assert differing(t.codec.state_dict(), there["model"] | there["ema"]) == []
    assert differing(t.averages, there["ema"]) == []
    assert differing(t.discriminators.state_dict(), there["discriminators"]) == []
    assert differing(there["model"], there["model"] | there["ema"])  # known wrong: the live weights


def test_a_new_run_starts_from_a_pretrained_folder(manifest, source, tmp_path):
    codec = Codec.from_pretrained(source)
    codec.save_pretrained(tmp_path / "published")
    config = settings(manifest, "optim.ema_decay=0.9")
    t = build(config, CPU)
    assert load_initial(resolve(tmp_path / "published"), t, config)[0] is False  # it holds no discriminators
    torch.testing.assert_close(t.codec.eval()(batch()).wav_hat, codec(batch()).wav_hat)
    assert differing(t.averages, t.codec.state_dict()) == []


def test_a_compact_folder_is_half_as_large_sounds_alike_and_brings_its_discriminators(manifest, source, tmp_path):
    out = tmp_path / "compact"
    assert cli.main(["convert", "--from", str(source), str(out), "--compact"]) == 0
    checkpoint = find_checkpoint(source)
    weights, before = (load_file(folder / "model.safetensors") for folder in (out, checkpoint))
    assert sum(value.nbytes for value in weights.values()) < 0.5 * sum(value.nbytes for value in before.values())
    assert {str(value.dtype) for value in weights.values()} == {"torch.float16"}
    assert str(manifest.parent) not in (out / "config.yaml").read_text()  # nobody's folders are published
    one, other = Codec.from_pretrained(source), Codec.from_pretrained(out)
    wav_hat, compact = (codec(batch()).wav_hat for codec in (one, other))
    assert (wav_hat - compact).norm() < 0.02 * wav_hat.norm() and not wav_hat.equal(compact)

    t = build(settings(manifest), CPU)
    discriminators_came, _ = load_initial(resolve(out), t, settings(manifest))
    assert discriminators_came
    trained = load_file(checkpoint / "discriminators.safetensors")
    assert all((value - trained[name]).abs().max() < 1e-3 for name, value in t.discriminators.state_dict().items())
    quantizer = t.codec.quantizer
    assert quantizer.ema_sum.allclose(quantizer.codebooks * quantizer.ema_count[..., None])  # left out, and given again
    assert all(p.dtype == torch.float32 for p in t.codec.parameters())


def test_discriminators_that_never_learned_are_not_published(source, tmp_path):
    before = find_checkpoint(source).parent / "step_00000002"  # the last update without an adversary
    assert cli.main(["convert", "--from", str(before), str(tmp_path / "compact"), "--compact"]) == 0
    assert sorted(path.name for path in (tmp_path / "compact").iterdir()) == [
        "README.md", "config.json", "config.yaml", "model.safetensors"]  # fmt: skip


def test_folders_of_teachers_are_not_published(source, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(source, run_dir)
    path = find_checkpoint(run_dir) / "config.yaml"
    teacher = "  wavlm: {features: /home/somebody/private/wavlm, dim: 4, n_codebooks: 1}\n"
    assert "  wavlm: null\n" in path.read_text()
    path.write_text(path.read_text().replace("  wavlm: null\n", teacher))
    assert cli.main(["convert", "--from", str(run_dir), str(tmp_path / "compact"), "--compact"]) == 0
    published = (tmp_path / "compact" / "config.yaml").read_text()
    assert "features: wavlm" in published and "private" not in published


def test_values_that_fp16_cannot_hold_are_refused(source, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(source, run_dir)
    for name in ("model", "ema"):
        path = find_checkpoint(run_dir) / f"{name}.safetensors"
        tensors = load_file(path)
        tensors["quantizer.project_in.weight"][0, 0] = 1e5
        save_file(tensors, path)
    assert cli.main(["convert", "--from", str(run_dir), str(tmp_path / "out"), "--compact"]) == 2
    assert "quantizer.project_in.weight: holds values that fp16 cannot" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_codebooks_are_not_started_anew(manifest, source, tmp_path, capsys):
    there = load_file(find_checkpoint(source) / "ema.safetensors")
    frozen = ["optim.lr_g=0", "optim.weight_decay=0", "model.quantizer.decay=1.0", "model.quantizer.dead_threshold=0"]
    config = settings(manifest, f"train.init_from={source}", "phases.0.steps=1", "phases.1.steps=0", *frozen)
    train(config, tmp_path / "run", False, CPU)
    assert "its discriminators too" in capsys.readouterr().err
    after = saved(find_checkpoint(tmp_path / "run"), "model")
    for name in ("quantizer.ema_sum", "quantizer.ema_count"):  # the entries are these, divided
        torch.testing.assert_close(after[f"model.{name}"], there[name])

    t = build(config, CPU)  # known wrong: k-means after loading
    load_initial(find_checkpoint(source), t, config)
    utterances = train_codec_gan.read_manifest(manifest, "train", 8000)
    start_codebooks(t.codec, train_codec_gan.SegmentDataset(utterances, 2000, 0), config, CPU)
    assert not torch.allclose(t.codec.quantizer.codebooks, there["quantizer.codebooks"], atol=1e-2)


def test_further_codebooks_start_on_what_those_there_leave_over(manifest, source, tmp_path, capsys):
    config = settings(manifest, f"train.init_from={source}", "model.quantizer.n_codebooks=5", "phases.0.steps=1",
                      "phases.1.steps=0")  # fmt: skip
    t = build(config, CPU)
    _, added = load_initial(find_checkpoint(source), t, config)
    start_codebooks(t.codec, train_codec_gan.open_data(config)[0].segments, config, CPU, added)
    before, after = Codec.from_pretrained(source).quantizer, t.codec.eval().quantizer
    assert torch.equal(after.codebooks[:3], before.codebooks)
    latents = t.codec.encoder(batch())
    distances = after(latents).distances.mean(0)
    torch.testing.assert_close(distances[:3], before(latents).distances.mean(0))
    assert (distances.diff() < 0).all()  # known wrong: entries of a fresh codec, which add to what is left
    train(config, tmp_path / "run", False, CPU)
    assert "codebooks 3, 4 are new: k-means on what those before them leave over" in capsys.readouterr().err


def test_a_codec_goes_on_with_fewer_codebooks(manifest, source):
    config = settings(manifest, "model.quantizer.n_codebooks=2")
    t = build(config, CPU)
    assert load_initial(find_checkpoint(source), t, config) == (True, range(3, 2))
    before = Codec.from_pretrained(source)
    assert torch.equal(t.codec.eval().encode(batch()), before.encode(batch())[:, :2])


REFIT = ["train.refit_frames=2000", "train.freeze=[encoder,quantizer]", "model.quantizer.beam=4"]


def test_codebooks_are_fitted_anew_where_that_is_asked_for_and_stay_where_they_are_frozen(manifest, source, tmp_path, capsys):
    config = settings(manifest, *REFIT, f"train.init_from={source}", "phases.0.steps=2", "phases.1.steps=0")
    train(config, tmp_path / "run", False, CPU)
    assert "codebooks are fitted anew to 2,000 latents" in capsys.readouterr().err
    before, after = Codec.from_pretrained(source), Codec.from_pretrained(tmp_path / "run")
    t = build(config, CPU)
    load_initial(find_checkpoint(source), t, config)
    dataset = train_codec_gan.open_data(config)[0].segments
    latents = train_codec_gan.start_latents(t.codec, dataset, config, CPU, 2000)
    error = t.codec.quantizer(latents).distances[:, -1].mean()
    t.codec.quantizer.refit_codebooks(latents)
    assert torch.equal(after.quantizer.codebooks, t.codec.quantizer.codebooks)
    assert t.codec.quantizer(latents).distances[:, -1].mean() < 0.9 * error
    quantizer = t.codec.quantizer
    assert quantizer.ema_sum.allclose(quantizer.codebooks * quantizer.ema_count[..., None])
    assert differing(after.decoder.state_dict(), before.decoder.state_dict())
    assert not differing(after.encoder.state_dict(), before.encoder.state_dict())


@pytest.mark.parametrize("change", [
    "train.init_from=''", "model.quantizer.n_semantic=1", "model.quantizer.beam=1", "train.freeze=[quantizer]",
    "model.quantizer={type: factorized, n_codebooks: 3, codebook_size: 16, codebook_dim: 4}",
])
def test_fitting_anew_is_refused_where_there_is_nothing_to_fit(manifest, source, change):
    with pytest.raises(ValueError, match="train.refit_frames=9 is for weights of train.init_from whose quantizer is ema"):
        settings(manifest, *REFIT, "train.refit_frames=9", f"train.init_from={source}", change)
    with pytest.raises(ValueError, match="train.refit_frames=9 are fewer than the 16 entries of a codebook"):
        settings(manifest, *REFIT, "train.refit_frames=9", f"train.init_from={source}")


def test_discriminators_of_another_shape_or_absent_ones_start_fresh(manifest, source, tmp_path):
    config = settings(manifest, OTHER_DISCRIMINATORS)
    t = build(config, CPU)
    fresh = copy(t.discriminators)
    assert load_initial(find_checkpoint(source), t, config)[0] is False
    assert differing(fresh, t.discriminators.state_dict()) == []

    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("model.safetensors", "config.yaml", "state.json"):
        (bare / name).write_bytes((find_checkpoint(source) / name).read_bytes())
    config = settings(manifest)
    t = build(config, CPU)
    assert load_initial(find_checkpoint(bare), t, config)[0] is False
    assert differing(t.codec.state_dict(), load_file(bare / "model.safetensors")) == []


def test_another_model_is_refused_in_one_line_that_names_the_keys_and_the_config_that_fits(manifest, source, tmp_path,
                                                                                          monkeypatch):  # fmt: skip
    monkeypatch.setattr(train_codec_gan, "__file__", str(tmp_path / "train_codec_gan.py"))
    config = settings(manifest, "model.encoder.causal=true", "model.quantizer.codebook_size=32")
    with pytest.raises(ValueError) as error:
        load_initial(find_checkpoint(source), build(config, CPU), config)
    assert "model.encoder.causal: false there, true here; model.quantizer.codebook_size: 16 there, 32 here" in str(error.value)
    assert "use the model section they came with" in str(error.value)

    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "fits.yaml").write_text(TINY)
    (tmp_path / "configs" / "other.yaml").write_text(TINY.replace("latent_dim: 16", "latent_dim: 20"))
    (tmp_path / "configs" / "unfinished.yaml").write_text("name: x\n")
    with pytest.raises(ValueError) as error:
        load_initial(find_checkpoint(source), build(config, CPU), config)
    assert str(error.value).endswith(f"use the model section of {tmp_path / 'configs' / 'fits.yaml'}")
    assert "\n" not in str(error.value)


def test_how_a_quantizer_is_trained_may_differ_from_the_source(manifest, source):
    config = settings(manifest, "model.quantizer.dropout=0.5", "model.quantizer.decay=0.9", "model.quantizer.bypass=0.5",
                      "model.quantizer.dropout_counts=[1, 3]", "model.quantizer.kmeans_frames=9")  # fmt: skip
    assert load_initial(find_checkpoint(source), build(config, CPU), config)[0] is True


# ---------------------------------------------------------------------- the warm-up


@pytest.mark.parametrize(
    "phases, n_steps, expected",
    [
        ([("off", 3), ("on", 5)], 2, range(3, 5)),
        ([("on", 5)], 2, range(2)),
        ([("on", 5), ("on", 5)], 9, range(5)),
        ([("off", 3)], 2, range(0)),
        ([("off", 3), ("on", 5)], 0, range(3, 3)),
        ([("on", 0), ("off", 3), ("on", 5)], 1, range(3, 4)),
    ],
)
def test_warm_up_is_the_start_of_the_first_adversarial_phase(phases, n_steps, expected):
    config = tiny_config(["loss_weights.adv=0", "loss_weights.feat=0"])
    weights = {"on": {"loss_weights.feat": 1.0}, "off": {}}
    phases = tuple(dataclasses.replace(config.phases[0], steps=steps, set=weights[kind]) for kind, steps in phases)
    assert disc_warmup(dataclasses.replace(config, phases=phases), n_steps) == expected


def test_warm_up_without_weights_to_start_from_is_refused():
    with pytest.raises(ValueError, match="train.disc_warmup_steps=3 without train.init_from"):
        tiny_config(["train.disc_warmup_steps=3"])


@pytest.mark.parametrize("values, said", [
    (["train.disc_warmup_steps=5"], "that has 5 steps: expected fewer"),
    (["train.disc_warmup_steps=3", "phases.1.steps=0"], "and there is none: set it to 0"),
    (["train.disc_warmup_steps=3", "loss_weights={mel: 1.0}", "discriminators.sets=[]"], "and there is none: set it to 0"),
])  # fmt: skip
def test_a_warm_up_that_leaves_no_adversarial_update_is_refused(values, said):
    assert tiny_config(["train.init_from=x", "train.disc_warmup_steps=4"]).train.disc_warmup_steps == 4
    with pytest.raises(ValueError, match=said) as error:
        tiny_config(["train.init_from=x", *values])
    assert "train.disc_warmup_steps=" in str(error.value) and "\n" not in str(error.value)


def test_a_warm_up_update_changes_the_discriminators_and_nothing_else():
    config = phase_config(tiny_config(["optim.ema_decay=0.9"]), 1)
    t = build(config, CPU)
    codec, averages, discriminators = copy(t.codec), {n: v.clone() for n, v in t.averages.items()}, copy(t.discriminators)
    for step in range(3):
        log = train_step(batch(step), t, config, step, warming=True)
    assert differing(codec, t.codec.state_dict()) == [] and differing(averages, t.averages) == []
    assert len(differing(discriminators, t.discriminators.state_dict())) > 0.9 * len(discriminators)
    assert not t.optimizer_g.state and all(p.grad is None for p in t.codec.parameters())
    assert set(log) == {"loss_d", "acc_real", "acc_fake", "logit_real", "logit_fake", "grad_norm_d", "skipped_d",
                        *sound_figures(batch(), batch())}  # fmt: skip
    assert not any(value.requires_grad for value in log.values())

    quantizer = t.codec.quantizer  # known wrong: the generator is left out, and the codebooks go on
    quantizer.update_codebooks(t.codec(batch()).quantized, 0)
    assert set(differing(codec, t.codec.state_dict())) == {f"quantizer.{n}" for n in ("codebooks", "ema_count", "ema_sum")}


def test_discriminators_learn_in_the_warm_up_that_uses_up_steps_of_its_phase(manifest, source, tmp_path, capsys):
    config = settings(manifest, f"train.init_from={source}", "train.disc_warmup_steps=3", "phases.0.steps=1",
                      "phases.1.steps=5", OTHER_DISCRIMINATORS)  # fmt: skip
    train(config, tmp_path / "run", False, CPU)
    assert "discriminators are new, 3 updates of theirs come first" in capsys.readouterr().err
    codec = {step: at_step(tmp_path / "run", step, "model") for step in range(1, 7)}
    discriminators = {step: at_step(tmp_path / "run", step, "discriminators") for step in range(1, 7)}
    assert not differing(codec[1], codec[4]) and differing(discriminators[1], discriminators[4])
    assert {"model.quantizer.codebooks", "model.encoder.local.0.conv.bias"} <= set(differing(codec[4], codec[5]))
    assert differing(discriminators[4], discriminators[5])
    lines = {line["step"]: line for line in read_metrics(tmp_path / "run") if "train/snr_db_step" in line}
    assert list(lines) == [1, 2, 3, 4, 5, 6]
    assert ["train/loss_d_step" in line for line in lines.values()] == [False, True, True, True, True, True]
    assert ["train/loss_g_step" in line for line in lines.values()] == [True, False, False, False, True, True]


def test_a_run_stopped_in_the_warm_up_resumes_to_the_same_bits(manifest, source, tmp_path):
    values = [f"train.init_from={source}", "train.disc_warmup_steps=3", "phases.0.steps=1", "optim.ema_decay=0.9",
              OTHER_DISCRIMINATORS]  # fmt: skip
    config = settings(manifest, "phases.1.steps=5", *values)
    train(config, tmp_path / "whole", False, CPU)
    stopped_at(tmp_path / "whole", 3, tmp_path / "stopped")
    assert load_state(find_checkpoint(tmp_path / "stopped"))["disc_warmup_steps"] == 3
    train(config, tmp_path / "stopped", True, CPU)
    assert differing(at_step(tmp_path / "whole", 6), at_step(tmp_path / "stopped", 6)) == []


def test_a_resumed_run_takes_the_shorter_warm_up_of_its_own_and_the_config(manifest, source, tmp_path, capsys):
    values = [f"train.init_from={source}", "phases.0.steps=1", "phases.1.steps=6", OTHER_DISCRIMINATORS]
    train(settings(manifest, "train.disc_warmup_steps=4", *values), tmp_path / "whole", False, CPU)  # of steps 2 to 5
    for n_steps, warming in ((1, []), (3, [4]), (5, [4, 5])):
        run_dir = tmp_path / str(n_steps)
        stopped_at(tmp_path / "whole", 3, run_dir)
        train(settings(manifest, f"train.disc_warmup_steps={n_steps}", *values), run_dir, True, CPU)
        lines = [line for line in read_metrics(run_dir) if line["step"] > 3 and "train/snr_db_step" in line]
        assert [line["step"] for line in lines if "train/loss_g_step" not in line] == warming
    assert "note: resumed with other values" not in capsys.readouterr().err


def test_discriminators_that_came_along_do_not_warm_up_nor_do_those_of_a_resumed_run(manifest, source, tmp_path):
    values = [f"train.init_from={source}", "train.disc_warmup_steps=2", "phases.0.steps=0"]
    train(settings(manifest, "phases.1.steps=3", *values), tmp_path / "run", False, CPU)
    train(settings(manifest, "phases.1.steps=4", *values), tmp_path / "run", True, CPU)
    losses = [line["train/loss_g_step"] for line in read_metrics(tmp_path / "run") if "train/snr_db_step" in line]
    assert len(losses) == 4 and all(map(math.isfinite, losses))
