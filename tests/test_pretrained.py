"""Pretrained folders, hub ids, and the model card."""

import json
import os

import huggingface_hub.constants
import pytest
import torch
from conftest import TINY, speech_like, tiny_config
from safetensors.torch import load_file, save_file

from codec.checkpoint import inference_tensors, load_into, save_checkpoint
from codec.cli import main
from codec.model import Codec
from codec.pretrained import NORM, WEIGHTS, fetch, public_name, read_model, resolve, with_weight_norm, without_weight_norm
from codec.runlog import RunLog


@pytest.fixture
def codec():
    torch.manual_seed(3)
    return Codec(tiny_config().model)


@pytest.fixture
def wav():
    return torch.from_numpy(speech_like(4000))[None, None]


def save_run(run_dir, codec, text=TINY, step=40, averages=None):
    tensors = {"model": codec.state_dict()} | ({"ema": averages} if averages else {})
    return save_checkpoint(run_dir, step, tensors, {"step": step}, text, best=False, keep_last=1)


def error_of(function, *arguments) -> str:
    with pytest.raises(ValueError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same_output(one: Codec, other: Codec, wav) -> bool:
    return torch.equal(one.encode(wav), other.encode(wav)) and torch.equal(one(wav).wav_hat, other(wav).wav_hat)


def test_a_saved_codec_comes_back_to_the_bit_in_the_form_training_needs(codec, wav, tmp_path):
    codec.save_pretrained(tmp_path / "a")
    assert same_output(Codec.from_pretrained(tmp_path / "a"), codec.eval(), wav)
    fresh = Codec(read_model(resolve(tmp_path / "a")))
    load_into(fresh, inference_tensors(tmp_path / "a"), "a")  # as train.init_from does
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), codec.parameters()))


def test_a_folded_codec_saves_what_training_can_load_and_codes_alike(codec, wav, tmp_path):
    codec.save_pretrained(tmp_path / "a")
    folded = Codec.from_pretrained(tmp_path / "a")
    assert not any(NORM in name for name in folded.state_dict())
    folded.save_pretrained(tmp_path / "b")
    assert load_file(tmp_path / "b" / WEIGHTS).keys() == codec.state_dict().keys()
    assert same_output(Codec.from_pretrained(tmp_path / "b"), folded, wav)


def test_splitting_a_weight_and_folding_it_again_changes_no_bit():
    w = torch.randn(96, 32, 7)
    split = with_weight_norm({"a.weight": w, "b.weight": w}, [f"a{NORM}0", f"a{NORM}1", "b.weight"])
    assert sorted(split) == [f"a{NORM}0", f"a{NORM}1", "b.weight"]
    assert torch.equal(without_weight_norm(split)["a.weight"], w)
    wrong = split | {f"a{NORM}0": torch.norm_except_dim(w, 2, 0)}
    assert not torch.equal(without_weight_norm(wrong)["a.weight"], w)


def test_saving_replaces_nothing(codec, tmp_path):
    (tmp_path / "empty").mkdir()
    codec.save_pretrained(tmp_path / "empty", card="first")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/diary.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("empty", "other", "file"):
        assert "exists and is not empty" in error_of(codec.save_pretrained, tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "other"]
    assert (tmp_path / "empty/README.md").read_text() == "first"


def test_an_error_while_writing_leaves_the_empty_folder(codec, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.setattr("codec.pretrained.write_atomically", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        codec.save_pretrained(tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"] and not os.listdir(tmp_path / "a")


def test_runs_checkpoints_and_pretrained_folders_resolve_to_their_weights(codec, wav, tmp_path):
    checkpoint = save_run(tmp_path / "run", codec)
    codec.save_pretrained(tmp_path / "a")
    assert resolve(tmp_path / "run") == resolve(checkpoint) == checkpoint and resolve(str(tmp_path / "a")) == tmp_path / "a"
    assert read_model(checkpoint) == read_model(tmp_path / "a") == codec.config
    assert same_output(Codec.from_pretrained(checkpoint), Codec.from_pretrained(tmp_path / "a"), wav)


def test_a_run_is_converted_with_its_averages_step_and_source(codec, wav, tmp_path, capsys):
    averages = {name: p.detach() * 0.9 for name, p in codec.named_parameters()}
    save_run(tmp_path / "run", codec, averages=averages)
    assert main(["convert", "--from", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert f"train.init_from={tmp_path / 'out'}" in capsys.readouterr().out
    with torch.no_grad():
        for name, p in codec.named_parameters():
            p.copy_(averages[name])
    assert same_output(Codec.from_pretrained(tmp_path / "out"), codec.eval(), wav)
    about = json.loads((tmp_path / "out/config.json").read_text())
    assert about["format"] == "codec" and about["step"] == 40 and about["source"] == "run"
    assert main(["info", str(tmp_path / "out")]) == 0
    assert "40" in capsys.readouterr().out


def test_a_folder_that_lies_about_itself_is_one_line(codec, tmp_path):
    codec.save_pretrained(tmp_path / "a")
    path, weights = tmp_path / "a/config.json", tmp_path / "a" / WEIGHTS
    good, tensors = json.loads(path.read_text()), load_file(tmp_path / "a" / WEIGHTS)
    path.write_text(json.dumps(good | {"version": 2}))
    assert "version 2" in error_of(Codec.from_pretrained, tmp_path / "a")
    path.write_text(json.dumps(good | {"model": good["model"] | {"sample_rat": 1}}))
    assert "did you mean model.sample_rate" in error_of(Codec.from_pretrained, tmp_path / "a")
    path.write_text(json.dumps(good | {"model": good["model"] | {"latent_dim": 24}}))
    assert "of another shape" in error_of(Codec.from_pretrained, tmp_path / "a")
    path.write_text("[1]")
    assert "holds a list" in error_of(Codec.from_pretrained, tmp_path / "a")
    path.write_text(json.dumps({"model_type": "mimi"}))
    assert "codec convert --from" in error_of(Codec.from_pretrained, tmp_path / "a")
    path.write_text(json.dumps(good))
    save_file({name: tensors[name] for name in list(tensors)[1:]}, weights)
    assert "1 missing" in error_of(Codec.from_pretrained, tmp_path / "a")
    weights.write_bytes(weights.read_bytes()[:-50])
    assert "truncated" in error_of(Codec.from_pretrained, tmp_path / "a")
    weights.unlink()
    assert "holds no model.safetensors" in error_of(Codec.from_pretrained, tmp_path / "a")


@pytest.mark.parametrize("change, said", [
    ({"latent_dim": 0}, "model.latent_dim=0, expected at least 1"),
    ({"latent_dim": -4}, "model.latent_dim=-4, expected at least 1"),
    ({"sample_rate": 0}, "model.sample_rate=0, expected at least 1"),
    ({"encoder.encoder_dim": 0}, "model.encoder.encoder_dim=0, expected at least 1"),
    ({"encoder.strides": []}, "model.encoder.strides=[], expected numbers of at least 2"),
    ({"encoder.residual_compress": 0}, "model.encoder.residual_compress=0, expected at least 1"),
    ({"decoder.decoder_dim": 3}, "model.decoder.decoder_dim=3 cannot be halved 2 times"),
    ({"quantizer.n_semantic": 9}, "model.quantizer.n_semantic=9, expected less than n_codebooks=3"),
    ({"quantizer.n_codebooks": 10**9}, "model.quantizer.n_codebooks=1000000000, expected 1 to 1024"),
])  # fmt: skip
def test_a_config_json_of_no_possible_model_is_one_line_naming_the_key(codec, tmp_path, capsys, change, said):
    codec.save_pretrained(tmp_path / "a")
    path = tmp_path / "a/config.json"
    config = json.loads(path.read_text())
    for key, value in change.items():
        *section, name = key.split(".")
        (config["model"][section[0]] if section else config["model"])[name] = value
    path.write_text(json.dumps(config))
    assert main(["info", str(tmp_path / "a")]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and str(path) in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_weights_without_their_config_are_told_so(codec, tmp_path):
    codec.save_pretrained(tmp_path / "a")
    (tmp_path / "a/config.json").unlink()
    assert "lacks the config.json, transformers' or ours" in error_of(resolve, tmp_path / "a")


# ------------------------------------------------------------------------- the hub


def test_a_hub_id_without_a_network_is_one_line_naming_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # refused at once
    for message in (error_of(Codec.from_pretrained, "nobody/no-codec"), error_of(resolve, "nobody/no-codec")):
        assert message.startswith("nobody/no-codec: no such folder here, and the hub did not give it (")
        assert "hf auth login" in message
    assert main(["convert", "--from", "nobody/no-codec", "out"]) == 2
    assert main(["encode", "in.wav", "out.codec", "--checkpoint", "nobody/no-codec"]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_a_hub_id_is_downloaded_without_pickles_unless_a_folder_has_its_name(codec, wav, tmp_path, monkeypatch):
    codec.save_pretrained(tmp_path / "hub")
    asked = []

    def download(hub_id, allow_patterns):
        asked.append((hub_id, allow_patterns))
        return str(tmp_path / "hub")

    monkeypatch.setattr("codec.pretrained.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert same_output(Codec.from_pretrained("owner/name"), codec.eval(), wav)
    (hub_id, patterns), = asked
    assert hub_id == "owner/name" and {WEIGHTS, "discriminators.safetensors"} <= set(patterns)
    assert not any(pattern.endswith((".bin", "*")) for pattern in patterns)
    codec.save_pretrained("owner/name")
    assert fetch("owner/name").is_dir() and len(asked) == 1


@pytest.mark.parametrize("files, said", [
    (["config.json", "pytorch_model.bin"], "(it holds config.json, pytorch_model.bin)"), (OSError(), "(only pickled weights?)"),
])  # fmt: skip
def test_a_hub_repository_of_pickles_is_told_so(tmp_path, monkeypatch, files, said):
    def list_repo_files(self, hub_id):
        if isinstance(files, list):
            return files
        raise files

    monkeypatch.setattr("codec.pretrained.snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", list_repo_files)
    assert error_of(fetch, "owner/name").startswith(f"owner/name: no model.safetensors in that repository {said}")


def test_a_mistyped_folder_is_not_asked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("codec.pretrained.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert error_of(resolve, "runs/typo").startswith("runs/typo: no such folder in runs")


def test_only_a_hub_id_is_published_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/a").mkdir(parents=True)
    names = {"owner/name": "owner/name", "runs/a": "a", str(tmp_path / "runs/gone"): "gone", ".": tmp_path.name}
    assert {name: public_name(name) for name in names} == names


@pytest.mark.parametrize("name", ["absent", "a/b/c", "/abs/olute", "./a/b", "../b", "a/", "", "runs//a"])
def test_what_cannot_be_a_hub_id_never_reaches_the_network(name, tmp_path, monkeypatch):
    monkeypatch.setattr("codec.pretrained.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    error_of(resolve, name)


# ------------------------------------------------------------------------- the card


def card_of_run(tmp_path, codec, stats: dict | None, losses=(3.0, 2.0, 2.5)) -> str:
    manifest = tmp_path / "data/manifest.jsonl"
    manifest.parent.mkdir()
    if stats:
        (tmp_path / "data/stats.json").write_text(json.dumps(stats))
    log = RunLog(tmp_path / "runs/telugu-small")
    for step, mel in zip((20, 30, 40, 50), (*losses, 1.0)):
        scores = {"snr_db": 5.25, "mel": mel, "perplexity_0": 9.0, "perplexity_1": 12.0, "used_0": 0.5}
        log.scalars(step, {f"val/{name}_step": value for name, value in scores.items()})
    log.close()
    save_run(tmp_path / "runs/telugu-small", codec, TINY.replace("MANIFEST", str(manifest)))
    assert main(["convert", "--from", str(tmp_path / "runs/telugu-small"), str(tmp_path / "out")]) == 0
    return (tmp_path / "out/README.md").read_text()


def test_the_card_tells_the_runs_data_recipe_and_metrics(codec, tmp_path):
    part = {"hours": 1.5, "n_speakers": 6, "n_utterances": 4421}
    card = card_of_run(tmp_path, codec, {"hours": 2.4, "n_recordings": 36, "splits": {"train": part}})
    n = sum(p.numel() for name, p in codec.named_parameters() if not name.endswith("original0")) + 3 * 16 * 8
    for told in ("library_name: codec", "# telugu-small", f"{n / 1e6:.2f}M", "8000 Hz", "400 Hz", "3 × 16", "4.8 kbps",
                 "2.40 h at 8000 Hz, from 36 recordings", "| train | 1.50 | 6 | 4421 |", "40 of 8 steps",
                 f"{40 * 4 * 0.25 / 3600:.2f} h of audio seen", "| warm-up | 3 | wave 1, mel 1, commit 0.25 |",
                 "| adversarial | 5 | adv 1, feat 2, wave 1, mel 1, commit 0.25 |", "Discriminators: mrd; hinge loss",
                 "| metric | here (step 40) | best mel (step 30) |", "| mel | 2.5 | 2 |", "| snr_db | 5.25 | 5.25 |",
                 "| codebook perplexity | 9 to 12 | 9 to 12 |", "Codec.from_pretrained",
                 "TODO, author:** no licence"):  # fmt: skip
        assert told in card, told
    assert "| mel | 1 |" not in card  # logged after this checkpoint


def test_the_card_says_what_it_does_not_know(codec, tmp_path):
    card = card_of_run(tmp_path, codec, None, losses=(float("nan"),) * 3)
    assert "its stats.json was out of reach" in card and "No validation was logged up to this checkpoint" in card
    codec.save_pretrained(tmp_path / "bare")
    bare = (tmp_path / "bare/README.md").read_text()
    assert "TODO, author:** say on which data" in bare and "## Metrics" not in bare


def test_a_converted_folder_names_its_source_and_claims_no_training(codec, tmp_path):
    codec.save_pretrained(tmp_path / "a")
    assert main(["convert", "--from", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    card = (tmp_path / "b/README.md").read_text()
    assert "Converted from `a`; no training run here" in card and "## Recipe" not in card
    assert str(tmp_path) not in card + (tmp_path / "b/config.json").read_text()


def test_the_config_that_goes_along_names_no_folder_of_its_author(codec, tmp_path):
    text = TINY.replace("train: {", f"train: {{init_from: {tmp_path / 'elsewhere'}, ")
    text = text.replace("losses: {", f"losses: {{whisper_model: {tmp_path / 'whisper'}, ")
    text = text.replace("MANIFEST", f"{tmp_path}/a.jsonl")
    save_run(tmp_path / "run", codec, text)
    assert main(["convert", "--from", str(tmp_path / "run"), "--compact", str(tmp_path / "out")]) == 0
    written = (tmp_path / "out/config.yaml").read_text()
    assert "whisper_model: whisper" in written and "init_from: elsewhere" in written and str(tmp_path) not in written


def test_a_checkpoint_moved_out_of_its_run_takes_no_name_or_metrics_from_where_it_lies(codec, tmp_path):
    text = TINY.replace("train: {", f"train: {{init_from: {tmp_path / 'elsewhere'}, ")
    checkpoint = save_run(tmp_path / "run", codec, text)
    checkpoint.rename(tmp_path / "moved")
    assert main(["convert", "--from", str(tmp_path / "moved"), str(tmp_path / "out")]) == 0
    card = (tmp_path / "out/README.md").read_text()
    assert "# moved" in card and "The log of the run was out of reach" in card and tmp_path.parent.name not in card
    assert "It started from the weights of `elsewhere`." in card
