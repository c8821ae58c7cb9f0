"""From measures of single files to what one may say: means with intervals, paired differences, verdicts.

Intervals are bootstrap percentiles over files, 95 %, from a fixed seed, widened as Student's t is for few files. Files of
one speaker are not independent, so they are too narrow where a test set has few speakers.
"""

from __future__ import annotations

import math

import numpy as np

N_RESAMPLES = 1000
LEVEL = 95.0
# what a verdict speaks of; waveform measures are left out: a codec can sound well at an SNR of 0
QUALITY = ("pesq_wb", "visqol", "stoi", "estoi", "distillmos", "dnsmos", "speaker_similarity", "wer_uncoded", "phoneme_error",
           "log_f0_rmse", "mel_db")  # fmt: skip
MIN_FILES = 6  # fewer tell nothing apart
SAME_RATE = 1.1  # a codec that spends up to a tenth more than another is at the same rate


class Figures:
    """One system's measures of all files: per metric a number a file, NaN where there is none.

    A metric in `pooled` is a ratio of two counts over all files (errors per word): its mean over files would let a
    file of one word count as much as one of twenty.
    """

    def __init__(self, values: dict[str, list[float | None]], pooled: dict[str, tuple[str, str]]):
        self.values = {key: np.array([math.nan if x is None else x for x in column], float) for key, column in values.items()}
        self.pooled = pooled

    def pairs(self, metric: str) -> np.ndarray:
        """[n_files, 2]: what to add up, and what to divide by; NaN where the file has no value."""
        column = self.values[metric]
        nowhere = np.isnan(column)
        if metric in self.pooled and self.pooled[metric][0] in self.values:
            over, under = (np.where(nowhere, np.nan, self.values[key]) for key in self.pooled[metric])
            return np.stack([over, under], 1)
        return np.stack([column, np.where(nowhere, np.nan, 1.0)], 1)


def resamples(n: int) -> np.ndarray:
    """[N_RESAMPLES, n] indices, the same for the same n: differences of two systems are paired."""
    return np.random.default_rng(0).integers(n, size=(N_RESAMPLES, n))


def interval(pairs: np.ndarray, other: np.ndarray | None = None) -> dict | None:
    """Mean over files and its interval; of two systems, mean of the first less that of the second, over the files both have.

    Args:
        pairs: [n_files, 2] as `Figures.pairs`; other: the same of a second system.
    Returns:
        "mean", "low", "high", "n"; low and high are None for a single file; None where no file has a value.
    """
    sides = [pairs] if other is None else [pairs, other]
    both = np.concatenate(sides, 1)
    both = both[np.isfinite(both).all(1)]
    if not len(both) or not both[:, 1].sum():
        return None
    sums = both[resamples(len(both))].sum(1) if len(both) > 1 else np.zeros((0, both.shape[1]))
    mean, draws = float(_ratios(both.sum(0)[None])[0]), _ratios(sums)
    draws = draws[np.isfinite(draws)]
    if not len(draws):
        return {"mean": mean, "low": None, "high": None, "n": len(both)}
    low, high = np.percentile(draws, [50 - LEVEL / 2, 50 + LEVEL / 2])
    low, high = (float(mean + _widening(len(both)) * (end - mean)) for end in (low, high))
    return {"mean": mean, "low": low, "high": high, "n": len(both)}


def _widening(n: int) -> float:
    """How much wider an interval of n files is than the bootstrap says: Student's t and n - 1 for the normal's and n.

    Source: Hesterberg 2015, "What teachers should know about the bootstrap", section 4.1; t by Cornish and Fisher's series.
    """
    z, dof = 1.959964, n - 1
    series = [z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384]
    return sum(term / dof**power for power, term in enumerate(series)) / z * math.sqrt(n / dof)


def _ratios(sums: np.ndarray) -> np.ndarray:
    """[R, 2 or 4] sums to [R] ratios, or differences of ratios."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = sums[:, 0::2] / sums[:, 1::2]
    return ratios[:, 0] if ratios.shape[1] == 1 else ratios[:, 0] - ratios[:, 1]


def group_means(figures: Figures, metric: str, groups: list[str | None]) -> dict[str, float]:
    """Mean of each group of files that has a value."""
    pairs, means = figures.pairs(metric), {}
    for name in sorted({group for group in groups if group}):
        over, under = np.nansum(pairs[[group == name for group in groups]], 0)
        if under:
            means[name] = float(over / under)
    return means


def pooled_snr_db(figures: Figures) -> float | None:
    """Power of all files over power of all errors, in dB: what a rate-distortion bound speaks of."""
    signal, error = (np.nansum(figures.values.get(key, np.zeros(0))) for key in ("signal_energy", "error_energy"))
    return float(10 * np.log10(signal / error)) if signal > 0 and error > 0 else None


# ------------------------------------------------------------------------------------ codebooks


def codebook_rows(counts: np.ndarray) -> list[dict[str, float]]:
    """How a test set uses each codebook.

    Args:
        counts: [N, K] how often each entry was chosen.
    Returns:
        by codebook: "used" share of entries, "perplexity", "entropy_bits" of one code, "efficiency": those bits over log2 K,
        which is what an entropy coder with fixed tables could save.
    """
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    logs = np.log2(shares, out=np.zeros_like(shares), where=shares > 0)
    entropy = np.maximum(-(shares * logs).sum(1), 0)
    return [{"used": float((row > 0).mean()), "perplexity": float(2**bits), "entropy_bits": float(bits),
             "efficiency": float(bits / math.log2(counts.shape[1]))} for row, bits in zip(counts, entropy)]  # fmt: skip


# ------------------------------------------------------------------------------------- verdicts


def differences(ours: Figures, theirs: Figures, metrics: list[str]) -> dict[str, dict]:
    """Paired difference, ours less theirs, of every metric that both have."""
    found = {metric: interval(ours.pairs(metric), theirs.pairs(metric)) for metric in metrics
             if metric in ours.values and metric in theirs.values}  # fmt: skip
    return {metric: difference for metric, difference in found.items() if difference}


def judge(difference: dict, better: str) -> str:
    """"better", "worse" or "even": whether the interval leaves out 0, and on which side."""
    low, high = difference["low"], difference["high"]
    if low is None or low <= 0 <= high or difference["n"] < MIN_FILES or better not in ("higher", "lower"):
        return "even"
    return "better" if (low > 0) == (better == "higher") else "worse"


def verdicts(systems: list[dict], figures: dict[str, Figures], metrics: dict[str, dict]) -> list[dict]:
    """Each bitrate of the checkpoint against every other family at the same rate, or the nearest there is.

    Args:
        systems: as in results.json, with "name", "family", "kind" and "kbps" on disk.
        figures: by name of system.
        metrics: as in results.json.
    """
    result = []
    rivals = list(dict.fromkeys(s["family"] for s in systems if s["kind"] not in ("ours", "uncoded")))
    for ours in reversed([s for s in systems if s["kind"] == "ours"]):
        for rival in rivals:
            theirs = min((s for s in systems if s["family"] == rival), key=lambda s: abs(math.log(s["kbps"] / ours["kbps"])))
            keys = [key for key in QUALITY if key in metrics]
            found = differences(figures[ours["name"]], figures[theirs["name"]], keys)
            sides = {side: [key for key in found if judge(found[key], metrics[key]["better"]) == side]
                     for side in ("better", "worse", "even")}  # fmt: skip
            sentence = verdict_sentence(ours, theirs, sides, metrics)
            result.append({"against": rival, "ours": ours["name"], "theirs": theirs["name"], "sentence": sentence, **sides,
                           "differences": found})  # fmt: skip
    return result


def verdict_sentence(ours: dict, theirs: dict, sides: dict[str, list[str]], metrics: dict[str, dict]) -> str:
    """The verdict in words, rates first; four metrics are named, more are counted."""
    words = {"better": "better in", "worse": "worse in", "even": "not told apart in"}
    n = sum(map(len, sides.values()))
    parts = []
    for side, keys in sides.items():
        named = ", ".join(metrics[key]["title"] for key in keys) if len(keys) <= 4 else f"{len(keys)} of {n} measures"
        parts += [f"{words[side]} {named}"] if keys else []
    return (f"{rates_in_words(ours, theirs)} {ours['name']} ({ours['kbps']:.1f} kbps on disk) is "
            f"{'; '.join(parts) or 'not comparable: nothing was measured on both'}.")  # fmt: skip


def rates_in_words(ours: dict, theirs: dict) -> str:
    """How the two rates compare, as the beginning of a sentence."""
    rival, ratio = f"{theirs['name']} ({theirs['kbps']:.1f} kbps)", theirs["kbps"] / ours["kbps"]
    if 1 / SAME_RATE <= ratio <= SAME_RATE:
        return f"At the same rate as {rival},"
    if ratio <= 0.5:
        return f"With {1 / ratio:.1f} times the bits of {rival},"
    if ratio >= 2:
        return f"Against {rival}, which spends {ratio:.1f} times the bits,"
    return f"Against {rival}, which spends {100 * abs(ratio - 1):.0f} % {'more' if ratio > 1 else 'fewer'} bits,"


def headline(found: list[dict]) -> list[str]:
    """Sentences that say first whether the codec is better than its first rival, a bitrate each."""
    return [verdict["sentence"] for verdict in found if verdict["against"] == found[0]["against"]]
