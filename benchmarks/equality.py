"""Ours against transformers' DacModel, EncodecModel and MimiModel at their published sizes, through `codec convert`.

    python benchmarks/equality.py [--seconds 2] [--only Mimi]

Weights are random, codebooks spread as the latents are, so that no weights need to be fetched. Each model is written
by its own save_pretrained, converted, loaded, compared on a batch of no whole hops, alone, and at lower bitrates, and
converted back. tests/test_convert.py does the same at small sizes, with more cases.
"""

import argparse
import gc
import tempfile

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    DacConfig,
    DacFeatureExtractor,
    DacModel,
    EncodecConfig,
    EncodecModel,
    MimiConfig,
    MimiModel,
)

from codec.convert import convert
from codec.model import Codec

PUBLISHED = {  # name: family, what builds it, millions of parameters as published
    "DAC 16 kHz": ("dac", lambda: DacModel(DacConfig(sampling_rate=16000, downsampling_ratios=[2, 4, 5, 8], n_codebooks=12)),
                   74.1),
    "DAC 24 kHz": ("dac", lambda: DacModel(DacConfig(sampling_rate=24000, downsampling_ratios=[2, 4, 5, 8], n_codebooks=32)),
                   74.7),
    "DAC 44.1 kHz": ("dac", lambda: DacModel(DacConfig(sampling_rate=44100)), 76.6),
    "EnCodec 24 kHz": ("encodec", lambda: EncodecModel(EncodecConfig()), 14.85),
    "Mimi": ("mimi", lambda: MimiModel(MimiConfig()), 79.3),
}  # fmt: skip


# ------------------------------------------------------------------------- their side, one interface


def their_latents(model: nn.Module, family: str, wav: Tensor) -> Tensor:
    """[B, D, T'] before quantization."""
    encoded = model.encoder(their_padding(model, wav) if family == "dac" else wav)
    return encoded.latents if family == "mimi" else encoded


def their_codes(model: nn.Module, family: str, wav: Tensor, n_codebooks: int) -> Tensor:
    """[B, n, T']."""
    if family == "dac":
        return model.encode(their_padding(model, wav), n_quantizers=n_codebooks).audio_codes
    if family == "encodec":
        bits_per_s = model.config.frame_rate * model.config.codebook_nbits
        kbps = next(kbps for kbps in model.config.target_bandwidths if 1000 * kbps // bits_per_s == n_codebooks)
        return model.encode(wav, bandwidth=kbps).audio_codes[0]
    return model.encode(wav, num_quantizers=n_codebooks).audio_codes


def their_audio(model: nn.Module, family: str, codes: Tensor) -> Tensor:
    """[B, 1, samples]; DacModel gives a few less than whole hops at odd strides."""
    if family == "encodec":
        return model.decode(codes[None], [None]).audio_values
    wav_hat = model.decode(audio_codes=codes).audio_values
    return wav_hat[:, None] if family == "dac" else wav_hat


def their_padding(model: nn.Module, wav: Tensor) -> Tensor:
    """What DacModel's feature extractor makes of wav."""
    extractor = DacFeatureExtractor(sampling_rate=model.config.sampling_rate, hop_length=model.config.hop_length)
    items = [item.numpy() for item in wav[:, 0]]
    return extractor(items, sampling_rate=model.config.sampling_rate, return_tensors="pt")["input_values"]


def their_quantizers(model: nn.Module, family: str) -> list[nn.Module]:
    """Those with Euclidean codebooks in buffers."""
    if family == "mimi":
        return [model.quantizer.semantic_residual_vector_quantizer, model.quantizer.acoustic_residual_vector_quantizer]
    return [model.quantizer] if family == "encodec" else []


# ------------------------------------------------------------------------- random, but alive


def lively(batch_size: int, n_samples: int, sample_rate: int) -> Tensor:
    """Tones with a moving pitch in noise of a changing level, [B, 1, T]: latents that differ from frame to frame."""
    t = torch.arange(n_samples) / sample_rate
    items = []
    for seed in range(batch_size):
        phase = 2 * torch.pi * (110 + 40 * seed) * (t + 0.1 * (3 * t).sin())
        noise = torch.randn(n_samples, generator=torch.Generator().manual_seed(seed))
        items.append(0.1 * sum((k * phase).sin() / k for k in range(1, 8)) + 0.3 * (30 * t).sin().square() * noise)
    return torch.stack(items)[:, None]


@torch.no_grad()
def make_random(model: nn.Module, family: str) -> nn.Module:
    """Every tensor random, latents of about 1, codebooks spread as the latents are."""
    for name, p in model.named_parameters():
        if name.endswith("original0") or "scale" in name or "alpha" in name or "norm.weight" in name:
            p.copy_(0.5 + torch.rand_like(p))
        elif "transformer" in name and p.ndim == 2:
            p.normal_(0, 0.3 * p.shape[1] ** -0.5)
        elif p.ndim == 3:
            p.normal_(0, (p.shape[1] * p.shape[2]) ** -0.5)
        elif "codebook" in name:
            p.normal_()
        elif p.ndim == 1:
            p.normal_(0, 0.05)
    wav, n_codebooks = lively(4, model.config.sampling_rate, model.config.sampling_rate), n_codebooks_of(model)
    encoder_end, decoder_end = ends(model, family)
    set_level(encoder_end, their_latents(model, family, wav).std())
    z = their_latents(model, family, wav)
    for vq in their_quantizers(model, family):
        project = getattr(vq, "input_proj", None) or nn.Identity()
        frames = project(z).transpose(1, 2).flatten(0, 1)
        for depth, layer in enumerate(vq.layers):
            noise = frames.std(0) * torch.randn(vq.layers[0].codebook.codebook_size, frames.shape[1])
            picked = frames[torch.randint(len(frames), (len(noise),))]
            fill(layer.codebook, 0.8**depth * noise if depth else picked + 0.2 * noise)
    if family == "dac":  # whose tanh shows little but signs of what is large
        model.decoder.tanh = nn.Identity()
    set_level(decoder_end, 5 * their_audio(model, family, their_codes(model, family, wav, n_codebooks)).std())
    if family == "dac":
        model.decoder.tanh = nn.Tanh()
    return model.eval()


def n_codebooks_of(model: nn.Module) -> int:
    return getattr(model.config, "n_codebooks", None) or model.config.num_quantizers


def ends(model: nn.Module, family: str) -> tuple[nn.Module, nn.Module]:
    """The convolutions that give latents and samples."""
    if family == "dac":
        return model.encoder.conv2, model.decoder.conv2
    if family == "encodec":
        return model.encoder.layers[-1].conv, model.decoder.layers[-1].conv
    return model.encoder.downsample.conv, model.decoder.decoder_seanet.layers[-1].conv


def set_level(conv: nn.Module, level: Tensor) -> None:
    """Divide the output of a convolution, whose weight may be normalised, by its level."""
    for name, p in conv.named_parameters():
        p.div_(1 if name.endswith("original1") else level)


def fill(codebook: nn.Module, entries: Tensor) -> None:
    """Give a codebook of theirs entries, and statistics that are not those of a fresh one."""
    if hasattr(codebook, "embed_avg"):
        codebook.cluster_size.uniform_(0, 5)
        codebook.embed.copy_(entries)
        codebook.embed_avg.copy_(1.01 * entries * codebook.cluster_size[:, None])
    else:
        codebook.cluster_usage.uniform_(0, 5)
        codebook.cluster_usage[0] = 0.0  # their floor of 1e-5
        codebook.embed_sum.copy_(entries * codebook.cluster_usage.clamp(min=1e-5)[:, None])
        codebook._embed = None


# ------------------------------------------------------------------------- the comparison


@torch.no_grad()
def compare(name: str, seconds: float) -> str:
    """One row of the table."""
    family, build, millions = PUBLISHED[name]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        theirs = make_random(build(), family)
        theirs.save_pretrained(f"{folder}/theirs")
        convert(f"{folder}/theirs", f"{folder}/ours")
        convert(f"{folder}/ours", f"{folder}/back", to="transformers")
        rate, n = theirs.config.sampling_rate, n_codebooks_of(theirs)
        fewer = [k for k in (1, 2, 4, 8, 16) if k < n and (k > 1 or family != "encodec")]
        # a batch of no whole hops; one item of whole hops; a short one at lower bitrates
        shapes = [(2, int(seconds * rate) + 1), (1, 1920 * 20), *[(1, rate // 2)] * len(fewer)]
        wavs = [lively(*shape, rate) for shape in shapes]
        cases = list(zip(wavs, [n, n, *fewer]))
        latents = [their_latents(theirs, family, wav) for wav in wavs]
        codes = [their_codes(theirs, family, wav, k) for wav, k in cases]
        sounds, n_theirs = [their_audio(theirs, family, c) for c in codes], sum(weights(theirs))
        del theirs
        gc.collect()
        ours = Codec.from_pretrained(f"{folder}/ours")
        unequal = sum((ours.encode(wav, k) != c).sum().item() for (wav, k), c in zip(cases, codes))
        of_latents = max(relative(ours.encoder(ours._pad(wav)), z) for wav, z in zip(wavs, latents))
        of_audio = max(difference(ours.decode(c), wav_hat) for c, wav_hat in zip(codes, sounds))
        n_ours = sum(p.numel() for p in ours.parameters())
        del ours
        gc.collect()
        back = AutoModel.from_pretrained(f"{folder}/back").eval()
        of_back = difference(their_audio(back, family, their_codes(back, family, wavs[0], n)), sounds[0])
    total = sum(c.numel() for c in codes)
    return (f"| {name} | {of_latents:.1e} | {unequal} of {total} | {of_audio:.1e} | {of_back:.1e} | "
            f"{n_ours:,} | {n_theirs:,} | {millions}M |")  # fmt: skip


def difference(wav_hat: Tensor, reference: Tensor) -> float:
    """Largest one between samples, over the reference's length."""
    return (wav_hat[..., : reference.shape[-1]] - reference).abs().max().item()


def relative(z: Tensor, reference: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    return ((z - reference).abs().max() / reference.abs().max()).item()


def weights(model: nn.Module) -> list[int]:
    """Sizes of the parameters, the gains of weight norm left out."""
    return [p.numel() for name, p in model.named_parameters() if not name.endswith("original0")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="of audio")
    parser.add_argument("--only", nargs="+", choices=list(PUBLISHED), default=list(PUBLISHED))
    options = parser.parse_args()
    print("| model | latents, relative | codes unequal | audio | audio, way back | parameters ours | theirs | published |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.only:
        print(compare(name, options.seconds), flush=True)


if __name__ == "__main__":
    main()
