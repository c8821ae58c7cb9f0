"""Time of one generator-and-discriminator update: this code base beside descript-audio-codec, on the CPU.

    python benchmarks/train_step.py [--batch_size 1] [--pairs 10] [--threads 2]

Both sides have DAC's published 24 kHz shape, discriminators, losses, clipping and AdamW, and get the same
0.38 s segments, in turn. Ours is `train_step` of train_codec_gan.py; theirs is the step of scripts/train.py at
DAC 1.0.0 without its two terms that are only logged. The ratio is the median of the ratios of neighbouring
updates, so that a slower moment of the machine strikes both sides. On a machine that others use, set
OMP_WAIT_POLICY=PASSIVE (threads that spin for a core that is taken cost more than the work) and read the
ratio of processor seconds as well.

DAC pins old packages; install it beside this code base without them, in an environment that has
requirements.txt (--no-deps keeps its pins out):

    pip install --no-deps descript-audio-codec==1.0.0 descript-audiotools==0.7.2 argbind docstring-parser \
        einops julius ffmpy flatten-dict importlib-resources markdown2 randomname pyloudnorm torch-stoi \
        librosa lazy_loader numba llvmlite soxr audioread pooch msgpack joblib cloudpickle narwhals \
        scikit-learn threadpoolctl decorator platformdirs ipython
"""

import argparse
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from codec.config import parse_config
from train_codec_gan import build, train_step

SAMPLE_RATE = 24000
SEGMENT_SAMPLES = 9120  # 0.38 s; both models pad it to 29 frames of 320
MEL_WINDOWS = [32, 64, 128, 256, 512, 1024, 2048]
MEL_BINS = [5, 10, 20, 40, 80, 160, 320]

DAC_24KHZ = f"""
name: dac_24khz
model:
  sample_rate: {SAMPLE_RATE}
  latent_dim: 1024
  encoder: {{type: conv, encoder_dim: 64, strides: [2, 4, 5, 8]}}
  quantizer: {{type: factorized, n_codebooks: 32, codebook_size: 1024, codebook_dim: 8, dropout: 0.5}}
  decoder: {{type: conv, decoder_dim: 1536, strides: [8, 5, 4, 2]}}
discriminators:
  sets: [{{type: mpd}}, {{type: mrd}}]
  normalize_input: true
losses: {{adversarial: least_squares, mel_windows: {MEL_WINDOWS}, mel_bins: {MEL_BINS}}}
loss_weights: {{adv: 1.0, feat: 2.0, mel: 15.0, commit: 0.25, codebook: 1.0}}
optim: {{lr_g: 1.0e-4, lr_d: 1.0e-4, betas: [0.8, 0.99], max_grad_norm_g: 1000.0, max_grad_norm_d: 10.0}}
data: {{manifest: none, segment_samples: 9280, batch_size: 8, segments_per_epoch: 8000}}
train: {{seed: 0}}
phases: [{{name: all, steps: 1000}}]
"""


Step = Callable[[Tensor], dict]
Parts = dict[str, tuple[object, str]]  # label to (owner, name) of a method


def our_step() -> tuple[Step, Parts]:
    """An update of this code base as a function of a batch, and the methods that its parts are."""
    config = parse_config(DAC_24KHZ, "benchmarks/train_step.py")
    training = build(config, torch.device("cpu"))
    parts = {
        "encoder, forward": (training.codec.encoder, "forward"),
        "quantizer, forward": (training.codec.quantizer, "forward"),
        "decoder, forward": (training.codec.decoder, "forward"),
        "discriminators, forward": (training.discriminators, "forward"),
        "mel loss, forward": (training.mel_loss, "forward"),
        "optimizer of the discriminators": (training.optimizer_d, "step"),
        "optimizer of the generator": (training.optimizer_g, "step"),
    }
    return lambda wav: train_step(wav, training, config, step=0), parts


def dac_step() -> tuple[Step, Parts]:
    """The same update with descript-audio-codec's own model, discriminator and losses."""
    import dac
    from audiotools import AudioSignal

    generator = dac.model.DAC(
        encoder_dim=64,
        encoder_rates=[2, 4, 5, 8],
        decoder_dim=1536,
        decoder_rates=[8, 5, 4, 2],
        n_codebooks=32,
        codebook_size=1024,
        codebook_dim=8,
        quantizer_dropout=0.5,
        sample_rate=SAMPLE_RATE,
    ).train()
    discriminator = dac.model.Discriminator(sample_rate=SAMPLE_RATE).train()
    n = len(MEL_WINDOWS)
    mel_loss = dac.nn.loss.MelSpectrogramLoss(
        n_mels=MEL_BINS,
        window_lengths=MEL_WINDOWS,
        mel_fmin=[0.0] * n,
        mel_fmax=[None] * n,
        pow=1.0,
        clamp_eps=1e-5,
        mag_weight=0.0,
    )
    gan_loss = dac.nn.loss.GANLoss(discriminator)
    optimizer_g = torch.optim.AdamW(generator.parameters(), lr=1e-4, betas=(0.8, 0.99))
    optimizer_d = torch.optim.AdamW(discriminator.parameters(), lr=1e-4, betas=(0.8, 0.99))

    def step(wav: Tensor) -> dict:
        signal = AudioSignal(wav, SAMPLE_RATE)
        out = generator(signal.audio_data, SAMPLE_RATE)
        recons = AudioSignal(out["audio"], SAMPLE_RATE)
        loss_d = gan_loss.discriminator_loss(recons, signal)
        optimizer_d.zero_grad()
        loss_d.backward()
        grad_norm_d = torch.nn.utils.clip_grad_norm_(discriminator.parameters(), 10.0)
        optimizer_d.step()
        mel = mel_loss(recons, signal)
        adv, feat = gan_loss.generator_loss(recons, signal)
        vq = 0.25 * out["vq/commitment_loss"] + out["vq/codebook_loss"]
        loss_g = 15 * mel + 2 * feat + adv + vq
        optimizer_g.zero_grad()
        loss_g.backward()
        grad_norm_g = torch.nn.utils.clip_grad_norm_(generator.parameters(), 1000.0)
        optimizer_g.step()
        return {"loss_d": loss_d, "loss_g": loss_g, "grad_norm_d": grad_norm_d, "grad_norm_g": grad_norm_g}

    parts = {
        "encoder, forward": (generator.encoder, "forward"),
        "quantizer, forward": (generator.quantizer, "forward"),
        "decoder, forward": (generator.decoder, "forward"),
        "discriminators, forward": (discriminator, "forward"),
        "mel loss, forward": (mel_loss, "forward"),
        "optimizer of the discriminators": (optimizer_d, "step"),
        "optimizer of the generator": (optimizer_g, "step"),
    }
    return step, parts


def seconds(step: Step, wav: Tensor) -> tuple[float, float]:
    """Wall-clock seconds of one update, and processor seconds of all threads."""
    start, start_cpu = time.perf_counter(), time.process_time()
    step(wav)
    return time.perf_counter() - start, time.process_time() - start_cpu


def time_parts(step: Step, parts: Parts, wav: Tensor) -> dict[str, float]:
    """Seconds of each part in one update; a part that runs twice is summed."""
    spent: dict[str, float] = defaultdict(float)
    plain_backward = torch.Tensor.backward
    backwards = iter(["backward of the discriminator step", "backward of the generator step"])

    def timed(function, label):
        def call(*args):
            start = time.perf_counter()
            result = function(*args)
            spent[label] += time.perf_counter() - start
            return result

        return call

    for label, (owner, name) in parts.items():
        setattr(owner, name, timed(getattr(owner, name), label))
    torch.Tensor.backward = lambda loss: timed(plain_backward, next(backwards))(loss)
    try:
        total, _ = seconds(step, wav)
    finally:
        torch.Tensor.backward = plain_backward
        for owner, name in parts.values():
            delattr(owner, name)  # uncovers the method of the class
    return spent | {"everything else": total - sum(spent.values()), "whole update": total}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    try:
        theirs, their_parts = dac_step()
    except ImportError as error:
        print(f"benchmarks/train_step.py: {error}; install descript-audio-codec as its docstring says", file=sys.stderr)
        return 2
    ours, our_parts = our_step()
    wav = 0.1 * torch.randn(args.batch_size, 1, SEGMENT_SAMPLES)
    for step in (theirs, ours, theirs, ours):  # DAC compiles Snake in its first updates
        step(wav)
    pairs = [(seconds(theirs, wav), seconds(ours, wav)) for _ in range(args.pairs)]
    print(f"batch {args.batch_size} x 0.38 s, {args.threads} threads, medians of {args.pairs} pairs")
    for i, kind in enumerate(["wall clock", "processor"]):
        their_s, our_s = [a[i] for a, _ in pairs], [b[i] for _, b in pairs]
        ratios = [b / a for a, b in zip(their_s, our_s)]
        print(f"{kind}: DAC {statistics.median(their_s):.2f} s, ours {statistics.median(our_s):.2f} s, "
              f"ratio {statistics.median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f})")  # fmt: skip
    print()
    print_breakdown([time_parts(theirs, their_parts, wav) for _ in range(3)],
                    [time_parts(ours, our_parts, wav) for _ in range(3)])  # fmt: skip
    return 0


def print_breakdown(theirs: list[dict[str, float]], ours: list[dict[str, float]]) -> None:
    """A Markdown table of the medians."""
    print("| part | DAC, s | ours, s |\n|---|---|---|")
    for label in theirs[0]:
        cells = [statistics.median(run[label] for run in runs) for runs in (theirs, ours)]
        print(f"| {label} | {cells[0]:.3f} | {cells[1]:.3f} |")


if __name__ == "__main__":
    sys.exit(main())
