"""A mean of a run's weights at two updates, as a run that `train.init_from` and `Codec.from_pretrained` take.

    python benchmarks/mean_of_weights.py RUN EARLIER LATER SHARE OUT     # SHARE of the earlier one's, 0 to 1

Everything else, discriminators too, is the later one's. For a run that leaves its codebooks as they are: entries of two
different codebooks have no meaning between them. What it is for: docs/speedrun.md, "What counts as silent".
`train.keep_last` says how many checkpoints a run keeps.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

WEIGHTS = ("model.safetensors", "ema.safetensors")


def mean_of_weights(run: Path, earlier: int, later: int, share: float, out: Path) -> None:
    """Raises ValueError for a share outside 0 to 1, a checkpoint that is missing, or an `out` that exists."""
    folders = [run / f"checkpoints/step_{step:08d}" for step in (earlier, later)]
    if not 0 <= share <= 1:
        raise ValueError(f"SHARE: got {share:g}; expected 0 to 1")
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such checkpoint; train with a larger train.keep_last")
    if out.exists():
        raise ValueError(f"{out}: exists; name another")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        new = Path(temporary) / "run"
        shutil.copytree(folders[1], new / "checkpoints" / folders[1].name)
        for name in ("metrics.jsonl", "config.yaml"):
            shutil.copy(run / name, new / name)
        (new / "checkpoints/latest").write_text(folders[1].name + "\n")
        for name in WEIGHTS:
            if not (folders[1] / name).exists():  # a run without averages
                continue
            a, b = (load_file(folder / name) for folder in folders)
            mean = {key: share * a[key] + (1 - share) * b[key] if b[key].is_floating_point() else b[key] for key in b}
            save_file(mean, new / "checkpoints" / folders[1].name / name)
        new.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("earlier", type=int)
    parser.add_argument("later", type=int)
    parser.add_argument("share", type=float)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    try:
        mean_of_weights(args.run, args.earlier, args.later, args.share, args.out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
