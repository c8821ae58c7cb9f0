import json
import pickle
import struct
import time
import zlib
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from codec.bitstream import (
    MAGIC,
    PREFIX,
    CodecFileHeader,
    code_bits,
    is_codec_file,
    pack_bits,
    read_codes,
    read_header,
    unpack_bits,
    write_codes,
)
from codec.prior import CodePrior, IntegerPrior, rounded

HEADER = CodecFileHeader(
    sample_rate=24000,
    hop_length=320,
    n_samples=9 * 320 + 7,
    n_codebooks=3,
    codebook_size=1000,
    n_frames=10,
    model_id="0123456789abcdef",
)

LONG = replace(HEADER, n_frames=120)
PACKED = {name: value for name, value in asdict(HEADER).items() if name not in ("prior", "n_bytes")}  # as version 2 has it


def random_codes(header: CodecFileHeader, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(header.codebook_size, (header.n_codebooks, header.n_frames), generator=generator)


def pack_one_bit_at_a_time(values: np.ndarray, bits: int) -> bytes:
    stream = 0
    for position, value in enumerate(values):
        stream |= int(value) << position * bits
    return stream.to_bytes(-(-len(values) * bits // 8), "little")


def write_raw(path, header: dict | bytes, payload: bytes = b"", version: int = 2) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = struct.pack("<4sHI", MAGIC, version, len(text)) + text + payload
    path.write_bytes(body + struct.pack("<I", zlib.crc32(body)))


@pytest.mark.parametrize("bits", range(1, 25))
def test_packing_equals_a_reference_in_plain_python(bits):
    rng = np.random.default_rng(bits)
    for n in (1, 7, 8, 9, 131):
        values = rng.integers(0, 2**bits, n)
        packed = pack_bits(values, bits)
        assert packed.tobytes() == pack_one_bit_at_a_time(values, bits)
        assert np.array_equal(unpack_bits(packed, bits, n), values)


def test_ten_million_codes_a_second():
    values = np.random.default_rng(0).integers(0, 1024, 2_000_000)
    start = time.perf_counter()
    restored = unpack_bits(pack_bits(values, 10), 10, len(values))
    seconds = time.perf_counter() - start
    assert np.array_equal(restored, values)
    assert seconds < 1.0  # 0.1 s when the machine is free


@pytest.mark.parametrize("codebook_size", [2, 3, 1000, 1024, 1025, 2**24])
def test_a_written_file_reads_back_with_ceil_log2_bits_a_code(tmp_path, codebook_size):
    header = replace(HEADER, codebook_size=codebook_size)
    codes = random_codes(header)
    path = tmp_path / "a.codec"
    write_codes(path, codes, header)
    read, read_header = read_codes(path)
    assert torch.equal(read, codes) and read.dtype == torch.int64 and read_header == header
    text = json.dumps({**{key: value for key, value in PACKED.items() if key != "gain"}, "codebook_size": codebook_size},
                      separators=(",", ":"))  # fmt: skip
    assert code_bits(codebook_size) == int(np.ceil(np.log2(codebook_size)))
    payload = -(-30 * code_bits(codebook_size) // 8)
    assert path.stat().st_size == PREFIX.size + len(text) + payload + 4
    assert is_codec_file(path) and [file.name for file in tmp_path.iterdir()] == ["a.codec"]


def test_every_flipped_byte_and_every_truncation_is_refused_in_one_line(tmp_path):
    path = tmp_path / "a.codec"
    write_codes(path, random_codes(HEADER), HEADER)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [whole[:length] for length in range(len(whole))]
    for position in range(len(whole)):
        for mask in (0x01, 0x80, int(rng.integers(1, 256))):
            damaged.append(whole[:position] + bytes([whole[position] ^ mask]) + whole[position + 1 :])
    damaged += [whole + b"\0", whole + whole]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(ValueError, match="a.codec: ") as error:
            read_codes(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_after_the_magic_are_refused(tmp_path, seed):
    rng = np.random.default_rng(seed)
    path = tmp_path / "a.codec"
    path.write_bytes(MAGIC + b"\x01\x00" + rng.bytes(int(rng.integers(0, 300))))
    with pytest.raises(ValueError, match="a.codec: "):
        read_codes(path)


def test_the_checksum_is_what_catches_a_flipped_code(tmp_path):
    path = tmp_path / "a.codec"
    codes = random_codes(replace(HEADER, codebook_size=1024))
    write_codes(path, codes, replace(HEADER, codebook_size=1024))
    data = bytearray(path.read_bytes())
    data[-6] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match="CRC-32"):
        read_codes(path)
    # the wrong version, which trusts its payload, returns other codes and says nothing
    payload = np.frombuffer(bytes(data[-4 - 38 : -4]), np.uint8)
    trusted = unpack_bits(payload, 10, 30).reshape(10, 3).T
    assert trusted.max() < 1024 and not np.array_equal(trusted, codes.numpy())


def test_a_later_version_asks_for_an_update(tmp_path):
    write_raw(tmp_path / "a.codec", asdict(HEADER), version=4)
    with pytest.raises(ValueError, match="written by version 4, this is version 3; update"):
        read_codes(tmp_path / "a.codec")


def test_a_gain_reads_back_and_without_one_the_file_is_what_older_programs_read(tmp_path):
    loud, plain = tmp_path / "loud.codec", tmp_path / "plain.codec"
    codes = random_codes(HEADER)
    write_codes(loud, codes, replace(HEADER, gain=0.2512))
    write_codes(plain, codes, HEADER)
    assert [path.read_bytes()[4] for path in (loud, plain)] == [2, 1] and b"gain" not in plain.read_bytes()
    assert read_codes(loud)[1] == replace(HEADER, gain=0.2512) and read_codes(plain)[1] == HEADER
    write_raw(tmp_path / "a.codec", {key: value for key, value in PACKED.items() if key != "gain"})
    with pytest.raises(ValueError, match="fields are not exactly"):
        read_codes(tmp_path / "a.codec")
    for version, values in ((1, PACKED), (2, asdict(HEADER))):
        write_raw(tmp_path / "a.codec", values, version=version)
        with pytest.raises(ValueError, match="fields are not exactly"):
            read_codes(tmp_path / "a.codec")


# ------------------------------------------------------------------------------ entropy coded


@pytest.fixture(scope="module")
def prior():
    torch.manual_seed(0)
    codebooks = torch.randn(3, 1000, 8)
    return IntegerPrior(rounded(CodePrior(codebooks, torch.ones(8))), codebooks.numpy(), HEADER.model_id)


@pytest.fixture(scope="module")
def likely(prior):
    """Codes of 3 codebooks, each the likeliest of its frame."""
    sums, codes = np.zeros((LONG.n_frames + 2, 8)), np.zeros((3, LONG.n_frames), np.int64)
    for frame in range(LONG.n_frames):
        seen = prior.seen(np.concatenate([sums[frame + 1], sums[frame]])[None])
        for i in range(3):
            codes[i, frame] = prior.frequencies(i, seen, sums[None, frame + 2])[0].argmax()
            sums[frame + 2] += prior.entries[i][codes[i, frame]]
    return torch.from_numpy(codes)


def test_an_entropy_coded_file_reads_back_by_the_prior_that_wrote_it_only(tmp_path, prior, likely):
    path = tmp_path / "a.codec"
    written = write_codes(path, likely, LONG, prior)
    assert written == replace(LONG, prior=prior.id, n_bytes=written.payload_bytes) and path.read_bytes()[4] == 3
    read, header = read_codes(path, prior)
    assert torch.equal(read, likely) and read.dtype == torch.int64 and header == read_header(path) == written
    tensors = {name: value + 1 for name, value in prior.tensors.items()}
    other = IntegerPrior(tensors, np.ones((3, 1000, 8), np.float32), HEADER.model_id)
    for wrong in (None, other):
        with pytest.raises(ValueError, match=f"a.codec: entropy coded by prior {prior.id}, "):
            read_codes(path, wrong)


def test_codes_that_a_prior_would_make_larger_are_packed(tmp_path, prior):
    codes = random_codes(HEADER)
    assert len(prior.write(codes.numpy())) > HEADER.payload_bytes
    assert write_codes(tmp_path / "a.codec", codes, HEADER, prior) == HEADER
    write_codes(tmp_path / "b.codec", codes, HEADER)
    assert (tmp_path / "a.codec").read_bytes() == (tmp_path / "b.codec").read_bytes()


def test_a_prior_of_other_codebooks_writes_no_file(tmp_path, prior):
    header = replace(HEADER, n_codebooks=4)
    for wrong in (header, replace(HEADER, codebook_size=1024)):
        with pytest.raises(ValueError, match="the prior knows 3 of 1000"):
            write_codes(tmp_path / "a.codec", random_codes(wrong), wrong, prior)
    assert list(tmp_path.iterdir()) == []


def test_damage_to_an_entropy_coded_file_is_refused_in_one_line(tmp_path, prior, likely):
    path = tmp_path / "a.codec"
    write_codes(path, likely, LONG, prior)
    whole = path.read_bytes()
    damaged = [whole[:length] for length in range(len(whole))] + [whole + b"\0"]
    damaged += [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(len(whole))]
    for data in damaged:
        path.write_bytes(data)
        for read in (lambda: read_codes(path, prior), lambda: read_header(path)):
            with pytest.raises(ValueError, match="a.codec: ") as error:
                read()
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("payload", [b"\0" * 60, b"\xff" * 60, bytes(range(60)), b"\x28\0\0\0" + b"\1" * 56])
@pytest.mark.parametrize("n_frames", [10, 600])
def test_a_payload_that_was_never_written_is_refused_though_its_crc_is_right(tmp_path, prior, payload, n_frames):
    values = {**asdict(HEADER), "prior": prior.id, "n_bytes": len(payload), "n_frames": n_frames}
    write_raw(tmp_path / "a.codec", values, payload, version=3)
    with pytest.raises(ValueError, match="a.codec: damaged: "):
        read_codes(tmp_path / "a.codec", prior)


@pytest.mark.parametrize("change", [{"prior": ""}, {"prior": 1}, {"n_bytes": 0}, {"n_bytes": True}, {"n_bytes": 41},
                                    {"prior": "g"}, {"n_frames": 10**6}, {"n_frames": 2**62}], ids=str)  # fmt: skip
def test_header_fields_of_an_entropy_coded_file_are_refused_too(tmp_path, prior, change, monkeypatch):
    values = {**asdict(HEADER), "prior": prior.id, "n_bytes": 40}
    reached = []
    monkeypatch.setattr(IntegerPrior, "read", lambda *_: reached.append(1) or np.zeros((3, 10), np.int64))
    write_raw(tmp_path / "a.codec", values, b"\0" * 40, version=3)
    assert read_codes(tmp_path / "a.codec", prior)[1].n_bytes == 40 and reached == [1]  # as it is it gets there
    write_raw(tmp_path / "a.codec", {**values, **change}, b"\0" * 40, version=3)
    with pytest.raises(ValueError, match="a.codec: ") as error:
        read_codes(tmp_path / "a.codec", prior)
    assert len(str(error.value)) < 400 and reached == [1]


@pytest.mark.parametrize("claim", [{"n_frames": 10**12}, {"n_codebooks": 10**12}, {"n_frames": 2**62}])
def test_a_claim_of_a_million_million_frames_allocates_nothing(tmp_path, claim, monkeypatch):
    write_raw(tmp_path / "a.codec", {**PACKED, **claim}, b"\0" * 38)
    monkeypatch.setattr("codec.bitstream.unpack_bits", lambda *_: pytest.fail("reached the payload"))
    with pytest.raises(ValueError, match="truncated"):
        read_codes(tmp_path / "a.codec")


@pytest.mark.parametrize(
    "change",
    [
        {"n_frames": 0},
        {"n_frames": -10},
        {"n_frames": True},
        {"n_frames": 10.0},
        {"n_frames": "10"},
        {"n_frames": None},
        {"n_frames": 10**400},
        {"sample_rate": [24000]},
        {"codebook_size": 1},
        {"codebook_size": 2**24 + 1},
        {"n_samples": 10 * 320 + 1},
        {"model_id": ""},
        {"model_id": "../x"},
        {"model_id": 12},
        {"gain": 0.0},
        {"gain": -1.0},
        {"gain": float("nan")},
        {"gain": float("inf")},
        {"gain": True},
        {"gain": "1"},
        {"gain": 10**400},
        {"gain": 0.0099},
        {"gain": 101},
        {"extra": 1},
    ],
    ids=str,
)
def test_header_fields_out_of_range_or_ill_typed_are_refused(tmp_path, change):
    write_raw(tmp_path / "a.codec", {**PACKED, **change}, b"\0" * 38)
    with pytest.raises(ValueError, match="header") as error:
        read_codes(tmp_path / "a.codec")
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("text", [b"[1]", b"{}", b"[" * 60000, b"{\xff}", b"1" * 99, b'{"n_frames":'], ids=len)
def test_a_header_that_is_no_such_object_is_refused(tmp_path, text):
    write_raw(tmp_path / "a.codec", text)
    with pytest.raises(ValueError, match="damaged: the header"):
        read_codes(tmp_path / "a.codec")


def test_a_header_above_64_kib_is_refused_unread(tmp_path):
    write_raw(tmp_path / "a.codec", b" " * 65537)
    with pytest.raises(ValueError, match="header of 65537 bytes, expected at most 65536"):
        read_codes(tmp_path / "a.codec")


def test_a_pickle_is_not_a_codec_file(tmp_path):
    (tmp_path / "a.codec").write_bytes(pickle.dumps({"codes": [1, 2, 3]}))
    with pytest.raises(ValueError, match="not a codec file"):
        read_codes(tmp_path / "a.codec")
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_codes(tmp_path / "b.codec")


@pytest.mark.parametrize("bad", ["too_large", "negative", "shape", "no_frames"])
def test_writing_codes_that_do_not_fit_leaves_no_file(tmp_path, bad):
    codes, header = random_codes(HEADER), HEADER
    if bad == "too_large":
        codes[1, 2] = 1000
    elif bad == "negative":
        codes[1, 2] = -1
    elif bad == "shape":
        codes = codes[:2]
    else:
        codes, header = codes[:, :0], replace(HEADER, n_frames=0)
    with pytest.raises(ValueError, match="a.codec: "):
        write_codes(tmp_path / "a.codec", codes, header)
    assert list(tmp_path.iterdir()) == []
