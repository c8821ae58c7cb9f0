import os
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from codec.audio import load_audio
from codec.bitstream import read_codes
from codec.checkpoint import save_checkpoint
from codec.cli import main
from codec.config import parse_config
from codec.model import Codec

CONFIG = """
name: tiny
model:
  sample_rate: 16000
  latent_dim: 8
  encoder: {type: conv, encoder_dim: 4, strides: [2, 4, 5]}
  quantizer: {type: factorized, n_codebooks: 3, codebook_size: 20, codebook_dim: 4}
  decoder: {type: conv, decoder_dim: 32, strides: [5, 4, 2]}
discriminators: {sets: []}
losses: {}
loss_weights: {mel: 1.0}
optim: {lr_g: 1.0e-4, lr_d: 1.0e-4}
data: {manifest: none, segment_samples: 4000, batch_size: 1, segments_per_epoch: 100}
train: {}
phases: [{name: all, steps: 10}]
"""


def save_run(run_dir: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    codec = Codec(parse_config(CONFIG, "tiny").model)
    tensors = {"model": codec.state_dict()}
    save_checkpoint(run_dir, 1000, tensors, {"step": 1000}, CONFIG, best=False, keep_last=1)
    return run_dir


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "a", seed=0)


@pytest.fixture
def speech(tmp_path):
    path = tmp_path / "in.wav"
    wav = 0.3 * np.random.default_rng(0).standard_normal((33333, 2))
    sf.write(path, wav.clip(-1, 1), 44100, "PCM_24")
    return path


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def fails_in_one_line(capsys, *arguments) -> str:
    capsys.readouterr()
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("codec: ") and captured.err.count("\n") == 1 and not captured.out
    return captured.err


def test_encode_then_decode_equals_reconstruct_and_the_model_itself(run_dir, speech, tmp_path):
    assert run("encode", speech, tmp_path / "a.codec", "--checkpoint", run_dir) == 0
    assert run("decode", tmp_path / "a.codec", tmp_path / "a.wav", "--checkpoint", run_dir) == 0
    assert run("reconstruct", speech, tmp_path / "b.wav", "--checkpoint", run_dir) == 0
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()

    codec = Codec.from_pretrained(run_dir)
    wav = load_audio(speech, 16000)
    codes, header = read_codes(tmp_path / "a.codec")
    assert torch.equal(codes, codec.encode(wav[None])[0])
    assert header.n_samples == wav.shape[-1] == -(-33333 * 160 // 441) and header.model_id == codec.model_id
    wav_hat, sample_rate = sf.read(tmp_path / "a.wav")
    expected = codec.decode(codes[None], header.n_samples)[0, 0].numpy()
    assert sample_rate == 16000 and np.abs(wav_hat - expected).max() < 1 / 32767


def test_fewer_codebooks_give_a_smaller_file_that_decodes(run_dir, speech, tmp_path):
    for n in (1, 3):
        arguments = ("--checkpoint", run_dir, "--n_codebooks", n)
        assert run("encode", speech, tmp_path / f"{n}.codec", *arguments) == 0
        assert run("reconstruct", speech, tmp_path / f"{n}.wav", *arguments) == 0
    one, three = (read_codes(tmp_path / f"{n}.codec")[0] for n in (1, 3))
    assert torch.equal(one, three[:1])
    assert run("decode", tmp_path / "1.codec", tmp_path / "1d.wav", "--checkpoint", run_dir) == 0
    assert (tmp_path / "1d.wav").read_bytes() == (tmp_path / "1.wav").read_bytes()


@pytest.mark.parametrize("sample_rate, channels, subtype", [(8000, 1, "PCM_U8"), (96000, 6, "FLOAT")])
def test_any_rate_and_channel_count_is_read(run_dir, tmp_path, sample_rate, channels, subtype):
    wav = 0.1 * np.random.default_rng(0).standard_normal((sample_rate // 2, channels))
    sf.write(tmp_path / "in.wav", wav, sample_rate, subtype)
    assert run("reconstruct", tmp_path / "in.wav", tmp_path / "out.flac", "--checkpoint", run_dir) == 0
    info = sf.info(tmp_path / "out.flac")
    assert (info.samplerate, info.channels, info.frames) == (16000, 1, 8000)


def test_info_of_a_checkpoint_gives_sizes_rates_and_step(run_dir, capsys):
    assert run("info", run_dir) == 0
    printed = capsys.readouterr().out
    codec = Codec.from_pretrained(run_dir)
    total = sum(parameter.numel() for parameter in codec.parameters())
    sizes = (f"total {total:,}", "16000 Hz", "400 Hz (hop length 40)", "3 x 20")
    for part in (*sizes, codec.model_id, "1000", " ms "):
        assert part in printed, part
    assert f"3: {400 * 3 * np.log2(20) / 1000:.4g}" in printed


def test_info_of_a_codec_file_gives_its_header_and_true_bitrate(run_dir, speech, tmp_path, capsys):
    path = tmp_path / "a.codec"
    run("encode", speech, path, "--checkpoint", run_dir)
    capsys.readouterr()
    assert run("info", path) == 0
    printed = capsys.readouterr().out
    header = read_codes(path)[1]
    kbps = path.stat().st_size * 8 / (header.n_samples / 16000) / 1000
    for part in ("3 x 20", header.model_id, str(header.n_frames), "0.76 s", f"{kbps:.2f} kbps"):
        assert part in printed, part


def test_a_file_of_another_model_is_refused_naming_both(run_dir, speech, tmp_path, capsys):
    other = save_run(tmp_path / "b", seed=1)
    run("encode", speech, tmp_path / "a.codec", "--checkpoint", run_dir)
    arguments = (tmp_path / "a.codec", tmp_path / "a.wav", "--checkpoint", other)
    error = fails_in_one_line(capsys, "decode", *arguments)
    assert Codec.from_pretrained(run_dir).model_id in error and Codec.from_pretrained(other).model_id in error
    assert not (tmp_path / "a.wav").exists()


def test_bad_input_is_one_line_exit_code_2_and_no_output(run_dir, speech, tmp_path, capsys):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("not audio at all" * 100)
    sf.write(tmp_path / "nan.wav", np.full(1000, np.nan), 16000, "FLOAT")
    sf.write(tmp_path / "none.wav", np.zeros(0), 16000)
    torch.save({}, tmp_path / "model.pt")
    run("encode", speech, tmp_path / "good.codec", "--checkpoint", run_dir)
    (tmp_path / "cut.codec").write_bytes((tmp_path / "good.codec").read_bytes()[:-20])
    before = sorted(os.listdir(tmp_path))

    for name in ("absent.wav", "empty.wav", "text.wav", "nan.wav", "none.wav", ""):
        for command, out in (("encode", "out.codec"), ("reconstruct", "out.wav")):
            arguments = (tmp_path / name, tmp_path / out, "--checkpoint", run_dir)
            error = fails_in_one_line(capsys, command, *arguments)
            assert str(tmp_path / name) in error
    for name in ("absent.codec", "cut.codec", "in.wav", ""):
        fails_in_one_line(capsys, "decode", tmp_path / name, tmp_path / "out.wav", "--checkpoint", run_dir)
    for checkpoint in ("absent", "model.pt", "in.wav", ""):
        arguments = (speech, tmp_path / "out.codec", "--checkpoint", tmp_path / checkpoint)
        fails_in_one_line(capsys, "encode", *arguments)
        fails_in_one_line(capsys, "info", tmp_path / checkpoint)
    fails_in_one_line(capsys, "info", tmp_path / "cut.codec")
    to_wav = ("reconstruct", speech, tmp_path / "out.wav", "--checkpoint", run_dir)
    assert "expected 1 to 3" in fails_in_one_line(capsys, *to_wav, "--n_codebooks", 4)
    assert "expected 1 to 3" in fails_in_one_line(capsys, *to_wav, "--n_codebooks", 0)
    fails_in_one_line(capsys, "reconstruct", speech, tmp_path / "out.mp3", "--checkpoint", run_dir)
    fails_in_one_line(capsys, "encode", speech, speech / "out.codec", "--checkpoint", run_dir)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_truncated_checkpoint_is_one_line(speech, tmp_path, capsys):
    weights = save_run(tmp_path / "c", seed=0) / "checkpoints/step_00001000/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    arguments = (speech, tmp_path / "out.codec", "--checkpoint", tmp_path / "c")
    assert "model.safetensors: truncated" in fails_in_one_line(capsys, "encode", *arguments)
