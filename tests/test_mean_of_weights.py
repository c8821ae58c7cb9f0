"""benchmarks/mean_of_weights.py: between two checkpoints of a run, entry by entry."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from mean_of_weights import mean_of_weights  # noqa: E402


@pytest.fixture
def run(tmp_path):
    for step, value in ((5, 1.0), (20, 3.0)):
        folder = tmp_path / f"run/checkpoints/step_{step:08d}"
        folder.mkdir(parents=True)
        for name in ("model", "ema", "discriminators"):
            save_file({"w": torch.full((2,), value), "n": torch.tensor(step)}, folder / f"{name}.safetensors")
    for name in ("metrics.jsonl", "config.yaml"):
        (tmp_path / "run" / name).write_text(name)
    return tmp_path / "run"


def test_weights_lie_between_and_the_rest_is_the_later_ones(run):
    mean_of_weights(run, 5, 20, 0.25, run.parent / "mean")
    folder = run.parent / "mean/checkpoints/step_00000020"
    assert (run.parent / "mean/checkpoints/latest").read_text().strip() == folder.name
    for name in ("model", "ema"):
        tensors = load_file(folder / f"{name}.safetensors")
        assert tensors["w"].tolist() == [2.5, 2.5] and tensors["n"] == 20
    assert load_file(folder / "discriminators.safetensors")["w"].tolist() == [3.0, 3.0]
    assert load_file(run / "checkpoints/step_00000020/model.safetensors")["w"].tolist() == [3.0, 3.0]


@pytest.mark.parametrize("steps, share, message", [((5, 20), 1.5, "SHARE: got 1.5"), ((5, 21), 0.5, "step_00000021: no such")])
def test_what_is_wrong_is_said_and_nothing_is_left(run, steps, share, message):
    with pytest.raises(ValueError, match=message):
        mean_of_weights(run, *steps, share, run.parent / "mean")
    assert not (run.parent / "mean").exists()


def test_nothing_is_overwritten(run):
    with pytest.raises(ValueError, match="run: exists"):
        mean_of_weights(run, 5, 20, 0.5, run)
