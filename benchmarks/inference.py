"""Time to encode and decode 10 s of audio: ours beside transformers' DacModel, EncodecModel and MimiModel, on the CPU.

    python benchmarks/inference.py [--only Mimi] [--pairs 7] [--threads 2] [--compile]
    python benchmarks/inference.py --base    the package's own model beside transformers' EnCodec, both at 24 kHz and 6 kbps

Published sizes, all codebooks, the same random weights on both sides (through `codec convert`), the two sides in turn;
a ratio is the median of the ratios of neighbouring runs, so that a slower moment of the machine strikes both. Ours runs
as `Codec.from_pretrained` gives it. `--compile` adds our convolutions under torch.compile, which takes a minute or two
a model. On a machine that others use, set OMP_WAIT_POLICY=PASSIVE and read the ratio of processor seconds as well.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from equality import PUBLISHED, lively, make_random, n_codebooks_of, their_audio, their_codes
from torch import Tensor, nn

from codec.convert import convert
from codec.model import Codec

MODELS = ["DAC 24 kHz", "EnCodec 24 kHz", "Mimi"]


def both_sides(name: str, folder: str) -> tuple[nn.Module, Codec]:
    """Their model with random weights, and ours with the same."""
    family, build, _ = PUBLISHED[name]
    torch.manual_seed(0)
    theirs = make_random(build(), family)
    theirs.save_pretrained(f"{folder}/theirs")
    convert(f"{folder}/theirs", f"{folder}/ours")
    return theirs, Codec.from_pretrained(f"{folder}/ours")


def compiled(path: str) -> Codec:
    """Ours with its convolutions compiled."""
    codec = Codec.from_pretrained(path)
    codec.encoder.local = torch.compile(codec.encoder.local, dynamic=False)
    codec.decoder.layers = torch.compile(codec.decoder.layers, dynamic=False)
    return codec


def seconds(call: Callable[[], Tensor]) -> tuple[float, float]:
    """Wall-clock seconds, and processor seconds of all threads."""
    start, start_cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - start_cpu


def in_turn(calls: list[Callable[[], Tensor]], pairs: int) -> tuple[list[float], list[str]]:
    """Median wall-clock seconds of each call, and of all but the first its ratios to the first as text."""
    runs = [[seconds(call) for call in calls] for _ in range(pairs)]
    medians = [statistics.median(run[i][0] for run in runs) for i in range(len(calls))]
    cells = []
    for i in range(1, len(calls)):
        wall, cpu = ([run[i][kind] / run[0][kind] for run in runs] for kind in (0, 1))
        cells.append(f"**{statistics.median(wall):.2f}** ({min(wall):.2f} to {max(wall):.2f}), {statistics.median(cpu):.2f}")
    return medians, cells


@torch.inference_mode()
def compare(name: str, options: argparse.Namespace) -> None:
    """Two rows of the table."""
    family = PUBLISHED[name][0]
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = both_sides(name, folder)
        codecs = [ours, compiled(f"{folder}/ours")] if options.compile else [ours]
    wav, n = lively(1, 10 * ours.sample_rate, ours.sample_rate), n_codebooks_of(theirs)
    codes = their_codes(theirs, family, wav, n)
    wav_hat = their_audio(theirs, family, codes)
    unequal = sum((codec.encode(wav) != codes).sum().item() for codec in codecs)
    largest = max((codec.decode(codes)[..., : wav_hat.shape[-1]] - wav_hat).abs().max().item() for codec in codecs)
    directions = {
        "encode": ([lambda: their_codes(theirs, family, wav, n), *[lambda c=codec: c.encode(wav) for codec in codecs]],
                   f"{unequal} of {codes.numel()} codes unequal"),
        "decode": ([lambda: their_audio(theirs, family, codes), *[lambda c=codec: c.decode(codes) for codec in codecs]],
                   f"within {largest:.1e}"),
    }  # fmt: skip
    for direction, (calls, result) in directions.items():
        medians, cells = in_turn(calls, options.pairs)
        print(f"| {name} | {direction} | {medians[0]:.2f} | {medians[1]:.2f} | {' | '.join(cells)} | {result} |", flush=True)


@torch.inference_mode()
def compare_base(options: argparse.Namespace) -> None:
    """Encode and decode together, and each by itself."""
    family, build, _ = PUBLISHED["EnCodec 24 kHz"]
    torch.manual_seed(0)
    theirs, ours = make_random(build(), family), Codec.from_pretrained()
    wav = lively(1, 10 * ours.sample_rate, ours.sample_rate)

    def encode() -> Tensor:
        return their_codes(theirs, family, wav, 8)  # 6 kbps

    codes, own_codes = encode(), ours.encode(wav)
    directions = {
        "encode": (encode, lambda: ours.encode(wav)),
        "decode": (lambda: their_audio(theirs, family, codes), lambda: ours.decode(own_codes)),
        "both": (lambda: their_audio(theirs, family, encode()), lambda: ours.decode(ours.encode(wav))),
    }
    for direction, calls in directions.items():
        medians, cells = in_turn(list(calls), options.pairs)
        print(f"| base beside EnCodec 24 kHz | {direction} | {medians[0]:.3f} | {medians[1]:.3f} | {cells[0]} | "
              f"{medians[1] / 10:.4f} of real time |", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="time our convolutions under torch.compile as well")
    parser.add_argument("--base", action="store_true", help="the package's own model beside EnCodec, nothing else")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    modes = ["ratio, wall clock (range), processor", *["the same, compiled"] * options.compile]
    print(f"| model | direction | transformers, s | ours, s | {' | '.join(modes)} | result |")
    print("|---|---|---:|---:|" + "---|" * (len(modes) + 1))
    if options.base:
        return compare_base(options)
    for name in options.only:
        compare(name, options)


if __name__ == "__main__":
    main()
