"""The codec file: magic, version, JSON header, bit-packed codes, CRC-32. No pickle.

    4 bytes   magic "NSCF"
    2 bytes   version, little endian: 1, 2 where the header has a gain, 3 where the payload is entropy coded
    4 bytes   length of the header, little endian
    header    JSON object, the fields of CodecFileHeader
    payload   codes, frame after frame and within a frame codebook after codebook, each in ceil(log2 K) bits,
              least significant bit first; the last byte is filled up with zeros. Of version 3: as `codec.prior` writes it
    4 bytes   CRC-32 of everything before, little endian
"""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from codec.files import write_atomically
from codec.prior import IntegerPrior
from codec.rans import least_bits

MAGIC = b"NSCF"
VERSION = 3
ADDED = {2: ("gain",), 3: ("prior", "n_bytes")}  # fields of the header that versions before had not
PREFIX = struct.Struct("<4sHI")
CRC = struct.Struct("<I")
MAX_HEADER_BYTES = 64 * 1024
LEAST_GAIN, MOST_GAIN = 0.01, 100.0
MAX_CODE_BITS = 24  # a code and its shift of up to 7 bits must fit 32 bits


@dataclass(frozen=True)
class CodecFileHeader:
    """What a decoder must know before it reads a code. All counts are positive.

    Args:
        sample_rate: Hz of the coded audio.
        hop_length: samples a frame.
        n_samples: length of the coded audio, at most n_frames * hop_length.
        n_codebooks: codebooks in this file, N.
        codebook_size: entries each, K, from 2 to 2**24.
        n_frames: T'.
        model_id: hex string that names the codebooks the codes point into.
        gain: what the audio was multiplied by before it was coded.
        prior: hex string that names what the codes were entropy coded by; "" where they are packed.
        n_bytes: of the entropy coded payload; 0 where it is packed.
    """

    sample_rate: int
    hop_length: int
    n_samples: int
    n_codebooks: int
    codebook_size: int
    n_frames: int
    model_id: str
    gain: float = 1.0
    prior: str = ""
    n_bytes: int = 0

    @property
    def payload_bytes(self) -> int:
        """Size of the codes as they are in the file."""
        return self.n_bytes if self.prior else -(-self.n_codebooks * self.n_frames * code_bits(self.codebook_size) // 8)


def code_bits(codebook_size: int) -> int:
    """ceil(log2 K): bits that one code takes in the file."""
    return (codebook_size - 1).bit_length()


def pack_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack integers into `bits` bits each, least significant bit first.

    Args:
        values: [n] integers in [0, 2**bits).
        bits: 1 to 24.
    Returns:
        uint8 [ceil(n * bits / 8)].
    """
    n_groups = -(-len(values) // 8)  # 8 codes fill exactly `bits` bytes
    padded = np.zeros(8 * n_groups, np.uint32)
    padded[: len(values)] = values
    packed = np.zeros((bits, n_groups), np.uint8)
    for i, group in enumerate(np.ascontiguousarray(padded.reshape(n_groups, 8).T)):
        first, shift = divmod(i * bits, 8)
        for byte in range(-(-(shift + bits) // 8)):
            packed[first + byte] |= (group << shift >> 8 * byte).astype(np.uint8)
    return packed.T.reshape(-1)[: -(-len(values) * bits // 8)]


def unpack_bits(packed: np.ndarray, bits: int, n: int) -> np.ndarray:
    """Inverse of pack_bits.

    Args:
        packed: uint8 [ceil(n * bits / 8)].
        bits: 1 to 24.
        n: number of values.
    Returns:
        int64 [n].
    """
    n_groups = -(-n // 8)
    padded = np.zeros(n_groups * bits, np.uint8)
    padded[: len(packed)] = packed
    columns = np.ascontiguousarray(padded.reshape(n_groups, bits).T)
    values = np.empty((n_groups, 8), np.int64)
    for i in range(8):
        first, shift = divmod(i * bits, 8)
        word = np.zeros(n_groups, np.uint32)
        for byte in range(-(-(shift + bits) // 8)):
            word |= columns[first + byte].astype(np.uint32) << 8 * byte
        values[:, i] = (word >> shift) & (2**bits - 1)
    return values.reshape(-1)[:n]


def write_codes(
    path: str | Path, codes: Tensor, header: CodecFileHeader, prior: IntegerPrior | None = None
) -> CodecFileHeader:
    """Write a codec file, atomically.

    Args:
        path: file to write; its folder is made if missing.
        codes: [N, T'] integers in [0, codebook_size).
        header: must agree with the codes' shape.
        prior: what to entropy code them by, where that makes the file smaller; default: they are packed.
    Returns:
        The header as it is in the file.
    Raises:
        ValueError: a header field is out of range, or codes, header and prior disagree.
    """
    where = str(path)
    _check_header(where, asdict(header))
    if tuple(codes.shape) != (header.n_codebooks, header.n_frames):
        raise ValueError(
            f"{where}: codes are {tuple(codes.shape)}, the header says "
            f"{(header.n_codebooks, header.n_frames)} codebooks and frames"
        )
    values = codes.detach().cpu().numpy()
    low, high = values.min(), values.max()
    if low < 0 or high >= header.codebook_size:
        raise ValueError(f"{where}: codes from {low} to {high}, expected 0 to {header.codebook_size - 1}")
    ways = [(replace(header, prior="", n_bytes=0), pack_bits(values.T.reshape(-1), code_bits(header.codebook_size)).tobytes())]
    if prior:
        _check_prior(where, header, prior)
        coded = prior.write(values)
        ways.append((replace(header, prior=prior.id, n_bytes=len(coded)), coded))
    header, body = min(((header, _body(header, payload)) for header, payload in ways), key=lambda way: len(way[1]))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, body + CRC.pack(zlib.crc32(body)))
    return header


def _body(header: CodecFileHeader, payload: bytes) -> bytes:
    """A file but for its CRC, of the least version, so that older programs read it."""
    version = 3 if header.prior else 2 if header.gain != 1 else 1
    text = json.dumps({name: value for name, value in asdict(header).items() if name in _names(version)}, separators=(",", ":"))
    return PREFIX.pack(MAGIC, version, len(text)) + text.encode() + payload


def read_header(path: str | Path) -> CodecFileHeader:
    """The header of a codec file; the codes are checked by their CRC only.

    Raises:
        ValueError: as `read_codes`.
    """
    return _read(str(path))[0]


def read_codes(path: str | Path, prior: IntegerPrior | None = None) -> tuple[Tensor, CodecFileHeader]:
    """Read a codec file. Nothing is allocated for what a header claims before the file's size bears it out; entropy coded
    codes can be many in few bytes, and are read in groups.

    Args:
        path: file to read.
        prior: what its codes were entropy coded by, where they were.
    Returns:
        codes int64 [N, T'] and the header.
    Raises:
        ValueError: not a codec file, of a later version, truncated, damaged, with fields out of range, or entropy coded by
            another prior.
    """
    where = str(path)
    header, payload = _read(where)
    if header.prior:
        _check_prior(where, header, prior)
        try:
            return torch.from_numpy(prior.read(payload, header.n_codebooks, header.n_frames)), header
        except ValueError as error:
            raise ValueError(f"{where}: damaged: {error}") from None
    packed, n_codes = np.frombuffer(payload, np.uint8), header.n_codebooks * header.n_frames
    values = unpack_bits(packed, code_bits(header.codebook_size), n_codes)
    if values.max() >= header.codebook_size:
        raise ValueError(f"{where}: holds code {values.max()}, expected below {header.codebook_size}")
    codes = np.ascontiguousarray(values.reshape(header.n_frames, header.n_codebooks).T)
    return torch.from_numpy(codes), header


def is_codec_file(path: str | Path) -> bool:
    """Whether a file starts with our magic."""
    with _open(str(path)) as file:
        return file.read(len(MAGIC)) == MAGIC


def _open(where: str) -> BinaryIO:
    """Open for reading; a missing file or a folder is the user's error."""
    try:
        return open(where, "rb")
    except OSError as error:
        raise ValueError(f"{where}: cannot be read: {error.strerror}") from None


def _read(where: str) -> tuple[CodecFileHeader, bytes]:
    """Header and payload, after every check that needs no prior."""
    with _open(where) as file:
        header, start = _read_header(where, file)
        file.seek(0)
        data = file.read()
    body, written = data[: -CRC.size], CRC.unpack(data[-CRC.size :])[0]
    crc = zlib.crc32(body)
    if crc != written:
        raise ValueError(f"{where}: damaged: CRC-32 {crc:08x}, expected {written:08x}; fetch the file again")
    return header, body[start:]


def _read_header(where: str, file: BinaryIO) -> tuple[CodecFileHeader, int]:
    """Header and offset of the payload, after every check that needs no payload."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(PREFIX.size)
    if prefix[: len(MAGIC)] != MAGIC:
        raise ValueError(f"{where}: not a codec file: starts with {prefix[:4]!r}, expected {MAGIC!r}")
    if len(prefix) < PREFIX.size:
        raise ValueError(f"{where}: truncated: {size} bytes, expected at least {PREFIX.size}")
    _, version, n_bytes = PREFIX.unpack(prefix)
    if version > VERSION:
        raise ValueError(f"{where}: written by version {version}, this is version {VERSION}; update")
    if version < 1:
        raise ValueError(f"{where}: damaged: version {version}, expected 1 to {VERSION}")
    if n_bytes > MAX_HEADER_BYTES:
        raise ValueError(f"{where}: header of {n_bytes} bytes, expected at most {MAX_HEADER_BYTES}")
    text = file.read(n_bytes)
    if len(text) < n_bytes:
        raise ValueError(f"{where}: truncated: {size} bytes end within the header")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{where}: damaged: the header is not JSON") from None
    header = _check_header(where, values, version)
    expected = PREFIX.size + n_bytes + header.payload_bytes + CRC.size
    if size != expected:
        what = "truncated" if size < expected else "bytes after its end"
        raise ValueError(f"{where}: {what}: {size} bytes, the header asks for {expected}")
    return header, PREFIX.size + n_bytes


def _names(version: int) -> list[str]:
    """Fields of a header of this version."""
    later = [name for first, names in ADDED.items() if first > version for name in names]
    return [field.name for field in fields(CodecFileHeader) if field.name not in later]


def _check_prior(where: str, header: CodecFileHeader, prior: IntegerPrior | None) -> None:
    """Refuse codes that this prior cannot write or read."""
    if prior is None or header.prior not in ("", prior.id):
        which = "none is there" if prior is None else f"the codec's is {prior.id}"
        raise ValueError(f"{where}: entropy coded by prior {header.prior}, {which}; decode with the prior.safetensors that "
                         "lay beside the weights then")  # fmt: skip
    if header.n_codebooks > prior.n_codebooks or header.codebook_size != prior.codebook_size:
        raise ValueError(f"{where}: {header.n_codebooks} codebooks of {header.codebook_size} entries, the prior knows "
                         f"{prior.n_codebooks} of {prior.codebook_size}")  # fmt: skip


def _check_header(where: str, values: object, version: int = VERSION) -> CodecFileHeader:
    """The header from untrusted JSON."""
    names = _names(version)
    if not isinstance(values, dict) or sorted(values) != sorted(names):
        raise ValueError(f"{where}: damaged: the header's fields are not exactly {', '.join(names)}")
    header = CodecFileHeader(**values)
    for name in names[: names.index("model_id")]:
        value = values[name]
        if type(value) is not int or not 0 < value < 2**63:
            raise ValueError(f"{where}: header {name}={str(value)[:40]!r}, expected a positive integer")
    size, model_id = header.codebook_size, header.model_id
    if not 2 <= size <= 2**MAX_CODE_BITS:
        raise ValueError(f"{where}: header codebook_size={size}, expected 2 to {2**MAX_CODE_BITS}")
    if not isinstance(model_id, str) or not re.fullmatch("[0-9a-f]{1,64}", model_id):
        raise ValueError(f"{where}: header model_id={str(model_id)[:40]!r}, expected 1 to 64 hex digits")
    if type(header.gain) not in (int, float) or not LEAST_GAIN <= header.gain <= MOST_GAIN:
        raise ValueError(f"{where}: header gain={str(header.gain)[:40]!r}, expected a number from {LEAST_GAIN} to {MOST_GAIN}")
    if type(header.prior) is not str or not re.fullmatch("[0-9a-f]{0,64}", header.prior):
        raise ValueError(f"{where}: header prior={str(header.prior)[:40]!r}, expected hex digits")
    if type(header.n_bytes) is not int or not 0 <= header.n_bytes < 2**63 or bool(header.n_bytes) != bool(header.prior):
        raise ValueError(f"{where}: header n_bytes={str(header.n_bytes)[:40]!r}, expected the size of what a prior coded")
    if header.prior and header.n_codebooks * header.n_frames * least_bits(header.codebook_size) > 8 * header.n_bytes:
        raise ValueError(f"{where}: header n_bytes={header.n_bytes}, too few for {header.n_frames} frames")
    if header.n_samples > header.n_frames * header.hop_length:
        raise ValueError(
            f"{where}: header n_samples={header.n_samples}, expected at most "
            f"n_frames * hop_length = {header.n_frames * header.hop_length}"
        )
    return header
