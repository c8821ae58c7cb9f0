"""Opus, Codec2 and Speex through their own programs: the bytes, the time and the memory are the real ones.

A program is taken from $PATH, else from .tools/ at the project's root, where demo/fetch_programs.py puts it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile as sf

from codec.audio import resample_array, to_int16

TOOLS = Path(__file__).resolve().parents[1] / ".tools" / "bin"
POLL_S = 0.001
SPEEX_LATE = 223  # samples at 16 kHz: the lookahead that speexdec cuts off, but forgets in a file of one page (4 kB)


class Codec(NamedTuple):
    title: str
    programs: tuple[str, str]  # encoder, decoder
    package: str  # Debian's
    input_hz: int | None  # rate it is fed at; None: the audio's own
    kbps: tuple[float, ...]  # nominal bitrates, rising
    always: tuple[float, ...]  # run whatever the other bitrates are


CODECS = {
    # opusenc takes any rate from 6; whole ones are plenty to choose from
    "opus": Codec("Opus", ("opusenc", "opusdec"), "opus-tools", None, tuple(range(6, 257)), (6, 12, 24)),
    # in the order of the modes 450, 700C, 1200 ... 3200
    "codec2": Codec("Codec2", ("c2enc", "c2dec"), "codec2", 8000, (0.45, 0.7, 1.2, 1.3, 1.4, 1.6, 2.4, 3.2), (3.2,)),
    # of wideband at the qualities 0 to 10
    "speex": Codec("Speex", ("speexenc", "speexdec"), "speex", 16000,
                   (3.95, 5.75, 7.75, 9.8, 12.8, 16.8, 20.6, 23.8, 27.8, 34.2, 42.2), (12.8,)),  # fmt: skip
}


class Coded(NamedTuple):
    wav: np.ndarray  # float32 [T'], as many samples as the program gave
    sample_rate: int  # of wav
    n_bytes: int  # of the file on disk, headers and container included
    n_payload_bytes: int  # of the coded frames alone
    encode_s: float  # CPU time of the program
    decode_s: float
    peak_mb: float  # largest resident memory of the two, 10^6 bytes, looked at every ms: too low for under 0.2 s of audio


class Usage(NamedTuple):
    cpu_s: float
    peak_mb: float


def rates(codec: str, around: list[float]) -> list[float]:
    """Which bitrates to run beside a codec under test.

    Args:
        codec: a key of CODECS.
        around: bitrates of the codec under test, kbit/s; may be empty.
    Returns:
        Rising: for each of `around` the nearest that the codec has; besides, Opus always at 6 (its lowest), 12 and
        24, Codec2 at 3.2 (its best), Speex at 12.8 (the middle of wideband), so that each is seen at its usual work.
    """
    kbps = CODECS[codec].kbps
    nearest = {min(kbps, key=lambda have: abs(have - wanted)) for wanted in around}
    return sorted(nearest | set(CODECS[codec].always))


def find_program(name: str) -> str | None:
    """Path of a program on $PATH or in .tools/, whose starters know their libraries; None where there is none."""
    return shutil.which(name) or shutil.which(name, path=TOOLS)


def fingerprint(codec: str) -> str:
    """16 hex digits of its programs and of this file: what others coded is not used again."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for program in CODECS[codec].programs:
        digest.update(Path(find_program(program)).read_bytes())
    return digest.hexdigest()[:16]


def missing(codec: str) -> str:
    """"" where the codec's programs are there, else how to get them."""
    package = CODECS[codec].package
    return "" if all(map(find_program, CODECS[codec].programs)) else f"apt-get install {package}, or `make tools`"


def code(codec: str, kbps: float, wav: np.ndarray, sample_rate: int) -> Coded:
    """Encode to a file and decode that file again.

    Opus at its default, variable bitrate and 20 ms frames, without the padding that opusenc leaves for tags and
    without dither; Speex wideband at the quality of that constant bitrate; Codec2 with its header of 7 bytes.

    Args:
        codec: a key of CODECS.
        kbps: one of its `kbps`.
        wav: float32 [T]; rounded to 16 bits, resampled where the codec wants its own rate.
        sample_rate: Hz.
    Returns:
        What came back, and what it cost; the delay is as the program leaves it.
    Raises:
        ValueError: no such bitrate, a program is missing, or fails.
    """
    kind = CODECS[codec]
    if kbps not in kind.kbps:
        nearest = min(kind.kbps, key=lambda have: abs(have - kbps))
        raise ValueError(f"{codec}: got {kbps:g} kbps, expected one of its bitrates; the nearest is {nearest:g}")
    if missing(codec):
        raise ValueError(f"{codec}: {' or '.join(kind.programs)} is not installed; {missing(codec)}")
    input_hz = kind.input_hz or sample_rate
    samples = to_int16(resample_array(np.asarray(wav, np.float32), sample_rate, input_hz))
    with tempfile.TemporaryDirectory(prefix="classical_") as folder:
        if codec == "codec2":
            return _code_raw(Path(folder), kbps, samples)
        return _code_ogg(Path(folder), codec, kbps, samples, input_hz)


def _code_raw(folder: Path, kbps: float, samples: np.ndarray) -> Coded:
    """Codec2: headerless 16-bit samples at 8 kHz."""
    mode = {0.45: "450", 0.7: "700C"}.get(kbps, f"{1000 * kbps:.0f}")
    source, coded, decoded = folder / "in.raw", folder / "coded.c2", folder / "out.raw"
    samples.tofile(source)
    encoding = _run(["c2enc", mode, source, coded])
    decoding = _run(["c2dec", mode, coded, decoded])
    wav = np.fromfile(decoded, np.int16).astype(np.float32) / 32768
    n_bytes = coded.stat().st_size
    return _coded(wav, CODECS["codec2"].input_hz, n_bytes, n_bytes - 7, encoding, decoding)


def _code_ogg(folder: Path, codec: str, kbps: float, samples: np.ndarray, sample_rate: int) -> Coded:
    """Opus and Speex: a WAV file to an Ogg file and back."""
    source, coded, decoded = folder / "in.wav", folder / "coded.ogg", folder / "out.wav"
    sf.write(source, samples, sample_rate, subtype="PCM_16")
    if codec == "opus":
        encoding = _run(["opusenc", "--quiet", "--padding", "0", "--bitrate", f"{kbps:g}", source, coded])
        decoding = _run(["opusdec", "--quiet", "--no-dither", "--rate", str(sample_rate), coded, decoded])
    else:
        encoding = _run(["speexenc", "--wideband", "--quality", str(CODECS["speex"].kbps.index(kbps)), source, coded])
        decoding = _run(["speexdec", coded, decoded])
    wav, wav_hz = sf.read(decoded, dtype="float32")
    _header, _tags, *pages = ogg_pages(coded.read_bytes())
    if codec == "speex" and len(pages) == 1:
        wav = wav[SPEEX_LATE:]
    return _coded(wav, wav_hz, coded.stat().st_size, sum(pages), encoding, decoding)


def ogg_pages(contents: bytes) -> list[int]:
    """Bytes inside each page of an Ogg file; Opus and Speex begin with a page for the header and one for the tags.

    Source: RFC 3533, section 6.
    """
    sizes, at = [], 0
    while at < len(contents):
        lengths = contents[at + 27 : at + 27 + contents[at + 26]]
        sizes.append(sum(lengths))
        at += 27 + len(lengths) + sizes[-1]
    return sizes


def _coded(wav: np.ndarray, wav_hz: int, n_bytes: int, n_payload_bytes: int, encoding: Usage, decoding: Usage) -> Coded:
    peak_mb = max(encoding.peak_mb, decoding.peak_mb)
    return Coded(wav, wav_hz, n_bytes, n_payload_bytes, encoding.cpu_s, decoding.cpu_s, peak_mb)


def _run(command: list[str | Path]) -> Usage:
    """Run a program to its end; its CPU time and peak memory."""
    name = command[0]
    with tempfile.TemporaryFile() as output:  # a pipe that nobody drains would block it
        process = subprocess.Popen([find_program(name), *command[1:]], stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        peak_kb, pid = 0, 0
        while pid == 0:
            # wait4's own maximum counts this process too, from which the program was started
            peak_kb = max(peak_kb, _high_water_kb(process.pid))
            time.sleep(POLL_S)
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        complaint = output.read().decode(errors="replace").strip().splitlines()[-1:]
    if process.returncode:
        raise ValueError(f"{name}: ended with status {process.returncode}: {''.join(complaint)[-160:]}")
    return Usage(usage.ru_utime + usage.ru_stime, peak_kb * 1024 / 1e6)


def _high_water_kb(pid: int) -> int:
    """Largest resident memory of a process so far; 0 once it has ended, or where there is no /proc."""
    path = Path(f"/proc/{pid}/status")
    found = re.search(r"VmHWM:\s*(\d+)", path.read_text() if path.is_file() else "")
    return int(found[1]) if found else 0
