"""The training script as users run it: end to end, killed and resumed, on one process and on two."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY
from safetensors.torch import load_file

from codec.checkpoint import find_checkpoint
from codec.config import load_config
from codec.runlog import read_metrics
from train_codec_gan import main

SCRIPT = Path(__file__).parent.parent / "train_codec_gan.py"
ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def command(manifest: Path, run_dir: Path, n_processes: int, *extra: str) -> list[str]:
    config = run_dir.parent / f"{run_dir.name}.yaml"
    config.write_text(TINY.replace("MANIFEST", str(manifest)))
    launch = [sys.executable]
    if n_processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_processes}"]
    return [*launch, str(SCRIPT), "--config", str(config), "--run_dir", str(run_dir), "--set", "train.seed=0", *extra]


def run(*args) -> subprocess.CompletedProcess:
    return subprocess.run(command(*args), env=ENV, capture_output=True, text=True, timeout=300)


def start(*args) -> subprocess.Popen:
    return subprocess.Popen(command(*args), env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            start_new_session=True)  # fmt: skip


def kill_after_first_checkpoint(process: subprocess.Popen, run_dir: Path, number: int) -> None:
    """Send a signal to every process of the run, a random moment after its first checkpoint."""
    deadline = time.monotonic() + 240
    while not (run_dir / "checkpoints" / "latest").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.3))
    # by name: torchrun starts its workers in sessions of their own, which a group's signal would not reach
    subprocess.run(["pkill", f"-{number}", "-f", f"run_dir {run_dir} "], check=True)
    process.wait(timeout=60)


def tensors(run_dir: Path) -> dict:
    folder = find_checkpoint(run_dir)
    return {f"{path.stem}.{name}": value for path in sorted(folder.glob("*.safetensors"))
            for name, value in load_file(path).items()}  # fmt: skip


def changes(n_processes: int) -> tuple[str, ...]:
    return ("--set", "phases.1.steps=37", "train.checkpoint_every=5", "train.val_every=20", "model.quantizer.dropout=0.5",
            f"losses.balancer={'true' if n_processes == 2 else 'false'}")  # fmt: skip


@pytest.fixture(scope="module")
def whole_run(manifest, tmp_path_factory) -> tuple[Path, str]:
    """A run of one process that nothing stopped, and what it said."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    finished = run(manifest, run_dir, 1, *changes(1))
    assert finished.returncode == 0, finished.stderr
    return run_dir, finished.stderr


@pytest.mark.parametrize("n_processes", [1, 2], ids=["one process", "two processes"])
def test_a_killed_run_resumes_to_the_same_bits(manifest, tmp_path, n_processes, whole_run):
    whole = whole_run[0]
    if n_processes > 1:
        whole = tmp_path / "whole"
        finished = run(manifest, whole, n_processes, *changes(n_processes))
        assert finished.returncode == 0, finished.stderr
    process = start(manifest, tmp_path / "killed", n_processes, *changes(n_processes))
    kill_after_first_checkpoint(process, tmp_path / "killed", signal.SIGKILL)
    killed_at = json.loads((find_checkpoint(tmp_path / "killed") / "state.json").read_text())["step"]
    assert 0 < killed_at < 40
    resumed = run(manifest, tmp_path / "killed", n_processes, "--resume", *changes(n_processes))
    assert resumed.returncode == 0, resumed.stderr

    a, b = tensors(whole), tensors(tmp_path / "killed")
    assert a.keys() == b.keys() and len(a) > 100
    assert any(name.startswith("optimizers.d.") and name.endswith("exp_avg") for name in a)
    different = [name for name in a if not a[name].equal(b[name])]
    assert different == []
    # and the log is that of a run that was never stopped
    logs = [
        [{k: v for k, v in line.items() if k != "time" and "audio_s_per_s" not in k} for line in read_metrics(run_dir)]
        for run_dir in (whole, tmp_path / "killed")
    ]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_polite_signal_saves_and_leaves(manifest, tmp_path, number):
    run_dir = tmp_path / "run"
    process = start(manifest, run_dir, 1, "--set", "phases.1.steps=100000", "train.checkpoint_every=3")
    kill_after_first_checkpoint(process, run_dir, number)
    said = process.stderr.read()
    assert process.returncode == 0, said
    assert "saved; go on with --resume" in said
    state = json.loads((find_checkpoint(run_dir) / "state.json").read_text())
    assert state["step"] >= 3 and f"stopped at step {state['step']}" in said


def test_a_run_logs_the_names_users_look_for(whole_run):
    run_dir, said = whole_run
    names = {name for line in read_metrics(run_dir) for name in line}
    for name in ("loss_g", "loss_d", "adv_g", "feat", "mel", "vq", "acc_real", "acc_fake", "grad_norm_g", "grad_norm_d"):
        assert {f"train/{name}_step", f"train/{name}_epoch"} <= names, name
    for name in ("snr_db", "si_sdr_db", "amplitude_ratio", "mel", "dc_offset", "perplexity_0", "perplexity_2"):
        assert {f"val/{name}_step", f"val/{name}_epoch"} <= names, name
    assert {"train/lr_g_step", "train/lr_d_step", "train/audio_s_per_s_step"} <= names
    steps = [line["step"] for line in read_metrics(run_dir) if "train/loss_g_step" in line]
    assert steps == list(range(1, 41))  # generator updates, each counted once
    assert "val mel" in said and "kbps" in said
    assert sorted(p.name for p in (run_dir / "checkpoints").glob("step_*"))[-1] == "step_00000040"
    assert (run_dir / "config.yaml").is_file() and list((run_dir / "tensorboard").glob("events*"))


def test_a_second_run_must_not_write_into_the_first_ones_folder(manifest, whole_run):
    again = run(manifest, whole_run[0], 1)
    assert again.returncode == 2 and len(again.stderr.strip().splitlines()[-1]) > 10


def call_main(monkeypatch, capsys, *args) -> tuple[int, str]:
    """As run, in this process: the exit code and what was said."""
    monkeypatch.setattr(sys, "argv", command(*args)[1:])
    code = main()
    return code, capsys.readouterr().err


def test_resume_refuses_another_model(manifest, whole_run, monkeypatch, capsys):
    code, said = call_main(monkeypatch, capsys, manifest, whole_run[0], 1, "--resume", "--set", "model.latent_dim=20")
    assert code == 2 and "its model section differs" in said


def test_a_run_goes_on_with_another_beam_and_another_revival(manifest, whole_run, tmp_path, monkeypatch, capsys):
    shutil.copytree(whole_run[0], tmp_path / "run", symlinks=True)
    changes = ("--set", "model.quantizer.beam=4", "model.quantizer.dead_threshold=0.3", "phases.1.steps=42")
    code, said = call_main(monkeypatch, capsys, manifest, tmp_path / "run", 1, "--resume", *changes)
    assert code == 0 and "note: resumed with other values than before: " in said and "model" in said, said
    saved = load_config(find_checkpoint(tmp_path / "run") / "config.yaml").model.quantizer
    assert (saved.beam, saved.dead_threshold) == (4, 0.3)
    assert max(line["step"] for line in read_metrics(tmp_path / "run")) > 40


@pytest.mark.parametrize(
    "extra, said",
    [
        (["--set", "data.manifest=none.jsonl"], "train_codec_gan: none.jsonl: no such manifest"),
        (["--set", "data.segment_samples=2001"], "not a multiple of hop_length"),
        (["--set", "model.sample_rate=16000"], "prepare the data with --sample_rate 16000"),
    ],
    ids=["manifest", "segment", "rate"],
)
def test_bad_input_is_one_line_and_exit_code_2_and_leaves_no_run_behind(manifest, tmp_path, extra, said, monkeypatch, capsys):
    code, err = call_main(monkeypatch, capsys, manifest, tmp_path / "run", 1, *extra)
    assert code == 2 and said in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_run_that_stays_non_finite_stops_and_names_the_terms(manifest, tmp_path, monkeypatch, capsys):
    changes = ("--set", "optim.lr_g=1e30", "train.max_skipped_in_row=3", "phases.1.steps=50")
    code, said = call_main(monkeypatch, capsys, manifest, tmp_path / "run", 1, *changes)
    assert code == 2, said
    assert "update skipped, not finite" in said
    assert "3 updates in a row were not finite" in said.strip().splitlines()[-1]
