"""The published recipes as configurations: sizes, rates, and weights translated from sums to means."""

import math
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from codec.config import Config, load_config
from codec.discriminator import Discriminators
from codec.losses import Balancer, discriminator_loss, feature_matching_loss, generator_adversarial_loss
from codec.model import Codec
from codec.rvq import build_quantizer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import recipes  # noqa: E402

DAC = ["dac_16khz", "dac_24khz", "dac_44khz"]
SMALL_SETS = ["discriminators.sets.0.channels=[4, 4, 4, 4, 4]", "discriminators.sets.1.channels=4"]


def recipe(name: str, overrides: list[str] | None = None) -> Config:
    return load_config(ROOT / "configs" / f"{name}.yaml", overrides)


def size(model: nn.Module) -> int:
    """Parameters, without the gains of weight norm, which released weights have in some models only."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.endswith("original0"))


# ------------------------------------------------------------------------- sizes, rates


HALF = {"downsampling_ratios": [2, 4, 5, 8]}  # DacConfig's default is the 44.1 kHz model's


@pytest.mark.parametrize(
    "name, kind, settings, millions, kbps",
    [
        ("dac_16khz", "Dac", {"sampling_rate": 16000, "n_codebooks": 12} | HALF, 74.14, [6]),
        ("dac_24khz", "Dac", {"sampling_rate": 24000, "n_codebooks": 32} | HALF, 74.65, [24]),
        ("dac_44khz", "Dac", {"sampling_rate": 44100, "n_codebooks": 9}, 76.62, [7.75]),
        ("encodec_24khz", "Encodec", {}, 14.85, [1.5, 3, 6, 12, 24]),
        ("mimi", "Mimi", {}, 79.31, [4.4]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_recipe_has_exactly_the_size_and_the_bitrates_of_the_published_model(name, kind, settings, millions, kbps):
    config = recipe(name).model
    with torch.device("meta"):
        ours = Codec(config)
        theirs = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**settings))
    assert round(sum(p.numel() for p in theirs.parameters()) / 1e6, 2) == millions
    assert size(ours) == size(theirs)
    suffixes = ("codebook.weight", "codebook.embed", "codebook.embed_sum")
    codebooks = [t.shape for key, t in theirs.state_dict().items() if key.endswith(suffixes)]
    assert codebooks == [ours.quantizer.codebooks.shape[1:]] * ours.n_codebooks
    assert ours.frame_rate_hz == pytest.approx(theirs.config.frame_rate, rel=0.01)  # 86.13, which DacConfig rounds up
    counts = getattr(config.quantizer, "dropout_counts", ()) or [ours.n_codebooks]
    assert [ours.bitrate_kbps * count / ours.n_codebooks for count in counts] == pytest.approx(kbps, rel=1e-3)


def test_the_benchmark_compares_recipes_of_one_size_and_one_bitrate():
    configs = {
        name: load_config(ROOT / "configs" / f"{config}.yaml", recipes.overrides(name, "none.jsonl", 1500))
        for name, (config, _) in recipes.RECIPES.items()
    }
    for name, config in configs.items():
        model, quantizer = config.model, config.model.quantizer
        bits = quantizer.n_codebooks * math.log2(quantizer.codebook_size)
        assert recipes.n_parameters(model) == pytest.approx(2.46e6, rel=0.05), name
        assert model.sample_rate / model.encoder.hop_length * bits == pytest.approx(3000, rel=0.02), name
        assert config.total_steps == pytest.approx(1562, abs=1), name
    assert configs["telugu"].phases[0].steps == 78  # a twentieth, as of its 400,000


# ----------------------------------------------------------------- DAC: sums, not means


def dac_logits_and_features(config: Config) -> tuple[tuple, tuple]:
    """Outputs of the recipe's discriminators, narrow, for a sound and another."""
    discriminators = Discriminators(config.discriminators)
    wav = 0.1 * torch.randn(2, 1, 4096)
    with torch.no_grad():
        return discriminators(wav), discriminators(wav + 0.05 * torch.randn_like(wav))


@pytest.mark.parametrize("name", DAC)
def test_dac_weighs_the_generators_adversarial_loss_as_published(name):
    config = recipe(name, SMALL_SETS)
    _, (logits_fake, _) = dac_logits_and_features(config)
    published = 1.0 * sum((1 - logit).square().mean() for logit in logits_fake)
    ours = generator_adversarial_loss(logits_fake, config.losses.adversarial)
    assert torch.isclose(config.loss_weights.adv * ours, published)
    assert not torch.isclose(1.0 * ours, published)  # the published weight on our mean


@pytest.mark.parametrize("name", DAC)
def test_dac_weighs_every_feature_map_as_published(name):
    config = recipe(name, SMALL_SETS)
    (_, real), (_, fake) = dac_logits_and_features(config)
    assert [len(layers) for layers in real] == [5] * 5 + [25] * 3
    published = 2.0 * sum((a - b).abs().mean() for layers in zip(real, fake) for a, b in zip(*layers))
    losses, weight = config.losses, config.loss_weights.feat
    assert torch.isclose(weight * feature_matching_loss(real, fake, losses.feat_relative, losses.feat_flat), published)
    assert not torch.isclose(weight * feature_matching_loss(real, fake), published)  # a mean over discriminators


@pytest.mark.parametrize("name", DAC)
def test_dac_weighs_commitment_and_codebook_losses_as_published(name):
    config = recipe(name, ["model.quantizer.codebook_size=16"])
    quantizer = build_quantizer(config.model.quantizer, latent_dim=32).eval()
    z, published = torch.randn(2, 32, 10), {"commit": 0.0, "codebook": 0.0}
    residual = z
    for level in quantizer.levels:  # a sum over codebooks of means over width and frames, then over the batch
        z_e = level.in_proj(residual)
        codes = level.lookup(z_e)
        distance = (z_e - level.codebook(codes).transpose(1, 2)).square().mean([1, 2]).mean()
        published["commit"] += 0.25 * distance.item()
        published["codebook"] += 1.0 * distance.item()
        residual = residual - level.decode(codes)
    out = quantizer(z)
    for term, value in published.items():
        assert getattr(config.loss_weights, term) * getattr(out, term).item() == pytest.approx(value, rel=1e-4)
    assert 0.25 * out.commit.item() != pytest.approx(published["commit"], rel=0.5)  # the published weight on our mean


@pytest.mark.parametrize("name", DAC)
def test_dac_clips_the_discriminators_where_it_was_clipped_on_a_sum(name):
    config = recipe(name, SMALL_SETS)
    (logits_real, _), _ = dac_logits_and_features(config)
    n = len(logits_real)

    def clipped(loss_scale: float, limit: float) -> Tensor:
        """The gradient that reaches AdamW, whose step does not depend on a common scale."""
        torch.manual_seed(0)
        logits = [torch.randn(8, requires_grad=True) for _ in range(n)]
        loss = discriminator_loss(logits, [3 * logit.detach() for logit in logits], "least_squares")
        (1e3 * loss_scale * loss).backward()
        clip_grad_norm_(logits, limit)
        return torch.cat([logit.grad for logit in logits])

    on_sum, ours = clipped(n, 10.0), clipped(1, config.optim.max_grad_norm_d)
    assert on_sum.norm() == pytest.approx(10.0, rel=1e-3)
    assert torch.allclose(on_sum, n * ours, rtol=1e-3)
    assert not torch.allclose(on_sum, n * clipped(1, 10.0), rtol=1e-3)  # the published limit on our mean


# -------------------------------------------------------------- EnCodec: gradient shares


def audiocraft_gradients(wav_hat: Tensor, z: Tensor, losses: dict, penalty, n_ranks: int) -> tuple[Tensor, Tensor]:
    """What each item's output and latent receive: balanced gradients of norm 1 an item, the penalty as it is, and both
    averaged over processes."""
    total = sum(weight for _, weight in losses.values())
    to_output, to_latent = torch.zeros_like(wav_hat), torch.zeros_like(z)
    for output, latent, out, lat in zip(*(x.chunk(n_ranks) for x in (wav_hat, z, to_output, to_latent))):
        output, latent = output.detach().requires_grad_(), latent.detach().requires_grad_()
        for loss, weight in losses.values():
            (gradient,) = torch.autograd.grad(loss(output), output)
            out += gradient / gradient.flatten(1).norm(dim=1).mean() * weight / total / n_ranks
        lat += torch.autograd.grad(penalty(latent), latent)[0] / n_ranks
    return to_output, to_latent


def test_encodec_weighs_commitment_against_balanced_gradients_as_eight_processes_do():
    config = recipe("encodec_24khz")
    weights, n_items = config.loss_weights, config.data.batch_size
    wav_hat = torch.sign(torch.randn(n_items, 1, 50)).requires_grad_()  # norms alike in every item, as their average on each
    z = torch.randn(n_items, 4, 5, requires_grad=True)
    losses = {"wave": (lambda x: x.abs().mean(), weights.wave), "msspec": (lambda x: 9 * x.square().mean(), weights.msspec)}

    def penalty(latent: Tensor) -> Tensor:
        return latent.square().mean()

    to_output, to_latent = audiocraft_gradients(wav_hat, z, losses, penalty, n_ranks=8)
    balanced = Balancer()({name: (loss(wav_hat), weight) for name, (loss, weight) in losses.items()}, wav_hat)
    (vq,) = torch.autograd.grad(weights.commit * penalty(z), z)
    scale = to_output.norm() / balanced.norm()  # common to all gradients: Adam does not see it
    assert torch.allclose(to_output, scale * balanced, rtol=1e-3)
    assert torch.allclose(to_latent, scale * vq, rtol=1e-3)
    assert not torch.allclose(to_latent, scale * vq / weights.commit, rtol=0.5)  # AudioCraft's 1 in our units
