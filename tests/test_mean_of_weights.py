"""benchmarks/mean_of_weights.py: the decoder lies between two, all else is the run's own unless all is asked for."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, tiny_config

from codec.checkpoint import save_checkpoint
from codec.model import Codec

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from mean_of_weights import mean_of_weights  # noqa: E402


def save_run(folder: Path, seed: int, averaged: bool) -> Codec:
    torch.manual_seed(seed)
    tensors = Codec(tiny_config().model).state_dict()
    groups = {"model": tensors}
    if averaged:  # these are what is used
        groups["ema"] = tensors
        groups["model"] = {key: value + 1 if value.is_floating_point() else value for key, value in tensors.items()}
    save_checkpoint(folder, seed, groups, {"step": seed}, TINY, best=False, keep_last=1)
    for name in ("metrics.jsonl", "config.yaml"):
        (folder / name).write_text(name)
    return Codec.from_pretrained(folder)


@pytest.mark.parametrize("averaged", [False, True])
def test_the_decoder_lies_between_and_the_rest_is_the_runs(tmp_path, averaged):
    run, other = save_run(tmp_path / "run", 5, averaged), save_run(tmp_path / "other", 6, True)
    mean_of_weights(tmp_path / "run", tmp_path / "other", 0.25, tmp_path / "mean")
    mean = Codec.from_pretrained(tmp_path / "mean")
    wav = torch.randn(1, 1, 800)
    assert torch.equal(mean.encode(wav), run.encode(wav)) and mean.encode(wav).ne(other.encode(wav)).any()
    mean_of_weights(tmp_path / "run", tmp_path / "run", 0.25, tmp_path / "same")
    torch.testing.assert_close(Codec.from_pretrained(tmp_path / "same")(wav).wav_hat, run(wav).wav_hat)
    biases = [dict(codec.named_parameters())["decoder.to_wav.0.conv.bias"] for codec in (run, other, mean)]
    torch.testing.assert_close(biases[2], 0.75 * biases[0] + 0.25 * biases[1])
    assert not biases[0].equal(biases[1]) and (tmp_path / "mean/config.yaml").read_text() == "config.yaml"


def test_all_of_it_lies_between_when_asked(tmp_path):
    run, other = save_run(tmp_path / "run", 5, True), save_run(tmp_path / "other", 6, True)
    mean_of_weights(tmp_path / "run", tmp_path / "other", 0.25, tmp_path / "mean", of_all=True)
    mean = Codec.from_pretrained(tmp_path / "mean").state_dict()
    a, b = run.state_dict(), other.state_dict()
    assert {key.split(".")[0] for key in mean if not a[key].equal(b[key])} == {"encoder", "quantizer", "decoder"}
    for key in [key for key in mean if key.endswith("bias") or key.startswith("quantizer")]:  # of weights, lengths are apart
        torch.testing.assert_close(mean[key], 0.75 * a[key] + 0.25 * b[key])


def test_what_is_wrong_is_said_and_nothing_is_left(tmp_path):
    save_run(tmp_path / "run", 5, False)
    Codec(tiny_config(["model.decoder.decoder_dim=32"]).model).save_pretrained(tmp_path / "wide")
    cases = (("run", 1.5, "SHARE: got 1.5"), ("none", 0.5, "none: "), ("wide", 0.5, "has no decoder.*same networks"))
    for other, share, message in cases:
        with pytest.raises(ValueError, match=message):
            mean_of_weights(tmp_path / "run", tmp_path / other, share, tmp_path / "mean")
    with pytest.raises(ValueError, match="run: exists"):
        mean_of_weights(tmp_path / "run", tmp_path / "run", 0.5, tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "wide"]
