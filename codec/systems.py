"""What an evaluation compares: a checkpoint at each of its bitrates, transformers' codecs, classical codecs, the audio itself.

A system is a description that travels to worker processes; `code_clip` opens its model there once and codes one recording.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from codec import classical, prior
from codec.audio import resample_array
from codec.bitstream import CodecFileHeader, write_codes
from codec.checkpoint import load_state
from codec.config import halvings, to_dict, trained_counts
from codec.model import Codec
from codec.pretrained import public_name, read_model, resolve

OUR_CODE = ("model", "encoder", "decoder", "lapped", "layers", "rvq", "spectral", "metrics", "prior", "rans",
            "bitstream")  # modules that code and decode  # fmt: skip


class System(NamedTuple):
    name: str  # "quickstart@6.00", "opus@12", "uncoded": what tables call it
    family: str  # "quickstart", "opus": systems of one curve
    kind: str  # "ours", "run", "hf", "classical", "uncoded"
    source: str  # checkpoint folder or hub id; "" for the others
    n_codebooks: int  # 0 where it has none
    nominal_kbps: float  # as the codec says it, without what its file needs besides
    setting: str  # the same for readers: "6 of 12 codebooks"
    fingerprint: str  # of weights, config and our code: what others gave is not used again

    @property
    def key(self) -> str:
        """Names what is cached of it."""
        return f"{self.name}-{self.fingerprint or 'x'}"


class Coded(NamedTuple):
    wav: np.ndarray  # float32 [T'], with the codec's delay
    sample_rate: int
    n_bytes: int  # of the file that a user would keep
    n_payload_bytes: int  # of the coded frames alone
    codes: np.ndarray | None  # [n, T']


UNCODED = System("uncoded", "uncoded", "uncoded", "", 0, 0.0, "the audio itself", "")


# ------------------------------------------------------------------------------ neural codecs


class NeuralCodec(NamedTuple):
    """Our codecs and those of transformers behind the same two functions."""

    sample_rate: int
    hop_length: int
    codebook_size: int
    counts: list[int]  # numbers of codebooks it was trained for, ascending
    weights_id: str
    n_parameters: int
    encode: Callable[[Tensor, int], Tensor]  # wav [1, 1, T], n -> codes [1, n, T']
    decode: Callable[[Tensor], Tensor]  # codes [1, n, T'] -> wav_hat [1, 1, T' x hop]
    gain: Callable[[Tensor], Tensor]  # wav [1, 1, T] -> [1, 1, 1], by which it is multiplied before
    prior: prior.IntegerPrior | None = None  # what its files are entropy coded by

    @property
    def frame_rate_hz(self) -> float:
        return self.sample_rate / self.hop_length

    def kbps(self, n_codebooks: int) -> float:
        return self.frame_rate_hz * n_codebooks * math.log2(self.codebook_size) / 1000


@functools.lru_cache(maxsize=4)
def open_neural(kind: str, source: str) -> NeuralCodec:
    """The model of a system, for inference on the CPU.

    Args:
        kind: "hf" for transformers' EncodecModel, DacModel or MimiModel; else ours.
        source: as `Codec.from_pretrained` or `AutoModel.from_pretrained` take it.
    Raises:
        ValueError: no such model there; one line.
    """
    return _open_transformers(source) if kind == "hf" else _open_ours(source)


def _open_ours(source: str) -> NeuralCodec:
    codec = Codec.from_pretrained(source)
    known = prior.load(resolve(source), codec)
    return NeuralCodec(
        codec.sample_rate, codec.hop_length, codec.codebook_size, trained_counts(codec.config),
        _fingerprint(codec, {**to_dict(codec.config), "prior": known and known.id}), sum(p.numel() for p in codec.parameters()),
        codec.encode_long, codec.decode_long, codec.gain, known,
    )  # fmt: skip


def _open_transformers(source: str) -> NeuralCodec:
    from transformers import AutoModel  # takes seconds

    try:
        model = AutoModel.from_pretrained(source).eval().requires_grad_(False)
    except Exception as error:  # what a hub or a folder can raise is not ours to list
        raise ValueError(f"hf:{source}: cannot be loaded by transformers: {str(error).splitlines()[0]}") from error
    config, family = model.config, model.config.model_type
    if family not in ("encodec", "dac", "mimi"):
        raise ValueError(f"hf:{source}: a model of type {family}, expected encodec, dac or mimi")
    if getattr(config, "audio_channels", 1) != 1:
        raise ValueError(f"hf:{source}: codes {config.audio_channels} channels, expected mono")
    hop = config.hop_length if family != "mimi" else round(config.sampling_rate / config.frame_rate)
    size = config.codebook_size
    if family == "encodec":
        per_codebook = config.sampling_rate / hop * math.log2(size) / 1000
        bandwidths = {round(kbps / per_codebook): kbps for kbps in config.target_bandwidths}
        counts = sorted(bandwidths)
    else:
        whole, least = (config.n_codebooks, 1) if family == "dac" else (config.num_quantizers, config.num_semantic_quantizers)
        counts = [n for n in halvings(whole) if n >= least]

    @torch.no_grad()
    def encode(wav: Tensor, n_codebooks: int) -> Tensor:
        if family == "encodec":
            return model.encode(wav, bandwidth=bandwidths[n_codebooks]).audio_codes[0]
        if family == "mimi":
            return model.encode(wav, num_quantizers=n_codebooks).audio_codes
        padded = torch.nn.functional.pad(wav, (0, -wav.shape[-1] % hop))  # as DacFeatureExtractor does
        return model.encode(padded, n_quantizers=n_codebooks).audio_codes

    @torch.no_grad()
    def decode(codes: Tensor) -> Tensor:
        if family == "encodec":
            return model.decode(codes[None], [None]).audio_values
        wav_hat = model.decode(audio_codes=codes).audio_values
        return wav_hat[:, None] if wav_hat.ndim == 2 else wav_hat

    n_parameters = sum(p.numel() for p in model.parameters())
    return NeuralCodec(config.sampling_rate, hop, size, counts, _fingerprint(model, {}), n_parameters, encode, decode,
                       lambda wav: wav.new_ones(1, 1, 1))  # fmt: skip


def _fingerprint(model: torch.nn.Module, config: dict) -> str:
    """16 hex digits of a model's tensors, of its config, which has what no tensor tells (beam, level), and of what codes."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in OUR_CODE if config else ():
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------- who takes part


def neural_systems(kind: str, source: str, counts: Iterable[float] = ()) -> list[System]:
    """A model at each bitrate, lowest first.

    Args:
        kind: "ours", "run" or "hf".
        source: run, checkpoint, pretrained folder or hub id.
        counts: numbers of codebooks; default: those the model was trained for.
    Raises:
        ValueError: as `open_neural`, or a number that the model does not have.
    """
    model, family = open_neural(kind, source), public_name(source)
    most = model.counts[-1]
    chosen = sorted(set(counts)) or model.counts
    wrong = [n for n in chosen if not 1 <= n <= most or n != int(n)]
    if wrong or kind == "hf" and not set(chosen) <= set(model.counts):
        there = model.counts if kind == "hf" else f"1 to {most}"
        raise ValueError(f"{source}: codebooks {', '.join(f'{n:g}' for n in chosen)}, expected some of {there}")
    return [System(f"{family}@{model.kbps(n):.2f}", family, kind, source, n, model.kbps(n), f"{n} of {most} codebooks",
                   model.weights_id) for n in map(int, chosen)]  # fmt: skip


def classical_systems(codec: str, kbps: Iterable[float] = (), around: Iterable[float] = ()) -> list[System]:
    """A classical codec at some bitrates.

    Args:
        codec: "opus", "codec2" or "speex".
        kbps: the bitrates; default: those near `around`, as `codec.classical.rates` chooses.
    Raises:
        ValueError: an unknown codec, or its program is not there.
    """
    missing = classical.missing(codec)
    if missing:
        raise ValueError(f"--against {codec}: {missing}")
    chosen, there = sorted(kbps) or classical.rates(codec, list(around)), classical.CODECS[codec].kbps
    wrong = [rate for rate in chosen if rate not in there]
    if wrong:
        nearest = min(there, key=lambda rate: abs(rate - wrong[0]))
        raise ValueError(f"--against {codec}@{wrong[0]:g}: not one of its bitrates; the nearest is {nearest:g}")
    version = classical.fingerprint(codec)
    return [System(f"{codec}@{rate:g}", codec, "classical", "", 0, rate, f"{rate:g} kbps", version) for rate in chosen]


def parse_against(text: str, around: list[float]) -> list[System]:
    """`opus,codec2@3.2+1.2,runs/other,hf:facebook/encodec_24khz@8` to systems.

    Numbers after @ are bitrates in kbps of a classical codec, numbers of codebooks of a neural one.

    Raises:
        ValueError: a name that is neither a classical codec nor a model, or what the two functions above raise.
    """
    systems: list[System] = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, numbers = item.partition("@")
        try:
            values = [float(number) for number in numbers.split("+") if number]
        except ValueError:
            raise ValueError(f"--against {item}: {numbers!r} after @, expected numbers such as 6+12") from None
        if name in classical.CODECS:
            systems += classical_systems(name, values, around)
        elif name.startswith("hf:"):
            systems += neural_systems("hf", name.removeprefix("hf:"), values)
        else:
            systems += neural_systems("run", name, values)
    return systems


def distinct(systems: list[System]) -> list[System]:
    """The same systems, names made distinct where two runs share theirs.

    Raises:
        ValueError: one system twice.
    """
    families: dict[tuple[str, str], str] = {}
    for system in systems:
        taken = [name for key, name in families.items() if key != (system.family, system.source)]
        name, number = system.family, 2
        while name in taken:
            name, number = f"{system.family}-{number}", number + 1
        families.setdefault((system.family, system.source), name)
    renamed = []
    for system in systems:
        family = families[system.family, system.source]
        renamed.append(system._replace(family=family, name=family + system.name.removeprefix(system.family)))
    names = [system.name for system in renamed]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"--against: {', '.join(twice)} given twice; name each once")
    return renamed


# ------------------------------------------------------------------------------------- coding


def code_clip(systems: list[System], wav: np.ndarray, sample_rate: int) -> dict[str, Coded]:
    """One recording through systems of one family.

    Args:
        systems: of one source; neural ones are encoded once, and the first codes of that decoded for each bitrate.
        wav: float32 [T].
        sample_rate: Hz of wav; models and programs get it at their own.
    Returns:
        by system's name; not aligned and not of length T yet.
    Raises:
        ValueError: a program failed, or the model gave something that is not finite.
    """
    first = systems[0]
    if first.kind == "uncoded":
        return {first.name: Coded(wav, sample_rate, 2 * len(wav), 2 * len(wav), None)}
    if first.kind == "classical":
        results = {system.name: classical.code(system.family, system.nominal_kbps, wav, sample_rate) for system in systems}
        return {name: Coded(result.wav, result.sample_rate, result.n_bytes, result.n_payload_bytes, None)
                for name, result in results.items()}  # fmt: skip
    model = open_neural(first.kind, first.source)
    samples = resample_array(wav, sample_rate, model.sample_rate) if sample_rate != model.sample_rate else wav
    most = max(system.n_codebooks for system in systems)
    x = torch.from_numpy(np.ascontiguousarray(samples, np.float32))[None, None]
    gain = model.gain(x)
    codes = model.encode(gain * x, most)
    return {system.name: _decode(model, codes[:, : system.n_codebooks], len(samples), gain.item(), system.name)
            for system in systems}  # fmt: skip


def _decode(model: NeuralCodec, codes: Tensor, n_samples: int, gain: float, name: str) -> Coded:
    """One bitrate: audio, and the size of the codec file that holds these codes."""
    wav_hat = model.decode(codes)[0, 0, :n_samples].float().numpy() / np.float32(gain)
    if not np.isfinite(wav_hat).all():
        raise ValueError(f"{name}: the decoder gave NaN or infinity")
    header = CodecFileHeader(
        sample_rate=model.sample_rate, hop_length=model.hop_length, n_samples=min(n_samples, codes.shape[2] * model.hop_length),
        n_codebooks=codes.shape[1], codebook_size=model.codebook_size, n_frames=codes.shape[2], model_id=model.weights_id,
        gain=round(gain, 4),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.codec")
        header = write_codes(path, codes[0], header, model.prior)
        return Coded(wav_hat, model.sample_rate, path.stat().st_size, header.payload_bytes, codes[0].numpy())


def measure_speed(system: System, wav: np.ndarray, sample_rate: int, n_threads: int) -> dict[str, float]:
    """Real-time factors of coding and decoding one recording; call it in a fresh process for an honest peak of memory.

    Returns:
        "encode_rtf", "decode_rtf": seconds of work per second of audio, the better of two runs after a first one.
        "peak_mb": largest resident memory of this process, Python and torch included; of a program its own.
    """
    seconds = len(wav) / sample_rate
    if system.kind == "classical":
        result = classical.code(system.family, system.nominal_kbps, wav, sample_rate)
        return {"encode_rtf": result.encode_s / seconds, "decode_rtf": result.decode_s / seconds, "peak_mb": result.peak_mb}
    import resource

    torch.set_num_threads(n_threads)
    model = open_neural(system.kind, system.source)
    samples = resample_array(wav, sample_rate, model.sample_rate) if sample_rate != model.sample_rate else wav
    x = torch.from_numpy(np.ascontiguousarray(samples, np.float32))[None, None]
    codes = model.encode(x, system.n_codebooks)
    encode_s = min(_seconds(lambda: model.encode(x, system.n_codebooks)) for _ in range(2))
    model.decode(codes)
    decode_s = min(_seconds(lambda: model.decode(codes)) for _ in range(2))
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return {"encode_rtf": encode_s / seconds, "decode_rtf": decode_s / seconds, "peak_mb": peak_mb}


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def describe(source: str) -> dict:
    """What results.json tells about the checkpoint under test."""
    folder = resolve(source)
    model, most = open_neural("ours", source), read_model(folder).quantizer.n_codebooks
    steps = load_state(folder).get("step") if (folder / "state.json").is_file() else None
    return {"checkpoint": str(folder), "parameters": model.n_parameters, "sample_rate": model.sample_rate, "steps": steps,
            "frame_rate_hz": model.frame_rate_hz, "n_codebooks": most, "codebook_size": model.codebook_size,
            "kbps": model.kbps(most)}  # fmt: skip
