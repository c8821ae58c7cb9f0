"""Take the absolute position out of Whisper's features, so that they can stand in for WavLM's, which have none.

    python benchmarks/distillation/unposition.py data/study/speech data/study/features/whisper data/study/features/wavlm

Whisper adds a sinusoid of the position within its 30 s to its input, and its encoder's last layer still holds it: the mean
vector of a position explains two fifths of the variance. A codec that hears 2 s cannot know where in the 30 s they stood.
Here each position's mean over the training recordings is replaced by the mean over all positions. Prints the share explained.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from codec.data import read_manifest  # noqa: E402
from codec.features import TEACHER, feature_path, finish, write_frames  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("speech", type=Path)
    parser.add_argument("features", type=Path, help="as `codec features --speech whisper-base` wrote them")
    parser.add_argument("out_dir", type=Path)
    args = parser.parse_args()
    splits = {split: read_manifest(args.speech / "manifest.jsonl", split, 16000) for split in ("train", "val", "test")}
    features = {u.name: load_file(feature_path(args.features, u.name))["features"].float()
                for us in splits.values() for u in us}  # fmt: skip
    longest = max(map(len, features.values()))
    totals, counts = torch.zeros(longest, 512), torch.zeros(longest, 1)
    for u in splits["train"]:
        totals[: len(features[u.name])] += features[u.name]
        counts[: len(features[u.name])] += 1
    mean = totals.sum(0) / counts.sum()
    offsets = torch.where(counts >= 20, totals / counts.clamp(min=1) - mean, 0)  # by position
    frames = torch.cat([features[u.name] for u in splits["train"]])
    explained = (counts * offsets.square()).sum() / (frames - mean).square().sum()
    for us in splits.values():
        for u in us:
            x = features[u.name]
            write_frames(args.out_dir, u.name, x - offsets[: len(x)], u, 16000)
    info = json.loads((args.features / TEACHER).read_text()) | {"teacher": "whisper-base without positions"}
    constant = finish(args.out_dir, info, [u.name for us in splits.values() for u in us])
    after = torch.cat([F.normalize(x, dim=-1) for x in features.values()]).mean(0).norm()
    print(f"position explains {explained:.3f} of the variance; constant loss {1 - after:.3f} before, {constant:.3f} after")
    return 0


if __name__ == "__main__":
    sys.exit(main())
