"""The codec file: magic, version, JSON header, bit-packed codes, CRC-32. No pickle.

    4 bytes   magic "NSCF"
    2 bytes   version, little endian: 1, or 2 where the header has a gain
    4 bytes   length of the header, little endian
    header    JSON object, the fields of CodecFileHeader
    payload   codes, frame after frame and within a frame codebook after codebook, each in ceil(log2 K) bits,
              least significant bit first; the last byte is filled up with zeros
    4 bytes   CRC-32 of everything before, little endian
"""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from codec.files import write_atomically

MAGIC = b"NSCF"
VERSION = 2
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
    """

    sample_rate: int
    hop_length: int
    n_samples: int
    n_codebooks: int
    codebook_size: int
    n_frames: int
    model_id: str
    gain: float = 1.0

    @property
    def payload_bytes(self) -> int:
        """Size of the packed codes."""
        return -(-self.n_codebooks * self.n_frames * code_bits(self.codebook_size) // 8)


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


def write_codes(path: str | Path, codes: Tensor, header: CodecFileHeader) -> None:
    """Write a codec file, atomically.

    Args:
        path: file to write; its folder is made if missing.
        codes: [N, T'] integers in [0, codebook_size).
        header: must agree with the codes' shape.
    Raises:
        ValueError: a header field is out of range, or codes and header disagree.
    """
    where = str(path)
    _check_header(where, asdict(header))
    if tuple(codes.shape) != (header.n_codebooks, header.n_frames):
        raise ValueError(
            f"{where}: codes are {tuple(codes.shape)}, the header says "
            f"{(header.n_codebooks, header.n_frames)} codebooks and frames"
        )
    values = codes.detach().cpu().numpy().T.reshape(-1)
    low, high = values.min(), values.max()
    if low < 0 or high >= header.codebook_size:
        raise ValueError(f"{where}: codes from {low} to {high}, expected 0 to {header.codebook_size - 1}")
    values_of_header = asdict(header)
    version = VERSION if header.gain != 1 else 1
    if version == 1:
        del values_of_header["gain"]  # so that older programs read it
    text = json.dumps(values_of_header, separators=(",", ":")).encode()
    body = PREFIX.pack(MAGIC, version, len(text)) + text
    body += pack_bits(values, code_bits(header.codebook_size)).tobytes()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, body + CRC.pack(zlib.crc32(body)))


def read_codes(path: str | Path) -> tuple[Tensor, CodecFileHeader]:
    """Read a codec file. Nothing is allocated for what a header claims before the file's size bears it out.

    Args:
        path: file to read.
    Returns:
        codes int64 [N, T'] and the header.
    Raises:
        ValueError: not a codec file, of a later version, truncated, damaged, or with fields out of range.
    """
    where = str(path)
    with _open(where) as file:
        header, start = _read_header(where, file)
        file.seek(0)
        data = file.read()
    body, written = data[: -CRC.size], CRC.unpack(data[-CRC.size :])[0]
    crc = zlib.crc32(body)
    if crc != written:
        raise ValueError(f"{where}: damaged: CRC-32 {crc:08x}, expected {written:08x}; fetch the file again")
    packed = np.frombuffer(body, np.uint8, offset=start)
    values = unpack_bits(packed, code_bits(header.codebook_size), header.n_codebooks * header.n_frames)
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
    if version == 1 and isinstance(values, dict):
        values["gain"] = None if "gain" in values else 1.0  # that version had none
    header = _check_header(where, values)
    expected = PREFIX.size + n_bytes + header.payload_bytes + CRC.size
    if size != expected:
        what = "truncated" if size < expected else "bytes after its end"
        raise ValueError(f"{where}: {what}: {size} bytes, the header asks for {expected}")
    return header, PREFIX.size + n_bytes


def _check_header(where: str, values: object) -> CodecFileHeader:
    """The header from untrusted JSON."""
    names = [field.name for field in fields(CodecFileHeader)]
    if not isinstance(values, dict) or sorted(values) != sorted(names):
        raise ValueError(f"{where}: damaged: the header's fields are not exactly {', '.join(names)}")
    header = CodecFileHeader(**values)
    for name in names[:-2]:
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
    if header.n_samples > header.n_frames * header.hop_length:
        raise ValueError(
            f"{where}: header n_samples={header.n_samples}, expected at most "
            f"n_frames * hop_length = {header.n_frames * header.hop_length}"
        )
    return header
