"""Ours against transformers' own classes, through files and the command line, both ways."""

import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from codec.checkpoint import save_checkpoint
from codec.cli import main
from codec.config import parse_config
from codec.convert import bandwidth_kbps, dac_model, their_config
from codec.model import Codec
from codec.pretrained import WEIGHTS

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from equality import lively, make_random, their_audio, their_codes, their_latents  # noqa: E402
from transformers import (  # noqa: E402
    AutoFeatureExtractor,
    AutoModel,
    DacConfig,
    DacModel,
    EncodecConfig,
    EncodecModel,
    MimiConfig,
    MimiModel,
    Wav2Vec2Config,
)

FAMILIES = ["dac", "encodec", "mimi"]
HOP = {"dac": 320, "encodec": 320, "mimi": 1920}
COUNTS = {"dac": [1, 2, 3, 4], "encodec": [1, 2, 4], "mimi": [2, 3, 4, 5]}  # every bitrate they allow


def tiny(family: str):
    if family == "dac":
        return DacModel(DacConfig(sampling_rate=24000, encoder_hidden_size=4, downsampling_ratios=[2, 4, 5, 8],
                                  decoder_hidden_size=64, n_codebooks=4, codebook_size=64, codebook_dim=4))  # fmt: skip
    if family == "encodec":
        return EncodecModel(EncodecConfig(num_filters=4, hidden_size=16, codebook_size=64, num_residual_layers=2,
                                          target_bandwidths=[0.45, 0.9, 1.8]))  # fmt: skip
    return MimiModel(MimiConfig(num_filters=4, hidden_size=16, upsample_groups=16, num_hidden_layers=2, intermediate_size=32,
                                num_attention_heads=2, num_key_value_heads=2, sliding_window=10, codebook_size=64,
                                codebook_dim=8, vector_quantization_hidden_dimension=8, num_quantizers=5,
                                num_semantic_quantizers=2))  # fmt: skip


def speech(batch_size: int, n_samples: int) -> torch.Tensor:
    return lively(batch_size, n_samples, 24000)


def reference_z_q(model, family: str, codes: torch.Tensor) -> torch.Tensor:
    if family == "dac":
        return model.quantizer.from_codes(codes)[0]
    return model.quantizer.decode(codes.transpose(0, 1) if family == "encodec" else codes)


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def error_of(capsys, *arguments) -> str:
    capsys.readouterr()
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("codec: ") and captured.err.count("\n") == 1 and not captured.out
    return captured.err


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict:
    """Each family: their folder, the folder converted from it, and the folder converted back."""
    folders = {}
    torch.manual_seed(5)
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        make_random(tiny(family), family).save_pretrained(folder / "theirs")
        assert run("convert", "--from", folder / "theirs", folder / "ours") == 0
        assert run("convert", "--from", folder / "ours", "--to", "transformers", folder / "back") == 0
        folders[family] = folder
    return folders


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def theirs(saved, family):
    return AutoModel.from_pretrained(saved[family] / "theirs").eval()


@pytest.fixture(scope="module")
def ours(saved, family):
    return Codec.from_pretrained(saved[family] / "ours")


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


@pytest.mark.parametrize("batch_size, n_hops", [(1, 20), (2, 21.37), (1, 0.2), (3, 7 + 1 / 1920)])
def test_latents_codes_and_audio_equal_theirs(family, theirs, ours, batch_size, n_hops):
    wav = speech(batch_size, round(n_hops * HOP[family]))
    with torch.no_grad():
        z = their_latents(theirs, family, wav)
        assert (ours(wav).z - z).abs().max() < 1e-4
        for n in COUNTS[family]:
            codes = their_codes(theirs, family, wav, n)
            assert torch.equal(ours.encode(wav, n), codes)
            assert (ours.quantizer.decode(codes) - reference_z_q(theirs, family, codes)).abs().max() < 1e-4
            wav_hat, expected = ours.decode(codes), their_audio(theirs, family, codes)
            assert wav_hat.shape[-1] - expected.shape[-1] in range(HOP[family])  # theirs is short at odd strides
            assert (wav_hat[..., : expected.shape[-1]] - expected).abs().max() < 1e-4
            assert expected.std() > 0.01 and (n_hops < 2 or len(codes.unique()) > 10)


def test_the_way_back_gives_automodel_the_same_outputs(saved, family, theirs):
    back, info = AutoModel.from_pretrained(saved[family] / "back", output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    wav = speech(2, 13 * HOP[family])
    n = COUNTS[family][-1]
    with torch.no_grad():
        codes = their_codes(theirs, family, wav, n)
        assert torch.equal(their_codes(back.eval(), family, wav, n), codes)
        wav_hats = [their_audio(model, family, codes) for model in (theirs, back)]
    assert (wav_hats[0] - wav_hats[1]).abs().max() < 1e-6


def test_there_and_back_changes_no_bit_of_their_weights(saved, family):
    before, after = (load_file(saved[family] / name / WEIGHTS) for name in ("theirs", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((saved[family] / name / "config.json").read_text()) for name in ("theirs", "back")]
    assert configs[0] == configs[1]


def test_their_feature_extractor_is_written_and_the_cards_lines_run(saved, family):
    extractor = AutoFeatureExtractor.from_pretrained(saved[family] / "back")
    assert type(extractor).__name__ == ("DacFeatureExtractor" if family == "dac" else "EncodecFeatureExtractor")
    assert extractor.sampling_rate == 24000 and (family != "dac" or extractor.hop_length == 320)
    lines = (saved[family] / "back/README.md").read_text().split("```python")[1].split("```")[0]
    known = {"wav": speech(1, 9000)[0, 0].numpy()}
    exec(lines.replace("FOLDER_OR_HUB_ID", str(saved[family] / "back")), known)
    assert known["wav_hat"].shape[-1] in range(8990, 9000 + HOP[family])


@pytest.mark.parametrize("chunk_frames", [1, 7, 16, 1000])
def test_chunks_change_no_code_and_no_sample(family, ours, chunk_frames):
    wav = speech(1, int(23.4 * HOP[family]))  # 46 frames of Mimi's transformer, whose window is 10
    codes = ours.encode(wav)
    assert torch.equal(ours.encode_long(wav, chunk_frames=chunk_frames), codes)
    wav_hat = ours.decode_long(codes, wav.shape[-1], chunk_frames)
    assert (wav_hat - ours.decode(codes, wav.shape[-1])).abs().max() < 1e-5


def test_a_transformer_without_its_window_gives_other_codes(saved, tmp_path):
    folder = copied(saved["mimi"] / "ours", tmp_path / "wide")
    config = json.loads((folder / "config.json").read_text())
    for body in ("encoder", "decoder"):
        config["model"][body]["transformer"]["window"] = 1000
    (folder / "config.json").write_text(json.dumps(config))
    wav = speech(1, 20 * 1920)
    assert not torch.equal(Codec.from_pretrained(folder).encode(wav), Codec.from_pretrained(saved["mimi"] / "ours").encode(wav))


def test_folded_weights_come_back_from_gain_and_direction_to_the_bit(saved):
    theirs = load_file(saved["dac"] / "theirs" / WEIGHTS)
    codec = Codec.from_pretrained(saved["dac"] / "ours")
    assert torch.equal(codec.decoder.layers[2].conv.weight, theirs["decoder.block.0.conv_t1.weight"])
    w = torch.randn(256, 64, 7)
    assert not torch.equal(torch._weight_norm(w, torch.norm_except_dim(w, 2, 0), 0), w)  # the gain that torch itself takes


@pytest.mark.parametrize("form", ["plain", "old"])
def test_each_way_of_writing_weight_norm_is_read(saved, tmp_path, form):
    folder = copied(saved["encodec"] / "theirs", tmp_path / "theirs")
    tensors = load_file(folder / WEIGHTS)
    for gain in [name for name in tensors if name.endswith("original0")]:
        stem = gain.removesuffix(".parametrizations.weight.original0")
        g, v = tensors.pop(gain), tensors.pop(stem + ".parametrizations.weight.original1")
        tensors |= {stem + ".weight": torch._weight_norm(v, g, 0)} if form == "plain" else {
            stem + ".weight_g": g, stem + ".weight_v": v}  # fmt: skip
    save_file(tensors, folder / WEIGHTS)
    assert run("convert", "--from", folder, tmp_path / "ours") == 0
    wav = speech(1, 6400)
    one, other = Codec.from_pretrained(tmp_path / "ours"), Codec.from_pretrained(saved["encodec"] / "ours")
    assert torch.equal(one.decode(one.encode(wav)), other.decode(other.encode(wav)))


def test_the_published_config_files_of_mimi_are_read(saved, tmp_path):
    folder = copied(saved["mimi"] / "theirs", tmp_path / "theirs")
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"], config["_frame_rate"]
    (folder / "config.json").write_text(json.dumps(config | {"frame_rate": 12.5, "rope_theta": 10000.0}))
    assert run("convert", "--from", folder, tmp_path / "ours") == 0
    expected = Codec.from_pretrained(saved["mimi"] / "ours")
    assert Codec.from_pretrained(tmp_path / "ours").config == expected.config


RUN = """
name: small
model:
  sample_rate: 24000
  latent_dim: 16
  encoder: ENCODER
  quantizer: {type: ema, n_codebooks: 3, codebook_size: 64, codebook_dim: 8, n_semantic: 1}
  decoder: DECODER
  pad_input: false
discriminators: {sets: []}
losses: {}
loss_weights: {mel: 1.0}
optim: {lr_g: 1.0e-4, lr_d: 1.0e-4}
data: {manifest: none, segment_samples: 4800, batch_size: 1, segments_per_epoch: 100}
train: {}
phases: [{name: all, steps: 10}]
"""
BODY = ("{type: conv, WIDTH, dilations: [1], causal: true, activation: elu, last_kernel_size: 3, residual_kernel_size: 3, "
        "residual_compress: 2, transformer: {n_layers: 1, n_heads: 2, ff_dim: 32, window: 8}, latent_stride: 2}")  # fmt: skip
MIMI_RUN = RUN.replace("ENCODER", BODY.replace("WIDTH", "encoder_dim: 4, strides: [4, 5]")).replace(
    "DECODER", BODY.replace("type: conv,", "type: conv, output: linear,").replace("WIDTH", "decoder_dim: 16, strides: [5, 4]"))


def save_run(run_dir: Path, text: str = MIMI_RUN) -> Codec:
    """A run whose codebooks are trained ones: Laplace-smoothed, so not sum / count; its averages differ from its weights."""
    codec = Codec(parse_config(text, "small").model)
    for part in (codec.quantizer.semantic, codec.quantizer.acoustic) if text == MIMI_RUN else []:
        part.ema_count.uniform_(0, 300)
        part.ema_sum.copy_(part.codebooks * part.ema_count[..., None] * 1.01)
    averages = {name: p.detach() * 1.1 for name, p in codec.named_parameters()}
    tensors = {"model": codec.state_dict(), "ema": averages}
    save_checkpoint(run_dir, 7, tensors, {"step": 7}, text, best=False, keep_last=1)
    return codec


def test_a_run_of_ours_goes_to_transformers_with_averages_and_exactly_its_codebooks(tmp_path):
    save_run(tmp_path / "run")
    assert run("convert", "--from", tmp_path / "run", "--to", "transformers", tmp_path / "theirs") == 0
    theirs, info = AutoModel.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    codec = Codec.from_pretrained(tmp_path / "run")
    for vq, own in ((theirs.quantizer.semantic_residual_vector_quantizer, codec.quantizer.semantic),
                    (theirs.quantizer.acoustic_residual_vector_quantizer, codec.quantizer.acoustic)):  # fmt: skip
        assert torch.equal(torch.stack([layer.codebook.embed for layer in vq.layers]), own.codebooks)
        usage = own.ema_count.clamp(min=1e-5)[..., None]  # the wrong version: sums divided by counts are not what they were
        assert not torch.equal(own.codebooks * usage / usage, own.codebooks)
    wav = speech(2, 4900)
    with torch.no_grad():
        codes = theirs.eval().encode(wav).audio_codes
        assert torch.equal(codec.encode(wav), codes)
        assert (theirs.decode(codes).audio_values - codec.decode(codes)).abs().max() < 1e-4


@pytest.mark.parametrize("change, named", [
    ({"output: linear, ": ""}, 'model.decoder.output: "linear" there, "scaled_tanh" here'),
    ({"latent_stride: 2": "latent_stride: 3", "segment_samples: 4800": "segment_samples: 6000"}, "model.encoder.latent_stride"),
    ({"activation: elu": "activation: snake"}, "model.encoder.activation"),
    ({", n_semantic: 1": ""}, "EncodecModel cannot be this model: model.encoder.lstm_layers"),
    ({"pad_input: false": "pad_input: true"}, "model.pad_input"),
    ({"codebook_size: 64": "codebook_size: 65"}, "model.quantizer.codebook_size: 65 here"),
])  # fmt: skip
def test_what_transformers_cannot_be_is_refused_by_key(tmp_path, capsys, change, named):
    text = MIMI_RUN
    for old, new in change.items():
        assert old in text
        text = text.replace(old, new)
    codec = Codec(parse_config(text, "small").model)
    save_checkpoint(tmp_path / "run", 7, {"model": codec.state_dict()}, {"step": 7}, text, best=False, keep_last=1)
    error = error_of(capsys, "convert", "--from", tmp_path / "run", "--to", "transformers", tmp_path / "out")
    assert named in error and "configs/dac_*.yaml, encodec_24khz.yaml and mimi.yaml" in error
    assert not (tmp_path / "out").exists()


def test_every_number_of_codebooks_has_a_bandwidth_that_means_it():
    for bits_per_s in range(50, 2000, 7):
        for n in range(1, 33):
            kbps = bandwidth_kbps(n, bits_per_s)
            assert kbps == pytest.approx(n * bits_per_s / 1000, abs=2e-6)
            assert int(1000 * kbps // bits_per_s) == math.floor(kbps * 1000 / bits_per_s) == n  # EncodecConfig's two formulas
    wrong = [n for n in range(1, 33) if int(1000 * (n * 113 / 1000) // 113) != n]
    assert wrong  # the plain quotient


def test_a_spectral_body_has_no_counterpart(tmp_path, capsys):
    spectral = "{type: spectral, n_fft: 80, hop_length: 40, dim: 8, n_blocks: 1}"
    text = RUN.replace("ENCODER", spectral).replace("DECODER", spectral).replace("pad_input: false", "pad_input: true")
    codec = Codec(parse_config(text, "small").model)
    codec.save_pretrained(tmp_path / "ours")
    error = error_of(capsys, "convert", "--from", tmp_path / "ours", "--to", "transformers", tmp_path / "out")
    assert "model.encoder.type: spectral here" in error


@pytest.mark.parametrize("family, change, named", [
    ("encodec", {"audio_channels": 2}, "audio_channels=2, expected 1"),
    ("encodec", {"normalize": True}, "normalize=True, expected False"),
    ("encodec", {"norm_type": "time_group_norm"}, "norm_type='time_group_norm', expected 'weight_norm'"),
    ("encodec", {"chunk_length_s": 1.0, "overlap": 0.01}, "chunk_length_s=1.0, expected None"),
    ("encodec", {"use_causal_conv": False}, "use_causal_conv=False, expected True"),
    ("encodec", {"pad_mode": "circular"}, "pad_mode='circular', expected constant | reflect | replicate"),
    ("mimi", {"hidden_act": "silu"}, "hidden_act='silu', expected 'gelu'"),
    ("mimi", {"num_key_value_heads": 1}, "num_key_value_heads=1, expected 2"),
    ("mimi", {"upsample_groups": 1}, "upsample_groups=1, expected 16"),
    ("mimi", {"trim_right_ratio": 0.5}, "trim_right_ratio=0.5, expected 1.0"),
    ("mimi", {"num_quantizers": "many"}, "num_quantizers"),
    ("encodec", {"num_lstm_layers": 0}, "num_lstm_layers=0, expected at least 1"),
    ("encodec", {"target_bandwidths": []}, "no encodec that can be converted"),
    ("encodec", {"sampling_rate": 0}, "no encodec that can be converted"),
    ("encodec", {"sampling_rate": -1}, "no encodec that can be converted"),
    ("encodec", {"upsampling_ratios": []}, "model.quantizer.n_codebooks=0, expected"),  # 1 sample a frame
    ("encodec", {"upsampling_ratios": [0]}, "no encodec that can be converted"),
    ("encodec", {"num_filters": -4}, "model.encoder.encoder_dim=-4, expected at least 1"),
    ("encodec", {"compress": 0}, "model.encoder.residual_compress=0, expected at least 1"),
    ("encodec", {"compress": 5}, "model.encoder.residual_compress=5, expected at most 4"),
    ("encodec", {"dilation_growth_rate": 0}, "model.encoder.dilations=[1, 0], expected numbers of at least 1"),
    ("encodec", {"num_lstm_layers": 10**9}, "model.encoder.lstm_layers=1000000000, expected 0 to 16"),
    ("mimi", {"sampling_rate": 0}, "no mimi that can be converted"),
    ("mimi", {"upsampling_ratios": [0]}, "no mimi that can be converted"),
    ("mimi", {"num_attention_heads": 0, "num_key_value_heads": 0}, "no mimi that can be converted"),
    ("mimi", {"num_attention_heads": 0, "head_dim": None}, "no mimi that can be converted"),
    ("mimi", {"sliding_window": 0}, "model.encoder.transformer.window=0, expected at least 1"),
    ("mimi", {"last_kernel_size": -3}, "model.encoder.last_kernel_size=-3, expected at least 1"),
    ("mimi", {"codebook_dim": -8, "vector_quantization_hidden_dimension": -8}, "model.quantizer.codebook_dim=-8, expected"),
    ("dac", {"sampling_rate": 0}, "model.sample_rate=0, expected at least 1"),
    ("dac", {"hidden_size": None}, "model.latent_dim=None, expected int"),
    ("dac", {"encoder_hidden_size": -4}, "model.encoder.encoder_dim=-4, expected at least 1"),
    ("dac", {"codebook_dim": -4}, "model.quantizer.codebook_dim=-4, expected at least 1"),
    ("dac", {"quantizer_dropout": 1.5}, "model.quantizer.dropout=1.5, expected 0 to 1"),
    ("dac", {"downsampling_ratios": []}, "model.encoder.strides=[], expected"),
    ("dac", {"downsampling_ratios": [0]}, "model.encoder.strides=[0], expected"),
])  # fmt: skip
def test_a_variant_we_do_not_have_is_one_line_naming_key_and_value(saved, tmp_path, capsys, family, change, named):
    folder = copied(saved[family] / "theirs", tmp_path / "theirs")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    error = error_of(capsys, "convert", "--from", folder, tmp_path / "ours")
    assert named in error and str(folder / "config.json") in error
    assert not (tmp_path / "ours").exists()


def test_codebooks_of_no_power_of_2_entries_are_refused_as_transformers_refuses_them():
    theirs = DacConfig(encoder_hidden_size=4, downsampling_ratios=[2, 4], decoder_hidden_size=16, codebook_size=21)
    with pytest.raises(ValueError, match="power of 2"):
        DacModel(theirs)
    with pytest.raises(ValueError, match="power of 2"):
        their_config("dac", dac_model(theirs), "small")


def test_missing_extra_and_misshapen_tensors_are_named(saved, family, tmp_path, capsys):
    folder = copied(saved[family] / "theirs", tmp_path / "theirs")
    tensors = load_file(folder / WEIGHTS)
    bias = next(name for name in tensors if name.endswith(".bias"))
    for changed, named in (
        ({name: tensors[name] for name in tensors if name != bias}, f"1 missing ({bias})"),
        (tensors | {"stranger": torch.ones(2)}, "1 unexpected (stranger)"),
        (tensors | {bias: torch.ones(999)}, f"1 of another shape ({bias} [999] instead of"),
    ):
        save_file(changed, folder / WEIGHTS)
        error = error_of(capsys, "convert", "--from", folder, tmp_path / "ours")
        assert named in error and family in error
    assert os.listdir(tmp_path) == ["theirs"]


def test_a_missing_projection_of_attention_is_found_inside_the_joined_one(saved, tmp_path, capsys):
    folder = copied(saved["mimi"] / "theirs", tmp_path / "theirs")
    tensors = load_file(folder / WEIGHTS)
    del tensors["encoder_transformer.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, folder / WEIGHTS)
    error = error_of(capsys, "convert", "--from", folder, tmp_path / "ours")
    assert "1 missing (encoder_transformer.layers.1.self_attn.k_proj.weight)" in error


def test_another_architecture_is_named_with_what_was_expected_and_the_configs_that_fit(tmp_path, capsys):
    Wav2Vec2Config().save_pretrained(tmp_path / "other")
    for arguments in (("convert", "--from", tmp_path / "other", tmp_path / "ours"), ("info", tmp_path / "other")):
        error = error_of(capsys, *arguments)
        assert "model_type 'wav2vec2', expected dac | encodec | mimi" in error
        assert "configs/dac_*.yaml, configs/encodec_24khz.yaml and configs/mimi.yaml" in error


def test_sharded_pickled_and_absent_weights_are_named(saved, family, tmp_path, capsys):
    folder = copied(saved[family] / "theirs", tmp_path / "theirs")
    (folder / WEIGHTS).unlink()
    convert = ("convert", "--from", folder, tmp_path / "ours")
    assert "holds no model.safetensors" in error_of(capsys, *convert)
    torch.save({}, folder / "pytorch_model.bin")
    assert "are a pickle (pytorch_model.bin)" in error_of(capsys, *convert)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "are sharded (model.safetensors.index.json)" in error_of(capsys, *convert)
    (folder / "config.json").write_text("not json")
    assert "config.json: cannot be read" in error_of(capsys, *convert)


def test_an_output_that_exists_is_kept(saved, family, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/diary.txt").write_text("dear diary")
    for to in ("codec", "transformers"):
        error = error_of(capsys, "convert", "--from", saved[family] / "ours", "--to", to, tmp_path / "out")
        assert "exists and is not empty" in error
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["diary.txt"]
    assert "--to codec" in error_of(
        capsys, "convert", "--from", saved[family] / "theirs", "--to", "transformers", tmp_path / "new"
    )
