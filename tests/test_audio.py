"""Reading, writing and resampling against soundfile, torchaudio and hand computation."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile as sf
import torch
import torchaudio

from codec.audio import (
    StreamResampler,
    load_audio,
    probe,
    read_blocks,
    read_segment,
    resample,
    resample_array,
    rms,
    rms_db,
    save_audio,
    true_peak,
)

torch.set_num_threads(2)


def noise(n_samples: int, seed: int = 0) -> np.ndarray:
    return (0.2 * np.random.default_rng(seed).standard_normal(n_samples)).astype(np.float32)


def resample_in_blocks(wav: np.ndarray, orig_hz: int, new_hz: int, seed: int) -> np.ndarray:
    """Random block sizes, some of them smaller than the kernel."""
    rng, resampler, parts, position = np.random.default_rng(seed), StreamResampler(orig_hz, new_hz), [], 0
    while position < len(wav):
        n = int(rng.integers(1, 3000))
        parts.append(resampler.push(wav[position:position + n]))
        position += n
    return np.concatenate([*parts, resampler.finish()])


RATES = [(44100, 24000), (16000, 24000), (48000, 24000), (22050, 24000), (96000, 16000), (8000, 24000),
         (24000, 44100), (11025, 24000), (1000, 999)]


@pytest.mark.parametrize("orig_hz,new_hz", RATES)
def test_resampling_in_blocks_equals_torchaudio_on_the_whole_signal(orig_hz, new_hz):
    wav = noise(23457)
    expected = torchaudio.functional.resample(
        torch.from_numpy(wav).double(), orig_hz, new_hz, lowpass_filter_width=32
    ).numpy()
    got = resample_in_blocks(wav, orig_hz, new_hz, seed=orig_hz)
    assert got.dtype == np.float32 and got.shape == expected.shape
    assert np.abs(got - expected).max() < 1e-6


def test_resampling_each_block_by_itself_would_not_equal_the_whole():
    wav = noise(44100)
    whole = resample_array(wav, 44100, 24000)
    # multiples of 147 samples, so that even the lengths fit
    wrong = np.concatenate([resample_array(block, 44100, 24000) for block in np.split(wav, 20)])
    assert wrong.shape == whole.shape and np.abs(wrong - whole).max() > 1e-2
    assert np.abs(resample_in_blocks(wav, 44100, 24000, seed=1) - whole).max() < 1e-6


def test_resampled_length_is_the_ceiling_for_every_short_signal():
    for n in [*range(0, 12), 146, 147, 148, 500]:
        assert len(resample_array(noise(n), 44100, 24000)) == -(-n * 80 // 147)
        assert len(resample_array(noise(n), 1, 4)) == 4 * n


def test_rates_without_a_common_divisor_need_no_huge_kernel():
    resampler = StreamResampler(4409, 2400)
    dense = 4 * 2400 * (4409 + 2 * resampler.width)  # torchaudio's: 4 GB for 44099:24000
    assert sum(kernel.nbytes for _, _, kernel in resampler.kernels) < dense / 3
    wav = np.sin(2 * np.pi * 44 * np.arange(4409) / 4409).astype(np.float32)
    expected = np.sin(2 * np.pi * 44 * np.arange(2400) / 2400)
    assert np.abs(np.concatenate([resampler.push(wav), resampler.finish()]) - expected)[99:-99].max() < 2e-3


def test_resampling_down_keeps_what_fits_and_removes_what_would_alias():
    def level_after(hz):
        wav = np.sin(2 * np.pi * hz * np.arange(48000) / 48000).astype(np.float32)
        return rms_db(resample_array(wav, 48000, 24000)[200:-200])

    assert level_after(11000) == pytest.approx(-3.01, abs=0.1)
    assert level_after(13000) < -55 and level_after(14000) < -75


def test_resample_keeps_leading_axes():
    wav = torch.from_numpy(noise(6000)).reshape(2, 3, 1000)
    got = resample(wav, 16000, 24000)
    assert got.shape == (2, 3, 1500)
    assert np.array_equal(got[1, 2].numpy(), resample_array(wav[1, 2].numpy(), 16000, 24000))


def test_resampling_refuses_a_rate_of_zero():
    with pytest.raises(ValueError, match="0 Hz"):
        StreamResampler(0, 24000)


def test_true_peak_finds_the_peak_between_two_samples():
    wav = np.sin(np.pi / 2 * np.arange(4800) + np.pi / 4).astype(np.float32)
    wav *= np.hanning(4800).astype(np.float32)
    assert np.abs(wav).max() < 0.708  # what the samples alone would say
    assert true_peak(wav) == pytest.approx(1.0, abs=0.01)
    assert true_peak(np.zeros(0, np.float32)) == 0.0


def test_rms_of_a_sine_is_minus_three_db():
    wav = np.sin(2 * np.pi * np.arange(1000) / 100)
    assert rms_db(wav) == pytest.approx(-3.0103, abs=1e-3)
    assert rms_db(np.zeros(10)) == -120.0 and rms(np.zeros(0)) == 0.0


@pytest.mark.parametrize("suffix,subtype,rate,channels", [
    (".wav", "PCM_U8", 8000, 1), (".wav", "PCM_16", 44100, 2), (".wav", "PCM_24", 96000, 1),
    (".wav", "FLOAT", 48000, 6), (".wav", "DOUBLE", 16000, 1), (".flac", "PCM_24", 44100, 2),
    (".ogg", "VORBIS", 44100, 1), (".ogg", "OPUS", 48000, 1), (".mp3", None, 24000, 1),
], ids=str)
def test_every_format_reads_as_soundfile_reads_it_whole(tmp_path, suffix, subtype, rate, channels):
    path = tmp_path / f"a{suffix}"
    sf.write(path, noise(rate * channels // 2).reshape(-1, channels), rate, subtype=subtype)
    expected = sf.read(path, dtype="float32", always_2d=True)[0]
    assert np.allclose(np.concatenate(list(read_blocks(path, 1000))), expected, rtol=0, atol=1e-6)
    assert probe(path) == (rate, channels, len(expected))
    wav = load_audio(path, rate)
    assert wav.shape == (1, len(expected)) and np.allclose(wav[0], expected.mean(axis=1), atol=1e-6)


def test_soundfile_alone_would_misread_an_mp3_in_blocks(tmp_path):
    sf.write(tmp_path / "a.mp3", noise(48000), 24000)
    expected = sf.read(tmp_path / "a.mp3", dtype="float32", always_2d=True)[0]
    with sf.SoundFile(tmp_path / "a.mp3") as file:
        wrong = np.concatenate([file.read(1000, dtype="float32", always_2d=True) for _ in range(48)])
    assert np.abs(wrong - expected).max() > 0.1
    assert np.abs(np.concatenate(list(read_blocks(tmp_path / "a.mp3", 1000))) - expected).max() < 1e-6


def test_an_mp3_is_truncated_only_if_it_says_how_long_it_was(tmp_path):
    sf.write(tmp_path / "a.mp3", noise(48000), 24000)
    mp3 = (tmp_path / "a.mp3").read_bytes()
    (tmp_path / "cut.mp3").write_bytes(mp3[:len(mp3) // 2])
    with pytest.raises(ValueError, match="truncated"):
        list(read_blocks(tmp_path / "cut.mp3", 1000))
    # Frames without the header that tells the length, as streams leave them: the quiet start has a low bit
    # rate, from which a far too large length is guessed.
    sf.write(tmp_path / "b.mp3", np.concatenate([np.zeros(24000), noise(96000)]), 24000)
    mp3 = (tmp_path / "b.mp3").read_bytes()
    (tmp_path / "stream.mp3").write_bytes(mp3[mp3.index(mp3[:2], 4):])
    n_samples = sum(len(block) for block in read_blocks(tmp_path / "stream.mp3", 1000))
    assert n_samples > 118000 and probe(tmp_path / "stream.mp3").n_samples > 2 * n_samples


def test_load_audio_resamples(tmp_path):
    sf.write(tmp_path / "a.wav", noise(100000), 44100, subtype="FLOAT")
    wav = load_audio(tmp_path / "a.wav", 24000)
    assert torch.allclose(wav[0], torch.from_numpy(resample_array(noise(100000), 44100, 24000)), atol=1e-6)


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_a_segment_is_a_slice_of_the_whole(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    sf.write(path, noise(20000).reshape(-1, 2), 16000, subtype="PCM_16")
    whole = sf.read(path, dtype="float32")[0].mean(axis=1)
    assert np.allclose(read_segment(path, 1234, 2000), whole[1234:3234], atol=1e-7)
    assert len(read_segment(path, 9500, 2000)) == 500
    assert len(read_segment(path, 50000, 2000)) == 0


def test_saved_audio_comes_back_within_half_a_step(tmp_path):
    wav = torch.from_numpy(noise(5000))[None].clamp(-1, 0.999)
    for name in ("new_folder/a.wav", "a.flac"):
        save_audio(tmp_path / name, wav, 24000)
        assert sf.info(tmp_path / name).subtype == "PCM_16"
        assert (load_audio(tmp_path / name, 24000) - wav).abs().max() <= 0.5001 / 32768


def test_saved_audio_is_clipped_and_does_not_wrap(tmp_path):
    save_audio(tmp_path / "a.wav", torch.tensor([1.5, -1.5, 1.0]), 24000)
    assert sf.read(tmp_path / "a.wav", dtype="int16")[0].tolist() == [32767, -32768, 32767]


@pytest.mark.parametrize("wav", [torch.tensor([0.0, math.nan]), torch.zeros(2, 10)], ids=["nan", "stereo"])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, wav):
    save_audio(tmp_path / "a.wav", torch.full((10,), 0.5), 24000)
    before = (tmp_path / "a.wav").read_bytes()
    with pytest.raises(ValueError, match="a.wav"):
        save_audio(tmp_path / "a.wav", wav, 24000)
    with pytest.raises(ValueError, match="mp3"):
        save_audio(tmp_path / "a.mp3", torch.zeros(10), 24000)
    assert (tmp_path / "a.wav").read_bytes() == before and os.listdir(tmp_path) == ["a.wav"]


def write_bad(folder, kind):
    """A broken file of this kind."""
    sf.write(folder / "good.wav", noise(8000), 16000, subtype="PCM_16")
    sf.write(folder / "good.ogg", noise(80000), 16000)
    sf.write(folder / "good.flac", noise(80000), 16000)
    wav = (folder / "good.wav").read_bytes()
    path = folder / f"bad{'.' + kind.split('.')[1] if '.' in kind else '.wav'}"
    contents = {
        "zero": b"", "text": b"not audio at all" * 100, "truncated": wav[:9000], "header alone": wav[:44],
        "truncated.ogg": (folder / "good.ogg").read_bytes()[:20000],
        "truncated.flac": (folder / "good.flac").read_bytes()[:20000],
    }
    if kind in contents:
        path.write_bytes(contents[kind])
    elif kind == "no samples":
        sf.write(path, np.zeros(0), 16000)
    elif kind == "nan":
        wav = noise(8000)
        wav[4321] = np.nan
        sf.write(path, wav, 16000, subtype="FLOAT")
    return path


@pytest.mark.parametrize("kind,message", [
    ("zero", "0 bytes"), ("text", "cannot read"), ("truncated", "truncated"), ("header alone", "truncated"),
    ("truncated.ogg", "truncated"), ("truncated.flac", "cannot read"), ("no samples", "no samples"),
    ("nan", "sample 4321"), ("missing", "no such file"),
])
def test_a_bad_file_is_one_line_that_names_it(tmp_path, kind, message):
    path = write_bad(tmp_path, kind)
    with pytest.raises(ValueError, match=message) as caught:
        load_audio(path, 24000)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_soundfile_alone_would_read_a_truncated_wav_without_a_word(tmp_path):
    path = write_bad(tmp_path, "truncated")
    assert 0 < len(sf.read(path)[0]) < 8000


def test_a_segment_with_nan_names_the_sample_of_the_file(tmp_path):
    with pytest.raises(ValueError, match="sample 4321"):
        read_segment(write_bad(tmp_path, "nan"), 4000, 1000)


def test_a_wav_written_to_a_pipe_is_not_taken_for_truncated(tmp_path):
    path = write_bad(tmp_path, "truncated").with_name("good.wav")
    wav = bytearray(path.read_bytes())
    wav[4:8] = wav[40:44] = b"\xff\xff\xff\xff"
    path.write_bytes(wav)
    assert sum(len(block) for block in read_blocks(path, 1000)) == 8000


def test_m4a_without_ffmpeg_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "a.m4a").write_bytes(b"something")
    for read in (probe, lambda path: list(read_blocks(path, 1000))):
        with pytest.raises(ValueError, match="a.m4a: needs ffmpeg"):
            read(tmp_path / "a.m4a")


@pytest.mark.skipif(os.name != "posix", reason="the stand-in for ffmpeg is a shell script")
def test_ffmpegs_pipe_is_read_to_its_end_and_its_failure_is_told(tmp_path, monkeypatch):
    """A script in the place of ffmpeg sends an AU stream, or fails as ffmpeg does."""
    wav = noise(30000).reshape(-1, 2)
    sf.write(tmp_path / "stream.au", wav, 44100, subtype="FLOAT", endian="BIG")
    program = tmp_path / "ffmpeg"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "a.m4a").write_bytes(b"something")
    program.write_text(f"#!/bin/sh\ncat {tmp_path}/stream.au\n")
    program.chmod(0o755)
    assert probe(tmp_path / "a.m4a") == (44100, 2, -1)
    assert np.array_equal(np.concatenate(list(read_blocks(tmp_path / "a.m4a", 1000))), wav)
    program.write_text("#!/bin/sh\necho 'Invalid data' >&2\nexit 1\n")
    with pytest.raises(ValueError, match="a.m4a: not audio: ffmpeg ended with status 1: Invalid data"):
        list(read_blocks(tmp_path / "a.m4a", 1000))
    program.write_text(f"#!/bin/sh\nhead -c 40000 {tmp_path}/stream.au\necho broken >&2\nexit 1\n")
    with pytest.raises(ValueError, match="status 1: broken"):
        list(read_blocks(tmp_path / "a.m4a", 1000))


def test_data_preparation_does_not_pay_for_torch():
    code = "import sys, prepare_speaker_data; sys.exit('torch' in sys.modules)"
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
