import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from codec.runlog import EpochMeans, RunLog, read_metrics, spectrogram_image


def refuse_constant(name):
    raise AssertionError(f"{name} is not JSON")


def tensorboard(run_dir: Path) -> EventAccumulator:
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return events


def test_scalars_reach_both_logs(tmp_path):
    log = RunLog(tmp_path / "run")
    log.scalars(1, {"train/mel_step": 2.5, "train/loss_d_step": 2})
    log.scalars(2, {"train/mel_step": 1.25})
    log.close()
    first, second = read_metrics(tmp_path / "run")
    assert first["step"] == 1 and first["train/mel_step"] == 2.5 and first["train/loss_d_step"] == 2.0
    assert second["step"] == 2 and second["time"] >= first["time"]
    scalars = tensorboard(tmp_path / "run").Scalars("train/mel_step")
    assert [(event.step, event.value) for event in scalars] == [(1, 2.5), (2, 1.25)]


def test_every_line_is_strict_json_even_for_nan_and_inf(tmp_path):
    log = RunLog(tmp_path)
    log.scalars(3, {"a": math.nan, "b": -math.inf, "c": 1.0})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=refuse_constant)
    assert line["a"] is None and line["b"] is None and line["c"] == 1.0
    assert line["nonfinite"] == {"a": "nan", "b": "-inf"}
    with pytest.raises(AssertionError, match="NaN is not JSON"):  # the wrong version, json.dumps as it comes
        json.loads(json.dumps({"a": math.nan}), parse_constant=refuse_constant)


def test_a_resumed_log_equals_one_never_stopped(tmp_path, monkeypatch):
    def log_steps(resume_step, last):
        clock = time.time() + 10  # TensorBoard orders its files by the second they were opened in
        monkeypatch.setattr(time, "time", lambda: clock)
        log = RunLog(tmp_path, resume_step=resume_step)
        for step in range((resume_step or 0) + 1, last + 1):
            log.scalars(step, {"x": step * 0.5})
        log.close()
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('{"step": 9, "x": 4.')  # killed in the middle of a line

    log_steps(None, 6)
    log_steps(4, 5)
    log_steps(2, 8)
    expected = [(step, step * 0.5) for step in range(1, 9)]
    assert [(line["step"], line["x"]) for line in read_metrics(tmp_path)] == expected
    assert [(event.step, event.value) for event in tensorboard(tmp_path).Scalars("x")] == expected


def test_a_new_run_does_not_write_into_the_log_of_another(tmp_path):
    log = RunLog(tmp_path)
    log.scalars(1, {"x": 1.0})
    log.close()
    with pytest.raises(ValueError, match="holds another run's log; resume that run or choose another folder"):
        RunLog(tmp_path)
    assert len(read_metrics(tmp_path)) == 1


def test_a_torn_last_line_is_left_out_and_a_missing_log_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 0}\n{"step": 2, "ti')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    with pytest.raises(ValueError, match="no such file; is .* the folder of a run"):
        read_metrics(tmp_path / "absent")


def test_audio_and_spectrogram_reach_tensorboard(tmp_path):
    wav = 2 * torch.sin(torch.arange(8000) * 0.3)[None]
    wav[0, 5] = math.nan
    log = RunLog(tmp_path)
    log.audio(7, "val/0/input", wav, 16000)
    log.spectrogram(7, "val/0/spectrogram", wav, wav[:, :7000], 16000)
    log.close()
    events = tensorboard(tmp_path)
    audio, image = events.Audio("val/0/input")[0], events.Images("val/0/spectrogram")[0]
    assert audio.step == image.step == 7
    assert audio.sample_rate == 16000 and audio.encoded_audio_string[:4] == b"RIFF"
    assert image.height > 500 and image.width > 60


def test_a_tone_is_bright_at_its_frequency_above_and_below_and_silence_is_dark():
    seconds = torch.arange(16000) / 16000
    tone, low = torch.sin(2 * torch.pi * 6000 * seconds), 0.1 * torch.sin(2 * torch.pi * 1000 * seconds)
    image = spectrogram_image(tone, low[None], 16000)
    assert image.dtype == np.uint8 and image.shape[2] == 3
    n_bins = (image.shape[0] - 6) // 2
    brightness = image.astype(int).sum(-1)[:, image.shape[1] // 2]
    upper, lower = brightness[:n_bins][::-1], brightness[-n_bins:][::-1]  # from 0 Hz upward
    assert abs(upper.argmax() / (n_bins - 1) * 8000 - 6000) < 20
    assert abs(lower.argmax() / (n_bins - 1) * 8000 - 1000) < 20
    assert upper.max() > lower.max() > 0.4 * upper.max()  # -20 dB on the same scale
    silent = spectrogram_image(torch.zeros(1, 300), torch.zeros(1, 0), 16000)
    assert silent[:n_bins].max() <= 252


def test_epoch_means_leave_out_what_is_not_finite():
    means = EpochMeans()
    means.add({"mel": 1.0, "adv": math.nan})
    means.add({"mel": 2.0, "adv": math.inf, "late": 5.0})
    means.add({"mel": math.nan})
    restored = EpochMeans(**json.loads(json.dumps({"sums": means.sums, "counts": means.counts})))
    result = restored.pop()
    assert result["mel"] == 1.5 and result["late"] == 5.0 and math.isnan(result["adv"])
    assert restored.pop() == {}
