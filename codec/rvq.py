"""Residual vector quantizers: Euclidean with EMA codebooks, and DAC's factorised form with learnt codebooks."""

from collections.abc import Container
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from codec import distributed
from codec.config import EMAQuantizerConfig, FactorizedQuantizerConfig
from codec.layers import ConvNeXtBlock, reach_in_samples

LAPLACE_EPSILON = 1e-5
REVIVALS_PER_STEP = 128  # dead codes replaced in one update, per codebook
REFIT_BEAM, REFIT_ROUNDS, REFIT_SWEEPS = 4, 9, 3  # `refit_codebooks`; more rounds take off less than 1 % of the error each
NEAR = 96  # entries that a beam goes on with, those nearest to the mean of what its sums leave; of all, 2 % better
BEAM_FRAMES = 256  # searched at once: the entries near to each, and their distances from all sums kept, take memory


class QuantizerOutput(NamedTuple):
    z_q: Tensor  # [B, D, T'], straight-through
    codes: Tensor  # [B, N, T'], int64
    commit: Tensor  # scalar, averaged over B, T', width and codebooks (EMA: those in use); gradient to the encoder
    codebook: Tensor  # scalar, averaged likewise; gradient to learnt codebooks, none to EMA ones
    residuals: Tensor | None  # [N, B, T', codebook_dim], detached: what each codebook was asked to code (EMA)
    active: Tensor  # [B, N], 1 where the item uses the codebook (quantizer dropout)
    distances: Tensor | None  # [B, N], mean squared distance to the code, gradient to the encoder (EMA)
    prefixes: tuple[Tensor, ...] = ()  # EMA: [B, T', codebook_dim] of the first 1, 2, ... codebooks, straight-through
    entries: tuple[Tensor, ...] = ()  # EMA: [B, T', codebook_dim] chosen of each; ask autograd for what a loss sends there


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest entry by Euclidean distance.

    Args:
        x: [..., D].
        codebook: [K, D].
    Returns:
        [...], int64.
    """
    # |x - e|² without |x|², which does not change the order
    distance = torch.addmm(codebook.square().sum(1), x.reshape(-1, x.shape[-1]), codebook.T, alpha=-2)
    return distance.argmin(1).view(x.shape[:-1])


def beam_search(x: Tensor, codebooks: Tensor, width: int) -> list[Tensor]:
    """Codes whose entries add up to x, better than the nearest entry at each step does: `width` sums are kept till the end.

    Args:
        x: [M, D].
        codebooks: [N, K, D].
    Returns:
        Of the first 1, 2, ... N codebooks alone, [1, M], [2, M], ... [N, M], int64.
    Source: multi-path encoding of Liu, Lu and Shao 2015 (arXiv:1509.05195).
    """
    parts = [_beam_search(part, codebooks, width) for part in x.split(BEAM_FRAMES)]
    return [torch.cat(codes, 1) for codes in zip(*parts)]


def _beam_search(x: Tensor, codebooks: Tensor, width: int) -> list[Tensor]:
    best_paths, frames = [], torch.arange(len(x), device=x.device)[:, None]
    residuals, paths = x[:, None], torch.zeros(len(x), 1, 0, dtype=torch.int64, device=x.device)
    for i, codebook in enumerate(codebooks):
        # |r|² - 2 r e + |e|² as one product, which goes through memory once
        left = torch.cat([residuals, residuals.square().sum(-1, keepdim=True), torch.ones_like(residuals[..., :1])], -1)
        right = torch.cat([-2 * codebook, torch.ones_like(codebook[:, :1]), codebook.square().sum(1, keepdim=True)], 1)
        n_near = min(len(codebook), max(NEAR, width))
        near = (left.mean(1) @ right.T).topk(n_near, largest=False, sorted=False).indices
        distance = (left @ F.embedding(near, right).mT).flatten(1)
        best = smallest(distance, 1 if i == len(codebooks) - 1 else min(width, distance.shape[1]))
        parent, code = (best // n_near + frames * residuals.shape[1]).flatten(), near.gather(1, best % n_near)
        paths = torch.cat([paths.flatten(0, 1).index_select(0, parent).view(*code.shape, i), code[..., None]], -1)
        best_paths.append(paths[:, 0].T)
        residuals = residuals.flatten(0, 1).index_select(0, parent).view(*code.shape, -1) - F.embedding(code, codebook)
    return best_paths


def smallest(x: Tensor, n: int, block: int = 16) -> Tensor:
    """Indices [M, n] of the n smallest of x [M, L], in order; looked for in the n blocks with the smallest minima only."""
    if x.shape[1] % block or x.shape[1] <= n * block:
        return x.topk(n, largest=False).indices
    stride = x.shape[1] // block  # a block is every so manyth: its minimum is taken down columns, which is fast
    blocks = smallest(x.view(len(x), block, stride).amin(1), n)
    within = (blocks[:, None] + stride * torch.arange(block, device=x.device)[:, None]).flatten(1)
    return within.gather(1, x.gather(1, within).topk(n, largest=False).indices)


def fit_entries(x: Tensor, codebooks: Tensor, codes: list[Tensor], n_sweeps: int) -> None:
    """Move entries, in place, toward the least squares of x minus the sums that codes name; one codebook after the other.

    Args:
        x: [M, D].
        codebooks: [N, K, D].
        codes: [n, M] for one or more numbers n of codebooks; what falls is the sum of their errors, each over its value now.
    """
    left = [x - sum(map(F.embedding, own, codebooks)) for own in codes]
    errors = torch.stack([rest.square().mean() for rest in left]).clamp(min=1e-30)
    weights = (errors.min() / errors).tolist()
    for i in [*range(len(codebooks))] * n_sweeps:
        users = [(own[i], rest, weight) for own, rest, weight in zip(codes, left, weights) if i < len(own)]
        total, count = torch.zeros_like(codebooks[i]), codebooks.new_ones(len(codebooks[i]))  # one frame asks for no change
        for code, rest, weight in users:
            total.index_add_(0, code, weight * rest)
            count += weight * torch.bincount(code, minlength=len(count))
        change = total / count[:, None]
        codebooks[i] += change
        for code, rest, _ in users:
            rest -= F.embedding(code, change)


def commitment(distances: Tensor, active: Tensor) -> Tensor:
    """Distances [B, N] averaged over the codebooks that each item uses, then over the batch."""
    return ((distances * active).sum(1) / active.sum(1)).mean()


def draw_active(
    batch_size: int, n_codebooks: int, dropout: float, device: torch.device, counts: tuple[int, ...] = ()
) -> Tensor:
    """Quantizer dropout: a share `dropout` of the items uses a random number of codebooks, from `counts` or 1 to N.

    Returns:
        [B, N] of 0 and 1, a prefix of ones in every row.
    Source: Zeghidour et al. 2021 (SoundStream), section III-C; per item as in DAC.
    """
    choices = torch.tensor(counts or range(1, n_codebooks + 1))
    count = choices[torch.randint(len(choices), (batch_size,))]
    count[torch.rand(batch_size) >= dropout] = n_codebooks
    return (torch.arange(n_codebooks) < count[:, None]).float().to(device)


def kmeans(x: Tensor, k: int, generator: torch.Generator, n_iterations: int = 10) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from random points; an empty cluster moves to a random point.

    Args:
        x: [M, D].
    Returns:
        means [k, D] and counts [k] of the points nearest to each.
    """
    picks = torch.randint(len(x), (k,), generator=generator) if len(x) < k else torch.randperm(
        len(x), generator=generator)[:k]  # fmt: skip
    means = x[picks.to(x.device)].clone()
    for iteration in range(n_iterations + 1):
        codes = nearest(x, means)
        counts = torch.bincount(codes, minlength=k).to(x.dtype)
        if iteration == n_iterations:
            return means, counts
        sums = torch.zeros_like(means).index_add_(0, codes, x)
        spare = x[torch.randint(len(x), (k,), generator=generator).to(x.device)]
        means = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], spare)


class EMAResidualVQ(nn.Module):
    """Residual VQ whose codebooks follow the data by exponential moving average.

    Codebooks are buffers: no optimizer and no weight decay touches them. `forward` never changes them;
    training calls `update_codebooks` once an update, with what `forward` returned.

    Source: van den Oord et al. 2017, appendix A.1 (EMA); Zeghidour et al. 2021 (residual VQ, k-means start,
    dead codes). Departure: the straight-through estimator is per step with a residual of its own, so that
    every prefix of codebooks passes gradient exactly 1 and every commitment term has a gradient. Where codebooks have inputs
    of their own, a prefix passes it to each of the inputs it holds: a teacher of the sum teaches them all.
    """

    reach_frames = 0.0  # a frame of codes depends on its own frame of z alone

    def __init__(self, config: EMAQuantizerConfig, latent_dim: int, own_inputs: bool = False):
        super().__init__()
        self.config = config
        n, k, d = config.n_codebooks, config.codebook_size, config.codebook_dim
        projected = d != latent_dim
        self.project_in = nn.Linear(latent_dim, d, bias=False) if projected else nn.Identity()
        # where each codebook has an input of its own, the first so many together code that input, not the first one's
        self.own_inputs = nn.ModuleList(nn.Linear(latent_dim, d, bias=False) for _ in range(n - 1 if own_inputs else 0))
        self.project_out = nn.Linear(d, latent_dim, bias=False) if projected else nn.Identity()
        self.frozen: tuple[int, ...] = ()  # codebooks that update_codebooks leaves as they are
        self.first_gradient = 1.0  # share of the output's gradient that the first input gets; the prefixes pass all of theirs
        self.register_buffer("codebooks", torch.randn(n, k, d))
        self.register_buffer("ema_count", torch.ones(n, k))
        self.register_buffer("ema_sum", self.codebooks.clone())

    def forward(self, z: Tensor, n_codebooks: int | None = None) -> QuantizerOutput:
        """Quantize z [B, D, T'] with the first `n_codebooks` (default: all, or as dropout draws in training)."""
        z = z.transpose(1, 2)
        x = self.project_in(z)  # [B, T', d]
        n = n_codebooks or self.config.n_codebooks
        dropout, bypass = (self.config.dropout, self.config.bypass) if self.training else (0.0, 0.0)
        active = draw_active(len(z), n, dropout, z.device, self.config.dropout_counts)
        residual, z_q, output = x, 0, 0
        learns = self.training and any(self.learning)  # by the nearest; where all are frozen they are searched as at inference
        found = None if learns else self._search(x, active)
        codes, residuals, distances, prefixes, entries = [], [], [], [], []
        for i in range(n):
            if i and len(self.own_inputs):
                x = self.own_inputs[i - 1](z)
                residual = x - z_q.detach()
            residuals.append(residual.detach())
            code = nearest(residuals[-1], self.codebooks[i])
            codes.append(code if found is None else torch.where(active[:, i, None] > 0, found[:, i], code))
            q = F.embedding(codes[-1], self.codebooks[i])
            entries.append(q.requires_grad_(x.requires_grad))
            distances.append((residual - q).square().mean((1, 2)))
            # straight-through: an input's gradient is spent by the first codebook that reads it
            ste = q + (x - x.detach()) if i == 0 or len(self.own_inputs) else q
            z_q = z_q + active[:, i, None, None] * ste
            prefixes.append(z_q)
            if i == 0 and self.first_gradient != 1:
                ste = ste.detach().lerp(ste, self.first_gradient)
            output = output + active[:, i, None, None] * ste
            residual = residual - q  # feeds lookup and commitment: its gradient stays 1
        z_q = output
        if bypass:
            if not len(self.own_inputs):
                x = x.detach().lerp(x, self.first_gradient)
            z_q = torch.where(torch.rand(len(z), 1, 1, device=z.device) < bypass, x, z_q)
        z_q, distances = self.project_out(z_q).transpose(1, 2), torch.stack(distances, 1)
        commit, residuals = commitment(distances, active), torch.stack(residuals)
        return QuantizerOutput(z_q, torch.stack(codes, 1), commit, commit.detach(), residuals, active, distances,
                               tuple(prefixes), tuple(entries))  # fmt: skip

    def encode(self, z: Tensor, n_codebooks: int | None = None) -> Tensor:
        """The codes [B, n, T'] that `forward` gives when it does not train, without what only training needs."""
        z, z_q, codes = z.transpose(1, 2), 0, []
        residual = self.project_in(z)
        found = self._search(residual, residual.new_ones(len(z), n_codebooks or self.config.n_codebooks))
        if found is not None:
            return found
        for i, codebook in enumerate(self.codebooks[:n_codebooks]):
            if i and len(self.own_inputs):
                residual = self.own_inputs[i - 1](z) - z_q
            codes.append(nearest(residual, codebook))
            q = F.embedding(codes[-1], codebook)
            residual, z_q = residual - q, z_q + q
        return torch.stack(codes, 1)

    @torch.no_grad()
    def _search(self, x: Tensor, active: Tensor) -> Tensor | None:
        """Codes [B, n, T'] of x [B, T', d] by a beam, each item's for the codebooks that are active [B, n] for it; None where
        the nearest entry at each step is asked for.

        Codebooks with inputs of their own have no common sum that a beam could follow.
        """
        if self.config.beam == 1 or len(self.own_inputs):
            return None
        paths = beam_search(x.flatten(0, 1), self.codebooks[: active.shape[1]], self.config.beam)
        paths = [codes.view(-1, *x.shape[:2]).transpose(0, 1) for codes in paths]
        found = paths[-1]
        for item, n in enumerate(active.sum(1).int().tolist()):
            found[item, :n] = paths[max(n, 1) - 1][item, :n]
        return found

    def unrounded(self, z: Tensor, active: Tensor) -> Tensor:
        """z [B, D, T'] through the projections alone, where `active` [B, N]: the straight-through gradient is this one's."""
        z = z.transpose(1, 2)
        x = self.project_in(z)
        x = x.detach().lerp(x, self.first_gradient)
        x = x + sum(active[:, i, None, None] * own(z) for i, own in enumerate(self.own_inputs, 1))
        return self.project_out(x).transpose(1, 2)

    @property
    def ema_counts(self) -> Tensor:
        """[N, K], how often each entry is in use."""
        return self.ema_count

    @property
    def learning(self) -> list[bool]:
        """Whether each codebook is to learn, or is frozen."""
        return [level not in self.frozen for level in range(self.config.n_codebooks)]

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, n, T'] of the first n codebooks to z_q [B, D, T']."""
        x = sum(F.embedding(codes[:, i], self.codebooks[i]) for i in range(codes.shape[1]))
        return self.project_out(x).transpose(1, 2)

    @torch.no_grad()
    def init_codebooks(self, z: Tensor, frames_per_update: int, levels: Container[int] | None = None) -> None:
        """k-means start, level by level on what the levels before leave over; identical on all ranks.

        Args:
            z: [B, D, T'], the same latents on every rank (gathered).
            frames_per_update: latent frames of one training update over all ranks.
            levels: those to start; the others stay as they are. Default all.
        """
        generator = torch.Generator().manual_seed(0)
        z = z.transpose(1, 2).flatten(0, 1)
        residual = self.project_in(z)
        z_q = torch.zeros_like(residual)
        # as if the counts had come from one update, so that the first updates are not outweighed
        scale = frames_per_update / len(residual)
        for i in range(self.config.n_codebooks):
            if i and len(self.own_inputs):
                residual = self.own_inputs[i - 1](z) - z_q
            if levels is None or i in levels:
                means, counts = kmeans(residual, self.config.codebook_size, generator)
                self.codebooks[i] = means
                self.ema_count[i] = counts.clamp(min=0.5) * scale
                # k-means yields means; EMA keeps sums, so scale by counts
                self.ema_sum[i] = means * self.ema_count[i, :, None]
            q = self.codebooks[i][nearest(residual, self.codebooks[i])]
            residual, z_q = residual - q, z_q + q
        for buffer in (self.codebooks, self.ema_count, self.ema_sum):
            distributed.broadcast(buffer)  # sums on a GPU differ in the last bit from run to run

    @torch.no_grad()
    def refit_codebooks(self, z: Tensor) -> None:
        """Fit the codebooks anew to latents z [B, D, T'], the same on every rank (gathered), of an encoder that is done.

        An EMA entry is the mean of what chose it in the last hundred updates or so, a revived one a single frame, and each
        codebook is fitted without those behind it. Here all are fitted together to the codes that a beam finds, for every
        number of codebooks that dropout draws.

        Source: additive quantization of Babenko and Lempitsky 2014; by coordinate descent, and for prefixes too.
        """
        config = self.config
        x = self.project_in(z.transpose(1, 2)).flatten(0, 1)
        counts = {*(config.dropout_counts or range(1, config.n_codebooks) if config.dropout else ()), config.n_codebooks}
        width = min(config.beam, REFIT_BEAM)
        for _ in range(REFIT_ROUNDS):
            paths = beam_search(x, self.codebooks, width)
            fit_entries(x, self.codebooks, [paths[n - 1] for n in counts], REFIT_SWEEPS)
        distributed.broadcast(self.codebooks)
        mass = self.ema_count.sum(1, keepdim=True)
        used = torch.stack([torch.bincount(codes, minlength=config.codebook_size) for codes in paths[-1]]).clamp(min=0.5)
        self.ema_count.copy_(used / used.sum(1, keepdim=True) * mass)
        self.ema_sum.copy_(self.codebooks * self.ema_count[..., None])

    def freeze_codebooks(self, levels: set[int]) -> None:
        """Let `update_codebooks` leave these codebooks as they are."""
        self.frozen = tuple(levels)

    @torch.no_grad()
    def update_codebooks(self, out: QuantizerOutput, step: int) -> None:
        """One EMA step from a training forward, with one packed all-reduce; then dead codes are revived.

        Every rank ends with the same codebooks: statistics are summed, and the frames that replace dead codes are
        drawn from all ranks' frames by a generator that `step` seeds.
        """
        n, k, d = self.codebooks.shape
        frames = out.residuals.flatten(1, 2)  # [N, M, d]
        codes = out.codes.transpose(0, 1).flatten(1)  # [N, M]
        weights = out.active.T[:, :, None].expand(-1, -1, out.codes.shape[2]).flatten(1)  # [N, M]
        index = (codes + k * torch.arange(n, device=codes.device)[:, None]).flatten()
        count = frames.new_zeros(n * k).index_add_(0, index, weights.flatten())
        total = frames.new_zeros(n * k, d).index_add_(0, index, (weights[..., None] * frames).flatten(0, 1))
        spare = self._spare_frames(frames, step)
        packed = distributed.all_reduce_sum(torch.cat([count, total.flatten(), spare.flatten()]))
        count, total, spare = packed.split([n * k, n * k * d, spare.numel()])
        decay, buffers = self.config.decay, (self.codebooks, self.ema_count, self.ema_sum)
        kept = [buffer[list(self.frozen)] for buffer in buffers]
        self.ema_count.mul_(decay).add_(count.view(n, k), alpha=1 - decay)
        self.ema_sum.mul_(decay).add_(total.view(n, k, d), alpha=1 - decay)
        self._revive(spare.view(n, -1, d))
        mass = self.ema_count.sum(1, keepdim=True)
        smoothed = (self.ema_count + LAPLACE_EPSILON) / (mass + k * LAPLACE_EPSILON) * mass
        self.codebooks.copy_(self.ema_sum / smoothed[..., None])
        for buffer, values in zip(buffers, kept):
            buffer[list(self.frozen)] = values

    def _spare_frames(self, frames: Tensor, step: int) -> Tensor:
        """[N, C, d]: this rank's part of C frames drawn from all ranks' frames, zeros where another rank holds them."""
        n, m, _ = frames.shape
        generator = torch.Generator().manual_seed(step)
        picks = torch.stack([torch.randperm(m * distributed.world_size(), generator=generator)[:REVIVALS_PER_STEP]
                             for _ in range(n)]).to(frames.device)  # fmt: skip
        mine = (picks // m == distributed.rank())[..., None]
        return frames.gather(1, (picks % m)[..., None].expand(-1, -1, frames.shape[2])) * mine

    def _revive(self, spare: Tensor) -> None:
        """Replace sum and count of dead codes: replacing only the entry would be undone by the same update."""
        fresh = self.ema_count.mean(1, keepdim=True)
        dead = self.ema_count < self.config.dead_threshold * fresh
        slot = dead.cumsum(1) - 1
        level, code = torch.nonzero(dead & (slot < spare.shape[1]), as_tuple=True)
        count = fresh[level, 0]
        self.ema_count[level, code] = count
        self.ema_sum[level, code] = spare[level, slot[level, code]] * count[:, None]


class SplitResidualVQ(nn.Module):
    """Two residual VQs side by side: the semantic one and the acoustic one both read z, and their outputs are added.

    A semantic codebook can then be trained toward meaning without what it drops being asked of it as a residual. Prosodic
    codebooks follow the semantic ones in the first of the two and code what they leave over.

    Source: Défossez et al. 2024 (Moshi), section 3.3.3, for one semantic codebook. Dropout leaves the first group in place;
    bypass is drawn for each of the two by itself.
    """

    def __init__(self, config: EMAQuantizerConfig, latent_dim: int, causal: bool = False):
        super().__init__()
        self.config, n_first = config, config.n_first
        counts = tuple(count - n_first for count in config.dropout_counts)
        start = config.semantic_layer_scale
        self.path = nn.Sequential(*[ConvNeXtBlock(latent_dim, 3, 7, start, causal) for _ in range(config.semantic_blocks)])
        decay = config.semantic_decay or config.decay
        self.semantic = EMAResidualVQ(
            replace(config, n_codebooks=n_first, dropout=0.0, decay=decay), latent_dim, config.semantic_inputs == "own"
        )
        self.semantic.first_gradient = config.semantic_gradient
        self.acoustic = EMAResidualVQ(
            replace(config, n_codebooks=config.n_codebooks - n_first, dropout_counts=counts), latent_dim
        )

    @property
    def codebooks(self) -> Tensor:
        """[N, K, codebook_dim]."""
        return torch.cat([self.semantic.codebooks, self.acoustic.codebooks])

    @property
    def reach_frames(self) -> float:
        """Frames of z that one frame of codes can depend on, minus 1."""
        return reach_in_samples(self.path)

    def forward(self, z: Tensor, n_codebooks: int | None = None) -> QuantizerOutput:
        """Quantize z [B, D, T'] with the first `n_codebooks` (default: all, or as dropout draws in training)."""
        n, n_first = n_codebooks or self.config.n_codebooks, self.config.n_first
        semantic = self.semantic(self.toward_meaning(z), min(n, n_first))
        if n <= n_first:
            return semantic
        acoustic = self.acoustic(z, n - n_first)
        codes, active, distances = (torch.cat([getattr(part, name) for part in (semantic, acoustic)], 1)
                                    for name in ("codes", "active", "distances"))  # fmt: skip
        commit, residuals = commitment(distances, active), torch.cat([semantic.residuals, acoustic.residuals])
        z_q = semantic.z_q + acoustic.z_q
        return QuantizerOutput(z_q, codes, commit, commit.detach(), residuals, active, distances,
                               semantic.prefixes, semantic.entries)  # fmt: skip

    def toward_meaning(self, z: Tensor) -> Tensor:
        """What the first group quantizes: z [B, D, T'] through blocks of its own, where it has some."""
        if self.config.semantic_to_encoder != 1:
            z = z.detach().lerp(z, self.config.semantic_to_encoder)
        return self.path(z.transpose(1, 2)).transpose(1, 2) if len(self.path) else z

    def unrounded(self, z: Tensor, active: Tensor) -> Tensor:
        """As `EMAResidualVQ.unrounded`."""
        n = self.config.n_first
        return self.semantic.unrounded(self.toward_meaning(z), active[:, :n]) + self.acoustic.unrounded(z, active[:, n:])

    @property
    def ema_counts(self) -> Tensor:
        """[N, K]."""
        return torch.cat([self.semantic.ema_count, self.acoustic.ema_count])

    @property
    def learning(self) -> list[bool]:
        """As `EMAResidualVQ.learning`."""
        return self.semantic.learning + self.acoustic.learning

    def encode(self, z: Tensor, n_codebooks: int | None = None) -> Tensor:
        """As `EMAResidualVQ.encode`."""
        n, n_first = n_codebooks or self.config.n_codebooks, self.config.n_first
        semantic = self.semantic.encode(self.toward_meaning(z), min(n, n_first))
        return torch.cat([semantic, self.acoustic.encode(z, n - n_first)], 1) if n > n_first else semantic

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, n, T'] of the first n codebooks to z_q [B, D, T']."""
        semantic, acoustic = codes[:, : self.config.n_first], codes[:, self.config.n_first :]
        z_q = self.semantic.decode(semantic)
        return z_q + self.acoustic.decode(acoustic) if acoustic.shape[1] else z_q

    def init_codebooks(self, z: Tensor, frames_per_update: int, levels: Container[int] | None = None) -> None:
        """As `EMAResidualVQ.init_codebooks`."""
        n, n_first = self.config.n_codebooks, self.config.n_first
        chosen = [i for i in range(n) if levels is None or i in levels]
        self.semantic.init_codebooks(self.toward_meaning(z), frames_per_update, [i for i in chosen if i < n_first])
        self.acoustic.init_codebooks(z, frames_per_update, [i - n_first for i in chosen if i >= n_first])

    def freeze_codebooks(self, levels: set[int]) -> None:
        """As `EMAResidualVQ.freeze_codebooks`."""
        n = self.config.n_first
        self.semantic.freeze_codebooks({level for level in levels if level < n})
        self.acoustic.freeze_codebooks({level - n for level in levels if level >= n})

    def update_codebooks(self, out: QuantizerOutput, step: int) -> None:
        """As `EMAResidualVQ.update_codebooks`."""
        n = self.config.n_first
        for part, rows in ((self.semantic, slice(None, n)), (self.acoustic, slice(n, None))):
            chosen = {"codes": out.codes[:, rows], "residuals": out.residuals[rows], "active": out.active[:, rows]}
            part.update_codebooks(out._replace(**chosen), step)


class FactorizedCodebook(nn.Module):
    """One quantizer of `FactorizedResidualVQ`: project down, look up on the unit sphere, project up."""

    def __init__(self, latent_dim: int, codebook_size: int, codebook_dim: int):
        super().__init__()
        self.in_proj = weight_norm(nn.Conv1d(latent_dim, codebook_dim, 1))
        self.out_proj = weight_norm(nn.Conv1d(codebook_dim, latent_dim, 1))
        self.codebook = nn.Embedding(codebook_size, codebook_dim)

    def lookup(self, z_e: Tensor) -> Tensor:
        """z_e [B, d, T'] to codes [B, T'] by cosine similarity."""
        return nearest(F.normalize(z_e.transpose(1, 2), dim=-1), F.normalize(self.codebook.weight, dim=-1))

    def decode(self, codes: Tensor) -> Tensor:
        """codes [B, T'] to their part of the latent [B, D, T']."""
        return self.out_proj(self.codebook(codes).transpose(1, 2))


class FactorizedResidualVQ(nn.Module):
    """Residual VQ with low-dimensional, L2-normalised lookup and codebooks trained by gradient.

    Source: Kumar et al. 2023 (DAC), section 3.2, after Yu et al. 2021. The residual stays live as in DAC: the
    projections of each level keep part of it, so later commitment terms keep a gradient too.
    """

    reach_frames = 0.0

    def __init__(self, config: FactorizedQuantizerConfig, latent_dim: int):
        super().__init__()
        self.config = config
        self.levels = nn.ModuleList(
            FactorizedCodebook(latent_dim, config.codebook_size, config.codebook_dim)
            for _ in range(config.n_codebooks)
        )

    @property
    def codebooks(self) -> Tensor:
        """[N, K, codebook_dim]."""
        return torch.stack([level.codebook.weight for level in self.levels])

    @property
    def learning(self) -> list[bool]:
        """As `EMAResidualVQ.learning`."""
        return [level.codebook.weight.requires_grad for level in self.levels]

    def forward(self, z: Tensor, n_codebooks: int | None = None) -> QuantizerOutput:
        """Quantize z [B, D, T'] with the first `n_codebooks` (default: all, or as dropout draws in training)."""
        n = n_codebooks or self.config.n_codebooks
        active = draw_active(len(z), n, self.config.dropout if self.training else 0.0, z.device)
        residual, z_q, codes = z, torch.zeros_like(z), []
        commit, codebook = z.new_zeros(()), z.new_zeros(())
        for i, level in enumerate(self.levels[:n]):
            z_e = level.in_proj(residual)
            codes.append(level.lookup(z_e.detach()))
            q = level.codebook(codes[-1]).transpose(1, 2)
            mask = active[:, i, None, None]
            commit = commit + (mask * (z_e - q.detach()).square()).mean() / n
            codebook = codebook + (mask * (q - z_e.detach()).square()).mean() / n
            z_q_i = level.out_proj(z_e + (q - z_e).detach())
            z_q = z_q + mask * z_q_i
            residual = residual - z_q_i
        return QuantizerOutput(z_q, torch.stack(codes, 1), commit, codebook, None, active, None)

    def unrounded(self, z: Tensor, active: Tensor) -> Tensor:
        """As `EMAResidualVQ.unrounded`."""
        residual, output = z, 0
        for i, level in enumerate(self.levels):
            part = level.out_proj(level.in_proj(residual))
            residual, output = residual - part, output + active[:, i, None, None] * part
        return output

    def encode(self, z: Tensor, n_codebooks: int | None = None) -> Tensor:
        """As `EMAResidualVQ.encode`."""
        residual, codes = z, []
        for level in self.levels[:n_codebooks]:
            z_e = level.in_proj(residual)
            codes.append(level.lookup(z_e))
            q = level.codebook(codes[-1]).transpose(1, 2)
            residual = residual - level.out_proj(z_e + (q - z_e))  # q as `forward` rounds it
        return torch.stack(codes, 1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, n, T'] of the first n codebooks to z_q [B, D, T']."""
        return sum(self.levels[i].decode(codes[:, i]) for i in range(codes.shape[1]))


def build_quantizer(
    config: EMAQuantizerConfig | FactorizedQuantizerConfig, latent_dim: int, causal: bool = False
) -> EMAResidualVQ | SplitResidualVQ | FactorizedResidualVQ:
    """The quantizer that `quantizer.type` names, split where it has semantic codebooks; `causal`: semantic blocks are."""
    if config.type == "factorized":
        return FactorizedResidualVQ(config, latent_dim)
    return SplitResidualVQ(config, latent_dim, causal) if config.n_first else EMAResidualVQ(config, latent_dim)
