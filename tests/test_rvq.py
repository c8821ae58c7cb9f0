import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import DacConfig
from transformers.models.dac.modeling_dac import DacResidualVectorQuantizer

from codec.config import EMAQuantizerConfig, FactorizedQuantizerConfig
from codec.rvq import (
    BEAM_FRAMES,
    EMAResidualVQ,
    FactorizedResidualVQ,
    SplitResidualVQ,
    beam_search,
    build_quantizer,
    draw_active,
    fit_entries,
    kmeans,
    nearest,
    smallest,
)

N, K, D = 5, 32, 8


def ema_quantizer(**changes) -> EMAResidualVQ:
    torch.manual_seed(0)
    values = {"n_codebooks": N, "codebook_size": K, "codebook_dim": D} | changes
    return EMAResidualVQ(EMAQuantizerConfig("ema", **values), latent_dim=D)


def latents(seed: int = 1, batch: int = 3, n_frames: int = 20) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(batch, D, n_frames)


# ------------------------------------------------------------- straight-through and commitment


def live_residual(x, codebooks):
    """Known wrong: one live residual for everything. Commitment gradients vanish after the first step."""
    residual, z_q, commits = x, 0, []
    for codebook in codebooks:
        q = F.embedding(nearest(residual.detach(), codebook), codebook)
        commits.append((residual - q).square().mean())
        ste = residual + (q - residual).detach()
        z_q, residual = z_q + ste, residual - ste
    return z_q, commits


def detached_residual_summed(x, codebooks):
    """Known wrong: every step's straight-through estimator reads the live input. The gradient is N times too large."""
    residual, z_q, commits = x, 0, []
    for codebook in codebooks:
        q = F.embedding(nearest(residual.detach(), codebook), codebook)
        commits.append((residual - q).square().mean())
        z_q, residual = z_q + residual + (q - residual).detach(), residual - q.detach()
    return z_q, commits


def ours(x, codebooks):
    quantizer = ema_quantizer()
    quantizer.codebooks.copy_(codebooks)
    outs = [quantizer(x.transpose(1, 2), n_codebooks=n) for n in range(1, N + 1)]
    totals = [out.commit * n for n, out in enumerate(outs, 1)]
    commits = [total - before for total, before in zip(totals, [0.0, *totals])]
    return outs[-1].z_q.transpose(1, 2), commits


def output_gradient(function) -> torch.Tensor:
    x = latents().transpose(1, 2).requires_grad_()
    z_q, _ = function(x, ema_quantizer().codebooks)
    return torch.autograd.grad(z_q.sum(), x)[0]


def commitment_gradients(function) -> list[float]:
    x = latents().transpose(1, 2).requires_grad_()
    _, commits = function(x, ema_quantizer().codebooks)
    return [torch.autograd.grad(commit, x, retain_graph=True)[0].abs().max().item() for commit in commits]


@pytest.mark.parametrize("n", range(1, N + 1))
def test_every_prefix_passes_unit_gradient(n):
    z = latents().requires_grad_()
    z_q = ema_quantizer()(z, n_codebooks=n).z_q
    weight = torch.randn_like(z_q)
    gradient = torch.autograd.grad((z_q * weight).sum(), z)[0]
    assert torch.equal(gradient, weight)


def test_unit_gradient_fails_on_the_summed_estimator():
    assert torch.equal(output_gradient(ours), torch.ones(3, 20, D))
    assert torch.equal(output_gradient(live_residual), torch.ones(3, 20, D))
    torch.testing.assert_close(output_gradient(detached_residual_summed), torch.full((3, 20, D), float(N)))


def test_every_codebook_has_a_commitment_gradient_and_the_live_residual_has_it_only_once():
    assert min(commitment_gradients(ours)) > 1e-3
    wrong = commitment_gradients(live_residual)
    assert wrong[0] > 1e-3 and max(wrong[1:]) == 0.0


def test_output_is_the_sum_of_the_chosen_entries_and_decode_gives_it_back():
    quantizer, z = ema_quantizer(), latents()
    out = quantizer(z)
    torch.testing.assert_close(quantizer.decode(out.codes), out.z_q)
    by_hand = sum(quantizer.codebooks[i][out.codes[:, i]] for i in range(N)).transpose(1, 2)
    torch.testing.assert_close(out.z_q, by_hand)
    torch.testing.assert_close(quantizer.decode(out.codes[:, :2]), quantizer(z, n_codebooks=2).z_q)


def test_nearest_is_the_brute_force_answer():
    x, codebook = torch.randn(50, D), torch.randn(K, D)
    brute = np.square(x.numpy()[:, None] - codebook.numpy()[None]).sum(-1).argmin(1)
    assert np.array_equal(nearest(x, codebook).numpy(), brute)


# ----------------------------------------------------------------------------- EMA statistics


def test_one_ema_update_equals_a_hand_computation():
    quantizer, z = ema_quantizer(n_codebooks=1, dead_threshold=0.0), latents()
    out = quantizer(z)
    x, codes = z.transpose(1, 2).reshape(-1, D).numpy().astype(np.float64), out.codes.flatten().numpy()
    count = 0.99 * np.ones(K) + 0.01 * np.bincount(codes, minlength=K)
    total = 0.99 * quantizer.ema_sum[0].numpy().astype(np.float64)
    for frame, code in zip(x, codes):
        total[code] += 0.01 * frame
    smoothed = (count + 1e-5) / (count.sum() + K * 1e-5) * count.sum()
    quantizer.update_codebooks(out, 0)
    np.testing.assert_allclose(quantizer.ema_count[0], count, rtol=1e-5)
    np.testing.assert_allclose(quantizer.codebooks[0], total / smoothed[:, None], rtol=1e-4, atol=1e-5)


def test_forward_changes_no_statistics_so_a_second_pass_is_not_seen_twice():
    quantizer, z = ema_quantizer().train(), latents()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    out = quantizer(z)
    quantizer(z)
    assert all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())
    quantizer.update_codebooks(out, 0)
    assert not torch.equal(before["codebooks"], quantizer.codebooks)


def test_codebooks_are_no_parameters_so_no_optimizer_and_no_weight_decay_moves_them():
    quantizer = ema_quantizer()
    assert list(quantizer.parameters()) == []

    wrong = torch.nn.Parameter(quantizer.codebooks.clone())  # known wrong: the optimizer has them too
    wrong.grad = torch.zeros_like(wrong)
    torch.optim.AdamW([wrong], lr=0.1, weight_decay=0.1).step()
    assert wrong.norm() < 0.995 * quantizer.codebooks.norm()  # decayed with no gradient at all


def test_codebooks_converge_to_the_data():
    quantizer, z = ema_quantizer(), latents()
    quantizer.init_codebooks(latents(2), frames_per_update=60)
    first = quantizer(z).commit
    for step in range(200):
        quantizer.update_codebooks(quantizer(z), step)
    assert quantizer(z).commit < 0.5 * first


def test_a_revived_code_survives_its_update_and_replacing_only_the_entry_does_not():
    def with_a_dead_code():
        quantizer = ema_quantizer(n_codebooks=1, codebook_size=8)
        quantizer.init_codebooks(latents(), frames_per_update=60)
        quantizer.codebooks[0, 3] = 1000.0
        quantizer.ema_count[0, 3], quantizer.ema_sum[0, 3] = 1e-4, 0.1
        return quantizer

    quantizer, z = with_a_dead_code(), latents()
    quantizer.update_codebooks(quantizer(z), 0)
    frames = z.transpose(1, 2).reshape(-1, D)
    assert torch.cdist(quantizer.codebooks[0, 3:4], frames).min() < 1e-2  # it is one of the frames now
    assert (quantizer(z).codes == 3).any()
    for step in range(1, 20):
        quantizer.update_codebooks(quantizer(z), step)
    assert torch.cdist(quantizer.codebooks[0, 3:4], frames).min() < 3.0  # and later updates leave it among them

    wrong = with_a_dead_code()
    wrong.config = EMAQuantizerConfig("ema", 1, 8, D, dead_threshold=0.0)  # no revival of sum and count ...
    wrong.codebooks[0, 3] = frames[7]  # ... the entry alone
    wrong.update_codebooks(wrong(latents(5)), 0)
    assert torch.cdist(wrong.codebooks[0, 3:4], frames[7:8]).item() > 1.0


def test_kmeans_start_keeps_sums_and_storing_means_shrinks_the_codebook():
    quantizer = ema_quantizer(n_codebooks=1, codebook_size=4, dead_threshold=0.0)
    z = latents()
    quantizer.init_codebooks(z, frames_per_update=60)
    norm = quantizer.codebooks.norm()
    quantizer.update_codebooks(quantizer(z), 0)
    torch.testing.assert_close(quantizer.codebooks.norm(), norm, rtol=0.02, atol=0)

    quantizer.init_codebooks(z, frames_per_update=60)
    quantizer.ema_sum.copy_(quantizer.codebooks)  # known wrong: means where sums belong
    quantizer.update_codebooks(quantizer(z), 0)
    assert quantizer.codebooks.norm() < 0.5 * norm


def test_kmeans_finds_separate_clusters_and_counts_them():
    torch.manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    x = (centres.repeat_interleave(50, 0) + 0.1 * torch.randn(150, 2))[torch.randperm(150)]
    for seed in range(20):
        means, counts = kmeans(x, 3, torch.Generator().manual_seed(seed))
        if counts.min() == 50:
            break
    assert sorted(counts.tolist()) == [50.0, 50.0, 50.0]
    assert torch.cdist(centres, means).min(1).values.max() < 0.1
    means, counts = kmeans(x[:2], 5, torch.Generator().manual_seed(0))
    assert means.shape == (5, 2) and counts.sum() == 2


def test_all_codes_are_used_after_training_from_a_bad_start():
    quantizer, z = ema_quantizer(n_codebooks=1, codebook_size=16), latents()
    quantizer.codebooks.copy_(50 + torch.randn(1, 16, D))
    quantizer.ema_sum.copy_(quantizer.codebooks)
    for step in range(400):
        quantizer.update_codebooks(quantizer(z), step)
    assert len(quantizer(z).codes.unique()) >= 12


# ------------------------------------------------------------------------------- dropout


def test_quantizer_dropout_uses_prefixes_for_the_given_share_of_items():
    torch.manual_seed(0)
    active = draw_active(4000, 8, 0.5, torch.device("cpu"))
    assert torch.equal(active, active.cummin(1).values) and active[:, 0].min() == 1
    count = active.sum(1)
    # half of the items draw 1..8, so 8 comes up in 1/2 + 1/16 of them
    assert abs((count == 8).float().mean().item() - 0.5625) < 0.03
    assert draw_active(50, 8, 0.0, torch.device("cpu")).min() == 1
    assert draw_active(4000, 8, 1.0, torch.device("cpu")).sum(1).mean().item() == pytest.approx(4.5, abs=0.15)


def test_quantizer_dropout_draws_from_the_given_counts():
    used = draw_active(500, 32, 1.0, torch.device("cpu"), (2, 4, 8, 16, 32)).sum(1).long()
    counts = torch.bincount(used, minlength=33)
    assert counts.nonzero().flatten().tolist() == [2, 4, 8, 16, 32] and counts[counts > 0].min() > 60


def split_quantizer(**changes) -> SplitResidualVQ:
    torch.manual_seed(0)
    values = {"n_codebooks": N, "codebook_size": K, "codebook_dim": 4, "n_semantic": 2} | changes
    return build_quantizer(EMAQuantizerConfig("ema", **values), latent_dim=D)


def test_both_parts_of_a_split_quantizer_read_the_latent_itself():
    quantizer, z = split_quantizer(), latents()
    out = quantizer(z)
    assert torch.equal(out.codes, torch.cat([quantizer.semantic(z).codes, quantizer.acoustic(z).codes], 1))
    torch.testing.assert_close(out.z_q, quantizer.semantic(z).z_q + quantizer.acoustic(z).z_q)
    torch.testing.assert_close(quantizer.decode(out.codes), out.z_q)
    for n in range(1, N + 1):
        assert torch.equal(quantizer(z, n).codes, out.codes[:, :n])
        torch.testing.assert_close(quantizer.decode(out.codes[:, :n]), quantizer(z, n).z_q)
    # known wrong: the acoustic part codes what the semantic part left over
    assert not torch.equal(quantizer.acoustic(z - quantizer.semantic(z).z_q).codes, out.codes[:, 2:])
    commits = [(r - quantizer.codebooks[i][out.codes[:, i]]).square().mean() for i, r in enumerate(out.residuals)]
    torch.testing.assert_close(out.commit, torch.stack(commits).mean())


def test_a_split_quantizer_starts_and_updates_each_codebook_on_its_own_frames():
    quantizer, z = split_quantizer(), torch.randn(8, D, 100)
    quantizer.init_codebooks(z, 800)
    before = quantizer(z).commit
    for step in range(30):
        out = quantizer(z)
        alone = split_quantizer()
        alone.load_state_dict(quantizer.state_dict())
        quantizer.update_codebooks(out, step)
        for part in (alone.semantic, alone.acoustic):
            part.update_codebooks(part(z), step)
        assert torch.equal(alone.codebooks, quantizer.codebooks)
    assert quantizer(z).commit <= before


@pytest.mark.parametrize("n_semantic", [0, 2])
def test_commitment_is_a_mean_over_the_codebooks_an_item_uses(n_semantic):
    quantizer = split_quantizer(n_semantic=n_semantic, dropout=1.0).train()
    out = quantizer(torch.randn(40, D, 3))
    parts = [quantizer.semantic, quantizer.acoustic] if n_semantic else [quantizer]
    entries = torch.cat([part.codebooks for part in parts])
    squared = torch.stack([(out.residuals[i] - entries[i][out.codes[:, i]]).square().mean((1, 2)) for i in range(N)], 1)
    items = [squared[b, : int(out.active[b].sum())].mean() for b in range(40)]
    torch.testing.assert_close(out.commit, torch.stack(items).mean())
    assert not torch.isclose(out.commit, (squared * out.active).mean(), rtol=0.05)  # known wrong here: divided by all N


def test_dropout_of_a_split_quantizer_keeps_the_semantic_codebooks():
    active = split_quantizer(dropout=1.0).train()(torch.randn(200, D, 2)).active
    assert active[:, :3].min() == 1 and 0.2 < active[:, 4].mean() < 0.5  # 1, 2 or 3 acoustic ones


def test_bypass_passes_the_projected_latent_for_its_share_of_items_and_the_codebooks_learn_from_all():
    quantizer = split_quantizer(bypass=0.5).train()
    z = torch.randn(300, D, 3)
    out = quantizer(z)
    for part, other in ((quantizer.semantic, quantizer.acoustic), (quantizer.acoustic, quantizer.semantic)):
        plain = part.project_out(part.project_in(z.mT)).mT
        rest = [other.project_out(other.project_in(z.mT)).mT, other.eval()(z).z_q]
        bypassed = torch.stack([(out.z_q - plain - r).abs().amax((1, 2)) < 1e-5 for r in rest]).any(0)
        assert 0.35 < bypassed.float().mean() < 0.65
        other.train()
    assert out.residuals.shape[1] == 300 and out.active.min() == 1
    torch.testing.assert_close(quantizer.eval()(z).z_q, quantizer.decode(quantizer(z).codes))  # never at inference


@pytest.mark.parametrize("kind", ["ema", "factorized"])
def test_a_dropped_codebook_adds_nothing_and_learns_nothing(kind, monkeypatch):
    if kind == "ema":
        quantizer = ema_quantizer(dropout=1.0).train()
    else:
        quantizer = FactorizedResidualVQ(FactorizedQuantizerConfig("factorized", N, K, 4, dropout=1.0), D).train()
    active = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]).float()
    monkeypatch.setattr("codec.rvq.draw_active", lambda *_: active)
    z = latents()
    out = quantizer(z)
    for item in range(3):
        n = int(active[item].sum())
        torch.testing.assert_close(out.z_q[item], quantizer.decode(out.codes[item : item + 1, :n])[0])
    if kind == "ema":
        before = quantizer.ema_count.clone()
        quantizer.update_codebooks(out, 0)
        gained = (quantizer.ema_count - 0.99 * before).sum(1) / 0.01
        expected = active.sum(0) * z.shape[-1]
        alive = (before >= 0.1 * before.mean(1, keepdim=True)).all()
        assert alive
        torch.testing.assert_close(gained[0], expected[0], rtol=1e-3, atol=1e-2)


# ----------------------------------------------------------------------------- factorised form


def test_factorised_quantizer_equals_transformers_dac():
    torch.manual_seed(0)
    reference = DacResidualVectorQuantizer(
        DacConfig(n_codebooks=N, codebook_size=K, codebook_dim=4, hidden_size=24, quantizer_dropout=0.0)
    ).eval()
    quantizer = FactorizedResidualVQ(FactorizedQuantizerConfig("factorized", N, K, 4), 24).eval()
    with torch.no_grad():
        for mine, theirs in zip(quantizer.levels, reference.quantizers):
            for name in ("in_proj", "out_proj"):
                getattr(mine, name).weight = getattr(theirs, name).weight.detach()
                getattr(mine, name).bias.copy_(getattr(theirs, name).bias)
            mine.codebook.weight.copy_(theirs.codebook.weight)
        z = torch.randn(2, 24, 30)
        out = quantizer(z)
        expected = reference(z)
    assert torch.equal(out.codes, expected[1])
    torch.testing.assert_close(out.z_q, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(quantizer.decode(out.codes), expected[0], rtol=1e-5, atol=1e-5)
    # theirs sums the levels, ours is their mean
    torch.testing.assert_close(out.commit * N, expected[3].mean())
    torch.testing.assert_close(out.codebook * N, expected[4].mean())


def test_every_factorised_codebook_has_commitment_and_codebook_gradients():
    torch.manual_seed(0)
    quantizer = FactorizedResidualVQ(FactorizedQuantizerConfig("factorized", N, K, 4), 24)
    z = torch.randn(2, 24, 30)
    out = quantizer(z)
    (out.commit + out.codebook + out.z_q.square().mean()).backward()
    for level in quantizer.levels:
        assert level.codebook.weight.grad.abs().max() > 0
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in level.in_proj.parameters())
    # the codebook loss moves entries only, commitment moves the encoder only
    z.requires_grad_()
    out = quantizer(z)
    assert torch.autograd.grad(out.codebook, z, retain_graph=True, allow_unused=True)[0] is None
    assert math.isclose(out.commit.item(), out.codebook.item(), rel_tol=1e-5)


@pytest.mark.parametrize("n", range(1, N + 1))
def test_factorised_prefix_with_full_projections_passes_unit_gradient(n):
    quantizer = FactorizedResidualVQ(FactorizedQuantizerConfig("factorized", N, K, D), D)
    with torch.no_grad():
        for level in quantizer.levels:
            for projection in (level.in_proj, level.out_proj):
                projection.weight = torch.eye(D)[..., None]
                projection.bias.zero_()
    z = latents().requires_grad_()
    gradient = torch.autograd.grad(quantizer(z, n_codebooks=n).z_q.sum(), z)[0]
    torch.testing.assert_close(gradient, torch.ones_like(z), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------- beam search


def errors(x, codebooks, codes) -> np.ndarray:
    """Squared distance [M] of x [M, D] from what codes [N, M] add up to, in NumPy."""
    total = sum(codebook[code] for codebook, code in zip(codebooks.numpy().astype(float), codes.numpy(), strict=True))
    return np.square(x.numpy() - total).sum(1)


def test_a_beam_wide_enough_finds_the_best_of_all_sums_and_a_greedy_one_does_not():
    torch.manual_seed(0)
    x, codebooks = torch.randn(40, 3), torch.randn(3, 5, 3)
    every = torch.cartesian_prod(*[torch.arange(5)] * 3).T  # [N, 125]
    best = np.stack([errors(x, codebooks, codes[:, None].expand(-1, len(x))) for codes in every.T]).min(0)
    assert np.allclose(errors(x, codebooks, beam_search(x, codebooks, 25)[-1]), best, atol=1e-5)
    greedy = errors(x, codebooks, beam_search(x, codebooks, 1)[-1])
    assert greedy.mean() > 1.2 * best.mean()  # the known wrong version: a beam that forgets all but the nearest


def test_a_beam_through_entries_near_to_the_mean_of_its_sums_loses_little_to_one_through_all(monkeypatch):
    quantizer = EMAResidualVQ(EMAQuantizerConfig("ema", 8, 256, 32), 32)
    quantizer.init_codebooks(torch.randn(1, 32, 3000, generator=torch.Generator().manual_seed(0)), 3000)
    x = torch.randn(300, 32, generator=torch.Generator().manual_seed(1))

    def error(n_near: int, width: int) -> float:
        monkeypatch.setattr("codec.rvq.NEAR", n_near)
        return errors(x, quantizer.codebooks, beam_search(x, quantizer.codebooks, width)[-1]).mean()

    through_all = error(256, 8)
    assert through_all < error(64, 8) < 1.035 * through_all  # near to the best sum alone: 1.042
    assert error(1, 8) > 1.15 * through_all and error(256, 1) > 1.25 * through_all  # one entry for all sums; one sum


@pytest.mark.parametrize("n", [1, 7])
def test_the_smallest_are_found_by_blocks(n):
    x = torch.randn(50, 640, generator=torch.Generator().manual_seed(0))
    assert torch.equal(smallest(x, n, block=32), x.topk(n, largest=False).indices)
    assert torch.equal(smallest(x[:, :630], n, block=32), x[:, :630].topk(n, largest=False).indices)


def test_entries_are_fitted_to_the_least_squares_of_all_sums():
    torch.manual_seed(0)
    x, codebooks, codes = torch.randn(4000, 3).double(), torch.randn(3, 5, 3).double(), torch.randint(5, (3, 4000))
    chosen = np.concatenate([np.eye(5)[own.numpy()] for own in codes], 1)  # [M, 15]
    solution = np.linalg.lstsq(chosen, x.numpy(), rcond=None)[0]
    best, before = np.square(x.numpy() - chosen @ solution).mean(), errors(x, codebooks, codes).mean() / 3
    fit_entries(x, codebooks, [codes], 20)
    assert errors(x, codebooks, codes).mean() / 3 == pytest.approx(best, rel=1e-4) and best < 0.5 * before


def test_refitting_lowers_the_error_of_the_whole_and_of_the_prefixes_that_dropout_draws():
    z = latents(batch=8, n_frames=100)

    def left(quantizer: EMAResidualVQ, n: int) -> float:
        return (z - quantizer.decode(quantizer.encode(z, n))).square().mean().item()

    after = {}
    for counts in ((2, N), (N,)):
        quantizer = ema_quantizer(beam=4, dropout=0.5, dropout_counts=counts).eval()
        quantizer.init_codebooks(z[:, :, :50], 400)
        before = {n: left(quantizer, n) for n in (2, N)}
        quantizer.refit_codebooks(z)
        after[counts] = {n: left(quantizer, n) for n in (2, N)}
        assert after[counts][N] < 0.8 * before[N]
    assert after[2, N][2] < 0.97 * before[2]
    assert after[N,][2] > 1.02 * after[2, N][2]


def test_frozen_codebooks_are_searched_by_the_beam_in_training_too_each_item_for_its_own_codebooks():
    quantizer, z = ema_quantizer(beam=8, dropout=1.0, dropout_counts=(1, 2, N)), latents(batch=24)
    quantizer.freeze_codebooks(set(range(N)))
    out = quantizer(z)
    for item, n in enumerate(out.active.sum(1).int().tolist()):
        alone = z[item : item + 1]
        assert torch.equal(out.codes[item, :n], quantizer.encode(alone, n)[0])
        torch.testing.assert_close(out.z_q[item : item + 1], quantizer.decode(quantizer.encode(alone, n)))
        for i in range(n, N):  # what nobody hears is still the nearest entry to what is left over, for the log
            assert torch.equal(out.codes[item, i], nearest(out.residuals[i, item], quantizer.codebooks[i]))
    searched = quantizer.encode(z)
    quantizer.config = replace(quantizer.config, beam=1)
    greedy = quantizer.encode(z)
    quantizer.config = replace(quantizer.config, beam=8, dropout=0.0)
    for frozen in (set(), {0}):  # one that learns is enough: EMA is fed by what the greedy search assigns
        quantizer.freeze_codebooks(frozen)
        assert quantizer(z).codes.equal(greedy) and not searched.equal(greedy)


def test_a_beam_finds_for_each_number_of_codebooks_what_a_search_through_so_many_alone_finds():
    torch.manual_seed(0)
    x, codebooks = torch.randn(BEAM_FRAMES + 7, D), torch.randn(N, K, D)
    for n, codes in enumerate(beam_search(x, codebooks, 8), 1):
        assert codes.shape == (n, len(x)) and codes.equal(beam_search(x, codebooks[:n], 8)[-1])


def test_acoustic_codebooks_that_an_item_does_not_use_at_all_may_be_searched():
    config = EMAQuantizerConfig("ema", N, K, D, n_semantic=1, dropout=1.0, dropout_counts=(1, N), beam=4)
    torch.manual_seed(0)
    quantizer = SplitResidualVQ(config, D)
    quantizer.freeze_codebooks(set(range(N)))
    out = quantizer(latents(batch=16))
    assert {*out.active.sum(1).int().tolist()} == {1, N}
    assert torch.equal(out.z_q[out.active[:, -1] == 0], quantizer.decode(out.codes[:, :1])[out.active[:, -1] == 0])


def test_a_beam_of_one_is_the_nearest_entry_at_each_step():
    quantizer, z = ema_quantizer(), latents()
    x = z.transpose(1, 2).flatten(0, 1)
    codes = beam_search(x, quantizer.codebooks, 1)[-1].view(N, 3, 20).transpose(0, 1)
    assert torch.equal(codes, quantizer.encode(z)) and torch.equal(codes, quantizer(z).codes)


@pytest.mark.parametrize("n_codebooks", [None, 1, 2])
def test_inference_searches_by_the_beam_and_training_does_not(n_codebooks):
    torch.manual_seed(1)
    greedy, beamed, z = ema_quantizer(), ema_quantizer(beam=8), torch.randn(2, D, BEAM_FRAMES)  # two parts
    wide = beamed.eval()(z, n_codebooks)
    assert torch.equal(wide.codes, beamed.encode(z, n_codebooks))
    assert torch.allclose(wide.z_q, beamed.decode(wide.codes), atol=1e-5)
    narrow = greedy.eval()(z, n_codebooks)
    error, before = ((z - out.z_q).square().mean() for out in (wide, narrow))
    assert error < 0.97 * before if n_codebooks != 1 else error == before
    assert torch.equal(beamed.train()(z, n_codebooks).codes, narrow.codes)


def test_codebooks_with_inputs_of_their_own_are_searched_one_by_one():
    def codes(beam: int) -> torch.Tensor:
        torch.manual_seed(0)
        return EMAResidualVQ(EMAQuantizerConfig("ema", 3, K, D, beam=beam), D, own_inputs=True).eval().encode(latents())

    assert torch.equal(codes(beam=8), codes(beam=1))
