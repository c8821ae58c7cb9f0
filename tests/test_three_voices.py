"""benchmarks/three_voices.py: which phrases it takes, and what it puts in place of a codec's error."""

import json
import sys
from pathlib import Path

import pytest
import soundfile as sf
import torch
from conftest import speech_like

from codec.model import Codec

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import three_voices  # noqa: E402
from three_voices import spectrum  # noqa: E402


@pytest.fixture(scope="module")
def heard():
    """The original and, by name, what each part of the package's own codec gives."""
    wav = torch.from_numpy(speech_like(36000, 24000))[None, None]
    with torch.no_grad():
        return wav, {name: part(wav) for name, part in three_voices.parts_of(Codec.from_pretrained().eval())}


def log_error(wav: torch.Tensor, output: torch.Tensor) -> float:
    truth, found = spectrum(wav).abs(), spectrum(output).abs()
    return ((truth + 1e-2).log() - (found + 1e-2).log()).abs().mean().item()


def test_each_part_takes_away_its_error_and_leaves_the_other(heard):
    wav, outputs = heard
    coded, magnitudes, phases = (outputs[name] for name in ("nothing", "magnitudes", "phases"))
    assert {output.shape for output in outputs.values()} == {wav.shape}
    assert log_error(wav, magnitudes) < 0.5 * log_error(wav, coded)

    def phase_error(output):  # 1 - cosine, weighted by the original's magnitudes
        truth = spectrum(wav)
        return (truth.abs() * (1 - (truth.angle() - spectrum(output).angle()).cos())).sum() / truth.abs().sum()

    assert phase_error(phases) < 0.3 * phase_error(coded)
    assert log_error(wav, phases) > 0.5 * log_error(wav, coded)


def test_finer_levels_leave_less(heard):
    wav, outputs = heard
    errors = [log_error(wav, output) for name, output in outputs.items() if name.startswith("levels in 40 bands")]
    assert len(errors) == 3 and log_error(wav, outputs["nothing"]) > errors[0] > errors[1] > errors[2]


def test_phrases_that_are_missing_are_named(tmp_path):
    sf.write(tmp_path / "a.wav", speech_like(30000, 24000), 24000, subtype="PCM_16")
    manifest = tmp_path / "manifest.jsonl"
    line = {"path": "a.wav", "speaker": "da", "split": "val", "sample_rate": 24000, "n_samples": 30000}
    manifest.write_text(json.dumps(line))
    with pytest.raises(ValueError, match=r"manifest.jsonl: 1 phrases of da; expected 50 or more"):
        three_voices.read_phrases(manifest, half=False)
