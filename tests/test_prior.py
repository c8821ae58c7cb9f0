import hashlib
import math
import shutil
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import speech_like, tiny_config
from safetensors.numpy import save_file

from codec.bitstream import read_header
from codec.cli import main
from codec.model import Codec
from codec.prior import (
    NATS,
    ONE,
    SEGMENT_FRAMES,
    CodePrior,
    Frames,
    IntegerPrior,
    exponentials,
    file_bytes,
    load,
    rounded,
    shapes_of,
    train,
)
from codec.rans import TOTAL
from codec.systems import code_clip, neural_systems
from train_codec_gan import open_data, start_codebooks

N, K, D = 4, 64, 8


@pytest.fixture(scope="module")
def speech():
    """Codes that depend on those before: a wandering latent, quantized by a residual VQ of random entries."""
    generator = torch.Generator().manual_seed(0)
    codebooks = torch.randn(N, K, D, generator=generator) * torch.tensor([1.0, 0.6, 0.4, 0.25])[:, None, None]
    z, walk = torch.zeros(D), []
    for step in torch.randn(6000, D, generator=generator):
        z = 0.95 * z + 0.3 * step
        walk.append(z)
    left, codes = torch.stack(walk), []
    for codebook in codebooks:
        codes.append(torch.cdist(left, codebook).argmin(1))
        left = left - codebook[codes[-1]]
    return codebooks, torch.stack(codes, 1)


@pytest.fixture(scope="module")
def trained(speech):
    codebooks, codes = speech
    prior = CodePrior(codebooks, torch.stack([codebooks[i][codes[:, i]] for i in range(N)]).sum(0).std(0))
    train(prior, Frames(codes[:5000], torch.arange(5000)), [2, N], 400)
    return prior


@pytest.fixture(scope="module")
def integers(trained, speech):
    return IntegerPrior(rounded(trained), speech[0].numpy(), "0123456789abcdef")


def order_zero_bits(codes):
    counts = [np.bincount(level, minlength=K) / codes.shape[1] for level in codes]
    return sum(-(p[p > 0] * np.log2(p[p > 0])).sum() for p in counts)


@pytest.mark.parametrize(("n", "n_frames"), [(N, 700), (N, 1), (2, 40), (N, SEGMENT_FRAMES), (3, 2 * SEGMENT_FRAMES + 3)])
def test_codes_come_back(integers, speech, n, n_frames):
    codes = speech[1].T[:n, :n_frames].numpy()
    assert np.array_equal(integers.read(integers.write(codes), n, n_frames), codes)


def test_codes_that_it_holds_for_unlikely_come_back_too(integers):
    codes = np.random.default_rng(0).integers(K, size=(N, 600))
    assert np.array_equal(integers.read(integers.write(codes), N, 600), codes)


def test_what_was_learnt_saves_more_than_how_often_each_code_comes(integers, speech):
    codes = speech[1].T[:, 5000:].numpy()
    bits = 8 * len(integers.write(codes)) / codes.shape[1]
    assert bits < order_zero_bits(codes) - 2


@torch.no_grad()
def test_whole_numbers_cost_no_more_than_the_network_in_floating_point(integers, trained, speech):
    codes = speech[1][5000:]
    sums = sum(trained.entries[i][codes[:, i]] for i in range(N))
    past = torch.cat([torch.cat([torch.zeros(lag, D), sums[:-lag]]) for lag in (1, 2)], 1)
    nats = trained(codes, past).sum().item() * len(codes)
    n_segments = -(-len(codes) // SEGMENT_FRAMES)
    n_bytes = len(integers.write(codes.T.numpy())) - 8 * n_segments
    assert abs(n_bytes / (nats / math.log(2) / 8) - 1) < 0.02


def test_every_sum_is_exact(integers):
    """In int64, where nothing rounds: the same numbers, though float64 adds them in an order of its own."""
    rng = np.random.default_rng(0)
    past = rng.integers(-(2**13), 2**13, (50, 2 * D)).astype(float)
    first, bias = (part.astype(np.int64) for part in integers.first)
    second, bias_2 = (part.astype(np.int64) for part in integers.second)
    x = np.clip(np.clip((past.astype(np.int64) @ first >> 12) + bias, 0, 32767) @ second >> 12, -(2**40), 2**40) + bias_2
    assert np.array_equal(integers.seen(past), np.clip(x, 0, 32767))
    one_by_one = np.concatenate([integers.seen(row[None]) for row in past])
    assert np.array_equal(one_by_one, integers.seen(past))


def test_what_is_written_stays_as_it_is():
    """Of whole numbers alone: any change here is one of the format, which wants a version of its own."""
    rng = np.random.RandomState(0)  # whose numbers never change
    tensors = {name: rng.randint(-3000, 3000, shape) for name, shape in shapes_of(N, K, D).items()}
    tensors |= {"spread": rng.randint(1, 9, D) / 3, "scale": rng.randint(1, 9000, N)}
    prior = IntegerPrior(tensors, rng.randint(-999, 999, (N, K, D)).astype(np.float32) / 256, "0123456789abcdef")
    data = prior.write(rng.randint(K, size=(N, 2 * SEGMENT_FRAMES + 9)))
    assert (prior.id, hashlib.sha256(data).hexdigest()[:16]) == ("5a9f460b6b3dfd98", "9020da9a6e304d89")


def test_frequencies_are_a_distribution_that_leaves_nothing_out(integers):
    rng = np.random.default_rng(1)
    seen, total = np.abs(rng.normal(0, 500, (20, 192))).round(), rng.normal(0, 3000, (20, D)).round()
    for i in range(N):
        frequencies, ends = integers.frequencies(i, seen, total)
        assert frequencies.min() >= 1 and (ends[:, -1] == TOTAL).all()


def test_the_table_of_exponentials_is_the_one_that_files_are_written_by():
    table = exponentials()
    assert np.abs(table / TOTAL - np.exp(-np.arange(NATS * ONE + 1) / ONE)).max() <= 1 / TOTAL
    assert hashlib.sha256(table.astype("<i8").tobytes()).hexdigest()[:16] == "e3c8a338aed58e43"


def test_bytes_that_are_not_so_many_codes_are_refused(integers, speech):
    codes = speech[1].T[:, : SEGMENT_FRAMES + 40].numpy()
    data = integers.write(codes)
    for damaged in (data[:-9], data + b"\0", data[:3], data[:40] + bytes([data[40] ^ 8]) + data[41:]):
        with pytest.raises(ValueError, match="the codes"):
            integers.read(damaged, N, codes.shape[1])


def test_places_are_those_of_the_floating_point_network(trained, integers):
    """By hand: entries in units of their spread, and their squared lengths, over the deviation of all of both."""
    entries = trained.entries
    places = torch.cat([entries, entries.square().sum(2, keepdim=True)], 2)
    places /= places.std((1, 2), keepdim=True)
    assert np.abs(integers.places.swapaxes(1, 2) / ONE - places.numpy()).max() < 0.03
    assert np.array_equal(integers.entries / ONE, entries.numpy())


class OfCodec(NamedTuple):
    """What `load` asks of a codec."""

    model_id: str
    quantizer: SimpleNamespace


@pytest.fixture
def its_codec(speech):
    return OfCodec("0123456789abcdef", SimpleNamespace(codebooks=speech[0]))


def test_it_is_kept_beside_the_weights_of_its_model_only(tmp_path, integers, its_codec):
    assert load(tmp_path, its_codec) is None
    (tmp_path / "prior.safetensors").write_bytes(file_bytes(integers))
    again = load(tmp_path, its_codec)
    assert again.id == integers.id and np.array_equal(again.places, integers.places)
    with pytest.raises(ValueError, match="prior.safetensors: knows codes of model 0123456789abcdef, this one is ffff"):
        load(tmp_path, its_codec._replace(model_id="ffff"))
    (tmp_path / "prior.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="prior.safetensors: cannot be read"):
        load(tmp_path, its_codec)


@pytest.mark.parametrize("change", [
    lambda t: t.pop("bias"), lambda t: t.update(bias=t["bias"][0]), lambda t: t.update(more=t["bias"]),
    lambda t: t.update(to_heads=t["to_heads"][:-1]), lambda t: t.update(bias=t["bias"].astype(np.int32)),
    lambda t: t.update(spread=t["spread"].astype(np.int16)), lambda t: t.clear(),
])  # fmt: skip
def test_tensors_that_are_no_prior_are_refused_in_one_line(tmp_path, integers, its_codec, change):
    tensors = dict(integers.tensors)
    change(tensors)
    save_file(tensors, tmp_path / "prior.safetensors", {"model_id": "0123456789abcdef"})
    with pytest.raises(ValueError, match="prior.safetensors: not the tensors of a prior; make it anew"):
        load(tmp_path, its_codec)


@pytest.mark.parametrize(("name", "value"), [("spread", 0), ("spread", np.nan), ("spread", np.inf), ("scale", -1)])
def test_a_spread_or_scale_that_cannot_be_divided_by_is_refused(tmp_path, integers, its_codec, name, value):
    tensors = {**integers.tensors, name: integers.tensors[name].copy()}
    tensors[name][1] = value
    save_file(tensors, tmp_path / "prior.safetensors", {"model_id": "0123456789abcdef"})
    with pytest.raises(ValueError, match="prior.safetensors: a spread or scale that is not above 0; make it anew"):
        load(tmp_path, its_codec)


# ------------------------------------------------------------------------------ for a codec, by the command


@pytest.fixture(scope="module")
def codec_folder(manifest, tmp_path_factory):
    """A codec whose codebooks were started from speech, and what `codec prior` put beside it."""
    folder = tmp_path_factory.mktemp("codec") / "codec"
    config = tiny_config(["data.n_workers=0"], manifest)
    torch.manual_seed(0)
    codec = Codec(config.model)
    start_codebooks(codec, open_data(config)[0].segments, config, torch.device("cpu"))
    codec.eval().save_pretrained(folder)
    assert main(["prior", str(folder), str(manifest), "--steps", "400"]) == 0
    return folder


@pytest.fixture
def speech_file(tmp_path):
    sf.write(tmp_path / "in.wav", 0.3 * speech_like(20000, seed=3), 8000)
    return tmp_path / "in.wav"


def test_files_get_smaller_and_the_audio_stays_the_same_to_the_bit(codec_folder, speech_file, tmp_path, capsys):
    for name, more in (("coded", []), ("packed", ["--packed"])):
        assert main(["encode", str(speech_file), str(tmp_path / name), "--checkpoint", str(codec_folder), *more]) == 0
        assert main(["decode", str(tmp_path / name), str(tmp_path / f"{name}.wav"), "--checkpoint", str(codec_folder)]) == 0
    coded, packed = (read_header(tmp_path / name) for name in ("coded", "packed"))
    assert coded.payload_bytes < 0.95 * packed.payload_bytes and packed.prior == ""
    assert (tmp_path / "coded.wav").read_bytes() == (tmp_path / "packed.wav").read_bytes()
    capsys.readouterr()
    assert main(["info", str(tmp_path / "coded")]) == 0
    assert main(["info", str(codec_folder)]) == 0
    assert capsys.readouterr().out.count(f"entropy coded by prior {coded.prior}") == 2


def test_evaluations_count_the_bytes_of_that_file(codec_folder, speech_file, tmp_path):
    systems = neural_systems("ours", str(codec_folder), [3])
    coded = code_clip(systems, sf.read(speech_file, dtype="float32")[0], 8000)[systems[0].name]
    assert main(["encode", str(speech_file), str(tmp_path / "a.codec"), "--checkpoint", str(codec_folder)]) == 0
    assert coded.n_bytes == (tmp_path / "a.codec").stat().st_size
    assert coded.n_payload_bytes == read_header(tmp_path / "a.codec").payload_bytes


@pytest.mark.parametrize("more", [[], ["--compact"]], ids=["as it is", "fp16"])
def test_a_converted_folder_brings_it(codec_folder, speech_file, tmp_path, more):
    assert main(["convert", "--from", str(codec_folder), str(tmp_path / "out"), *more]) == 0
    sizes = []
    for folder in (codec_folder, tmp_path / "out"):
        assert main(["encode", str(speech_file), str(tmp_path / "a.codec"), "--checkpoint", str(folder)]) == 0
        assert main(["decode", str(tmp_path / "a.codec"), str(tmp_path / "a.wav"), "--checkpoint", str(folder)]) == 0
        assert read_header(tmp_path / "a.codec").prior
        sizes.append(read_header(tmp_path / "a.codec").payload_bytes)
    assert abs(sizes[1] / sizes[0] - 1) < 0.03


def test_a_file_of_another_prior_is_refused_in_one_line_and_nothing_is_written(codec_folder, speech_file, tmp_path, capsys):
    assert main(["encode", str(speech_file), str(tmp_path / "a.codec"), "--checkpoint", str(codec_folder)]) == 0
    other = tmp_path / "other"
    shutil.copytree(codec_folder, other)
    (other / "prior.safetensors").unlink()
    capsys.readouterr()
    assert main(["decode", str(tmp_path / "a.codec"), str(tmp_path / "a.wav"), "--checkpoint", str(other)]) == 2
    error = capsys.readouterr().err
    assert "a.codec: entropy coded by prior" in error and "none is there" in error and error.count("\n") == 1
    assert not (tmp_path / "a.wav").exists()


@pytest.mark.parametrize(("more", "line"), [
    ([], "exists, and no other reads the files that it coded"), (["--replace", "--steps", "0"], "--steps 0: expected more"),
    (["--replace", "--hours", "nan"], "--hours nan: expected"), (["--replace", "--device", "nowhere"], "--device nowhere: "),
])  # fmt: skip
def test_what_cannot_be_is_said_before_anything_is_coded(codec_folder, manifest, capsys, monkeypatch, more, line):
    monkeypatch.setattr(Codec, "encode_long", lambda *_: pytest.fail("coded"))
    before = (codec_folder / "prior.safetensors").read_bytes()
    assert main(["prior", str(codec_folder), str(manifest), *more]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1 and (codec_folder / "prior.safetensors").read_bytes() == before


def test_a_codec_whose_entries_do_not_add_up_is_refused(manifest, tmp_path, capsys):
    config = tiny_config(["model.quantizer={type: factorized, n_codebooks: 3, codebook_size: 16, codebook_dim: 4}"], manifest)
    Codec(config.model).save_pretrained(tmp_path / "codec")
    assert main(["prior", str(tmp_path / "codec"), str(manifest)]) == 2
    assert "quantizer.type=factorized, n_semantic=0: its entries do not add up to a latent" in capsys.readouterr().err
    assert not (tmp_path / "codec" / "prior.safetensors").exists()
