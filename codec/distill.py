"""Distillation: heads that read teachers from the first codebooks, their loss, and which loss pulls a codebook where."""

from __future__ import annotations

from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from codec import distributed
from codec.config import TEACHERS, DistillConfig, TeacherConfig
from codec.data import SegmentDataset
from codec.features import FeatureStore, Targets

Teachers = dict[str, FeatureStore]  # those of config.TEACHERS that the config has


def open_teachers(config: DistillConfig) -> Teachers:
    """The feature folders of a config.

    Raises:
        ValueError: one is not there or not finished, or its features are of another width than the config says.
    """
    stores = {}
    for name in TEACHERS:
        teacher = getattr(config, name)
        if teacher is not None:
            stores[name] = FeatureStore(teacher.features)
            if stores[name].dim != teacher.dim:
                raise ValueError(f"{teacher.features}: features of width {stores[name].dim}, distill.{name}.dim={teacher.dim}; "
                                 f"set it to {stores[name].dim} or compute features of the other teacher")  # fmt: skip
    return stores


class DistilledSegments(Dataset):
    """Segments with what the teachers say of them: (wav [1, S], {name: Targets})."""

    def __init__(self, segments: SegmentDataset, teachers: Teachers, hop_length: int, sample_rate: int):
        self.segments, self.teachers = segments, teachers
        self.hop_length, self.sample_rate = hop_length, sample_rate

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Targets]]:
        utterance, start, _ = self.segments.position(index)  # config.py lets teachers have no speeds
        n_frames = self.segments.segment_samples // self.hop_length
        targets = {name: store.targets(utterance, start, n_frames, self.hop_length, self.sample_rate)
                   for name, store in self.teachers.items()}  # fmt: skip
        return self.segments[index], targets


class Head(nn.Module):
    """Reads one teacher from quantized latents, [B, T', codebook_dim] -> [B, T', dim].

    Source: Défossez et al. 2024 (Moshi) read WavLM through a linear layer; Amy through an MLP.
    """

    def __init__(self, config: TeacherConfig, codebook_dim: int):
        super().__init__()
        hidden = config.hidden_dim
        if config.head == "conv":
            self.context = nn.Sequential(nn.Conv1d(codebook_dim, hidden, 5, padding=2), nn.GELU())
        elif config.head == "mlp":
            self.context = nn.Sequential(nn.Conv1d(codebook_dim, hidden, 1), nn.GELU())
        else:
            self.context, hidden = nn.Identity(), codebook_dim
        self.out = nn.Linear(hidden, config.dim)

    def forward(self, prefix: Tensor) -> Tensor:
        return self.out(self.context(prefix.transpose(1, 2)).transpose(1, 2))


class Heads(nn.Module):
    """One head a teacher; each reads the sum of the first codebooks it is told."""

    def __init__(self, config: DistillConfig, codebook_dim: int, teachers: Teachers):
        super().__init__()
        self.configs = {name: getattr(config, name) for name in teachers}
        self.heads = nn.ModuleDict({name: Head(teacher, codebook_dim) for name, teacher in self.configs.items()})

    def forward(self, prefixes: tuple[Tensor, ...], targets: dict[str, Targets]) -> dict[str, Tensor]:
        """1 - cosine between each teacher and what its head reads, [B, T'] by name; frames without a target too.

        Args:
            prefixes: [B, T', codebook_dim] of the first 1, 2, ... codebooks.
            targets: values [B, T', dim] and mask [B, T'] of each teacher.
        """
        losses = {}
        for name, teacher in self.configs.items():
            prefix = prefixes[teacher.n_codebooks - 1]
            if teacher.detach_first:
                untaught = prefixes[teacher.detach_first - 1]
                prefix = prefix - untaught + untaught.detach()
            losses[name] = 1 - F.cosine_similarity(self.heads[name](prefix), targets[name].values, -1)
        return losses


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the frames of all ranks whose mask is 1; 0 without such frames, and then without gradient.

    With gradients averaged over ranks it is the mean over all ranks' frames, however they are spread.
    """
    count = distributed.mean_over_ranks(mask.sum())
    return (values * mask).sum() / count.clamp(min=1e-8)


def codebook_gradients(losses: dict[str, Tensor], entries: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What each weighted loss sends into each of the first codebooks, and whether the losses agree.

    Args:
        losses: weighted scalars by name; their graphs are kept.
        entries: as `QuantizerOutput` has them.
    Returns:
        `grad_NAME_to_I`, the norm of d loss / d entries_I over the batch; and for codebook 0 `pull_A_B`, the cosine between
        what two teachers ask, or a teacher and `rest`, the sum of all other losses.
    """
    log, directions = {}, {}
    for name, loss in losses.items():
        grads = torch.autograd.grad(loss, entries, retain_graph=True, allow_unused=True)
        grads = [torch.zeros_like(entry) if grad is None else grad for grad, entry in zip(grads, entries)]
        log |= {f"grad_{name}_to_{i}": grad.norm() for i, grad in enumerate(grads)}
        key = name if name in TEACHERS else "rest"
        directions[key] = directions.get(key, 0) + grads[0]
    for a, b in combinations([key for key in (*TEACHERS, "rest") if key in directions], 2):
        log[f"pull_{a}_{b}"] = F.cosine_similarity(directions[a].flatten(), directions[b].flatten(), 0)
    return log
