"""Train a neural speech codec: read this file top to bottom.

    python train_codec_gan.py --config configs/quickstart.yaml
    torchrun --nproc_per_node=8 train_codec_gan.py --config configs/telugu.yaml --resume

A run lives in runs/NAME: config.yaml, metrics.jsonl, tensorboard/, checkpoints/. "Steps" are generator updates, and
where `train.init_from` has the discriminators warm up first, theirs until then.
"""

import argparse
import math
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, parametrize
from torch.utils.data import default_collate
from tqdm import tqdm

from codec import distributed, metrics, preflight
from codec.checkpoint import (
    discriminators_learned,
    find_checkpoint,
    grow,
    inference_tensors,
    load_into,
    load_state,
    load_tensors,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from codec.config import (
    TEACHERS,
    Config,
    EMAQuantizerConfig,
    FactorizedQuantizerConfig,
    OptimConfig,
    can_grow,
    disc_warmup,
    dump_config,
    grown,
    has_term,
    load_config,
    model_differences,
    parse_config,
    phase_at,
    phase_config,
    refuse_other_model,
    to_dict,
)
from codec.data import SegmentDataset, StepSampler, read_manifest, segment_loader
from codec.discriminator import Discriminators
from codec.distill import DistilledSegments, Heads, Teachers, codebook_gradients, masked_mean, open_teachers
from codec.doctor import to_markdown
from codec.features import Targets
from codec.files import write_atomically
from codec.health import Diagnosis, History, diagnose
from codec.lapped import start_transform
from codec.layers import Transformer
from codec.losses import (
    Balancer,
    BandLevelLoss,
    CompressedSpectralLoss,
    MelLoss,
    MultiScaleSpectralLoss,
    discriminator_loss,
    feature_matching_loss,
    generator_adversarial_loss,
    scale_loss,
    waveform_loss,
)
from codec.model import Codec, CodecOutput
from codec.preflight import Check
from codec.pretrained import read_model, resolve
from codec.runlog import EpochMeans, RunLog, read_metrics
from codec.watch import NEUTRAL, OF_INTERVALS, CodebookWatch, gradient_figures, mel_off, over_interval, sound_figures
from codec.whisper import WhisperLoss

# Keys of train without a say in a resumed run; a warm-up can end early.
ONLY_AT_START = ("init_from", "refit_frames", "disc_warmup_steps")
PROJECTIONS = ("project_in", "project_out", "own_inputs", "in_proj", "out_proj", "path")  # of a quantizer
TRANSFORM_FRAMES = 20_000  # that a lapped body starts from
BRIEF_S, PREFLIGHT_S = 30.0, 600.0  # seconds of audio that are looked at before a run, and by --preflight
EXAMINED_BYTES = 8_000_000  # of the end of metrics.jsonl, some thousand lines, that the doctor reads at a validation
VAL_SEED = 12345  # validation segments are the same in every run on the same data


@dataclass
class Training:
    """Everything an update changes. The two networks are wrapped in DDP where there are several processes."""

    codec: nn.Module
    discriminators: nn.Module
    heads: nn.Module  # read the teachers of a distillation from the first codebooks
    optimizer_g: torch.optim.Optimizer
    optimizer_d: torch.optim.Optimizer
    mel_loss: MelLoss
    msspec_loss: MultiScaleSpectralLoss
    cspec_loss: CompressedSpectralLoss
    bands_loss: BandLevelLoss
    whisper_loss: WhisperLoss | None
    balancer: Balancer | None
    averages: dict[str, Tensor]  # of the codec's parameters and codebooks, by name; empty without optim.ema_decay


# ------------------------------------------------------------------------- one update


def train_step(
    wav: Tensor, t: Training, config: Config, step: int, warming: bool = False, targets: dict[str, Targets] | None = None,
    watch: CodebookWatch | None = None,
) -> dict[str, Tensor]:
    """One discriminator update, then one generator update, on the same forward of the codec.

    Args:
        wav: [B, 1, T] on the codec's device.
        config: as the current phase resolves it.
        step: number of this update; seeds what is random in it.
        warming: update the discriminators alone; nothing of the codec changes.
        targets: what the teachers of a distillation say of this batch, by name.
        watch: given at the updates whose gradients and codebooks the doctor wants to see.
    Returns:
        Unweighted terms, totals and gradient norms by name, detached. `skipped_g` or `skipped_d` is 1 where a
        non-finite loss or gradient made that update be left out.
    """
    weights, optim, kind = config.loss_weights, config.optim, config.losses.adversarial
    precision = torch.autocast(wav.device.type, torch.bfloat16, enabled=config.train.precision == "bf16")
    torch.manual_seed(hash((config.train.seed, step, distributed.rank())))
    set_learning_rates(t, optim, step, config.total_steps)
    with precision, torch.set_grad_enabled(not warming):
        out = t.codec(wav)  # the only forward of the codec: codebook statistics see each batch once
    log = sound_figures(wav, out.wav_hat)

    # Discriminator: real against detached fake, in one pass.
    if weights.adversarial:
        t.discriminators.requires_grad_(True)
        with precision:
            logits, _ = t.discriminators(torch.cat([wav, out.wav_hat.detach()]))
        logits_real, logits_fake = zip(*(x.chunk(2) for x in logits))
        loss_d = discriminator_loss(logits_real, logits_fake, kind)
        log["logit_real"], log["logit_fake"] = (torch.stack([x.detach().float().mean() for x in side]).mean()
                                                for side in (logits_real, logits_fake))  # fmt: skip
        log["acc_real"], log["acc_fake"] = metrics.discriminator_accuracy(logits_real, logits_fake, kind)
        t.optimizer_d.zero_grad()
        loss_d.backward()
        log["loss_d"] = loss_d.detach()
        log["grad_norm_d"] = clip_grad_norm_(t.discriminators.parameters(), optim.max_grad_norm_d)
        log["skipped_d"] = non_finite_anywhere(loss_d, log["grad_norm_d"])
        if not log["skipped_d"]:
            t.optimizer_d.step()
    if warming:
        return log

    # Generator: the updated discriminators are frozen, and real features need no graph.
    terms = reconstruction_terms(wav, out.wav_hat, t, config)
    if weights.adversarial:
        t.discriminators.requires_grad_(False)
        with precision, parametrize.cached():  # frozen weights are normalised once for both passes
            with torch.no_grad():
                _, features_real = unwrap(t.discriminators)(wav)
            logits_fake, features_fake = unwrap(t.discriminators)(out.wav_hat)
        terms["adv"] = generator_adversarial_loss(logits_fake, kind)
        losses = config.losses
        terms["feat"] = feature_matching_loss(features_real, features_fake, losses.feat_relative, losses.feat_flat)
    aside = weights.commit * out.quantized.commit + weights.codebook * out.quantized.codebook
    if targets:
        taught = {name: getattr(weights, name) * loss for name, loss in distillation_terms(out, targets, t, log).items()}
        aside = aside + sum(taught.values())
    signal = {name: getattr(weights, name) * term for name, term in terms.items()}
    loss_g = sum(signal.values()) + aside
    if t.balancer:  # the gradient at the output is given, so one backward remains and DDP synchronises as ever
        weighted = {name: (term, getattr(weights, name)) for name, term in terms.items() if getattr(weights, name) > 0}
        signal = {"balanced": (out.wav_hat * t.balancer(weighted, out.wav_hat)).sum()}
    if targets and (step + 1) % config.train.log_every == 0 and out.quantized.entries[0].requires_grad:
        log |= codebook_gradients(signal | taught, out.quantized.entries)
    if watch:
        log |= gradient_figures(signal, weights.commit * out.quantized.commit, out, unwrap(t.codec).quantizer)
        log |= watch.figures(out, unwrap(t.codec).quantizer)
    t.optimizer_g.zero_grad()
    (sum(signal.values()) + aside).backward()
    log["grad_norm_g"] = clip_grad_norm_([*t.codec.parameters(), *t.heads.parameters()], optim.max_grad_norm_g)
    log["skipped_g"] = non_finite_anywhere(loss_g, log["grad_norm_g"])
    if not log["skipped_g"]:
        t.optimizer_g.step()
        if config.model.quantizer.type == "ema":
            unwrap(t.codec).quantizer.update_codebooks(out.quantized, step)
        average_weights(t, optim.ema_decay)
    commit, codebook = out.quantized.commit, out.quantized.codebook
    terms |= {"loss_g": loss_g, "commit": commit, "codebook": codebook, "vq": commit + codebook}
    return log | {"adv_g" if name == "adv" else name: value.detach() for name, value in terms.items()}


def distillation_terms(out: CodecOutput, targets: dict[str, Targets], t: Training, log: dict) -> dict[str, Tensor]:
    """1 - cosine with each teacher over the frames that have a target; adds to `log` what one wants to see of it."""
    terms = {name: masked_mean(loss, targets[name].mask) for name, loss in t.heads(out.quantized.prefixes, targets).items()}
    for name, term in terms.items():
        log[f"{name}_frames"] = distributed.mean_over_ranks(targets[name].mask.mean())
        log[name] = torch.where(log[f"{name}_frames"] > 0, term.detach(), math.nan)  # a batch without words says nothing
        log[f"{name}_similarity"] = 1 - log[name]
    if "llm" in terms and "wavlm" in terms:
        log["wavlm_llm_ratio"] = log["wavlm"] / log["llm"]
    return terms


def reconstruction_terms(wav: Tensor, wav_hat: Tensor, t: Training, config: Config) -> dict[str, Tensor]:
    """The terms with a weight that compare signals; one without is not computed."""
    weights, terms = config.loss_weights, {}
    if weights.wave > 0:
        terms["wave"] = waveform_loss(wav, wav_hat)
    if weights.scale > 0:
        terms["scale"] = scale_loss(wav, wav_hat)
    if weights.mel > 0:
        terms["mel"] = t.mel_loss(wav, wav_hat)
    if weights.msspec > 0:
        terms["msspec"] = t.msspec_loss(wav, wav_hat)
    if weights.cspec > 0:
        terms["cspec"] = t.cspec_loss(wav, wav_hat)
    if weights.bands > 0:
        terms["bands"] = t.bands_loss(wav, wav_hat)
    if weights.whisper > 0:
        terms["whisper"] = t.whisper_loss(wav, wav_hat)
    return terms


@torch.no_grad()
def average_weights(t: Training, decay: float) -> None:
    """Move the averages toward the codec: averaged = decay * averaged + (1 - decay) * live; decay 0 starts them anew."""
    if t.averages:
        torch._foreach_lerp_(list(t.averages.values()), list(unwrap(t.codec).state_dict().values()), 1 - decay)


def exchange_weights(t: Training) -> None:
    """Swap the codec's weights and codebooks with their averages, if such are kept."""
    live = unwrap(t.codec).state_dict()
    for name, average in t.averages.items():
        kept = live[name].clone()
        live[name].copy_(average)
        average.copy_(kept)


def learning_rate(peak: float, optim: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of update `step`: a pure function, so that there is no scheduler to save."""
    if step < optim.warmup_steps:
        return peak * (step + 1) / optim.warmup_steps
    if optim.schedule == "exponential":
        return peak * optim.gamma**step
    if optim.schedule == "cosine":
        done = (step - optim.warmup_steps) / max(total_steps - optim.warmup_steps, 1)
        floor = optim.min_lr_ratio
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))
    return peak


def set_learning_rates(t: Training, optim: OptimConfig, step: int, total_steps: int) -> None:
    for optimizer, peak in ((t.optimizer_g, optim.lr_g), (t.optimizer_d, optim.lr_d)):
        for group in optimizer.param_groups:
            group["lr"] = group["lr_scale"] * learning_rate(peak, optim, step, total_steps)


def non_finite_anywhere(*values: Tensor) -> Tensor:
    """1.0 where any value on any rank is NaN or Inf, so that all ranks skip together; else 0.0."""
    finite = torch.stack([value.detach().float() for value in values]).isfinite().all()
    return distributed.all_reduce_max((~finite).float())


def unwrap(module: nn.Module) -> nn.Module:
    return module.module if isinstance(module, DistributedDataParallel) else module


# ------------------------------------------------------------------------- validation


@torch.no_grad()
def validate(t: Training, val: DistilledSegments, config: Config, device: torch.device, log: RunLog | None, step: int) -> dict:
    """Metrics over fixed segments of the validation split, shared out over the ranks; logs sound and pictures."""
    codec, heads = unwrap(t.codec), unwrap(t.heads)
    share = -(-config.data.val_segments // distributed.world_size())
    first = distributed.rank() * share
    codec.eval()
    per_item, codes, latents, taught = [], [], [], {name: torch.zeros(3, device=device) for name in val.teachers}
    for index in range(first, first + share):
        wav, targets = default_collate([val[index]])
        wav, targets = wav.to(device), to_device(targets, device)
        out = codec(wav)
        for name, loss in heads(out.quantized.prefixes, targets).items():
            values, mask = targets[name]
            constant = 1 - F.cosine_similarity(val.teachers[name].mean.to(device), values, -1)
            taught[name] += torch.stack([(loss * mask).sum(), (constant * mask).sum(), mask.sum()])
        codes.append(out.quantized.codes)
        if out.quantized.residuals is not None:
            latents.append(out.quantized.residuals[0].flatten(0, 1))
        per_item.append(torch.stack([metrics.snr_db(wav, out.wav_hat), metrics.si_sdr_db(wav, out.wav_hat),
                                     metrics.amplitude_ratio(wav, out.wav_hat), metrics.dc_offset(out.wav_hat),
                                     metrics.mel_distance(wav, out.wav_hat, codec.sample_rate)], 1))  # fmt: skip
        if log and index < 3:
            log.audio(step, f"input/{index}", wav[0], codec.sample_rate)
            log.audio(step, f"reconstruction/{index}", out.wav_hat[0], codec.sample_rate)
            log.spectrogram(step, f"input_above_reconstruction/{index}", wav[0], out.wav_hat[0], codec.sample_rate)
            for n in first_groups(config.model.quantizer):
                log.audio(step, f"reconstruction_from_first_{n}/{index}", codec(wav, n).wav_hat[0], codec.sample_rate)
    codec.train()
    items = distributed.all_gather_cat(torch.cat(per_item)).nanmean(0).tolist()
    used, perplexity = metrics.codebook_usage(distributed.all_gather_cat(torch.cat(codes)), codec.codebook_size)
    names = ("snr_db", "si_sdr_db", "amplitude_ratio", "dc_offset", "mel")
    scores = {f"val/{name}": value for name, value in zip(names, items)}
    for name, sums in taught.items():
        loss, constant, n_frames = distributed.all_reduce_sum(sums).tolist()
        if n_frames:  # gain: how far from what the best constant answer reaches to 0
            scores |= {f"val/{name}": loss / n_frames, f"val/{name}_gain": 1 - loss / constant}
    if latents:
        scores["val/latent_dims"] = metrics.latent_dims(distributed.all_gather_cat(torch.cat(latents))).item()
    for level in range(codec.n_codebooks):
        scores[f"val/perplexity_{level}"] = perplexity[level].item()
        scores[f"val/used_{level}"] = used[level].item()
    return scores


def first_groups(quantizer: EMAQuantizerConfig | FactorizedQuantizerConfig) -> list[int]:
    """Numbers of first codebooks to listen to by themselves: the semantic, and the prosodic with them."""
    if quantizer.type != "ema":
        return []
    return sorted({n for n in (quantizer.n_semantic, quantizer.n_first) if n})


def to_device(targets: dict[str, Targets], device: torch.device) -> dict[str, Targets]:
    return {name: Targets(*(x.to(device, non_blocking=True) for x in target)) for name, target in targets.items()}


# ------------------------------------------------------------------------------ set-up


def build(config: Config, device: torch.device, teachers: Teachers | None = None) -> Training:
    """Networks and optimizers for a fresh run, the same on every rank."""
    torch.manual_seed(config.train.seed)
    codec = Codec(config.model).to(device).train()
    discriminators = Discriminators(config.discriminators).to(device).train()
    if config.train.compile:
        torch._functorch.config.donated_buffer = False  # balancer and doctor walk a graph more than once
        for module in (codec.encoder, codec.decoder, discriminators):
            module.compile()
    heads = Heads(config.distill, config.model.quantizer.codebook_dim, teachers or {}).to(device).train()
    freeze(codec, config.train.freeze)
    optim = config.optim
    projections = [p for name, p in codec.quantizer.named_parameters() if any(f".{key}." in f".{name}" for key in PROJECTIONS)]
    optimizer_g = adamw([codec, heads], optim.lr_g, optim, [(list(heads.parameters()), optim.lr_scale_heads),
                                                            (projections, optim.lr_scale_projections)])  # fmt: skip
    optimizer_d = adamw([discriminators], optim.lr_d, optim, [])
    if distributed.world_size() > 1:
        # buffers are not broadcast: codebooks are kept equal by update_codebooks itself
        if any(p.requires_grad for p in codec.parameters()):
            codec = DistributedDataParallel(codec, broadcast_buffers=False)
        if config.discriminators.sets:
            discriminators = DistributedDataParallel(discriminators, broadcast_buffers=False)
        if teachers:
            heads = DistributedDataParallel(heads, broadcast_buffers=False)
    losses, whisper = config.losses, None
    if has_term(config, "whisper"):
        bf16 = config.train.precision == "bf16"
        whisper = WhisperLoss(losses.whisper_model, losses.whisper_layers, config.model.sample_rate, bf16).to(device)
    # codebooks are averaged as well, as in AudioCraft: they belong to the encoder of their time
    averages = {name: value.clone() for name, value in unwrap(codec).state_dict().items()} if config.optim.ema_decay else {}
    return Training(
        codec, discriminators, heads, optimizer_g, optimizer_d,
        MelLoss(config.model.sample_rate, losses.mel_windows, losses.mel_bins, losses.mel_floor).to(device),
        MultiScaleSpectralLoss(losses.msspec_windows, losses.msspec_log_weight).to(device),
        CompressedSpectralLoss(losses.cspec_windows, losses.cspec_power, losses.cspec_phase_share).to(device),
        BandLevelLoss(
            config.model.sample_rate, losses.bands_counts, losses.bands_frames, losses.bands_window, losses.bands_floor
        ).to(device),
        whisper,
        Balancer(mean_over_ranks=distributed.mean_over_ranks) if losses.balancer else None,
        averages,
    )  # fmt: skip


def adamw(
    modules: list[nn.Module], lr: float, optim: OptimConfig, scaled: list[tuple[list[nn.Parameter], float]]
) -> torch.optim.AdamW:
    """AdamW over what is not frozen; each of `scaled` is parameters with what multiplies their learning rate.

    Matrices and kernels decay, all or a transformer's; biases, gains and snake alphas have one long axis only.
    """
    everything = [child for module in modules for child in module.modules()]
    in_transformers = {p for child in everything if isinstance(child, Transformer) for p in child.parameters()}
    scale_of = {p: (index, scale) for index, (members, scale) in enumerate(scaled) for p in members}
    groups: dict[tuple, list[nn.Parameter]] = {}  # in an order that no setting decides: a resumed run may change it
    for p in (p for module in modules for p in module.parameters() if p.requires_grad):
        rank = 2 if p.numel() <= max(p.shape, default=1) else 0 if p in in_transformers else 1
        decay = (optim.weight_decay, optim.weight_decay if optim.weight_decay_on == "all" else 0.0, 0.0)[rank]
        index, scale = scale_of.get(p, (-1, 1.0))
        groups.setdefault((rank, index, decay, scale), []).append(p)
    groups = groups or {(2, -1, 0.0, 1.0): [nn.Parameter(torch.zeros(1))]}
    described = [{"params": members, "weight_decay": decay, "lr_scale": scale}
                 for (_, _, decay, scale), members in sorted(groups.items(), key=lambda item: item[0][:2])]  # fmt: skip
    return torch.optim.AdamW(described, lr=lr, betas=optim.betas, fused=True)


def freeze(codec: Codec, parts: tuple[str, ...]) -> None:
    """Leave parts of a codec as they are: parameters by the start of their name, and the codebooks that belong to them."""
    q = codec.config.quantizer
    levels = {}  # factorized codebooks are parameters like all others
    if q.type == "ema":
        levels = {"quantizer": range(q.n_codebooks), **{f"codebooks.{i}": [i] for i in range(q.n_codebooks)}}
    if q.type == "ema" and q.n_first:
        levels |= {"quantizer.semantic": range(q.n_first), "quantizer.acoustic": range(q.n_first, q.n_codebooks)}
    for part in parts:
        named = [p for name, p in codec.named_parameters() if f"{name}.".startswith(f"{part}.")]
        if not named and part not in levels:
            expected = ", ".join(["encoder", "decoder", *levels][:8])
            raise ValueError(f"train.freeze: '{part}' names no part of the codec; expected {expected}, or the start of a "
                             "parameter's name")  # fmt: skip
        for p in named:
            p.requires_grad_(False)
    if q.type == "ema":
        codec.quantizer.freeze_codebooks({level for part in parts for level in levels.get(part, ())})


def start_from_speech(codec: Codec, dataset: SegmentDataset, config: Config, device: torch.device) -> None:
    """What of a new codec does not start at random: a lapped body's transform, then Euclidean codebooks."""
    if config.model.encoder.type == "lapped":
        n_batches = -(-TRANSFORM_FRAMES * codec.hop_length // (config.data.batch_size * config.data.segment_samples))
        wavs = [distributed.all_gather_cat(wav) for wav in start_batches(dataset, config, device, n_batches)]
        start_transform(codec.encoder, codec.decoder, torch.cat(wavs))
    if config.model.quantizer.type == "ema":
        start_codebooks(codec, dataset, config, device)


@torch.no_grad()
def start_codebooks(
    codec: Codec, dataset: SegmentDataset, config: Config, device: torch.device, levels: range | None = None
) -> None:
    """k-means on latents of the encoder; `levels`: default all."""
    latents = start_latents(codec, dataset, config, device, config.model.quantizer.kmeans_frames)
    codec.quantizer.init_codebooks(latents, frames_per_update(config), levels)


@torch.no_grad()
def start_latents(codec: Codec, dataset: SegmentDataset, config: Config, device: torch.device, n_frames: int) -> Tensor:
    """At least n_frames latents [B, D, T'] of speech, the same on every rank."""
    batches = start_batches(dataset, config, device, -(-n_frames // frames_per_update(config)))
    return torch.cat([distributed.all_gather_cat(codec.encoder(wav).float()) for wav in batches])


def frames_per_update(config: Config) -> int:
    return config.data.batch_size * config.data.segment_samples // config.model.encoder.hop_length


def start_batches(dataset: SegmentDataset, config: Config, device: torch.device, n_batches: int) -> Iterator[Tensor]:
    """This rank's share of batches that training does not begin with, the same at every call."""
    far = 2**40 // config.data.batch_size  # a step no run reaches
    sampler = StepSampler(far, far + n_batches, config.data.batch_size, distributed.rank(), distributed.world_size())
    return (torch.stack([dataset[index] for index in indices]).to(device) for indices in sampler)


def save(run_dir: Path, t: Training, config: Config, state: dict, best: bool) -> None:
    """One checkpoint, by the main process; nobody goes on before it is whole."""
    if distributed.is_main():
        tensors = {
            "model": unwrap(t.codec).state_dict(),
            "discriminators": unwrap(t.discriminators).state_dict(),
            "optimizers": optimizer_tensors(t.optimizer_g, "g") | optimizer_tensors(t.optimizer_d, "d"),
        }
        if len(unwrap(t.heads).heads):
            tensors["heads"] = unwrap(t.heads).state_dict()
        if t.averages:
            tensors["ema"] = t.averages
        if t.balancer:
            state = state | {"balancer": t.balancer.state_dict()}
        save_checkpoint(run_dir, state["step"], tensors, state, dump_config(config), best=best,
                        keep_last=config.train.keep_last)  # fmt: skip
    distributed.barrier()


def restore(folder: Path, t: Training, config: Config) -> dict:
    """Load a checkpoint into `t`; returns its state. Its weights must fit the model, its discriminators be the config's."""
    saved = parse_config((folder / "config.yaml").read_text(), str(folder / "config.yaml"))
    differs = {"model": model_differences(saved.model, config.model),
               "discriminators": saved.discriminators != config.discriminators}  # fmt: skip
    for section in differs:
        if differs[section]:
            raise ValueError(f"{folder}: its {section} section differs from the config's; resume with "
                             f"{folder / 'config.yaml'}, or start a new run with another --run_dir")  # fmt: skip
    if saved.train.freeze != config.train.freeze:
        raise ValueError(f"{folder}: train.freeze={list(saved.train.freeze)} there, {list(config.train.freeze)} here, but the "
                         "optimizer's state belongs to what is trained; start a new run by train.init_from")  # fmt: skip
    before, now = to_dict(saved), to_dict(config)
    changed = [f"{section}.{key}" for section in ("losses", "loss_weights", "optim", "data", "train", "distill")
               for key in now[section] if now[section][key] != before[section][key] and key not in ONLY_AT_START]
    changed += [section for section in ("phases", "model") if now[section] != before[section]]
    if changed:
        tell(f"note: resumed with other values than before: {', '.join(changed)}")
    state = load_state(folder)
    load_averaged(folder, t)
    load_into(unwrap(t.codec), load_tensors(folder / "model.safetensors"), str(folder / "model.safetensors"))
    load_into(unwrap(t.discriminators), load_tensors(folder / "discriminators.safetensors"),
              str(folder / "discriminators.safetensors"))  # fmt: skip
    if len(unwrap(t.heads).heads):
        load_into(unwrap(t.heads), load_tensors(folder / "heads.safetensors"), str(folder / "heads.safetensors"))
    tensors = load_tensors(folder / "optimizers.safetensors")
    restore_optimizer(t.optimizer_g, tensors, "g")
    restore_optimizer(t.optimizer_d, tensors, "d")
    if t.balancer and "balancer" in state:
        t.balancer.load_state_dict(state["balancer"])
    return state


def load_averaged(folder: Path, t: Training) -> None:
    """Give the codec, and the averages if such are kept, the averaged weights of a checkpoint, or its only ones."""
    load_into(unwrap(t.codec), inference_tensors(folder), str(folder / "model.safetensors"))
    average_weights(t, decay=0.0)


def load_initial(folder: Path, t: Training, config: Config) -> tuple[bool, range]:
    """Start from the codec of a checkpoint or pretrained folder, and from its discriminators where they are the config's.

    Returns:
        Whether the discriminators came along, else they stay fresh; and the codebooks that the codec lacked.
    """
    model, added = read_model(folder), range(0)
    codec, tensors = unwrap(t.codec), inference_tensors(folder)
    if can_grow(model, config.model) and grown(model, config.model) != model:
        count = "n_first" if model.quantizer.n_first else "n_codebooks"
        added = range(getattr(model.quantizer, count), getattr(config.model.quantizer, count))
        fresh = {name: value.cpu() for name, value in codec.state_dict().items()}
        tensors = grow(tensors, fresh, model.quantizer.n_first)
        model = grown(model, config.model)
    refuse_other_model(model, config.model, f"train.init_from={folder}", Path(__file__).parent / "configs")
    load_into(codec, tensors, str(folder / "model.safetensors"))
    average_weights(t, decay=0.0)
    saved = parse_config((folder / "config.yaml").read_text(), str(folder / "config.yaml")) if (
        folder / "config.yaml").is_file() else None  # fmt: skip
    weights, heads = folder / "discriminators.safetensors", folder / "heads.safetensors"
    alike = saved and discriminators_learned(folder, saved) and saved.discriminators == config.discriminators
    if alike:
        load_into(unwrap(t.discriminators), load_tensors(weights), str(weights))  # fp16 ones are copied into fp32
    if heads.is_file() and saved.distill == config.distill:
        load_into(unwrap(t.heads), load_tensors(heads), str(heads))
    return bool(alike), added


def open_data(config: Config) -> tuple[DistilledSegments, DistilledSegments]:
    """Training and validation segments, with what the teachers say of them."""
    data, sample_rate = config.data, config.model.sample_rate
    train_set = SegmentDataset(read_manifest(data.manifest, "train", sample_rate), data.segment_samples, config.train.seed,
                               data.speaker_balanced, data.speeds)  # fmt: skip
    val_utterances = read_manifest(data.manifest, "val", sample_rate) or train_set.utterances
    val_set = SegmentDataset(val_utterances, data.val_segment_samples or data.segment_samples, VAL_SEED)
    teachers = open_teachers(config.distill)
    for name, store in teachers.items():
        utterances = {u.name: u for u in [*train_set.utterances, *val_utterances]}  # which may be the same
        n_without = store.check(list(utterances.values()), sample_rate)
        tell(f"{name}: features of {store.folder}; {n_without} utterances have no target")
    hop_length = config.model.encoder.hop_length
    return tuple(DistilledSegments(part, teachers, hop_length, sample_rate) for part in (train_set, val_set))


def look_before(
    config: Config, device: torch.device, segments: DistilledSegments, val_segments: DistilledSegments, max_s: float
) -> list[Check]:
    """What preflight says of data, arithmetic and precision; reads at most so many seconds of audio."""
    train_utterances, sample_rate = segments.segments.utterances, config.model.sample_rate
    val = [] if val_segments.segments.utterances is train_utterances else val_segments.segments.utterances
    test = read_manifest(config.data.manifest, "test", sample_rate)
    pieces, _ = preflight.read_pieces(train_utterances, sample_rate, max_s / 2)
    return [*preflight.check_data(train_utterances, val, test, sample_rate, max_s, config.model.level_db),
            *preflight.check_arithmetic(config, train_utterances, [wav for _, wav in pieces]),
            *preflight.check_precision(config.train.precision, device)]  # fmt: skip


def rehearse(config: Config, device: torch.device, price_per_hour: float) -> int:
    """`--preflight`: all its checks, with real updates that are thrown away; 1 where one says stop, else 0."""
    segments, val_segments = open_data(config)
    checks = look_before(config, device, segments, val_segments, PREFLIGHT_S)
    t = build(config, device, segments.teachers)
    if config.train.init_from:
        _, added = load_initial(resolve(config.train.init_from), t, config)
        if added:
            start_codebooks(unwrap(t.codec), segments.segments, config, device, added)
    else:
        start_from_speech(unwrap(t.codec), segments.segments, config, device)
    sampler = StepSampler(0, 2**31, config.data.batch_size, distributed.rank(), distributed.world_size())
    batches = iter(segment_loader(segments, sampler, config.data.n_workers, pin_memory=device.type == "cuda"))
    phases = [phase_config(config, index) for index in range(len(config.phases))]
    looks = {}  # the first update of each phase, as the doctor sees it

    def take_step(index: int) -> dict:
        wav, targets = next(batches)
        wav, targets = wav.to(device, non_blocking=True), to_device(targets, device)
        watch = None if index in looks else CodebookWatch()
        values = {key: float(value) for key, value in train_step(wav, t, phases[index], 0, False, targets, watch).items()}
        return looks.setdefault(index, values)

    with tempfile.TemporaryDirectory() as folder:
        log = RunLog(folder) if distributed.is_main() else None
        cost = preflight.measure(config, take_step, lambda: validate(t, val_segments, config, device, log, 0),
                                 lambda: save(Path(folder), t, config, {"step": 0}, best=False))  # fmt: skip
        if log:
            log.close()
    for index, look in looks.items():
        grads = {key.removeprefix("grad_out_").removeprefix("grad_"): value for key, value in look.items()
                 if key.startswith(("grad_out_", "grad_z_"))}  # fmt: skip
        checks += preflight.check_config(config, grads, index)
    n_parameters = sum(p.numel() for p in unwrap(t.codec).parameters())
    checks += preflight.check_resources(config, cost, n_parameters, price_per_hour)
    if distributed.is_main():
        print(preflight.render(checks, brief=False))
    return int(any(check.level == "stop" for check in checks))


# ---------------------------------------------------------------------------- the loop


def train(config: Config, run_dir: Path, resume: bool, device: torch.device) -> None:
    started, main = time.monotonic(), distributed.is_main()
    stop_requested = []

    def request_stop(*_) -> None:  # the first signal ends after the update under way, the second one at once
        if stop_requested:
            raise KeyboardInterrupt
        stop_requested.append(True)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, request_stop)
    if not resume and (run_dir / "metrics.jsonl").exists():
        raise ValueError(f"{run_dir}: holds a run already; go on with it by --resume, or name another --run_dir")

    data, fixed = config.data, {}
    segments, val_segments = open_data(config)
    if main:
        fixed["data_copies"] = preflight.copied_share(segments.segments.utterances, config.model.sample_rate, BRIEF_S)
        tell(preflight.render(look_before(config, device, segments, val_segments, BRIEF_S), brief=True))

    # Model: where the last run left it, or another run's, or a new one
    t, added = build(config, device, segments.teachers), range(0)
    state = {"step": 0, "best_mel": math.inf, "skipped_in_row": 0, "sums": {}, "counts": {}, "recent": [],
             "disc_warmup_steps": 0}  # fmt: skip
    if resume and any((run_dir / "checkpoints").glob("step_*")):
        folder = find_checkpoint(run_dir)
        state |= restore(folder, t, config)
        state["disc_warmup_steps"] = min(state["disc_warmup_steps"], config.train.disc_warmup_steps)
        tell(f"resumed from {folder}")
    elif config.train.init_from:
        folder = resolve(config.train.init_from)
        with_discriminators, added = load_initial(folder, t, config)
        state["disc_warmup_steps"] = 0 if with_discriminators else config.train.disc_warmup_steps
        tell(f"started from {folder}, its discriminators too" if with_discriminators else
             f"started from {folder}; discriminators are new, "
             f"{len(disc_warmup(config, config.train.disc_warmup_steps))} updates of theirs come first")  # fmt: skip
        if added:
            tell(f"codebooks {', '.join(map(str, added))} are new: k-means on what those before them leave over")
    first = torch.tensor([float(state["step"]), -float(state["step"])], device=device)
    if distributed.all_reduce_max(first).sum() != 0:
        raise ValueError(f"{run_dir}: processes found checkpoints of different steps; put the run on a shared disk")
    if state["step"] == 0 and added:
        start_codebooks(unwrap(t.codec), segments.segments, config, device, added)
    elif state["step"] == 0 and not config.train.init_from:
        start_from_speech(unwrap(t.codec), segments.segments, config, device)
    if state["step"] == 0 and config.train.refit_frames:
        tell(f"codebooks are fitted anew to {config.train.refit_frames:,} latents")
        latents = start_latents(unwrap(t.codec), segments.segments, config, device, config.train.refit_frames)
        unwrap(t.codec).quantizer.refit_codebooks(latents)
    if state["step"] == 0:
        average_weights(t, decay=0.0)
    log = None
    if main:
        log = RunLog(run_dir, resume_step=state["step"] if resume else None)
        write_atomically(run_dir / "config.yaml", dump_config(config))
    sampler = StepSampler(state["step"], config.total_steps, data.batch_size, distributed.rank(),
                          distributed.world_size())  # fmt: skip
    loader = segment_loader(segments, sampler, data.n_workers, pin_memory=device.type == "cuda")
    means = EpochMeans(state["sums"], state["counts"])
    steps_per_epoch = data.segments_per_epoch // data.batch_size
    audio_s_per_step = data.batch_size * data.segment_samples / config.model.sample_rate
    tell(f"{config.name}: {count_parameters(unwrap(t.codec)):.2f}M parameters, discriminators "
         f"{count_parameters(unwrap(t.discriminators)):.2f}M; {unwrap(t.codec).bitrate_kbps:.2f} kbps; "
         f"{config.total_steps} steps of {audio_s_per_step:.1f} s of audio, {steps_per_epoch} an epoch; log in {run_dir}")

    phases = [phase_config(config, index) for index in range(len(config.phases))]
    warmup = disc_warmup(config, state["disc_warmup_steps"])
    bar = tqdm(total=config.total_steps, initial=state["step"], disable=not main, unit="step", dynamic_ncols=True,
               mininterval=0.5 if sys.stderr.isatty() else 30)  # fmt: skip
    shown, clock, clock_step = {}, time.monotonic(), state["step"]
    watch, recent, verdicts = CodebookWatch(), state["recent"], []
    explained = phase_at(config, state["step"] - 1) if state["step"] else None  # the phase whose constants the log has
    fixed["mel_off"] = mel_off(t.mel_loss, config.model.sample_rate)
    for wav, targets in loader:
        step = state["step"]
        phase = phase_at(config, step)
        wav, targets = wav.to(device, non_blocking=True), to_device(targets, device)
        watched = (step + 1) % config.doctor.watch_every == 0
        values = train_step(wav, t, phases[phase], step, step in warmup, targets, watch if watched else None)
        names = list(values)
        over_time = config.train.max_minutes and time.monotonic() - started > 60 * config.train.max_minutes
        packed = torch.stack([values[name].float() for name in names]
                             + [torch.tensor(float(bool(stop_requested or over_time or dying(verdicts, config))),
                                             device=device)])  # fmt: skip
        *averages, stop = distributed.mean_over_ranks(packed).tolist()
        values = dict(zip(names, averages))
        state["step"] = step = step + 1
        means.add({f"train/{name}": value for name, value in values.items()})
        if main:
            recent.append({name: values[name] for name in OF_INTERVALS if name in values})
        bar.update()

        # A non-finite update was left out already; here it is named, and ends the run when it repeats.
        if values.get("skipped_g") or values.get("skipped_d"):
            state["skipped_in_row"] += 1
            bad = [name for name, value in values.items() if not math.isfinite(value)] or ["a gradient"]
            tell(f"step {step}: update skipped, not finite: {', '.join(bad)}", bar)
            if state["skipped_in_row"] >= config.train.max_skipped_in_row:
                bar.close()
                if main:
                    named = values | over_interval(recent, phases[phase].optim)
                    log.scalars(step, {f"train/{name}_step": value for name, value in named.items()})
                    examine(run_dir, log, step)
                raise ValueError(f"step {step}: {state['skipped_in_row']} updates in a row were not finite "
                                 f"({', '.join(bad)}); lower optim.lr_g or train in fp32, then --resume")  # fmt: skip
        else:
            state["skipped_in_row"] = 0

        if main and (step % config.train.log_every == 0 or watched):
            rate = (step - clock_step) * audio_s_per_step / max(time.monotonic() - clock, 1e-9)
            clock, clock_step = time.monotonic(), step
            rates = {"lr_g": t.optimizer_g.param_groups[0]["lr"], "lr_d": t.optimizer_d.param_groups[0]["lr"],
                     "audio_s_per_s": rate, "audio_hours": step * audio_s_per_step / 3600,
                     **over_interval(recent, phases[phase].optim)}  # fmt: skip
            recent.clear()
            if explained != phase:
                explained = phase
                rates |= explain(config, phase, fixed)
            log.scalars(step, {f"train/{name}_step": value for name, value in (values | rates).items()})
            shown |= {"audio_s/s": f"{rate:.0f}", "mel": f"{values.get('mel', math.nan):.3f}",
                      "snr": f"{values['snr_db']:.1f}dB", "amp": f"{values['amplitude_ratio']:.2f}",
                      "loss_d": f"{values.get('loss_d', math.nan):.2f}"}  # fmt: skip
            bar.set_postfix(shown, refresh=False)

        last = step == config.total_steps
        best = False
        if step % config.train.val_every == 0 or last:
            exchange_weights(t)  # validation hears what inference will use
            scores = validate(t, val_segments, config, device, log, step)
            exchange_weights(t)
            means.add(scores)
            best = scores["val/mel"] < state["best_mel"]
            if best:
                state["best_mel"] = scores["val/mel"]
            if main:
                again = explain(config, phase, fixed)  # so that the end of a long log explains itself
                log.scalars(step, {f"{name}_step": value for name, value in scores.items()}
                            | {f"train/{name}_step": value for name, value in again.items()})  # fmt: skip
            tell(validation_line(step, config.phases[phase].name, scores, values), bar)
            if main:
                verdicts.append(examine(run_dir, log, step, bar))
            clock, clock_step = time.monotonic(), step
        if main and (step % steps_per_epoch == 0 or last):
            log.scalars(step, {"epoch": step / steps_per_epoch}
                        | {f"{name}_epoch": value for name, value in means.pop().items()})  # fmt: skip
        elif step % steps_per_epoch == 0:
            means.pop()
        if step % config.train.checkpoint_every == 0 or last or stop or best:
            save(run_dir, t, config, state | {"sums": means.sums, "counts": means.counts, "recent": recent}, best)
        if stop:
            tell(f"stopped at step {step}, saved; go on with --resume", bar)
            break
    bar.close()
    if log:
        log.close()
    if main and dying(verdicts, config) and not (last or stop_requested or over_time):
        raise ValueError(f"{run_dir}: stopped by the doctor at step {step}, see health.md there; doctor.stop_on: never goes on")


def examine(run_dir: Path, log: RunLog, step: int, bar: tqdm | None = None) -> Diagnosis:
    """What the doctor says of the run so far: to run_dir/health.md, TensorBoard, and where it found something, the console."""
    try:
        diagnosis = diagnose(History.from_rows(read_metrics(run_dir, EXAMINED_BYTES)))
    except (ArithmeticError, ValueError, IndexError) as error:  # advice must not end a run
        tell(f"step {step}: the doctor stumbled ({error!r}); please report it with metrics.jsonl", bar)
        return Diagnosis(step, "not yet", [], [], [])
    text = to_markdown(diagnosis, run_dir.name)
    write_atomically(run_dir / "health.md", text)
    log.text(step, "health", text)
    for finding in diagnosis.findings:
        tell(f"step {step}: {finding.level}: {finding.title}: {finding.evidence}; {finding.mend}", bar)
    return diagnosis


def explain(config: Config, phase: int, fixed: dict[str, float]) -> dict[str, float]:
    """What does not change within a phase, so that a log explains itself without its config."""
    data, resolved = config.data, phase_config(config, phase)
    return {f"weight_{name}": value for name, value in vars(resolved.loss_weights).items()} | {
        "phase": phase, "phase_start": sum(p.steps for p in config.phases[:phase]), "total_steps": config.total_steps,
        "steps_per_epoch": data.segments_per_epoch // data.batch_size, **fixed,
        "from_weights": float(bool(config.train.init_from)), "loss_d_neutral": NEUTRAL[config.losses.adversarial],
        "codebook_size": config.model.quantizer.codebook_size,
        "frames_per_step": frames_per_update(config),
    }  # fmt: skip


def dying(verdicts: list[Diagnosis], config: Config) -> bool:
    """Whether the doctor shall end the run: two validations in a row agree on a critical finding."""
    critical = [{finding.number for finding in d.findings if finding.level == "critical"} for d in verdicts[-2:]]
    return config.doctor.stop_on == "critical" and len(critical) == 2 and bool(critical[0] & critical[1])


def validation_line(step: int, name: str, scores: dict, values: dict) -> str:
    """The line a person reads after each validation."""
    perplexity = [value for key, value in scores.items() if key.startswith("val/perplexity")]
    return (f"step {step} ({name}): val mel {scores['val/mel']:.2f} dB, snr {scores['val/snr_db']:.2f} dB, "
            f"amplitude {scores['val/amplitude_ratio']:.2f}, perplexity {min(perplexity):.0f} to {max(perplexity):.0f}"
            + "".join(f", {name} {scores[f'val/{name}']:.3f}" for name in TEACHERS if f"val/{name}" in scores)
            + "".join(f", {name} {values[name]:.3f}" for name in ("loss_g", "loss_d") if name in values))  # fmt: skip


def count_parameters(module: nn.Module) -> float:
    """In millions."""
    return sum(p.numel() for p in module.parameters()) / 1e6


def tell(message: str, bar: tqdm | None = None) -> None:
    """One line on stderr, from the main process, without tearing the progress bar."""
    if distributed.is_main():
        (bar or tqdm).write(message, file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML file, see configs/")
    parser.add_argument("--run_dir", help="default: runs/NAME, NAME from the config")
    parser.add_argument("--resume", action="store_true", help="go on from the run's latest checkpoint, if it has one")
    parser.add_argument("--preflight", action="store_true", help="say what the run will cost and what is wrong, and leave; "
                        "exit code 1 where it should not be started")  # fmt: skip
    parser.add_argument("--price_per_hour", type=float, default=0.0, help="of the machine, in any currency, for --preflight")
    parser.add_argument("--set", nargs="+", default=[], action="extend", metavar="KEY=VALUE", help="override a config value")
    args = parser.parse_args()
    try:
        device = distributed.setup()
        config = load_config(args.config, args.set)
        if args.preflight:
            return rehearse(config, device, args.price_per_hour)
        train(config, Path(args.run_dir or Path("runs") / config.name), args.resume, device)
    except (ValueError, OSError) as error:
        tell(f"train_codec_gan: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        distributed.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
