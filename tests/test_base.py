"""The model that comes with the package: there, small, the default, and something to fine-tune from."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import speech_like

from codec import cli, prior
from codec.bitstream import read_codes
from codec.config import load_config, trained_counts
from codec.metrics import speech_level_db
from codec.model import Codec
from codec.pretrained import BASE, resolve
from train_codec_gan import build, load_initial

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import base_speech  # noqa: E402


@pytest.fixture(scope="module")
def base() -> Codec:
    return Codec.from_pretrained()


@pytest.fixture
def speech(tmp_path) -> Path:
    path = tmp_path / "in.wav"
    sf.write(path, speech_like(3 * 24000 + 7, 24000, seed=5), 24000, subtype="PCM_16")
    return path


def test_it_is_in_the_package_within_15_mb():
    files = [path for path in BASE.rglob("*") if path.is_file()]
    assert {"config.json", "config.yaml", "model.safetensors", "README.md"} <= {path.name for path in files}
    assert sum(path.stat().st_size for path in files) <= 15e6
    setup = (ROOT / "setup.py").read_text()
    assert '"base/*"' in setup  # and so in the wheel
    assert "/tmp" not in (BASE / "config.yaml").read_text() + (BASE / "README.md").read_text()


def test_it_has_the_rates_it_was_trained_for(base):
    assert base.sample_rate == 24000 and base.bitrate_kbps == pytest.approx(7.0)  # before entropy coding
    assert trained_counts(base.config) == [4, 8, 14]
    known = prior.load(BASE, base)
    assert (known.n_codebooks, known.codebook_size) == (14, 1024)
    assert not any(p.requires_grad for p in base.parameters()) and not base.training
    assert all(p.dtype == torch.float32 for p in base.parameters())


def test_no_command_needs_to_name_it(base, speech, tmp_path, capsys):
    out, coded, decoded = (tmp_path / name for name in ("out.wav", "out.codec", "decoded.wav"))
    assert cli.main(["reconstruct", str(speech), str(out)]) == 0
    assert cli.main(["encode", str(speech), str(coded)]) == 0
    assert cli.main(["decode", str(coded), str(decoded)]) == 0
    assert cli.main(["info"]) == 0
    assert base.model_id in capsys.readouterr().out
    wav, wav_hat = sf.read(speech)[0], sf.read(out)[0]
    assert wav_hat.shape == wav.shape
    np.testing.assert_array_equal(wav_hat, sf.read(decoded)[0])


def test_an_installation_does_not_need_torchaudio():
    """Its newest build refuses the newest torch, and pip installs the two together all the same."""
    block = "import sys; sys.modules['torchaudio'] = None"
    commands = "codec.cli, train_codec_gan, prepare_speaker_data, evaluate_codec"
    script = f"{block}; import {commands}; codec.cli.Codec.from_pretrained()"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_more_bits_come_nearer_to_voiced_sound(base, speech):
    wav = torch.from_numpy(sf.read(speech, dtype="float32")[0])[None, None]
    error = [(base(wav, n).wav_hat - wav).square().mean() / wav.square().mean() for n in (4, 8, 14)]
    assert error[0] > error[1] > error[2] and error[2] < 0.7


@pytest.mark.parametrize("gain_db", [-20, 12])
def test_recordings_of_any_level_are_coded_as_if_they_were_of_the_level_of_its_training(base, speech, tmp_path, gain_db):
    loud = sf.read(speech, dtype="float32")[0]
    other = loud * np.float32(10 ** (gain_db / 20))
    sf.write(tmp_path / "loud.wav", loud, 24000, subtype="FLOAT")
    sf.write(tmp_path / "other.wav", other, 24000, subtype="FLOAT")
    for name in ("loud", "other"):
        assert cli.main(["encode", str(tmp_path / f"{name}.wav"), str(tmp_path / f"{name}.codec")]) == 0
    known = prior.load(BASE, base)
    (codes, header), (codes_other, header_other) = (read_codes(tmp_path / f"{name}.codec", known) for name in ("loud", "other"))
    assert (codes == codes_other).float().mean() > 0.99  # the gain is rounded
    assert 20 * np.log10(header.gain / header_other.gain) == pytest.approx(gain_db, abs=0.05)
    raw = base.encode(torch.from_numpy(other)[None, None])[0]
    assert (codes == raw).float().mean() < 0.5  # what the wrong version, without a gain, gives
    assert cli.main(["decode", str(tmp_path / "other.codec"), str(tmp_path / "decoded.wav")]) == 0
    wav_hat = sf.read(tmp_path / "decoded.wav", dtype="float32")[0]
    assert np.sqrt(np.mean(wav_hat**2) / np.mean(other**2)) == pytest.approx(1.0, abs=0.2)


def test_a_gain_is_of_each_recording_and_1_where_the_model_has_no_level(base):
    wavs = torch.randn(3, 1, 24000).clamp(-3, 3) * torch.tensor([1.0, 1e-3, 0.0])[:, None, None]
    torch.testing.assert_close(speech_level_db((base.gain(wavs) * wavs)[:1], 24000), torch.tensor([-16.0]), atol=0.01, rtol=0)
    assert base.gain(wavs)[1:].flatten().tolist() == [100.0, 100.0]  # 40 dB at most
    assert Codec(replace(base.config, level_db=None)).gain(wavs).flatten().tolist() == [1.0, 1.0, 1.0]
    wavs[1, 0, 500] = 0.5  # a click: what follows tanh could not come back from above 1
    assert base.gain(wavs)[1].item() == pytest.approx(10 ** (-1 / 20) / 0.5, abs=1e-4)
    with pytest.raises(ValueError, match=r"codec input has shape \[24000\], expected \[B, 1, T\]"):
        base.gain(wavs[0, 0])


@pytest.mark.parametrize("name", ["base", "base_cpu", "base_cpu_heard", "base_cpu_finish", "telugu_finetune"])
def test_the_configs_fit_it(base, name):
    there, here = load_config(ROOT / f"configs/{name}.yaml").model, base.config
    counts = {"n_codebooks": there.quantizer.n_codebooks, "dropout_counts": there.quantizer.dropout_counts}
    assert there == replace(here, quantizer=replace(here.quantizer, **counts))  # some were trained before its last codebooks
    assert there == here or name != "telugu_finetune"


def test_fine_tuning_starts_from_it(base):
    config = load_config(ROOT / "configs/telugu_finetune.yaml")
    t = build(config, torch.device("cpu"))
    came, _ = load_initial(resolve(config.train.init_from), t, config)
    assert came == (BASE / "discriminators.safetensors").is_file()
    for name, value in base.state_dict().items():
        assert value.equal(t.codec.state_dict()[name]), name


def test_a_folder_called_base_goes_before_its_name_but_not_before_the_default(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        Codec.from_pretrained("base")
    assert Codec.from_pretrained().model_id == base.model_id  # who names nothing means the package's
    assert cli.main(["info"]) == 0


def test_speech_of_the_languages_tested_on_is_never_laid_out(tmp_path):
    folder = tmp_path / "in/voices"
    wanted = (("fr/a", 24000), ("de/deep/de", 22050))
    unwanted = [(f"{name}/a", 24000) for name in ("es", "Default_es", "el_GR_x", "Robot")]
    for name, rate in (*wanted, *unwanted, ("fr/c", 8000)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        sf.write(folder / f"{name}.ogg", np.zeros(rate), rate)
    source = base_speech.Source("xx", "package", "voices", "file", "sha256")
    rows = base_speech.lay_out(tmp_path / "in", source, tmp_path / "out")
    assert rows == [("xx_de/deep-de.ogg", "xx_de", "train"), ("xx_fr/a.ogg", "xx_fr", "train")]
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.ogg")) == ["a.ogg", "deep-de.ogg"]


def test_the_script_that_trains_it_goes_from_stage_to_stage_and_ends_with_its_config(base, tmp_path):
    script = tmp_path / "benchmarks/train_base.sh"
    script.parent.mkdir()
    script.write_text((ROOT / "benchmarks/train_base.sh").read_text())
    for there in ("data/wide/speech/clear.jsonl", "data/teachers/whisper-base", "bin/python", "bin/codec"):
        (tmp_path / there).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / there).write_text(f"#!{sys.executable}\nimport json, sys; print(json.dumps(sys.argv[1:]))")
        (tmp_path / there).chmod(0o755)
    path = f"{tmp_path}/bin:/usr/bin:/bin"
    ran = subprocess.run(["bash", script], env={"PATH": path}, capture_output=True, check=True, text=True)
    runs = []
    for program, *arguments in map(json.loads, ran.stdout.splitlines()):
        if program == "train_codec_gan.py":
            of = {name: arguments[arguments.index(name) + 1] for name in ("--config", "--run_dir")}
            config = load_config(ROOT / of["--config"], arguments[arguments.index("--set") + 1 :])
            assert config.train.init_from in ("", *runs)
            runs.append(of["--run_dir"])
        elif program == "benchmarks/mean_of_weights.py":
            assert set(arguments[:2]) <= set(runs)
            runs.append(arguments[3])
    shipped = load_config(BASE / "config.yaml")
    assert (config.model, config.loss_weights, config.optim) == (shipped.model, shipped.loss_weights, shipped.optim)
    assert (config.phases, config.discriminators) == (shipped.phases, shipped.discriminators)
