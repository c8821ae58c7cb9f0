"""The decoder of a run, or all of it, mixed with another's, as a run that `train.init_from` and `Codec.from_pretrained` take.

    python benchmarks/mean_of_weights.py RUN OTHER SHARE OUT     # SHARE of OTHER's decoder, 0 to 1
    python benchmarks/mean_of_weights.py RUN OTHER SHARE OUT --all    # and of its encoder and codebooks

OTHER is a checkpoint of the same run, or what the run started from (Wortsman et al. 2022, "Robust fine-tuning of zero-shot
models"); only weights that come from the same ones can be mixed. Everything else is RUN's: codes that were fitted to one
encoder mean nothing to another. With `--all` they are only a start, so have `train.refit_frames` fit them anew. What it is
for: docs/speedrun.md, "A tenth of where it came from" and "An encoder that was told". `train.keep_last` says how many
checkpoints a run keeps.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

from codec.checkpoint import find_checkpoint, inference_tensors
from codec.pretrained import resolve

WEIGHTS = ("model.safetensors", "ema.safetensors")


def mean_of_weights(run: Path, other: Path, share: float, out: Path, of_all: bool = False) -> None:
    """Raises ValueError for a share outside 0 to 1, weights that are missing or of another shape, or an `out` that exists."""
    if not 0 <= share <= 1:
        raise ValueError(f"SHARE: got {share:g}; expected 0 to 1")
    if out.exists():
        raise ValueError(f"{out}: exists; name another")
    folder, theirs = find_checkpoint(run), inference_tensors(resolve(other))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        new = Path(temporary) / "run"
        shutil.copytree(folder, new / "checkpoints" / folder.name)
        for name in ("metrics.jsonl", "config.yaml"):
            shutil.copy(run / name, new / name)
        (new / "checkpoints/latest").write_text(folder.name + "\n")
        for name in WEIGHTS:
            if not (folder / name).exists():  # a run without averages
                continue
            tensors = load_file(folder / name)
            for key in [key for key in tensors if of_all or key.startswith("decoder.")]:
                if key not in theirs or theirs[key].shape != tensors[key].shape:
                    raise ValueError(f"{other}: has no {key} of shape {list(tensors[key].shape)}; expected the same networks")
                if tensors[key].is_floating_point():
                    tensors[key] = tensors[key].lerp(theirs[key].to(tensors[key]), share)
            save_file(tensors, new / "checkpoints" / folder.name / name)
        new.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("share", type=float)
    parser.add_argument("out", type=Path)
    parser.add_argument("--all", action="store_true", help="encoder and codebooks too: to fit the codebooks anew after it")
    args = parser.parse_args()
    try:
        mean_of_weights(args.run, args.other, args.share, args.out, args.all)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
