"""How likely each code is, given those before it: what makes codec files smaller (`codec prior`).

Codes are not independent: neighbouring frames resemble each other, and so do the codebooks of one frame. `CodePrior` is a
small network that says how likely each entry is, given the frames before and the codebooks before it in its own frame.
An arithmetic coder (`codec/rans.py`) turns that into bits. No code changes: the audio is the same, to the bit.

Encoder and decoder must get exactly the same probabilities, or all that follows is noise, and floating point is not the same on
two machines (nor in two batch sizes on one). So the trained network is rounded to whole numbers (`IntegerPrior`). These
are held in float64, where sums and products below 2**53 are exact in whatever order a BLAS adds them.

Source: entropy coding of codes by a network, Défossez et al. 2022 (EnCodec), section 3.3, whose transformer runs in floating
point; networks in integers for it, Ballé, Johnston and Minnen 2019, "Integer networks for data compression with
latent-variable models". A convolution over two frames in place of a transformer, and entries that score themselves by where
they lie, so that there is no output matrix to learn, are ours.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import math
import os
import random
from decimal import Context, Decimal
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from codec.audio import load_audio
from codec.config import trained_counts
from codec.data import Utterance, read_manifest
from codec.files import write_atomically
from codec.model import Codec
from codec.pretrained import resolve
from codec.rans import TOTAL, SymbolReader, least_bits, write_symbols

FILE = "prior.safetensors"
N_PAST = 2  # frames that are seen
DIM, HEAD_DIM = 192, 96
SEGMENT_FRAMES = 512  # coded by itself, so that many are read at once
ONE, WEIGHT_ONE = 2**8, 2**12  # what stands for 1.0 among numbers that flow, and among weights and scales
MOST = 2**15 - 1  # of both
NATS = 12  # less likely than the likeliest by more counts as this
BATCH_FRAMES, RATE = 1024, 3e-3
MOST_ENTRIES = TOTAL // 16  # of a codebook: the least frequency of each, together, wastes little
FORMAT = (N_PAST, SEGMENT_FRAMES, ONE, WEIGHT_ONE, MOST, NATS, TOTAL)  # files are written by these
TYPES = {"spread": "<f4", "scale": "<i4"}  # of its tensors; all others are int16
AT_ONCE = 256  # segments that are read side by side
HELD_OUT = 20  # every twentieth recording is kept back to measure on


class CodePrior(nn.Module):
    """The network that is trained.

    Codes are seen as their entries: sums over codebooks, in units of what such sums vary by. The score of an entry e is
    a b(e) + c(e), where b(e) is its place and its squared length, so that a Gaussian around any point can be said.

    Args:
        codebooks: [N, K, d], whose entries add up to a latent.
        spread: [d], standard deviation of such sums.
    """

    def __init__(self, codebooks: Tensor, spread: Tensor):
        super().__init__()
        n, k, d = codebooks.shape
        entries = codebooks.float() / spread
        places = torch.cat([entries, entries.square().sum(2, keepdim=True)], 2)
        self.spread = spread.numpy().astype(np.float32)
        self.scale = whole(1 / places.std((1, 2)), WEIGHT_ONE).clamp(1, 2**31 - 1).numpy().astype(np.int32)
        for name, value in zip(("entries", "places"), geometry(codebooks.float().numpy(), self.spread, self.scale)):
            self.register_buffer(name, torch.from_numpy(value / ONE).float())  # as the integers will be
        self.first, self.second = nn.Linear(N_PAST * d, DIM), nn.Linear(DIM, DIM)
        self.to_heads = nn.ModuleList(nn.Linear(DIM, HEAD_DIM) for _ in range(n))
        self.from_sum = nn.ModuleList(nn.Linear(d, HEAD_DIM, bias=False) for _ in range(n))
        self.to_place = nn.ModuleList(nn.Linear(HEAD_DIM, d + 1) for _ in range(n))
        self.bias = nn.Parameter(torch.zeros(n, k))

    def forward(self, codes: Tensor, past: Tensor) -> Tensor:
        """Nats that each code takes, mean over frames [n], of codes [M, n] whose frames before are past [M, N_PAST x d]."""
        most = MOST / ONE  # no number can be larger among the integers
        x = self.second(self.first(past).clamp(0, most)).clamp(0, most)
        nats, total = [], torch.zeros_like(past[:, : self.entries.shape[2]])
        for i, code in enumerate(codes.T):
            head = (self.to_heads[i](x) + self.from_sum[i](total)).clamp(0, most)
            place = self.to_place[i](head).clamp(-most, most)
            nats.append(F.cross_entropy(place @ self.places[i].T + self.bias[i], code))
            total = total + self.entries[i][code]
        return torch.stack(nats)


def geometry(codebooks: np.ndarray, spread: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Entries [N, K, d] in units of spread / ONE and their places [N, K, d + 1], whole numbers.

    One division or product a number, and sums below 2**53: on every machine the same.
    """
    entries = np.clip(np.rint(codebooks / spread.astype(np.float64) * ONE), -MOST, MOST)
    squares = np.floor(np.square(entries).sum(2, keepdims=True) / ONE)
    places = np.floor(np.concatenate([entries, squares], 2) * scale[:, None, None] / WEIGHT_ONE)
    return entries, np.clip(places, -MOST, MOST)


def whole(x: Tensor, one: int) -> Tensor:
    """x in units of 1 / one, rounded."""
    return (x * one).round()


class IntegerPrior:
    """The trained network in whole numbers.

    Args:
        tensors: as `rounded` gives them.
        codebooks: float32 [N, K, d], of the codec whose codes it knows.
        model_id: of that codec.
    """

    def __init__(self, tensors: dict[str, np.ndarray], codebooks: np.ndarray, model_id: str):
        self.model_id = model_id
        self.tensors = {name: np.ascontiguousarray(value, dtype=TYPES.get(name, "<i2")) for name, value in tensors.items()}
        digest = hashlib.sha256(f"{model_id}{FORMAT}".encode())
        for name, value in sorted(self.tensors.items()):
            digest.update(f"{name}{value.shape}".encode() + value.tobytes())
        self.id = digest.hexdigest()[:16]
        numbers = {name: value.astype(np.float64) for name, value in self.tensors.items()}
        self.bias = numbers["bias"]
        self.first, self.second = ((numbers[f"{name}.weight"].T, numbers[f"{name}.bias"]) for name in ("first", "second"))
        self.to_heads, self.from_sum, self.to_place = (numbers[name].swapaxes(1, 2) for name in
                                                       ("to_heads", "from_sum", "to_place"))  # fmt: skip
        self.head_bias, self.place_bias = numbers["to_heads.bias"], numbers["to_place.bias"]
        self.entries, places = geometry(codebooks, self.tensors["spread"], self.tensors["scale"])
        self.places = places.swapaxes(1, 2)

    @property
    def n_codebooks(self) -> int:
        return self.entries.shape[0]

    @property
    def codebook_size(self) -> int:
        return self.entries.shape[1]

    def seen(self, past: np.ndarray) -> np.ndarray:
        """What the frames before say: past [M, N_PAST x d] to [M, DIM]."""
        return rectified(rectified(past @ self.first[0], self.first[1]) @ self.second[0], self.second[1])

    def frequencies(self, i: int, seen: np.ndarray, total: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of codebook i in M frames, where `total` [M, d] sums up the entries before it.

        Returns:
            frequencies and their running sums, int64 [M, K]; they add up to `rans.TOTAL`, and none is 0.
        """
        head = rectified(seen @ self.to_heads[i] + total @ self.from_sum[i], self.head_bias[i])
        place = shifted(head @ self.to_place[i], self.place_bias[i])
        scores = np.floor(place @ self.places[i] / ONE) + self.bias[i]
        below = np.minimum(scores.max(1, keepdims=True) - scores, NATS * ONE).astype(np.int64)
        shares = exponentials()[below]
        frequencies = 1 + shares * (TOTAL - shares.shape[1]) // shares.sum(1, keepdims=True)
        frequencies[np.arange(len(scores)), scores.argmax(1)] += TOTAL - frequencies.sum(1)
        return frequencies, frequencies.cumsum(1)

    def write(self, codes: np.ndarray) -> bytes:
        """Codes [n, T'] of the first n codebooks to bytes: of all segments but the last their length, then all of them."""
        segments = [self._write_segment(codes[:, first : first + SEGMENT_FRAMES])
                    for first in range(0, codes.shape[1], SEGMENT_FRAMES)]  # fmt: skip
        lengths = np.array([len(segment) for segment in segments[:-1]], "<u4")
        return lengths.tobytes() + b"".join(segments)

    def _write_segment(self, codes: np.ndarray) -> bytes:
        n, n_frames = codes.shape
        sums = sum(self.entries[i][codes[i]] for i in range(n))
        padded = np.concatenate([np.zeros((N_PAST, sums.shape[1])), sums])
        seen = self.seen(np.concatenate([padded[N_PAST - 1 - lag : len(padded) - 1 - lag] for lag in range(N_PAST)], 1))
        starts, own = np.empty((2, n_frames, n), np.int64)
        total, frames = np.zeros_like(sums), np.arange(n_frames)
        for i in range(n):
            frequencies, ends = self.frequencies(i, seen, total)
            own[:, i] = frequencies[frames, codes[i]]
            starts[:, i] = ends[frames, codes[i]] - own[:, i]
            total += self.entries[i][codes[i]]
        return write_symbols(starts.reshape(-1), own.reshape(-1))

    def read(self, data: bytes, n_codebooks: int, n_frames: int) -> np.ndarray:
        """Inverse of `write`, int64 [n_codebooks, n_frames]; all segments are read side by side.

        Raises:
            ValueError: these bytes are not so many codes.
        """
        n_segments = -(-n_frames // SEGMENT_FRAMES)
        if len(data) < 4 * (n_segments - 1):
            raise ValueError("the codes end too early")
        lengths = np.frombuffer(data, "<u4", n_segments - 1).astype(np.int64)
        bounds = 4 * len(lengths) + np.concatenate([[0], lengths.cumsum(), [0]])
        bounds[-1] = len(data)
        frames = np.full(n_segments, SEGMENT_FRAMES)
        frames[-1] = n_frames - (n_segments - 1) * SEGMENT_FRAMES
        if (8 * np.diff(bounds) < frames * n_codebooks * least_bits(self.codebook_size)).any():
            raise ValueError("a segment is shorter than its codes can be")
        readers = [SymbolReader(data[start:end]) for start, end in zip(bounds[:-1], bounds[1:])]
        groups = [self._read_segments(readers[i : i + AT_ONCE], n_codebooks, frames[i : i + AT_ONCE])
                  for i in range(0, n_segments, AT_ONCE)]  # fmt: skip
        return np.concatenate(groups, 1)

    def _read_segments(self, readers: list[SymbolReader], n_codebooks: int, frames: np.ndarray) -> np.ndarray:
        """Codes [n_codebooks, T'] of segments of so many frames each, of which none is longer than the one before."""
        codes = np.zeros((len(readers), n_codebooks, frames[0]), np.int64)
        past = np.zeros((len(readers), N_PAST, self.entries.shape[2]))
        for frame in range(frames[0]):
            m = int((frames > frame).sum())  # segments that have this frame
            seen, total = self.seen(past[:m].reshape(m, -1)), np.zeros((m, self.entries.shape[2]))
            for i in range(n_codebooks):
                frequencies, ends = self.frequencies(i, seen, total)
                for segment, reader in enumerate(readers[:m]):
                    code = ends[segment].searchsorted(reader.slot, "right")
                    frequency = int(frequencies[segment, code])
                    reader.take(int(ends[segment, code]) - frequency, frequency)
                    codes[segment, i, frame] = code
                total += self.entries[i][codes[:m, i, frame]]
            past[:m] = np.concatenate([total[:, None], past[:m, :-1]], 1)
        if not all(reader.at_end for reader in readers):
            raise ValueError("the codes do not end where their bytes do")
        return codes.swapaxes(0, 1).reshape(n_codebooks, -1)[:, : frames.sum()]


def shifted(x: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Products of numbers and weights back among numbers, biased and clipped."""
    return np.clip(np.floor(x / WEIGHT_ONE) + bias, -MOST, MOST)


def rectified(x: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return np.maximum(shifted(x, bias), 0)


@functools.cache
def exponentials() -> np.ndarray:
    """exp(-i / ONE) in units of 1 / TOTAL for i up to NATS x ONE, by decimal arithmetic, which no platform rounds otherwise."""
    context = Context(prec=20)
    values = (context.exp(context.divide(Decimal(-i), ONE)) for i in range(NATS * ONE + 1))
    return np.array([int(context.multiply(value, TOTAL)) for value in values], np.int64)


# ------------------------------------------------------------------------------ training


class Frames(NamedTuple):
    """Codes of many recordings, one after the other."""

    codes: Tensor  # [M, N]
    place: Tensor  # [M], of a frame in its recording


def fit(
    codec: Codec, utterances: list[Utterance], hours: float, n_steps: int
) -> tuple[IntegerPrior, dict[int, tuple[float, float]]]:
    """Train a prior on what `codec` makes of so many hours of utterances.

    Returns:
        The prior, and by numbers of codebooks that the codec was trained for the kbps of recordings that were kept back:
        packed, and coded by the prior (of the codes for all codebooks the first so many).
    Raises:
        ValueError: a quantizer whose entries do not add up or are too many, or too few recordings; one line.
    """
    config = codec.config.quantizer
    if config.type != "ema" or config.n_semantic:
        raise ValueError(f"quantizer.type={config.type}, n_semantic={getattr(config, 'n_semantic', 0)}: its entries do not "
                         "add up to a latent; expected ema, 0")  # fmt: skip
    if config.codebook_size > MOST_ENTRIES:
        raise ValueError(f"quantizer.codebook_size={config.codebook_size}: expected at most {MOST_ENTRIES}")
    if len(utterances) < 2:
        raise ValueError(f"{len(utterances)} recordings to learn from, expected 2 and more")
    coded, left = [], hours * 3600 * codec.sample_rate
    for utterance in random.Random(0).sample(utterances, len(utterances)):
        if left <= 0 and len(coded) > 1:
            break
        wav = load_audio(utterance.path, codec.sample_rate)[None].to(codec.quantizer.codebooks.device)
        coded.append(codec.encode_long(codec.gain(wav) * wav)[0].T.cpu())
        left -= wav.shape[-1]
    held_out, kept = coded[::HELD_OUT], [codes for index, codes in enumerate(coded) if index % HELD_OUT]
    frames = Frames(torch.cat(kept), torch.cat([torch.arange(len(codes)) for codes in kept]))
    codebooks, counts = codec.quantizer.codebooks.float().cpu(), trained_counts(codec.config)
    sums = sum(F.embedding(frames.codes[:, i], codebooks[i]) for i in range(len(codebooks)))
    torch.manual_seed(0)
    prior = CodePrior(codebooks, sums.std(0, correction=0).clamp(min=1e-6))
    train(prior, frames, counts, n_steps)
    integers = IntegerPrior(rounded(prior), codebooks.numpy(), codec.model_id)
    seconds, rates = sum(map(len, held_out)) / codec.frame_rate_hz, {}
    for n in counts:
        n_bytes = sum(len(integers.write(codes.T[:n].numpy())) for codes in held_out)
        rates[n] = (n * (config.codebook_size - 1).bit_length() * codec.frame_rate_hz / 1000, 8 * n_bytes / seconds / 1000)
    return integers, rates


def train(prior: CodePrior, frames: Frames, counts: list[int], n_steps: int) -> None:
    """Maximum likelihood by AdamW and a cosine; half of the batches have all codebooks, the others any of `counts`."""
    sums = {n: sum(prior.entries[i][frames.codes[:, i]] for i in range(n)) for n in counts}
    optimizer = torch.optim.AdamW(prior.parameters(), RATE, weight_decay=0.01)
    rng = random.Random(0)
    for step in range(n_steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / n_steps)))
        n = rng.choice([counts[-1], rng.choice(counts)])
        index = torch.randint(len(frames.codes), (BATCH_FRAMES,))
        past = [sums[n][(index - lag).clamp(min=0)] * (frames.place[index] >= lag)[:, None] for lag in range(1, N_PAST + 1)]
        loss = prior(frames.codes[index, :n], torch.cat(past, 1)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def rounded(prior: CodePrior) -> dict[str, np.ndarray]:
    """The tensors of an `IntegerPrior`."""
    layers = {f"{name}.{kind}": [getattr(layer, kind) for layer in getattr(prior, name)]
              for name in ("to_heads", "from_sum", "to_place") for kind in ("weight", "bias")}  # fmt: skip
    stacked = {name: torch.stack(parts) for name, parts in layers.items() if parts[0] is not None}
    weights = {"first.weight": prior.first.weight, "second.weight": prior.second.weight}
    weights |= {name.removesuffix(".weight"): value for name, value in stacked.items() if name.endswith(".weight")}
    numbers = {"bias": prior.bias, "first.bias": prior.first.bias, "second.bias": prior.second.bias}
    numbers |= {name: value for name, value in stacked.items() if name.endswith(".bias")}
    units = [(weights, WEIGHT_ONE), (numbers, ONE)]
    integers = {name: whole(value, one).clamp(-MOST, MOST).numpy().astype(np.int16) for group, one in units
                for name, value in group.items()}  # fmt: skip
    return {**integers, "spread": prior.spread, "scale": prior.scale}


# ------------------------------------------------------------------------------ beside the weights


def file_bytes(prior: IntegerPrior) -> bytes:
    """What FILE holds."""
    return safetensors.numpy.save(prior.tensors, {"model_id": prior.model_id})


def load(folder: Path, codec: Codec) -> IntegerPrior | None:
    """The prior in the folder of a codec; None if there is none.

    Raises:
        ValueError: it belongs to other codebooks, or is not a prior; one line.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    mend = "make it anew by `codec prior --replace`, or remove it"
    try:
        with safe_open(path, "np") as file:
            belongs_to = (file.metadata() or {}).get("model_id")
        tensors = safetensors.numpy.load_file(path)
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read ({str(error).splitlines()[0]}); {mend}") from None
    if belongs_to != codec.model_id:
        raise ValueError(f"{path}: knows codes of model {belongs_to}, this one is {codec.model_id}; {mend}")
    codebooks = codec.quantizer.codebooks.float().cpu().numpy()
    wrong = {name: value.dtype for name, value in tensors.items() if value.dtype != np.dtype(TYPES.get(name, "<i2"))}
    if wrong or {name: value.shape for name, value in tensors.items()} != shapes_of(*codebooks.shape):
        raise ValueError(f"{path}: not the tensors of a prior; {mend}")
    if not (np.isfinite(tensors["spread"]).all() and tensors["spread"].min() > 0 and tensors["scale"].min() > 0):
        raise ValueError(f"{path}: a spread or scale that is not above 0; {mend}")
    return IntegerPrior(tensors, codebooks, codec.model_id)


def shapes_of(n: int, k: int, d: int) -> dict[str, tuple[int, ...]]:
    """Of all tensors of a prior for n codebooks of k entries of d numbers."""
    return {"spread": (d,), "scale": (n,), "bias": (n, k),
            "first.weight": (DIM, N_PAST * d), "first.bias": (DIM,), "second.weight": (DIM, DIM), "second.bias": (DIM,),
            "to_heads": (n, HEAD_DIM, DIM), "to_heads.bias": (n, HEAD_DIM), "from_sum": (n, HEAD_DIM, d),
            "to_place": (n, d + 1, HEAD_DIM), "to_place.bias": (n, d + 1)}  # fmt: skip


def add_command(commands: argparse._SubParsersAction) -> None:
    """`codec prior`."""
    about = "Learn which codes are likely, so that the files of this codec get smaller; the audio stays the same, to the bit."
    command = commands.add_parser("prior", help=about, description=about)
    command.add_argument("checkpoint", help="a run, checkpoint or pretrained folder; the prior is written beside its weights, "
                         "and goes when a run deletes that checkpoint: best the folder that you keep")  # fmt: skip
    command.add_argument("manifest", type=Path, help="manifest.jsonl, whose training split is coded")
    command.add_argument("--hours", type=float, default=3.0, help="of its speech, drawn at random (default 3)")
    command.add_argument("--steps", type=int, default=4000, help="of training, after the coding (default 4000)")
    command.add_argument("--replace", action="store_true", help="a prior that is there; files coded by it are lost")
    command.add_argument("--device", default="cpu", help="where speech is coded: cpu (default), cuda, ...")
    command.add_argument("--which", choices=("latest", "best"), default="latest", help="checkpoint of a run")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Fit a prior and put it beside the weights."""
    folder = resolve(options.checkpoint, options.which)
    for name in ("hours", "steps"):
        if not 0 < getattr(options, name) < math.inf:
            raise ValueError(f"--{name} {getattr(options, name):g}: expected more than 0")
    if (folder / FILE).exists() and not options.replace:
        raise ValueError(f"{folder / FILE}: exists, and no other reads the files that it coded; --replace where there are none")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder}: cannot be written; give a copy of that folder")
    codec = Codec.from_pretrained(folder)
    try:
        codec.to(options.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {options.device}: {str(error).splitlines()[0]}; try cpu") from None
    prior, rates = fit(codec, read_manifest(options.manifest, "train", codec.sample_rate), options.hours, options.steps)
    for n, (packed, coded) in rates.items():
        print(f"{n} codebooks: {packed:.2f} kbps packed, {coded:.2f} coded, {100 * (1 - coded / packed):.0f} % less")
    write_atomically(folder / FILE, file_bytes(prior))
    print(f"{folder / FILE}: written; files of this codec are coded by it where that makes them smaller")
