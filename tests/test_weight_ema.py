"""Averaged weights, from the update to the codec a user loads; and which weights decay."""

import math
from pathlib import Path

import pytest
import torch
from conftest import speech_like, tiny_config
from safetensors.torch import load_file

import train_codec_gan
from codec.checkpoint import find_checkpoint
from codec.config import phase_config
from codec.layers import Transformer, remove_weight_norm
from codec.model import Codec
from train_codec_gan import adamw, build, train, train_step

CPU = torch.device("cpu")
DECAY = 0.9


def batch(seed: int = 0) -> torch.Tensor:
    return torch.stack([torch.from_numpy(speech_like(2000, seed=seed + i))[None] for i in range(4)])


def settings(manifest: Path, *more: str):
    return tiny_config([f"optim.ema_decay={DECAY}", "data.n_workers=0", "train.val_every=2", "phases.0.steps=2",
                        "phases.1.steps=4", "train.keep_last=9", *more], manifest)  # fmt: skip


def saved(run_dir: Path, name: str = "*") -> dict[str, torch.Tensor]:
    folder = find_checkpoint(run_dir)
    return {f"{path.stem}.{key}": value for path in sorted(folder.glob(f"{name}.safetensors"))
            for key, value in load_file(path).items()}  # fmt: skip


def differing(a: dict, b: dict) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def tensors_of(codec: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in codec.state_dict().items()}


def test_the_average_is_the_one_of_a_hand_computation_and_takes_each_update_after_it_was_made():
    config = phase_config(tiny_config([f"optim.ema_decay={DECAY}"]), 1)
    t = build(config, CPU)
    history = [tensors_of(t.codec)]
    for step in range(4):
        train_step(batch(step), t, config, step)
        history.append(tensors_of(t.codec))
    late = {}
    for name, averaged in t.averages.items():
        expected = history[0][name].double()
        for live in history[1:]:
            expected = DECAY * expected + (1 - DECAY) * live[name].double()
        torch.testing.assert_close(averaged.double(), expected, rtol=1e-5, atol=1e-7)
        late[name] = history[0][name].double()
        for live in history[:-1]:  # known wrong: averaged before the optimizer's step
            late[name] = DECAY * late[name] + (1 - DECAY) * live[name].double()
    assert t.averages.keys() == history[0].keys()
    far = [name for name in late if not torch.allclose(late[name], t.averages[name].double(), rtol=1e-5, atol=1e-7)]
    assert len(far) == len(late)


def test_a_skipped_update_does_not_enter_the_average():
    config = phase_config(tiny_config([f"optim.ema_decay={DECAY}"]), 1)
    t = build(config, CPU)
    train_step(batch(), t, config, 0)
    before = {name: value.clone() for name, value in t.averages.items()}
    wav = batch()
    wav[0, 0, 0] = math.nan
    assert train_step(wav, t, config, 1)["skipped_g"] == 1
    assert differing(before, t.averages) == []


def test_averages_resume_to_the_same_bits(manifest, tmp_path, monkeypatch):
    config = settings(manifest)
    train(config, tmp_path / "whole", False, CPU)
    stopped = settings(manifest, "phases.1.steps=1")
    for name in ("resumed", "wrong"):
        train(stopped, tmp_path / name, False, CPU)
    train(config, tmp_path / "resumed", True, CPU)
    whole = saved(tmp_path / "whole")
    assert differing(whole, saved(tmp_path / "resumed")) == []
    assert len([name for name in whole if name.startswith("ema.")]) > 50

    monkeypatch.setattr(train_codec_gan, "load_averaged", lambda *_: None)  # known wrong: they start anew
    train(config, tmp_path / "wrong", True, CPU)
    different = differing(whole, saved(tmp_path / "wrong"))
    assert different and all(name.startswith("ema.") for name in different)


def test_averages_begin_where_a_run_that_had_none_is_resumed(manifest, tmp_path):
    train(settings(manifest, "optim.ema_decay=0", "phases.1.steps=1"), tmp_path / "run", False, CPU)
    assert not saved(tmp_path / "run", "ema")
    live = saved(tmp_path / "run", "model")
    train(settings(manifest, "phases.1.steps=1", "phases.0.steps=3"), tmp_path / "run", True, CPU)
    after, averages = saved(tmp_path / "run", "model"), saved(tmp_path / "run", "ema")
    for name, averaged in averages.items():
        name = name.replace("ema.", "model.")
        torch.testing.assert_close(averaged, DECAY * live[name] + (1 - DECAY) * after[name], rtol=1e-5, atol=1e-7)


def test_validation_hears_the_averages_and_training_does_not_notice(manifest, tmp_path, monkeypatch):
    heard, validate = {}, train_codec_gan.validate

    def listening(t, *rest):
        heard.update({name: value.clone() for name, value in t.codec.state_dict().items()})
        return validate(t, *rest)

    monkeypatch.setattr(train_codec_gan, "validate", listening)
    train(settings(manifest), tmp_path / "often", False, CPU)
    live, averages = saved(tmp_path / "often", "model"), saved(tmp_path / "often", "ema")
    expected = {name[6:]: averages.get(f"ema.{name[6:]}", value) for name, value in live.items()}
    assert differing(heard, expected) == []
    assert len(differing(heard, {name[6:]: value for name, value in live.items()})) == len(averages)  # known wrong: live
    train(settings(manifest, "train.val_every=100"), tmp_path / "seldom", False, CPU)
    assert differing(saved(tmp_path / "often"), saved(tmp_path / "seldom")) == []


def test_a_loaded_codec_has_the_averages_and_codebooks_of_the_same_time(manifest, tmp_path):
    config = settings(manifest)
    train(config, tmp_path / "run", False, CPU)
    live = {name[6:]: value for name, value in saved(tmp_path / "run", "model").items()}
    averages = {name[4:]: value for name, value in saved(tmp_path / "run", "ema").items()}
    wav, outputs = batch(), {}
    mixed = averages | {name: value for name, value in live.items() if name.startswith("quantizer.")}
    for kind, tensors in (("averaged", averages), ("live", live), ("mixed", mixed)):
        codec = Codec(config.model)
        codec.load_state_dict(tensors)
        remove_weight_norm(codec)
        outputs[kind] = codec.eval()(wav).wav_hat
    loaded = Codec.from_pretrained(tmp_path / "run")
    torch.testing.assert_close(loaded(wav).wav_hat, outputs["averaged"])
    assert not torch.allclose(loaded(wav).wav_hat, outputs["live"], atol=1e-4)
    # known wrong: the averaged encoder with the codebooks of the last update, which its latents do not fit
    assert not torch.allclose(loaded(wav).wav_hat, outputs["mixed"], atol=1e-4)


def test_weight_decay_can_be_kept_to_transformers():
    body = "causal: true, transformer: {n_layers: 1, n_heads: 2, ff_dim: 8, window: 4}"
    encoder = f"model.encoder={{type: conv, encoder_dim: 4, strides: [4, 5], dilations: [1], {body}}}"
    decoder = f"model.decoder={{type: conv, decoder_dim: 16, strides: [5, 4], dilations: [1], {body}}}"
    codec, decayed, order = Codec(tiny_config([encoder, decoder]).model), {}, {}
    for where in ("all", "transformer"):
        optimizer = adamw([codec], 1e-3, tiny_config([f"optim.weight_decay_on={where}"]).optim, [])
        order[where] = [id(p) for group in optimizer.param_groups for p in group["params"]]
        ids = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
        decayed[where] = {name for name, p in codec.named_parameters() if id(p) in ids}
    transformers = [name for name, module in codec.named_modules() if isinstance(module, Transformer)]
    inside = {name for name in decayed["all"] if name.startswith(tuple(transformers))}
    assert len(transformers) == 2 and len(inside) == 2 * 4  # qkv, out and the two of the MLP
    assert decayed["transformer"] == inside < decayed["all"]
    assert order["all"] == order["transformer"]  # so a resumed run may change it


@pytest.mark.parametrize("key", ["ema_decay: 0.9", "weight_decay_on: transformer", "weight_decay: 0", "betas: [0.5, 0.9]"])
def test_what_is_fixed_for_a_whole_run_is_refused_in_a_phase(key):
    with pytest.raises(ValueError, match="cannot change between phases"):
        tiny_config([f"phases.1.set={{optim.{key}}}"])
