import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import speech_like

from codec import classical
from codec.audio import resample_array
from codec.classical import CODECS, code, find_program, missing, ogg_pages, rates
from codec.delay import compensate, estimate_delay


def need(codec: str) -> None:
    if missing(codec):
        pytest.skip(f"{codec}: {missing(codec)}")


def put_program(folder: Path, name: str, lines: str) -> None:
    path = folder / name
    path.write_text(f"#!{sys.executable} -S\nimport shutil, sys, time\n{lines}\n")
    path.chmod(0o755)


@pytest.fixture
def only_programs(tmp_path, monkeypatch) -> Path:
    """A folder that alone is $PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(classical, "TOOLS", tmp_path / "tools")
    return tmp_path


def test_each_codec_runs_at_its_bitrate_nearest_to_each_and_at_its_usual_ones():
    assert rates("opus", []) == [6, 12, 24]
    assert rates("opus", [0.75, 5.9, 9.4, 12.2, 48]) == [6, 9, 12, 24, 48]
    assert rates("codec2", [0.4, 0.7, 1.9, 6]) == [0.45, 0.7, 1.6, 3.2]
    assert rates("speex", [3, 6]) == [3.95, 5.75, 12.8]
    for codec, kind in CODECS.items():
        assert set(rates(codec, [1.1, 7.3])) <= set(kind.kbps) and list(kind.kbps) == sorted(kind.kbps)


@pytest.mark.parametrize("kbps", [6, 12, 24])
def test_opus_gives_back_the_speech_at_about_its_bitrate(kbps):
    need("opus")
    wav = speech_like(64000, 16000)
    coded = code("opus", kbps, wav, 16000)
    assert coded.sample_rate == 16000 and coded.wav.dtype == np.float32 and len(coded.wav) == len(wav)
    assert 0.7 * kbps < 8 * coded.n_payload_bytes / 4 / 1000 < 1.1 * kbps
    assert coded.n_payload_bytes < coded.n_bytes < coded.n_payload_bytes + 900
    assert np.corrcoef(compensate(coded.wav, estimate_delay([(wav, coded.wav)], 800), len(wav)), wav)[0, 1] > 0.95
    assert 0 < coded.decode_s < coded.encode_s < 10 and 1 < coded.peak_mb < 30


@pytest.mark.parametrize("sample_rate", [8000, 24000, 44100])
def test_every_codec_takes_audio_of_any_rate(sample_rate):
    wav = speech_like(2 * sample_rate, sample_rate)
    for codec, kind in CODECS.items():
        need(codec)
        coded = code(codec, kind.kbps[-1] if codec != "opus" else 32, wav, sample_rate)
        assert coded.sample_rate == (kind.input_hz or sample_rate)
        assert abs(len(coded.wav) / coded.sample_rate - 2) < 0.02
        assert 0.3 < coded.wav.std() / wav.std() < 3


@pytest.mark.parametrize(("kbps", "frame_s", "bytes_a_frame"), [(3.2, 0.02, 8), (2.4, 0.02, 6), (1.2, 0.04, 6), (0.7, 0.04, 4)])
def test_codec2_writes_whole_bytes_a_frame_and_its_sound_keeps_its_place(kbps, frame_s, bytes_a_frame):
    need("codec2")
    wav = speech_like(32000, 16000)
    coded = code("codec2", kbps, wav, 16000)
    assert coded.n_payload_bytes == round(2 / frame_s) * bytes_a_frame and coded.n_bytes == coded.n_payload_bytes + 7
    wav_hat = resample_array(coded.wav, 8000, 16000)
    assert 0.01 < estimate_delay([(wav, wav_hat)], 1600) / 16000 < 0.04


@pytest.mark.parametrize("kbps", CODECS["speex"].kbps)
def test_speex_is_at_the_constant_bitrate_that_it_is_called_by(kbps):
    need("speex")
    coded = code("speex", kbps, speech_like(32000, 16000), 16000)
    assert abs(8 * coded.n_payload_bytes / 2 / 1000 / kbps - 1) < 0.07
    assert coded.sample_rate == 16000 and abs(len(coded.wav) - 32000) < 320


@pytest.mark.parametrize(("kbps", "seconds"), [(23.8, 1), (23.8, 2), (12.8, 2), (12.8, 3), (9.8, 3)])
def test_speex_is_never_late_though_speexdec_is_where_the_file_is_short(kbps, seconds):
    need("speex")
    wav = speech_like(16000 * seconds, 16000)
    coded = code("speex", kbps, wav, 16000)
    error = {lag: np.square(compensate(coded.wav, lag, len(wav)) - wav)[400:-400].mean() for lag in (-223, 0, 223)}
    assert error[0] < 0.5 * min(error[-223], error[223])


def test_audio_shorter_than_a_frame_is_coded_all_the_same():
    for codec, kind in CODECS.items():
        need(codec)
        assert len(code(codec, kind.always[0], np.full(100, 0.1, np.float32), 16000).wav) <= 420


def ogg_page(*packets: bytes) -> bytes:
    """RFC 3533: 26 bytes, the number of lengths, the lengths (a packet's in steps of 255), the packets."""
    lengths = [length for packet in packets for length in [255] * (len(packet) // 255) + [len(packet) % 255]]
    return b"OggS" + bytes(22) + bytes([len(lengths), *lengths]) + b"".join(packets)


def test_the_payload_of_an_ogg_file_is_counted_page_by_page():
    header, tags = b"OpusHead" + bytes(11), b"OpusTags" + bytes(300)
    frames = [bytes(40), bytes(255), bytes(700), b"OggS" * 20]
    contents = ogg_page(header) + ogg_page(tags) + ogg_page(*frames[:2]) + ogg_page(*frames[2:])
    assert ogg_pages(contents) == [19, 308, 295, 780]


IDENTITY = "shutil.copy(sys.argv[2], sys.argv[3])"


def test_time_is_the_programs_own_and_memory_is_not_that_of_this_process(only_programs):
    put_program(only_programs, "c2enc", f"x = bytearray(b'1') * 60_000_000; time.sleep(0.3); {IDENTITY}")
    put_program(only_programs, "c2dec", f"while time.process_time() < 0.15: pass\n{IDENTITY}")
    wav = speech_like(800)
    coded = code("codec2", 3.2, wav, 8000)
    assert np.abs(coded.wav - wav).max() <= 0.5 / 32768 and coded.n_bytes == 1600
    assert coded.encode_s < 0.25 and 0.15 <= coded.decode_s < 0.3
    assert 60 < coded.peak_mb < 100

    process = subprocess.Popen([sys.executable, "-S", "-c", ""])  # torch makes this process larger than that one
    _, process.returncode, usage = os.wait4(process.pid, 0)
    assert usage.ru_maxrss / 1000 > 100


def test_a_program_that_fails_is_one_line_with_its_last_words(only_programs):
    put_program(only_programs, "c2enc", "print('much', 'more', sep='\\n', file=sys.stderr); sys.exit('cannot allocate frame')")
    put_program(only_programs, "c2dec", IDENTITY)
    with pytest.raises(ValueError, match="^c2enc: ended with status 1: cannot allocate frame$"):
        code("codec2", 3.2, speech_like(800), 8000)


def test_a_missing_program_is_said_with_the_way_to_get_it(only_programs):
    put_program(only_programs, "opusenc", "")
    for codec, kind in CODECS.items():
        assert f"apt-get install {kind.package}" in missing(codec) and "make tools" in missing(codec)
        with pytest.raises(ValueError, match=f"^{codec}: .*not installed; apt-get install {kind.package}[^\n]*$"):
            code(codec, kind.always[0], speech_like(800), 8000)


def test_programs_are_found_among_the_tools_and_on_the_path_first(only_programs):
    (only_programs / "tools").mkdir()
    for name in CODECS["speex"].programs:
        put_program(only_programs / "tools", name, "")
    assert missing("speex") == "" and find_program("speexenc") == str(only_programs / "tools" / "speexenc")
    put_program(only_programs, "speexenc", "")
    assert find_program("speexenc") == str(only_programs / "speexenc")
    assert find_program("opusenc") is None


def test_a_bitrate_that_a_codec_has_not_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="^codec2: got 6 kbps, .* nearest is 3.2$"):
        code("codec2", 6, speech_like(800), 8000)
