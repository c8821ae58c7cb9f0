"""Reading, writing and resampling sound files in constant memory.

torch is imported only where a tensor is returned: its CUDA build alone takes 500 MB, which every worker of
the data preparation would pay.
"""

from __future__ import annotations

import io
import math
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import soundfile as sf

from codec.files import write_atomically

if TYPE_CHECKING:
    from torch import Tensor

FFMPEG_EXTENSIONS = (".m4a", ".aac", ".mp4", ".wma", ".webm", ".amr", ".3gp", ".mka")
AUDIO_EXTENSIONS = (
    ".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aiff", ".aif", ".aifc", ".au", ".caf", ".w64",
    ".rf64", *FFMPEG_EXTENSIONS,
)
LOWPASS_WIDTH = 32  # zero crossings of the sinc on each side
ROLLOFF = 0.99  # cut-off as a share of the lower Nyquist frequency
PHASES_PER_MATMUL = 512  # bounds the kernel for ratios such as 44099:44100


class AudioInfo(NamedTuple):
    sample_rate: int
    channels: int
    n_samples: int  # -1 where only decoding would tell (files that ffmpeg reads)


# ---- reading ----------------------------------------------------------------------------------------------

def needs_ffmpeg(path: str | Path) -> bool:
    """True for the formats that libsndfile lacks, judged by the suffix."""
    return Path(path).suffix.lower() in FFMPEG_EXTENSIONS


def probe(path: str | Path) -> AudioInfo:
    """Sample rate [Hz], channels and samples a channel, from the header alone.

    Raises:
        ValueError: missing, empty, truncated or not audio; or it needs ffmpeg and there is none.
    """
    if needs_ffmpeg(path):
        with _Ffmpeg(path) as stream:
            return _au_header(path, stream)
    with _open(path) as file:
        return AudioInfo(file.samplerate, file.channels, file.frames)


def read_segment(path: str | Path, start: int, n_samples: int) -> np.ndarray:
    """Seek and read part of a file, for random access by the data loader.

    Args:
        path: a file that libsndfile reads; WAV and FLAC seek fast and exactly.
        start: first sample, at the file's own sample rate.
        n_samples: samples to read.
    Returns:
        float32 [n], mean of the channels, in [-1, 1] for integer formats; shorter at the end of the file.
    Raises:
        ValueError: unreadable, or NaN or infinity inside.
    """
    try:
        with sf.SoundFile(str(path)) as file:
            file.seek(min(start, file.frames))
            block = file.read(n_samples, dtype="float32", always_2d=True)
            may_hold_nan = file.subtype in ("FLOAT", "DOUBLE")
    except sf.LibsndfileError as error:
        raise _unreadable(path, error) from None
    if may_hold_nan:
        _check_finite(path, block, start)
    return to_mono(block)


def read_blocks(path: str | Path, block_samples: int) -> Iterator[np.ndarray]:
    """Read a whole file in blocks: memory does not grow with its length.

    Args:
        path: any file with a suffix of AUDIO_EXTENSIONS; FFMPEG_EXTENSIONS go through `ffmpeg`.
        block_samples: samples a block.
    Yields:
        float32 [block_samples, channels], the last one shorter.
    Raises:
        ValueError: empty, truncated or not audio, NaN or infinity inside, or ffmpeg is missing.
    """
    decode = _ffmpeg_blocks if needs_ffmpeg(path) else _sndfile_blocks
    n_read = 0
    for block in decode(path, block_samples):
        _check_finite(path, block, n_read)
        n_read += len(block)
        yield block
    if n_read == 0:
        raise ValueError(f"{path}: holds no samples")


def load_audio(path: str | Path, sample_rate: int) -> Tensor:
    """Read a whole file as mono at `sample_rate`.

    Returns:
        float32 [1, T]; the mean of the channels.
    Raises:
        ValueError: as `read_blocks`.
    """
    import torch

    info = probe(path)
    resampler = StreamResampler(info.sample_rate, sample_rate)
    parts = [resampler.push(to_mono(block)) for block in read_blocks(path, 2 * info.sample_rate)]
    return torch.from_numpy(np.concatenate([*parts, resampler.finish()]))[None]


def to_mono(block: np.ndarray) -> np.ndarray:
    """Mean of the channels: [n, channels] -> [n]."""
    # A sum of columns: numpy's mean over so short an axis takes several times as long.
    return block[:, 0] if block.shape[1] == 1 else sum(block.T[1:], block[:, 0]) / np.float32(block.shape[1])


def _sndfile_blocks(path: str | Path, block_samples: int) -> Iterator[np.ndarray]:
    with _open(path) as file:
        # soundfile seeks after every read: slow, and an MP3 below 32 kHz goes on at the wrong place.
        file.seekable = lambda: False
        n_read = 0
        try:
            while len(block := file.read(block_samples, dtype="float32", always_2d=True)):
                n_read += len(block)
                yield block
        except sf.LibsndfileError as error:
            raise _unreadable(path, error) from None
        if n_read < file.frames and not (file.format == "MP3" and _mp3_length_is_a_guess(path)):
            raise ValueError(f"{path}: truncated: got {n_read} of {file.frames} samples")


def _open(path: str | Path) -> sf.SoundFile:
    """Open with libsndfile; it shortens truncated WAV and Ogg without a word, so look for that."""
    _check_there(path)
    try:
        file = sf.SoundFile(str(path))
    except sf.LibsndfileError as error:
        raise _unreadable(path, error) from None
    claim = re.search(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
    # Writers to a pipe leave 2^32 - 1 in the header; files over 4 GB leave a size that wrapped round.
    if claim and int(claim[2]) < int(claim[1]) < 2**32 - 1:
        file.close()
        raise ValueError(f"{path}: truncated: got {claim[2]} of {claim[1]} bytes of samples")
    if file.format == "OGG" and _last_ogg_page_is_cut(path):
        file.close()
        raise ValueError(f"{path}: truncated: the last Ogg page is not whole")
    return file


def _check_there(path: str | Path) -> None:
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    if Path(path).stat().st_size == 0:
        raise ValueError(f"{path}: empty (0 bytes)")


def _last_ogg_page_is_cut(path: str | Path) -> bool:
    """True where the last page's own table of lengths reaches past the end of the file."""
    with open(path, "rb") as file:
        file.seek(max(0, Path(path).stat().st_size - 65536))  # a page has at most 65307 bytes
        tail = file.read()
    page = tail[max(0, tail.rfind(b"OggS")):]
    if len(page) < 27:
        return True
    n_lengths = page[26]
    return len(page) < 27 + n_lengths + sum(page[27:27 + n_lengths])


def _mp3_length_is_a_guess(path: str | Path) -> bool:
    """True without a Xing, Info or VBRI header: the length then comes from the first frame's bit rate."""
    with open(path, "rb") as file:
        head = file.read(1 << 20)  # behind an ID3 tag, which may hold a picture
    return not any(name in head for name in (b"Xing", b"Info", b"VBRI"))


def _unreadable(path: str | Path, error: sf.LibsndfileError) -> ValueError:
    reason = " ".join(error.error_string.split())
    return ValueError(f"{path}: libsndfile cannot read it as audio: {reason}")


def _check_finite(path: str | Path, block: np.ndarray, offset: int) -> None:
    finite = np.isfinite(block)
    if not finite.all():
        index = offset + int(np.argmin(finite.all(axis=1)))
        raise ValueError(f"{path}: NaN or infinity at sample {index}")


class _Ffmpeg:
    """Decodes to a pipe as AU, a header of 24 bytes and float samples; the process ends with the block."""

    def __init__(self, path: str | Path):
        _check_there(path)
        program = shutil.which("ffmpeg")
        if program is None:
            raise ValueError(f"{path}: needs ffmpeg, which is not installed; install it or convert to FLAC")
        command = [program, "-v", "error", "-nostdin", "-i", f"file:{path}", "-map", "0:a:0",
                   "-c:a", "pcm_f32be", "-f", "au", "pipe:1"]
        self.errors = tempfile.TemporaryFile()  # a pipe that nobody drains would block ffmpeg
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.errors)

    def __enter__(self) -> _Ffmpeg:
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.stdout.close()
        self.process.wait()
        self.errors.close()

    def read(self, n_bytes: int) -> bytes:
        return self.process.stdout.read(n_bytes)

    def complaint(self) -> str:
        """ffmpeg's exit status and the end of its first line, empty where all went well."""
        status = self.process.wait()
        self.errors.seek(0)
        first_line = self.errors.readline().decode(errors="replace").strip()
        return f"ffmpeg ended with status {status}: {first_line[-160:]}" if status else ""


def _au_header(path: str | Path, stream: _Ffmpeg) -> AudioInfo:
    header = stream.read(24)
    if len(header) < 24:
        raise ValueError(f"{path}: not audio: {stream.complaint()}")
    _, data_offset, _, _, sample_rate, channels = struct.unpack(">4s5I", header)
    stream.read(data_offset - 24)
    return AudioInfo(sample_rate, channels, -1)


def _ffmpeg_blocks(path: str | Path, block_samples: int) -> Iterator[np.ndarray]:
    with _Ffmpeg(path) as stream:
        channels = _au_header(path, stream).channels
        while data := stream.read(4 * channels * block_samples):
            whole = len(data) - len(data) % (4 * channels)
            yield np.frombuffer(data[:whole], dtype=">f4").astype(np.float32).reshape(-1, channels)
        if complaint := stream.complaint():
            raise ValueError(f"{path}: {complaint}")


# ---- writing ----------------------------------------------------------------------------------------------

def to_int16(wav: np.ndarray) -> np.ndarray:
    """[-1, 1] -> 16-bit integers, clipped; reading them back as n / 32768 is exact to half a step."""
    return np.clip(np.rint(wav * 32768.0), -32768, 32767).astype(np.int16)


def save_audio(path: str | Path, wav: Tensor, sample_rate: int) -> None:
    """Write mono 16-bit WAV, or FLAC by suffix, atomically.

    Args:
        path: ends in .wav or .flac; its folder is made if missing.
        wav: [1, T] or [T]; values outside [-1, 1] are clipped.
        sample_rate: Hz.
    Raises:
        ValueError: another suffix, another shape, or NaN or infinity inside.
    """
    path = Path(path)
    if path.suffix.lower() not in (".wav", ".flac"):
        raise ValueError(f"{path}: cannot write {path.suffix or 'a name without suffix'}; use .wav or .flac")
    samples = wav.detach().float().cpu().numpy()
    if samples.ndim == 2 and samples.shape[0] == 1:
        samples = samples[0]
    if samples.ndim != 1:
        raise ValueError(f"{path}: cannot write shape {list(wav.shape)}; pass [1, T] or [T]")
    _check_finite(path, samples[:, None], 0)
    contents = io.BytesIO()
    sf.write(contents, to_int16(samples), sample_rate, format=path.suffix[1:].upper(), subtype="PCM_16")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, contents.getvalue())


# ---- resampling -------------------------------------------------------------------------------------------

class StreamResampler:
    """Resamples block by block to what the whole signal would give, whatever the blocks.

    Windowed-sinc interpolation with a Hann window. Equal, within float32 rounding, to what
    torchaudio.functional.resample with lowpass_filter_width=32 gives in float64 (in float32 its own kernel is
    off by up to 3e-5). Unlike there, the kernel stays small for ratios such as 44099:24000.

    Source: J. O. Smith, "Digital Audio Resampling", CCRMA; the definition of the kernel is torchaudio's.
    """

    def __init__(self, orig_hz: int, new_hz: int):
        """Args: orig_hz, new_hz: whole numbers of Hz. Raises: ValueError: not positive."""
        if orig_hz <= 0 or new_hz <= 0:
            raise ValueError(f"resampling: got {orig_hz} Hz to {new_hz} Hz, expected positive rates")
        divisor = math.gcd(orig_hz, new_hz)
        self.orig, self.new = orig_hz // divisor, new_hz // divisor
        self.width = math.ceil(LOWPASS_WIDTH * self.orig / (min(self.orig, self.new) * ROLLOFF))
        # Rows share 2 * width samples with their neighbours: several periods a row copy less.
        periods = math.ceil(2 * self.width / self.orig)
        self.row_in, self.row_out = periods * self.orig, periods * self.new
        self.kernels = [] if self.orig == self.new else self._make_kernels()
        self.buffer = np.zeros(self.width, np.float32)
        self.n_in = self.n_out = 0

    def push(self, block: np.ndarray) -> np.ndarray:
        """float32 [n] in, float32 [m] out: all that is settled by the samples so far."""
        self.n_in += len(block)
        if self.orig == self.new:
            self.n_out = self.n_in
            return np.asarray(block, np.float32)
        self.buffer = np.concatenate([self.buffer, block], dtype=np.float32)
        n_rows = max(0, (len(self.buffer) - 2 * self.width) // self.row_in)
        wav = np.empty((n_rows, self.row_out), np.float32)
        for first_out, first_in, kernel in self.kernels:
            rows = np.lib.stride_tricks.as_strided(
                self.buffer[first_in:], (n_rows, len(kernel)), (4 * self.row_in, 4), writeable=False
            )
            wav[:, first_out:first_out + kernel.shape[1]] = np.ascontiguousarray(rows) @ kernel
        self.buffer = self.buffer[n_rows * self.row_in:]
        self.n_out += wav.size
        return wav.reshape(-1)

    def finish(self) -> np.ndarray:
        """float32 [m]: the rest, as if silence followed; the total is ceil(n_in * new / orig)."""
        n_left = -(-self.n_in * self.new // self.orig) - self.n_out
        if n_left == 0:
            return np.zeros(0, np.float32)
        n_in = self.n_in
        tail = self.push(np.zeros(self.width + self.row_in, np.float32))
        self.n_in = n_in
        return tail[:n_left]

    def _make_kernels(self) -> list[tuple[int, int, np.ndarray]]:
        """(first output of a row, first input, [taps, outputs]) for each group of outputs."""
        kernels = []
        base = min(self.orig, self.new) * ROLLOFF
        for first in range(0, self.row_out, PHASES_PER_MATMUL):
            outputs = np.arange(first, min(first + PHASES_PER_MATMUL, self.row_out))
            first_in = int(outputs[0]) * self.orig // self.new
            end_in = min(int(outputs[-1]) * self.orig // self.new + 2, self.row_in) + 2 * self.width
            taps = np.arange(first_in, end_in) - self.width
            # in zero crossings from the output's place
            t = (taps[:, None] / self.orig - outputs[None, :] / self.new) * base
            window = np.where(np.abs(t) < LOWPASS_WIDTH, np.cos(t * np.pi / LOWPASS_WIDTH / 2) ** 2, 0.0)
            kernels.append((first, first_in, (np.sinc(t) * window * base / self.orig).astype(np.float32)))
        return kernels


def resample_array(wav: np.ndarray, orig_hz: int, new_hz: int) -> np.ndarray:
    """float32 [T] at orig_hz -> float32 [ceil(T * new_hz / orig_hz)]."""
    resampler = StreamResampler(orig_hz, new_hz)
    return np.concatenate([resampler.push(wav), resampler.finish()])


def resample(wav: Tensor, orig_hz: int, new_hz: int) -> Tensor:
    """Resample on the CPU, without gradient.

    Args:
        wav: [..., T].
        orig_hz, new_hz: whole numbers of Hz.
    Returns:
        float32 [..., ceil(T * new_hz / orig_hz)] on the device of `wav`.
    """
    import torch

    rows = wav.detach().float().cpu().reshape(-1, wav.shape[-1]).numpy()
    new_rows = np.stack([resample_array(row, orig_hz, new_hz) for row in rows])
    return torch.from_numpy(new_rows).reshape(*wav.shape[:-1], -1).to(wav.device)


# ---- levels -----------------------------------------------------------------------------------------------

def rms(x: np.ndarray) -> float:
    """Root mean square; 1.0 is a full-scale square wave."""
    return math.sqrt(np.mean(np.square(x, dtype=np.float64))) if x.size else 0.0


def rms_db(x: np.ndarray) -> float:
    """RMS in dB relative to 1.0, not below -120."""
    return 20 * math.log10(max(rms(x), 1e-6))


def true_peak(x: np.ndarray) -> float:
    """Largest absolute value of [T], also between the samples: of the signal oversampled four times.

    Source: ITU-R BS.1770-5, annex 2 (with this file's longer interpolation filter).
    """
    return float(np.abs(resample_array(x, 1, 4)).max(initial=0.0))
